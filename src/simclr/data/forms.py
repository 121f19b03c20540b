"""Convert paths, PIL images, arrays and tensors to (H, W, C) uint8 arrays, or to `Images`.

One image or many, of mixed types. Values of another range or layout than documented are rejected, never guessed.
Floats are rounded to bytes, because everything else reads bytes.

Shapes: n images, H x W pixels, C = 1 (gray) or 3 (RGB) channels.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import numpy as np
from PIL import Image
from torch import Tensor

from simclr.data.fingerprint import digest_of_arrays
from simclr.data.images import (
    Channels,
    Images,
    MemoryStore,
    array_images,
    choose_channels,
    require_no_colour,
    with_channels,
)
from simclr.data.readers.decode import decode_image, in_order
from simclr.data.readers.files import FileList, Labelling, open_files
from simclr.data.readers.scan import FileEntry
from simclr.data.readers.store import Reading
from simclr.errors import UserError
from simclr.files import stamp_of

ImagesLike = Images | np.ndarray | Tensor | Image.Image | str | os.PathLike[str] | Iterable[Any]

ROUNDING = 1e-3
"""How far floats may leave [0, 1]: a quarter of the step between two bytes, as resizing and half precision do."""

_SINGLE = (str, os.PathLike, Image.Image)


class Pixels(Sequence[np.ndarray]):
    """n images of any form as (H, W, 1 or 3) uint8 arrays, made when they are asked for: files are read late.

    Args:
        images: One image or many, in a form that `simclr.weights.folder.Model.embed` names, but for `Images`.
        channels: What all are to have: gray becomes three equal channels, colour for gray is refused. None: as each is.

    Raises:
        UserError: What was given is no image, none at all, or names a file that is not there. What is wrong within an
            image is said when it is read.
    """

    def __init__(self, images: Any, *, channels: int | None = None) -> None:
        self._given = _separate(images)
        self._channels = channels
        for item in self._given:
            if isinstance(item, str | os.PathLike):
                _require_file(Path(item))

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, slice):
            workers = 0 if isinstance(self._given, np.ndarray) else os.cpu_count() or 1
            made = in_order(one_image, self._given[rows], workers)
            return [self._fit(pixels) for pixels in made]
        return self._fit(one_image(self._given[rows]))

    def _fit(self, pixels: np.ndarray) -> np.ndarray:
        if self._channels is None:
            return pixels
        require_no_colour(pixels.shape[2], self._channels, "what was given")
        return with_channels(pixels, self._channels)

    @property
    def files(self) -> list[Path] | None:
        """The paths, where all are paths."""
        if not all(isinstance(item, str | os.PathLike) for item in self._given):
            return None
        return [Path(item) for item in self._given]


def open_images(images: ImagesLike, *, channels: Channels = "auto") -> Images:
    """Any form of images as `Images` without labels, to train on.

    Files stay files, and are decoded again for each batch where they do not fit the memory (`files.py`); the others
    lie in memory.

    Args:
        channels: "auto": 1 where every image is gray, else 3; "1" or "3" converts.

    Raises:
        UserError: As `Pixels`, or an image cannot be used.
    """
    if isinstance(images, Images):
        return images if channels == "auto" else replace(images, channels=int(channels))
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3):
        return array_images(
            images, None, name="the array", split="all", has_own_split=False, classes=None, channels=channels
        )
    pixels = Pixels(images)
    if pixels.files is not None:
        return _open_paths(pixels.files, channels)
    arrays = pixels[:]  # n of (H, W, C)
    num_channels, notes = choose_channels(channels, np.array([array.shape[2] == 1 for array in arrays]))
    return Images(
        name="the images",
        split="all",
        has_own_split=False,
        channels=num_channels,
        keys=[str(i) for i in range(len(arrays))],
        sizes=np.array([array.shape[:2] for array in arrays], dtype=np.int64),
        labels=None,
        classes=None,
        contents=digest_of_arrays(arrays),
        store=MemoryStore(arrays),
        rows=np.arange(len(arrays)),
        notes=notes,
    )


def one_image(image: Any) -> np.ndarray:
    """One path, PIL image, array (H, W) or (H, W, C) or tensor (H, W) or (C, H, W) as (H, W, 1 or 3) uint8.

    Raises:
        UserError: It is none of these, cannot be read, or holds other numbers than `to_bytes` takes.
    """
    if isinstance(image, str | os.PathLike):
        return decode_image(Path(image))
    if isinstance(image, Image.Image):
        return decode_image(image)
    layout = "(H, W) or (H, W, C)"
    if isinstance(image, Tensor):
        layout = "(H, W) or (C, H, W)"
        given = tuple(image.shape)
        image = _numpy(image)
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    else:
        image = _array(image)
        given = image.shape
    image = image[..., None] if image.ndim == 2 else image  # (H, W, C)
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise UserError(f"An image has shape {given}; give {layout}, in that order and with 1 or 3 channels C.")
    return to_bytes(image)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any shape as uint8, from booleans, integers in 0..255 or floats in [0, 1].

    Raises:
        UserError: There are no pixels, they are no numbers, or lie elsewhere; 16-bit integers always do.
    """
    if pixels.size == 0:
        raise UserError(f"There are no pixels in an array of shape {pixels.shape}; give at least one image.")
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "iuf" or (pixels.dtype.kind in "iu" and pixels.dtype.itemsize == 2):
        scale = " (16 bits: divide by 65535.0)" if pixels.dtype.kind in "iu" else ""
        raise UserError(f"Pixels have type {pixels.dtype}{scale}; give uint8, or floats in [0, 1].")
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise UserError(f"Integer pixels lie in [{low:.0f}, {high:.0f}]; give 0 to 255, or floats in [0, 1].")
        return pixels.astype(np.uint8)
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # false for NaN too
        raise UserError(
            f"Pixels lie in [{low:.6g}, {high:.6g}]; give uint8, or floats in [0, 1] that are not "
            "normalised (the encoder does that itself)."
        )
    return np.rint(pixels.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)


def _separate(images: Any) -> Any:
    """The images one by one, in whatever form they have."""
    if isinstance(images, _SINGLE):
        return [images]
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"A tensor of images has shape {tuple(images.shape)}; give (n, C, H, W), with 1 or 3 channels C."
            )
        return to_bytes(_numpy(images).transpose(0, 2, 3, 1))  # (n, H, W, C)
    if getattr(images, "ndim", None) == 1 and hasattr(images, "tolist"):
        images = images.tolist()  # a column of paths, of NumPy or pandas
    if isinstance(images, np.ndarray):
        return _separate_array(images)
    if isinstance(images, bytes | bytearray | dict) or not isinstance(images, Iterable):
        _refuse(images)
    images = list(images)
    if not images:
        raise UserError(f"There are no images to look at, a sequence of shape {(0,)}; give at least one.")
    return images


def _separate_array(images: np.ndarray) -> np.ndarray:
    given = images.shape
    if images.ndim == 3:
        images = images[None] if images.shape[2] in (1, 3) else images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"An array of images has shape {given}; give (n, H, W), (n, H, W, C) or one image (H, W, C), with 1 or 3 "
            "channels C last (an array x with channels first: x.transpose(0, 2, 3, 1))."
        )
    return to_bytes(images)


def _array(image: Any) -> np.ndarray:
    if isinstance(image, bytes | bytearray | dict) or not (
        hasattr(image, "__array__") or isinstance(image, list | tuple)
    ):
        _refuse(image)
    try:
        return np.asarray(image)
    except ValueError:  # lists of unequal lengths
        _refuse(image)


def _refuse(given: Any) -> Never:
    raise UserError(
        f"An image was given as {type(given).__name__}; give paths, PIL images, arrays or tensors, one or a sequence."
    )


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; open its images with simclr.data.open_data({str(path)!r}) and give those."
        )
    if not path.exists():
        raise UserError(f"There is no file {path}; check the path.")


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _open_paths(paths: Sequence[Path], channels: Channels) -> Images:
    files = [FileEntry(str(path), path.parent, path.name, stamp_of(path.stat())) for path in paths]
    opened = open_files(
        FileList(
            root=Path(os.path.commonpath([path.absolute().parent for path in paths])), files=files, every=files,
            label=lambda _: Labelling(), name="the list of files", split="all", has_own_split=False,
        ),
        Reading(channels=channels, workers=os.cpu_count() or 1),
    )  # fmt: skip
    skipped = opened.skipped or opened.check()
    if skipped:  # rows of the result are to be those of the list
        first = skipped[0]
        raise UserError(
            f"{len(skipped):,} of {len(paths):,} files cannot be used, the first is {first.key} "
            f"({first.reason}); leave them out of the list."
        )
    return opened
