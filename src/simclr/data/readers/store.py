"""Pixels of image files: decoded when they are read, from a pack or kept in memory where that is possible."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simclr.data.digests import decode_found, known_digests
from simclr.data.fingerprint import digest_of_files
from simclr.data.images import Channels
from simclr.data.pack.pack import Location, Pack, open_pack, say_if_stale
from simclr.data.readers.decode import Changed, TransientReason, in_order
from simclr.data.readers.scan import FileEntry
from simclr.errors import UserError

MEMORY_SHARE = 0.25
"""Share of the physical memory (or of the container's limit) that decoded pixels may take."""
MAX_MEMORY = 8 << 30
"""Bytes of decoded pixels kept at most, on machines with more than 32 GiB; other programs run there too."""
SMALLEST_SIDE = 16
"""Images shrunk further than this show nothing."""

Progress = Callable[[int, int], None]
Counting = Callable[[str], AbstractContextManager[Progress | None]]
"""Description of the work -> a context that gives a callback (done, total), or None where no progress is shown."""


def uncounted(_: str) -> AbstractContextManager[Progress | None]:
    """No progress is shown."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How image files become pixels.

    Attributes:
        strict: A damaged file is an error, and all are decoded at opening to find it.
        channels: "auto": 1 where every image is gray, else 3; "1" or "3" converts.
        workers: Decoding threads; 0 decodes in the calling thread.
        counting: Shows progress of what takes long.
        memory_budget: Bytes of decoded pixels to keep, 0 for work that reads each image once; by default MEMORY_SHARE
            and MAX_MEMORY decide.
        pack: "off"; "auto": where decoding takes long, pixels are kept in the user's cache folder for all processes
            and runs; or the folder to keep them in. It changes no pixel.
        allow_empty: Whether files of which none can be used are opened, as no image, instead of refused.
        completes_pack: Whether images that the pack lacks are added to it; else it is only read.
        side: Images whose shorter side is longer are shrunk to it (`decode.shrink`), with a pack or without.
        say: Called with messages about work that takes long and about failures.
    """

    strict: bool = False
    channels: Channels = "auto"
    workers: int = 2
    counting: Counting = uncounted
    memory_budget: int | None = None
    pack: str = "off"
    completes_pack: bool = True
    allow_empty: bool = False
    side: int | None = None
    say: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.side is not None and self.side < SMALLEST_SIDE:
            raise UserError(f"--pack-side was {self.side}; it must be at least {SMALLEST_SIDE} pixels.")


class PackPlan(NamedTuple):
    """Location and contents of a pack that is to be completed."""

    place: Path
    root: Path
    every: Sequence[FileEntry] | None
    """All files of the folder, of other parts too, as a pack is shared by the parts; None: there are no other parts."""


class FileStore:
    """Rows -> pixels of image files. Threads may share it.

    Attributes:
        files: n files with digest and shape.
        damaged: Rows that were found to be undecodable so far, and why. It depends on the files' content alone.
        notes: Sentences for the user that are known at opening.
    """

    def __init__(self, files: Sequence[FileEntry], sizes: np.ndarray, reading: Reading, plan: PackPlan | None) -> None:
        """Decodes nothing.

        Args:
            sizes: (n, 2) heights and widths of the pixels.
        """
        self.files = files
        self.damaged: dict[int, str] = {}
        self.notes: list[str] = []
        self._sizes, self._reading, self._plan = sizes, reading, plan
        self._pack: Pack | None = None
        self._kept: list[np.ndarray | None] | None = None
        self._is_good = np.zeros(len(files), bool)  # decoded by now, here or for the pack
        self._lock = threading.Lock()
        self._told = False
        if plan is None:
            self.notes += self._choose_memory(range(len(files)))

    def prepare(self) -> list[str]:
        """Complete the pack where one is wanted; sentences for the user. Reading does it at the first time."""
        if self._plan is None:
            return []
        with self._lock:
            plan, reading = self._plan, self._reading
            if plan is None:  # another thread was faster
                return []
            with reading.counting("Decoding images") as progress:
                self._pack, notes = open_pack(
                    plan.place,
                    self.files,
                    side=reading.side,
                    workers=reading.workers,
                    progress=progress,
                    say=reading.say,
                    complete=reading.completes_pack,
                )
            every = self.files if plan.every is None else known_digests(plan.root, plan.every)
            notes += say_if_stale(self._pack, every)
            unpacked = []
            for row, file in enumerate(self.files):
                location = self._pack.find(file)
                if isinstance(location, str):
                    self.damaged[row] = location
                elif location is None:
                    unpacked.append(row)
                else:
                    self._is_good[row] = True
            notes += self._choose_memory(unpacked)
            self._plan = None
        return notes

    def __call__(self, rows: np.ndarray) -> list[np.ndarray | None]:
        """(H, W, 1 or 3) uint8 arrays, only to be read; None for a damaged file.

        Raises:
            UserError: A file has changed since it was opened, or cannot be read for a reason that may pass.
        """
        self._prepare_aloud()
        spots = {int(row): self._spot(row) for row in rows}
        for spot in spots.values():
            if spot is not None:
                spot.shard.expect(spot.row)
        ready = {row: self._at_hand(row, spot) for row, spot in spots.items()}
        missing = [row for row, pixels in ready.items() if pixels is None and row not in self.damaged]
        for row, result in self._decode(missing):
            if isinstance(result, TransientReason):
                raise UserError(self._changed(row, result))
            if not isinstance(result, str):
                ready[row] = result
        return [ready[int(row)] for row in rows]

    def check(self, rows: np.ndarray, progress: Progress | None = None) -> Mapping[int, str]:
        """Decode the files that were not decoded before; the rows that cannot be, and why."""
        self._prepare_aloud()
        reasons = {int(row): self.damaged[int(row)] for row in rows if int(row) in self.damaged}
        unknown = [int(row) for row in rows if not self._is_good[row] and int(row) not in reasons]
        for done, (row, result) in enumerate(self._decode(unknown), start=1):
            if isinstance(result, str):
                reasons[row] = result
            if progress is not None:
                progress(done, len(unknown))
        return reasons

    def contents_of(self, rows: np.ndarray) -> str:
        """SHA-256 of the contents of some files."""
        return digest_of_files(self.files[row].digest for row in rows)

    def _choose_memory(self, rows: Sequence[int]) -> list[str]:
        """Keep the pixels of `rows` once they are decoded where all of them fit; what to say where not."""
        budget = _default_budget() if self._reading.memory_budget is None else self._reading.memory_budget
        channels = np.array([shape[2] for shape in (self.files[row].shape for row in rows) if shape is not None])
        num_bytes = int((self._sizes[rows].prod(axis=1) * channels).sum()) if len(rows) else 0
        if num_bytes <= budget:
            self._kept = [None] * len(self.files)
        if num_bytes <= budget or self._reading.memory_budget == 0:
            return []
        return [
            f"The decoded pixels{' of the others' if self._pack else ''} take {num_bytes / 2**30:.1f} GiB, and "
            f"{budget / 2**30:.1f} GiB may stay in memory: files are decoded again for each batch."
        ]

    def _prepare_aloud(self) -> None:
        for note in self.prepare():
            self._reading.say(note)

    def _spot(self, row: int) -> Location | None:
        location = None if self._pack is None else self._pack.find(self.files[row])
        return None if isinstance(location, str) else location

    def _at_hand(self, row: int, spot: Location | None) -> np.ndarray | None:
        """Pixels that need no decoding."""
        if spot is not None and self._pack is not None:
            return self._pack.read(spot)
        return None if self._kept is None else self._kept[row]

    def _decode(self, rows: Sequence[int]) -> Iterator[tuple[int, np.ndarray | str]]:
        """Pixels, or why there are none, of rows in their order."""
        results = in_order(
            partial(decode_found, side=self._reading.side), [self.files[row] for row in rows], self._reading.workers
        )
        for row, result in zip(rows, results, strict=True):
            height, width = self._sizes[row]
            if not isinstance(result, str) and result.shape[:2] != (height, width):
                result = f"{result.shape[0]} x {result.shape[1]} pixels, and {height} x {width} by its header"
            if not isinstance(result, str):
                self._is_good[row] = True
                if self._kept is not None and self._spot(row) is None:
                    self._kept[row] = result
            elif not isinstance(result, TransientReason):
                self.damaged[row] = result
            yield row, result

    def tell_replaced(self, row: int) -> None:
        """Say, the first time, that another image is read in the place of a damaged one."""
        if not self._told:
            self._told = True
            self._reading.say(
                f"{self.files[row].key} cannot be decoded ({self.damaged[row]}): the next readable image takes its "
                "place, as for any other like it; they are counted at the end, and `simclr check` names them all."
            )

    def _changed(self, row: int, reason: str) -> str:
        """What to say of a file that could be read at opening."""
        path, (height, width) = self.files[row].path, self._sizes[row]
        if isinstance(reason, Changed):
            return (
                f"{path} has changed since the data was opened: put the file back as it was, or begin again with the "
                "data as it is now."
            )
        return f"{path} has changed since the data was opened: it was {height} x {width} pixels and is now {reason}."


def _default_budget() -> int:
    """Bytes of pixels to keep: MEMORY_SHARE of what this process may have, at most MAX_MEMORY."""
    limits = [4 * MAX_MEMORY]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # no such limit, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(MAX_MEMORY, int(MEMORY_SHARE * min(limits)))
