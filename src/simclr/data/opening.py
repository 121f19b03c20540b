"""`open_data`: open data by a name or a path as `Images`."""

import difflib
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

from simclr.data.images import Channels, Images, Split
from simclr.data.readers.folder import open_folder
from simclr.data.readers.layouts import open_layout
from simclr.data.readers.named import ARRAYS, NAMES, open_named
from simclr.data.readers.npz import open_npz
from simclr.data.readers.store import Reading
from simclr.errors import UserError


def open_data(
    source: str | Path,
    *,
    split: Split = "train",
    labels: Path | None = None,
    strict: bool = False,
    channels: Channels = "auto",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    pack: str = "off",
    side: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Images:
    """Open images by name or by path; files are decoded when they are read.

    Args:
        source: One of NAMES, or NAME:FOLDER for files in a folder of yours; a folder of images; an .npz
            file. A folder called like a name is written ./digits.
        split: "train", "test" or "all". Data without a split of its own is opened whole by "train" and "all".
        labels: CSV file of `path,label` lines for a folder.
        strict: A broken file is an error, and all are decoded to find it. Else files that are no images by their
            header are left out, named in `notes` and counted in `skipped`, and damaged ones replaced (`Images.read`).
        channels: "auto": 1 where every image is gray, else 3; "1" or "3" converts.
        workers: Decoding threads.
        progress: Called with (files done, files in all) while files are hashed, and while they are decoded.
        pack: For a folder: "off", "auto" or a place for its pack (`Reading`).
        side: For a folder: largest shorter side of its images (`Reading`).
        say: Called with messages about work that takes long and about failures.

    Returns:
        The images, with `notes` for the user.

    Raises:
        UserError: no such name or path, nothing usable in it, labels that do not fit, no test part, broken
            files with `strict`.
    """
    reading = Reading(
        strict=strict, channels=channels, workers=workers, pack=pack, side=side, say=say,
        counting=lambda _: nullcontext(progress),
    )  # fmt: skip
    return open_source(source, split=split, labels=labels, reading=reading)


def open_source(
    source: str | Path, *, split: Split = "train", labels: Path | None = None, reading: Reading | None = None
) -> Images:
    """As `open_data`, with how files become pixels in one value."""
    reading = reading or Reading()
    for setting, value, allowed in (
        ("split", split, get_args(Split)),
        ("channels", reading.channels, get_args(Channels)),
    ):
        if value not in allowed:
            raise UserError(f"{setting} is {value!r}: give one of {', '.join(allowed)}.")
    name, _, place = str(source).partition(":")
    named = name in NAMES and not isinstance(source, Path)
    path = Path(source).expanduser()
    if labels is not None and (named or not path.is_dir()):
        raise UserError(f"A label file goes with a folder of images, and {source} is none; an .npz file carries y.")
    if reading.side is not None and (name in ARRAYS if named else not path.is_dir()):
        raise UserError(f"--pack-side goes with a folder of images, and {source} is none.")
    if named:
        folder = Path(place).expanduser() if place else None
        if folder is not None and not folder.is_dir():
            way_out = f"create it, or write '{name}' alone" if name in ARRAYS else "check the path"
            raise UserError(f"There is no folder {folder} for {name}: {way_out}.")
        if name in ARRAYS:
            return open_named(name, folder, split=split, channels=reading.channels)
        return open_layout(name, folder, split=split, reading=reading)
    if path.is_dir():
        return open_folder(path, split=split, labels=labels, reading=reading)
    if path.is_file():
        if path.suffix.lower() not in (".npz", ".npy"):
            raise UserError(
                f"{source} is a file, but no .npz: give a folder of images, an .npz file with x, or a name."
            )
        return open_npz(path, split=split, channels=reading.channels)
    raise UserError(_nothing_there(str(source)))


def open_whole(source: str | Path, reading: Reading) -> Images:
    """Every image of a folder, whatever its sub-folders are called, or of an .npz file or named set, of all parts.

    Raises:
        UserError: as `open_data`.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not (str(source).partition(":")[0] in NAMES and not isinstance(source, Path)):
        return open_folder(path, split="all", whole=True, reading=reading)
    return open_source(source, split="all", reading=reading)


def _nothing_there(source: str) -> str:
    if any(mark in source for mark in (os.sep, "/", "~")) or Path(source).suffix:
        return f"There is no folder or file {source}: check the path, or give one of {', '.join(NAMES)}."
    close = difflib.get_close_matches(source.partition(":")[0].lower(), NAMES, n=2, cutoff=0.5)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"{source!r} is neither a known data set nor a path{hint}: the names are {', '.join(NAMES)}."
