"""Image files as `Images`: known by their content and header at opening, decoded when they are read (`store.py`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simclr.data.digests import identify
from simclr.data.fingerprint import digest_of_files
from simclr.data.images import Images, Split, choose_channels
from simclr.data.pack.place import pack_place
from simclr.data.readers.decode import shrunk_size
from simclr.data.readers.header import read_header
from simclr.data.readers.scan import FileEntry
from simclr.data.readers.store import FileStore, PackPlan, Reading
from simclr.data.source import Skipped, some
from simclr.errors import UserError
from simclr.files import reason_of


class Labelling(NamedTuple):
    """What is known of images, in the terms of `Images`; and sentences for the user."""

    labels: np.ndarray | None = None
    classes: list[str] | None = None
    targets: np.ndarray | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class FileList:
    """The files of a data set, as a folder's scan or a list has found them.

    Attributes:
        root: A folder above all of them.
        files: In the order that the images are to have.
        unreachable: What is no file, though it should be: left out like those without a readable header.
        every: All files of the folder, of other parts too: a pack is shared by the parts.
        label: Positions in `files` of the usable ones -> their labels.
        name, split, has_own_split: Of the `Images`.
        notes: Sentences for the user so far.
    """

    root: Path
    files: Sequence[FileEntry]
    unreachable: Sequence[Skipped] = ()
    every: Sequence[FileEntry]
    label: Callable[[list[int]], Labelling]
    name: str
    split: Split
    has_own_split: bool
    notes: Sequence[str] = ()


def open_files(listed: FileList, reading: Reading) -> Images:
    """Open image files without decoding them.

    Files that are no images by their header are left out. Those that turn out to be damaged when they are decoded stay
    in the list, so that what is opened depends on no decoding: `Images.read` replaces them.

    Raises:
        UserError: None can be used, one cannot with `reading.strict`, or the pack would lie among the images.
    """
    notes = list(listed.notes)
    if reading.side:
        notes.append(
            f"Images with a shorter side above {reading.side} pixels are shrunk to {reading.side} (--pack-side)."
        )
    with reading.counting("Opening files") as progress:
        files, said = identify(listed.root, listed.files, workers=reading.workers, say=reading.say, progress=progress)
    notes += said
    kept, reasons = _by_header(files)
    skipped = sorted([*listed.unreachable, *(Skipped(files[row].key, why) for row, why in reasons.items())])
    total = len(files) + len(listed.unreachable)
    if skipped and (reading.strict or not (kept or reading.allow_empty)):
        _refuse(listed.root, skipped, total, some_good=reading.strict and bool(kept))
    shapes = np.array([files[row].shape for row in kept], np.int64).reshape(-1, 3)
    sizes = shapes[:, :2] if reading.side is None else _shrunk(shapes[:, :2], reading.side)
    num_channels, said = choose_channels(reading.channels, shapes[:, 2] == 1)
    notes += said
    if skipped:
        named = some([f"{item.key} ({item.reason})" for item in skipped], max_named=10)
        notes.append(f"{len(skipped):,} of {total:,} files left out: {named}.")
    plan, said = _plan_pack(listed, reading)
    usable = files if len(kept) == len(files) else [files[row] for row in kept]
    store = FileStore(usable, sizes, reading, plan)
    labelling = listed.label(kept)
    images = Images(
        name=listed.name,
        split=listed.split,
        has_own_split=listed.has_own_split,
        channels=num_channels,
        keys=[file.key for file in usable],
        sizes=sizes,
        labels=labelling.labels,
        classes=labelling.classes,
        targets=labelling.targets,
        contents=digest_of_files(file.digest for file in usable),
        store=store,
        rows=np.arange(len(usable)),
        skipped=skipped,
        notes=[*notes, *said, *store.notes, *labelling.notes],
    )
    if reading.strict:
        _require_undamaged(listed.root, images, total, reading)
    return images


def _by_header(files: Sequence[FileEntry]) -> tuple[list[int], dict[int, str]]:
    """Positions of the files that are images by their header, and of the others with the reason."""
    kept, reasons = [], {}
    for row, file in enumerate(files):
        if file.shape is not None:
            kept.append(row)
        else:
            problem = read_header(file.path)
            reasons[row] = problem if isinstance(problem, str) else "changed while it was opened"
    return kept, reasons


def _shrunk(sizes: np.ndarray, side: int) -> np.ndarray:
    """(n, 2) heights and widths after `shrink`."""
    if not len(sizes) or int(sizes.min(axis=1).max()) <= side:
        return sizes
    return np.array([shrunk_size(height, width, side) for height, width in sizes.tolist()], np.int64)


def _plan_pack(listed: FileList, reading: Reading) -> tuple[PackPlan | None, list[str]]:
    try:
        place = pack_place(reading.pack, listed.root, listed.every, reading.side)
    except OSError as error:
        return None, [f"There is no place for a pack ({reason_of(error)}): --pack names a folder."]
    every = None if len(listed.every) == len(listed.files) else listed.every
    return (None if place is None else PackPlan(place, listed.root, every)), []


def _require_undamaged(root: Path, images: Images, total: int, reading: Reading) -> None:
    for note in images.prepare():
        reading.say(note)
    with reading.counting("Checking images") as progress:
        damaged = images.check(progress)
    if damaged:
        _refuse(root, damaged, total, some_good=len(damaged) < len(images))


def _refuse(root: Path, skipped: Sequence[Skipped], total: int, *, some_good: bool) -> None:
    first = f"{some([skipped[0].key])} ({skipped[0].reason})"
    if some_good:
        raise UserError(
            f"{len(skipped):,} of {total:,} files in {root} cannot be used, the first is {first}: mend or "
            "remove them, or open the folder without --strict, which leaves them out."
        )
    raise UserError(f"None of the {total:,} image files in {root} can be used, the first is {first}.")
