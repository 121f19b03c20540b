"""Views on the CPU by compiled kernels: the pixels of `reference.py`, many times faster.

    kernels.py            what happens to one view
    operation_kernels.py  further operations on finished views
    here                  records for the kernels, and threads that share a batch

Shapes: B images, N views, C channels, S x S pixels.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from simclr.views.kernels import VIEW, render_views
from simclr.views.operation_kernels import operate
from simclr.views.params import ViewParams
from simclr.views.policy import AugmentationPreset, Policy
from simclr.views.reference import blur_kernels
from simclr.views.resize import Images

_CHUNKS_PER_THREAD = 4  # views differ in cost (blur, size of the crop): small shares end together


def render(images: Images, params: Sequence[ViewParams], policy: Policy, *, threads: int | None = None) -> list[Tensor]:
    """Make one view of each image for each element of `params`.

    Args:
        images: B uint8 images of `policy.channels` channels and any sizes (`resize.check_images`).
        params: of B rows each.
        threads: how many share the work; by default `torch.get_num_threads()`, and one when called beside the main
            thread, where other batches are made at the same time. It changes no pixel.

    Returns:
        (B, C, S, S) float32 in [0, 1] each, channels-last and side by side in one piece of memory.
    """
    images = _in_rows(images)
    views = np.zeros((len(params), len(images)), VIEW)
    for rows, of_view in zip(views, params, strict=True):
        _place(rows, images, of_view.box)
        rows["resized"] = policy.size
        for name in ("order", "brightness", "contrast", "saturation", "hue", "flip", "jitter", "gray", "blur"):
            rows[name] = getattr(of_view, name)
    kernels = np.concatenate([blur_kernels(of_view.sigma, policy.size) for of_view in params])
    add = policy.brightness_mode == "add"
    out = _make(views.reshape(-1), kernels, policy.size, policy.channels, policy.preset, add, threads)
    made = [out[k * len(images) : (k + 1) * len(images)] for k in range(len(params))]
    for batch, of_view in zip(made, params, strict=True):
        if of_view.operations is not None:
            operate(batch.permute(0, 2, 3, 1).numpy(), of_view.operations, policy)
    return made


def crop_resize(
    images: Images,
    boxes: np.ndarray,
    size: int,
    preset: AugmentationPreset,
    *,
    resized: np.ndarray | None = None,
    flip: np.ndarray | None = None,
    threads: int | None = None,
) -> Tensor:
    """What `resize.crop_resize` returns, clipped to [0, 1] and channels-last."""
    images = _in_rows(images)
    views = np.zeros(len(images), VIEW)
    _place(views, images, boxes)
    resized = np.full((len(images), 2), size) if resized is None else resized
    views["resized"], views["begin"] = resized, np.rint((resized - size) / 2)
    views["flip"] = False if flip is None else flip
    channels = images[0].shape[2] if len(images) else 3
    return _make(views, np.ones((len(views), 1), np.float32), size, channels, preset, False, threads)


def _in_rows(images: Images) -> Images:
    """The images with their rows' pixels and channels side by side in memory; copies only where they are not."""
    if isinstance(images, np.ndarray):
        return np.ascontiguousarray(images)
    return [image if image.strides[1:] == (image.shape[2], 1) else np.ascontiguousarray(image) for image in images]


def _place(views: np.ndarray, images: Images, boxes: np.ndarray) -> None:
    """Say where in memory each image and in it the crop lies; `images` must outlive the kernel's work."""
    if isinstance(images, np.ndarray):
        views["address"] = images.__array_interface__["data"][0] + np.arange(len(images)) * images.strides[0]
        views["row_bytes"] = images.strides[1]
    else:
        views["address"] = [image.__array_interface__["data"][0] for image in images]
        views["row_bytes"] = [image.strides[0] for image in images]
    views["corner"], views["length"] = boxes[:, :2], boxes[:, 2:]


def _make(
    views: np.ndarray,
    kernels: np.ndarray,
    size: int,
    channels: int,
    preset: AugmentationPreset,
    add: bool,
    threads: int | None,
) -> Tensor:
    """(N, C, S, S), channels-last."""
    out = np.empty((len(views), size * size * channels), np.float32)
    if threads is None:
        threads = torch.get_num_threads() if threading.current_thread() is threading.main_thread() else 1
    google = preset == "google"

    def share(first: int, last: int) -> None:
        render_views(views[first:last], kernels[first:last], size, channels, google, add, out[first:last])

    if threads == 1 or len(views) < 2:
        share(0, len(views))
    else:
        ends = np.linspace(0, len(views), min(threads * _CHUNKS_PER_THREAD, len(views)) + 1).astype(int)
        # threads of our own, which sleep when idle: Numba's would fight with torch's for the cores
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, ends[:-1], ends[1:]))
    return torch.from_numpy(out).view(-1, size, size, channels).permute(0, 3, 1, 2)
