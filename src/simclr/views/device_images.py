"""uint8 images on a device, side by side in one piece of its memory: a batch for a step, or a data set for good."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from simclr.data import images as data
from simclr.views.resize import Images, image_sizes

_SHARE_BYTES = 2**24  # of a data set that are decoded and sent at once


@dataclass(frozen=True, eq=False)
class DeviceImages:
    """n images of one number of channels and any sizes. `store[rows]` are some of them; no pixel is copied."""

    pixels: Tensor
    """(bytes,) uint8 on the device: rows of an image follow each other, channels last."""
    offsets: np.ndarray
    """(n,) int64: where in `pixels` each image begins."""
    sizes: np.ndarray
    """(n, 2) int64 heights and widths."""
    channels: int

    @classmethod
    def upload(cls, images: Images, channels: int, device: torch.device | str) -> "DeviceImages":
        """A batch, by one copy that the host does not wait for.

        Args:
            images: uint8 images that `resize.check_images` has passed.
        """
        sizes = image_sizes(images)
        pixels = _packed(images, torch.device(device)).to(device, non_blocking=True)
        return cls(pixels, _offsets(sizes, channels)[:-1], sizes, channels)

    @classmethod
    def of(cls, images: data.Images, device: torch.device | str) -> "DeviceImages":
        """A whole data set, decoded once, by as many threads as there are cores (8 at most)."""
        device = torch.device(device)
        ends = _offsets(images.sizes, images.channels)  # (n + 1,)
        pixels = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)

        def send(first: int, last: int) -> None:
            rows = np.arange(first, last)
            read, is_own = images.read(rows, copy=False), images.items_read(rows) == rows
            if not is_own.all():  # damaged: the image in its place may have another size
                read = [
                    image if own else np.zeros((*images.sizes[i], images.channels), np.uint8)
                    for i, image, own in zip(rows, read, is_own, strict=True)
                ]
            packed = _packed(read, device)
            pixels[ends[first] : ends[last]].copy_(packed, non_blocking=True)

        marks = np.searchsorted(ends, np.arange(0, ends[-1], _SHARE_BYTES))
        marks = np.unique(np.append(marks, len(images)))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(send, marks[:-1], marks[1:]))
        rows = images.items_read(np.arange(len(images)))
        return cls(pixels, ends[:-1][rows], images.sizes[rows], images.channels)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, rows: slice | np.ndarray) -> "DeviceImages":
        return replace(self, offsets=self.offsets[rows], sizes=self.sizes[rows])


def decoded_bytes(images: data.Images) -> int:
    """What the pixels of a data set take."""
    return int(_offsets(images.sizes, images.channels)[-1])


def _offsets(sizes: np.ndarray, channels: int) -> np.ndarray:
    """(n + 1,) where each image begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(sizes.prod(axis=1) * channels)])


def _packed(images: Images, device: torch.device) -> Tensor:
    """(bytes,) uint8 on the host; for a GPU in pinned memory, from which it copies while the host goes on."""
    total = sum(image.size for image in images)
    flat = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    into = flat.numpy()
    if isinstance(images, np.ndarray):
        into.reshape(images.shape)[...] = images
        return flat
    begin = 0
    for image in images:
        into[begin : begin + image.size].reshape(image.shape)[...] = image
        begin += image.size
    return flat
