"""Image files as `Images`: broken ones found at opening, pixels kept where there is room.

Every file is decoded once, here or when its pack (`pack.py`) was made, so that a broken one is met now and not in the
night. Pixels come from the pack's memory map, if there is one. Else they stay in memory where all of them fit a
budget; else only the sizes are kept and each batch decodes its files again.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simclr.data.digests import decode_found, identify, known_digests
from simclr.data.fingerprint import digest_of_files
from simclr.data.images import Channels, Images, Split, choose_channels
from simclr.data.pack.pack import Pack, Spot, open_pack, say_if_stale
from simclr.data.pack.place import pack_place
from simclr.data.readers.decode import Changed, in_order
from simclr.data.readers.scan import Found, some
from simclr.data.source import Skipped
from simclr.errors import UserError
from simclr.files import reason_of

MEMORY_SHARE = 0.25
"""Share of the physical memory (or of the container's limit) that decoded pixels may take."""
MEMORY_MOST = 8 << 30
"""Bytes of decoded pixels kept at most, on machines with more than 32 GiB; other programs run there too."""
SMALLEST_SIDE = 16
"""Images shrunk further than this show nothing."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files become pixels; `open_folder` says what each of these is."""

    strict: bool = False
    channels: Channels = "auto"
    workers: int = 2
    progress: Callable[[int, int], None] | None = None
    memory_budget: int | None = None
    pack: str = "off"
    side: int | None = None
    say: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.side is not None and self.side < SMALLEST_SIDE:
            raise UserError(f"--pack-side was {self.side}; it must be at least {SMALLEST_SIDE} pixels.")


class Labelling(NamedTuple):
    """What is known of images, in the terms of `Images`; and sentences to say aloud."""

    labels: np.ndarray | None = None
    classes: list[str] | None = None
    targets: np.ndarray | None = None
    notes: Sequence[str] = ()


def open_files(
    root: Path,
    files: Sequence[Found],
    *,
    unreachable: Sequence[Skipped],
    every: Sequence[Found],
    label: Callable[[list[int]], Labelling],
    name: str,
    split: Split,
    has_own_split: bool,
    notes: Sequence[str],
    how: Reading,
) -> Images:
    """Open the files that a folder's scan, or a list, has found.

    Args:
        files: In the order that the images are to have.
        unreachable: What is no file, though it should be: left out like those that cannot be decoded.
        every: All files of the folder, of other parts too: a pack is shared by the parts.
        label: Positions in `files` of the readable ones -> their labels.

    Raises:
        UserError: none can be used, one cannot with `how.strict`, or the pack would lie among the images.
    """
    notes = list(notes)
    if how.side:
        notes.append(f"Images with a shorter side above {how.side} pixels are shrunk to {how.side} (--pack-side).")
    budget = _default_budget() if how.memory_budget is None else how.memory_budget
    files, said = identify(root, files, workers=how.workers, say=how.say)
    notes += said
    packed = None
    try:
        place = pack_place(how.pack, root, every, how.side)
    except OSError as error:
        place = None
        notes.append(f"There is no place for a pack ({reason_of(error)}): --pack names a folder.")
    if place is not None:
        packed, said = open_pack(place, files, side=how.side, workers=how.workers, progress=how.progress, say=how.say)
        notes += said + say_if_stale(packed, files if len(files) == len(every) else known_digests(root, every))
    decoded = _decode_all(files, packed, how.side, how.workers, budget, how.progress)
    skipped = sorted([*unreachable, *decoded.skipped])
    total = len(files) + len(unreachable)
    if skipped and (how.strict or not decoded.rows):
        _refuse(root, skipped, total, how.strict and len(decoded.rows) > 0)
    num_channels, said = choose_channels(how.channels, np.array(decoded.gray))
    notes += said
    if skipped:
        named = some([f"{item.key} ({item.reason})" for item in skipped], most=10)
        notes.append(f"{len(skipped):,} of {total:,} files left out: {named}.")
    if decoded.num_bytes > budget:
        notes.append(
            f"The decoded pixels{' of the others' if packed else ''} take {decoded.num_bytes / 2**30:.1f} GiB, and "
            f"{budget / 2**30:.1f} GiB may stay in memory: files are decoded again for each batch."
        )
    kept = [files[row] for row in decoded.rows]
    sizes = np.array(decoded.sizes, dtype=np.int64)
    labelling = label(decoded.rows)
    return Images(
        name=name,
        split=split,
        has_own_split=has_own_split,
        channels=num_channels,
        keys=[file.key for file in kept],
        sizes=sizes,
        labels=labelling.labels,
        classes=labelling.classes,
        targets=labelling.targets,
        contents=digest_of_files(file.digest for file in kept),
        store=_Store(kept, sizes, decoded.lies, packed, how.side, how.workers),
        rows=np.arange(len(kept)),
        skipped=skipped,
        notes=[*notes, *labelling.notes],
    )


_Lies = Spot | np.ndarray | None
"""Where an image's pixels lie: in the pack, in memory, or nowhere, so that its file is decoded for each batch."""


class _Decoded(NamedTuple):
    rows: list[int]
    """Positions of the good files."""
    sizes: list[tuple[int, int]]
    gray: list[bool]
    lies: list[_Lies]
    skipped: list[Skipped]
    num_bytes: int
    """Pixels that are not in the pack; more than the budget are not kept."""


def _decode_all(
    files: Sequence[Found],
    pack: Pack | None,
    side: int | None,
    workers: int,
    budget: int,
    progress: Callable[[int, int], None] | None,
) -> _Decoded:
    """What the files hold: those that the pack knows without looking at them, the others decoded."""
    rows, sizes, gray, skipped = [], [], [], []
    lies: list[_Lies] = []
    num_bytes = done = 0
    known = [None if pack is None else pack.find(file) for file in files]
    new = [file for file, found in zip(files, known, strict=True) if found is None]
    decoded = in_order(partial(decode_found, side=side), new, workers)
    for row, found in enumerate(known):
        result = next(decoded) if found is None else found
        if isinstance(result, str):
            skipped.append(Skipped(files[row].key, result))
        else:
            height, width, channels = result.shape
            rows.append(row)
            sizes.append((height, width))
            gray.append(channels == 1)
            if isinstance(result, np.ndarray):
                if num_bytes <= budget < num_bytes + result.nbytes:  # from here on none is kept
                    lies = [spot if isinstance(spot, Spot) else None for spot in lies]
                num_bytes += result.nbytes
            lies.append(result if isinstance(result, Spot) or num_bytes <= budget else None)
        if found is None:
            done += 1
            if progress is not None:
                progress(done, len(new))
    return _Decoded(rows, sizes, gray, lies, skipped, num_bytes)


def _refuse(root: Path, skipped: Sequence[Skipped], total: int, some_good: bool) -> None:
    first = f"{some([skipped[0].key])} ({skipped[0].reason})"
    if some_good:
        raise UserError(
            f"{len(skipped):,} of {total:,} files in {root} cannot be used, the first is {first}: mend or "
            "remove them, or open the folder without --strict, which leaves them out."
        )
    raise UserError(f"None of the {total:,} image files in {root} can be used, the first is {first}.")


@dataclass(frozen=True)
class _Store:
    """Rows -> pixels of the good files, wherever they lie."""

    files: Sequence[Found]
    sizes: np.ndarray
    lies: Sequence[_Lies]
    pack: Pack | None
    side: int | None
    workers: int

    def __call__(self, rows: np.ndarray) -> list[np.ndarray]:
        lies = [self.lies[row] for row in rows]
        for spot in lies:
            if isinstance(spot, Spot):
                spot.shard.expect(spot.row)
        ready = [self.pack.read(spot) if self.pack and isinstance(spot, Spot) else spot for spot in lies]
        again = self._decode([row for row, pixels in zip(rows, ready, strict=True) if pixels is None])
        return [next(again) if pixels is None else pixels for pixels in ready]

    def _decode(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        decode = partial(decode_found, side=self.side)
        results = in_order(decode, [self.files[row] for row in rows], self.workers)
        for row, result in zip(rows, results, strict=True):
            height, width = self.sizes[row]
            if isinstance(result, Changed):
                raise UserError(
                    f"{self.files[row].path} has changed since the data was opened: put the file back as it was, or "
                    "begin again with the data as it is now."
                )
            if isinstance(result, str) or result.shape[:2] != (height, width):
                now = result if isinstance(result, str) else f"{result.shape[0]} x {result.shape[1]} pixels"
                raise UserError(
                    f"{self.files[row].path} has changed since the data was opened: it was {height} x {width} pixels "
                    f"and is now {now}."
                )
            yield result


def _default_budget() -> int:
    """Bytes of pixels to keep: MEMORY_SHARE of what this process may have, at most MEMORY_MOST."""
    limits = [4 * MEMORY_MOST]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # no such limit, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(MEMORY_MOST, int(MEMORY_SHARE * min(limits)))
