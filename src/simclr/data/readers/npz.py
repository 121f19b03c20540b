"""Arrays in an .npz file as `Images`: x and maybe y, or x_train, y_train, x_test and y_test."""

import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from simclr.data.images import Channels, Images, Split, array_images, part_of
from simclr.data.labels import UNLABELLED, index_labels
from simclr.data.pack.place import free_memory, size_text
from simclr.data.readers.decode import composite
from simclr.data.source import some
from simclr.errors import UserError
from simclr.files import open_regular

MAX_DIRECTORY_BYTES = 1 << 20
"""Of an archive's list of members, some 20,000 of them: Python's reader takes six times its size in memory."""
_TAIL_BYTES = (1 << 16) + 200  # end of an archive: its last records, and a comment
_HEADER_BYTES = 12 + 10_000
"""Beginning of a member that may hold its header; NumPy reads no longer one."""
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def open_npz(path: Path, *, split: Split = "train", channels: Channels = "auto") -> Images:
    """Open an .npz file (written by numpy.savez; pickled objects are refused).

    The file holds `x`: (n, H, W) or (n, H, W, C) with C 1, 3 or 4 (alpha, composited on white), uint8, or
    floats in [0, 1], which are rounded to 256 levels; and maybe `y`: (n,) whole numbers (-1: no label) or
    names.

    Raises:
        UserError: not an .npz file, no `x`, another shape or type, values out of range or NaN, labels that
            do not fit.
    """
    with _opened(path) as archive:
        return _open(archive, path, split, channels)


def _open(archive: zipfile.ZipFile, path: Path, split: Split, channels: Channels) -> Images:
    members = _members(archive, path)
    has_own_split = "x_train" in members and "x_test" in members
    if has_own_split == ("x" in members):
        raise UserError(
            f"{path} holds {some(sorted(members), max_named=20) or 'nothing'}: give either x (and y), or x_train and "
            "x_test (and y_train and y_test)."
        )
    part = part_of(split, has_own_split, str(path))
    every = ["_train", "_test"] if has_own_split else [""]
    names = [f"_{part}"] if has_own_split and part != "all" else every
    notes: list[str] = []
    used = {f"{letter}{name}" for letter in "xy" for name in every}
    if others := sorted(set(members) - used):
        notes.append(f"{path.name} also holds {some(others)}: not used.")
    headers = {name: _header(archive, members[name], path) for name in sorted(used & set(members))}
    wanted = [f"x{name}" for name in names] + [name for name in headers if name.startswith("y")]
    _require_memory([members[name] for name in wanted if name in headers], path)
    labels, classes = _labels(archive, headers, every, names, path, notes)
    pixels = _join([_pixels(_read(archive, headers[f"x{name}"]), f"x{name} in {path}", notes) for name in names], path)
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


class _Header(NamedTuple):
    """What a member says it holds, before it is read."""

    member: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever its reader raises becomes a sentence."""
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is no .npz file, or it is cut short: write one with numpy.savez('images.npz', x=images)."
            )
        if _directory_bytes(path) > MAX_DIRECTORY_BYTES:
            raise _unreadable(path, "its list of members is longer than that of any archive of arrays")
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:  # damaged members raise nearly every kind of error
        raise _unreadable(path, str(error).split("\n")[0][:200] or type(error).__name__) from error


def _directory_bytes(path: Path) -> int:
    """Size of the list of members that the archive's end states, in the old form or that of ZIP64: the larger."""
    with open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        tail = file.read()
    stated = [0]
    for signature, place, form in ((b"PK\x05\x06", 12, "<I"), (b"PK\x06\x06", 40, "<Q")):
        for match in re.finditer(re.escape(signature), tail):
            field = tail[match.start() + place :][: struct.calcsize(form)]
            stated += struct.unpack(form, field) if len(field) == struct.calcsize(form) else ()
    return max(size for size in stated if size != 0xFFFFFFFF)  # which stands for "see the form of ZIP64"


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"{path} cannot be read as an .npz file of plain arrays: {why}.")


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The arrays by name; nothing is read."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in members:
            raise _unreadable(path, f"it holds {name!r:.60} twice")
        members[name] = member
    return members


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> _Header:
    """Shape and type that a member claims, which have to fit the size that the archive states for it."""
    what = f"{member.filename!r:.60}"
    if member.flag_bits & 1:
        raise _unreadable(path, f"{what} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _unreadable(path, f"{what} is compressed in a way that numpy.savez and savez_compressed do not use")
    with archive.open(member) as file:
        start = io.BytesIO(file.read(_HEADER_BYTES))  # a header may claim 4 GiB of itself
    read_header = _READERS.get(npy.read_magic(start))
    if read_header is None:
        raise _unreadable(path, f"{what} has a version of the .npy format that holds no plain array")
    shape, _, dtype = read_header(start)
    if dtype.hasobject:
        raise _unreadable(path, f"{what} holds pickled objects, which are not loaded")
    num_bytes = start.tell() + math.prod(shape) * dtype.itemsize
    if num_bytes != member.file_size or dtype.itemsize == 0 or min(shape, default=0) < 0:
        raise _unreadable(
            path, f"{what} claims an array of shape {shape} and type {dtype}, and has {member.file_size:,} bytes"
        )
    return _Header(member, shape, dtype)


def _require_memory(members: Sequence[zipfile.ZipInfo], path: Path) -> None:
    """Refuse arrays that do not fit the memory, before any is read: a small file may inflate a thousandfold."""
    needed, available = sum(member.file_size for member in members), free_memory()
    if needed > available:
        raise UserError(
            f"The arrays in {path} take {size_text(needed)}, and {size_text(available)} of memory are free: give a "
            "smaller file, or a folder of images, which may be larger than the memory."
        )


def _read(archive: zipfile.ZipFile, header: _Header) -> np.ndarray:
    """The array. The archive's reader stops at the size that the archive states, and compares a checksum."""
    with archive.open(header.member) as file:
        array = npy.read_array(file, allow_pickle=False)
        file.read(1)  # the end, where the checksum is compared
    return array


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
    archive: zipfile.ZipFile,
    headers: Mapping[str, _Header],
    every: list[str],
    names: list[str],
    path: Path,
    notes: list[str],
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels of the parts `names`; names of classes become indices into those of `every` part."""
    missing = [f"y{name}" for name in names if f"y{name}" not in headers]
    if missing:
        if len(missing) < len(names):
            notes.append(f"{path.name} lacks {missing[0]}: no labels.")
        return None, None
    given: dict[str, np.ndarray] = {}
    for name in every:
        if (y := headers.get(f"y{name}")) is None:
            continue
        num_images = headers[f"x{name}"].shape[:1]
        if y.shape != num_images or not (np.issubdtype(y.dtype, np.integer) or y.dtype.kind == "U"):
            raise UserError(
                f"y{name} in {path} has shape {y.shape} and type {y.dtype}: give one whole number, or name, "
                f"for each of the {math.prod(num_images):,} images."
            )
        given[name] = _read(archive, y)
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
