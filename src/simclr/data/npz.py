"""Arrays in an .npz file as `Images`: x and maybe y, or x_train, y_train, x_test and y_test."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from simclr.data.decode import composite
from simclr.data.images import Channels, Images, Split, array_images, part_of
from simclr.data.labels import UNLABELLED, index_labels
from simclr.errors import UserError


def open_npz(path: Path, *, split: Split = "train", channels: Channels = "auto") -> Images:
    """Open an .npz file (written by numpy.savez; pickled objects are refused).

    The file holds `x`: (n, H, W) or (n, H, W, C) with C 1, 3 or 4 (alpha, composited on white), uint8, or
    floats in [0, 1], which are rounded to 256 levels; and maybe `y`: (n,) whole numbers (-1: no label) or
    names.

    Raises:
        UserError: not an .npz file, no `x`, another shape or type, values out of range or NaN, labels that
            do not fit.
    """
    arrays = _load(path)
    has_own_split = "x_train" in arrays and "x_test" in arrays
    if has_own_split == ("x" in arrays):
        raise UserError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}: give either x (and y), or x_train and "
            "x_test (and y_train and y_test)."
        )
    part = part_of(split, has_own_split, str(path))
    every = ["_train", "_test"] if has_own_split else [""]
    names = [f"_{part}"] if has_own_split and part != "all" else every
    notes: list[str] = []
    used = {f"{letter}{name}" for letter in "xy" for name in every}
    if others := sorted(set(arrays) - used):
        notes.append(f"{path.name} also holds {', '.join(others)}: not used.")
    pixels = _join([_pixels(arrays[f"x{name}"], f"x{name} in {path}", notes) for name in names], path)
    labels, classes = _labels(arrays, every, names, path, notes)
    return array_images(
        pixels,
        labels,
        name=path.stem,
        split=part,
        has_own_split=has_own_split,
        classes=classes,
        channels=channels,
        notes=notes,
    )


def _load(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is no .npz file, or it is cut short: write one with numpy.savez('images.npz', x=images)."
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
            return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    except Exception as error:  # damaged members and array headers raise nearly every kind of error
        why = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read as an .npz file of plain arrays: {why}.") from error


def _pixels(x: np.ndarray, what: str, notes: list[str]) -> np.ndarray:
    """(n, H, W, 1 or 3) uint8."""
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[3] not in (1, 3, 4):
        raise UserError(
            f"{what} has shape {x.shape}: give (n, H, W) for gray, or (n, H, W, C) with 1, 3 or 4 channels."
        )
    if x.size == 0:
        raise UserError(f"{what} has shape {x.shape}: there are no images in it.")
    if np.issubdtype(x.dtype, np.floating):
        if not np.isfinite(x).all():
            raise UserError(
                f"{what} holds values that are not finite numbers (NaN or infinite): give pixels in [0, 1]."
            )
        if x.min() < 0 or x.max() > 1:
            raise UserError(
                f"{what} holds floats from {x.min():.4g} to {x.max():.4g}: give floats in [0, 1], or uint8."
            )
        notes.append(f"{what}: floats in [0, 1] rounded to 256 levels.")
        x = _rounded(x)
    elif x.dtype != np.uint8:
        if not np.issubdtype(x.dtype, np.integer) or x.min() < 0 or x.max() > 255:
            raise UserError(f"{what} has type {x.dtype}: give uint8, whole numbers in 0..255, or floats in [0, 1].")
        x = x.astype(np.uint8)
    if x.shape[3] == 4:
        notes.append(f"{what}: alpha composited on white.")
        x = composite(x)
    return x


def _rounded(x: np.ndarray) -> np.ndarray:
    pixels = np.empty(x.shape, np.uint8)
    for row in range(len(x)):  # image by image: no second copy of all the floats
        pixels[row] = np.rint(x[row].astype(np.float64) * 255)
    return pixels


def _join(parts: list[np.ndarray], path: Path) -> np.ndarray:
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(f"x_train and x_test in {path} differ in size or channels: open one of them.")
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _labels(
    arrays: Mapping[str, np.ndarray], every: list[str], names: list[str], path: Path, notes: list[str]
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels of the parts `names`; names of classes become indices into those of `every` part."""
    missing = [f"y{name}" for name in names if f"y{name}" not in arrays]
    if missing:
        if len(missing) < len(names):
            notes.append(f"{path.name} lacks {missing[0]}: no labels.")
        return None, None
    given = {name: arrays[f"y{name}"] for name in every if f"y{name}" in arrays}
    for name, y in given.items():
        if y.shape != arrays[f"x{name}"].shape[:1] or not (np.issubdtype(y.dtype, np.integer) or y.dtype.kind == "U"):
            raise UserError(
                f"y{name} in {path} has shape {y.shape} and type {y.dtype}: give one whole number, or name, "
                f"for each of the {len(arrays[f'x{name}']):,} images."
            )
    part_of_row = np.concatenate([np.full(len(y), name) for name, y in given.items()])
    if len({y.dtype.kind == "U" for y in given.values()}) > 1:
        raise UserError(f"y_train and y_test in {path} are of two kinds: give numbers in both, or names in both.")
    y = np.concatenate(list(given.values()))
    if y.dtype.kind == "U":
        labels, classes = index_labels([value or None for value in y.tolist()])
    else:
        labels, classes = _numbers(y, path)
    labels = labels[np.isin(part_of_row, names)]
    if (labels < 0).all():
        return None, None
    if (labels < 0).any():
        notes.append(f"{(labels < 0).sum():,} of {len(labels):,} images are without a label (-1).")
    return labels, classes


def _numbers(y: np.ndarray, path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Numbers stay as they are; they name classes where they are 0, 1, ..., K - 1."""
    if y.min() < UNLABELLED or y.max() > np.iinfo(np.int64).max:
        raise UserError(f"{path} holds labels from {y.min()} to {y.max()}: give labels from 0, -1 for no label.")
    labels = y.astype(np.int64)
    known = np.unique(labels[labels >= 0])
    return labels, [str(value) for value in known] if np.array_equal(known, np.arange(len(known))) else None
