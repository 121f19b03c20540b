"""Packs: the images of a folder decoded once into memory-mapped files, for all processes, epochs and runs.

A pack is a folder of shards (`shard.py`) without a list of them: an image is in the pack if an intact shard has it
under the SHA-256 of its file's content. The same rule therefore serves a new pack, one whose writing was killed, one
with a damaged shard, and one whose images have changed: what is missing is decoded and added as further shards.

One process of a machine writes at a time, under a file lock; the others wait for what it writes. Where a network's
file system keeps no locks, two may write the same images twice: that costs room and harms nothing. Pixels of files
that have changed or gone stay until the pack is deleted by hand, as another run may be reading them.
"""

import errno
import math
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simclr.data.digests import decode_found
from simclr.data.pack.place import KEEP_FREE, room_for, size_text
from simclr.data.pack.shard import ENDING, Shard, ShardWriter
from simclr.data.readers.decode import DECODER, TransientReason, in_order
from simclr.data.readers.scan import FileEntry
from simclr.files import FileLock, reason_of

SHARD_BYTES = 128 << 20
"""Pixels in a shard: what a kill may cost, a second or two of decoding. Every further SHARDS_ALIKE shards are twice as
large, so that a pack of a terabyte has about 450: each one open keeps a file descriptor, of which many systems allow
1,024."""
SHARDS_ALIKE = 64
_DAMAGED, _PARTIAL = ".damaged", ".partial"
_DAY = 86_400.0
_POLL_SECONDS = 0.2

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


class Location(NamedTuple):
    """Position of an image in a pack."""

    shard: Shard
    row: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.shard.shapes[self.row].tolist()
        return height, width, channels

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded image."""
        return math.prod(self.shape)


def stamp(file: FileEntry) -> str:
    """Key of an image in a pack: the content of its file, and what decoded it."""
    return f"{DECODER} {file.digest.hex()}"


class Pack:
    """The decoded images of a folder.

    Args:
        place: The pack's folder; it need not exist.
        say: Called with a message about each damaged shard.
    """

    def __init__(self, place: Path, say: Say) -> None:
        self.place = place
        self._say = say
        self.damaged: list[Path] = []
        """Shards that are not whole, to be removed."""
        self._shards: dict[str, Shard | None] = {}  # by name; None for one that cannot be used
        self._found: dict[str, Location | str] = {}
        self._set_aside: set[Path] = set()
        self.refresh()

    @property
    def num_bytes(self) -> int:
        """On the disk."""
        return sum(shard.num_bytes for shard in self._shards.values() if shard is not None)

    @property
    def num_pixel_bytes(self) -> int:
        """Of all images, also those whose files have changed or gone."""
        return sum(shard.num_pixel_bytes for shard in self._shards.values() if shard is not None)

    @property
    def num_shards(self) -> int:
        """Files that hold the images."""
        return len(self._shards)

    def refresh(self) -> int:
        """Read the indices of the shards that have appeared since; how many images the pack knows."""
        for path in sorted(self.place.glob("*" + ENDING)):
            if path.name in self._shards:
                continue
            try:
                shard = Shard(path)
            except FileNotFoundError:
                continue  # another process has just removed it
            except (ValueError, OSError) as error:
                self._shards[path.name] = None
                if isinstance(error, OSError):  # perhaps only for us, only now: it is not to be removed
                    self._say(f"{path} of the pack cannot be read ({reason_of(error)}).")
                else:
                    self.damaged.append(path)
                    self._say(f"{path} of the pack is damaged ({error}): its images are decoded anew.")
                continue
            self._shards[path.name] = shard
            self._found.update(shard.left_out)
            self._found.update((name, Location(shard, row)) for row, name in enumerate(shard.files))
        return len(self._found)

    def remove_damaged(self) -> None:
        """Delete shards that are not whole; one of the same name is new then. Only for the holder of the lock."""
        for path in self.damaged:
            path.unlink(missing_ok=True)
            del self._shards[path.name]
        self.damaged = []

    def find(self, file: FileEntry) -> Location | str | None:
        """Position of an image, or why its file cannot be decoded; None if the pack does not have it."""
        return self._found.get(stamp(file))

    def missing(self, files: Sequence[FileEntry]) -> list[FileEntry]:
        """Files with a digest that the pack does not have, one of each content."""
        unknown = {file.digest: file for file in reversed(files) if file.digest and self.find(file) is None}
        return list(reversed(unknown.values()))

    def read(self, spot: Location) -> np.ndarray | None:
        """(H, W, 1 or 3) read-only pixels in the memory map; None where they are damaged on the disk.

        A damaged shard is set aside for the next opening to make anew; its other images are still good to read.
        """
        pixels = spot.shard.image(spot.row)
        if pixels is None:
            path = spot.shard.path
            if path not in self._set_aside:
                self._set_aside.add(path)
                with suppress(OSError):  # a pack that this process may not change
                    path.rename(path.with_name(path.name + _DAMAGED))
                self._say(
                    f"{path} of the pack is damaged (its pixels do not match their checksum): such images are decoded "
                    "again for each batch, and the next start makes that part of the pack anew."
                )
        return pixels


def open_pack(
    place: Path,
    files: Sequence[FileEntry],
    *,
    side: int | None,
    workers: int,
    progress: Progress | None,
    say: Say,
    complete: bool = True,
) -> tuple[Pack, list[str]]:
    """The pack of `files`, first completed where it can be.

    Args:
        side: As in `decode_file`.
        workers: Decoding threads.
        progress: Called with (files done, files in all) while images are added.
        say: Called with messages about work that takes long and about failures.
        complete: Whether anything is written.

    Returns:
        The pack, and notes for the user. Images may be missing from it if the disk is full or read-only.
    """
    pack = Pack(place, say)
    notes = []
    missing = pack.missing(files)
    if missing and not complete:
        notes.append(
            f"{len(missing):,} of {len(files):,} images are not in the pack {place} yet, and are decoded for each "
            "batch here; a run decodes them once, before its first step."
        )
    try:
        if complete and (pack.damaged or missing):
            place.mkdir(parents=True, exist_ok=True)
            with _lock(pack, len(files), progress, say):
                pack.refresh()
                _remove_leftovers(pack, say)
                if lacking := pack.missing(files):
                    notes += _complete(pack, lacking, side, workers, progress, say)
    except OSError as error:
        notes.append(f"The pack {place} cannot be written ({reason_of(error)}): --pack names another folder.")
    if pack.num_bytes:
        notes.insert(0, f"Images come decoded from the pack {place} ({size_text(pack.num_bytes)}).")
    return pack, notes


def say_if_stale(pack: Pack, files: Sequence[FileEntry] | None) -> list[str]:
    """A note where more than half of a pack belongs to files that are gone; `files` are all of the folder, if known."""
    if files is None:
        return []
    spots = {pack.find(file) for file in files}
    stale = pack.num_pixel_bytes - sum(spot.num_bytes for spot in spots if isinstance(spot, Location))
    if stale <= pack.num_pixel_bytes / 2:
        return []
    return [f"{size_text(stale)} of the pack are of files that have changed or gone: delete it, and it is made anew."]


def _complete(
    pack: Pack, files: Sequence[FileEntry], side: int | None, workers: int, progress: Progress | None, say: Say
) -> list[str]:
    """Add files to the pack, as far as the disk has room; sentences on what could not be added."""
    needed, no_room = room_for(pack.place, files, side)
    if no_room:
        return [no_room]
    say(f"Decoding {len(files):,} images into the pack {pack.place}, once for all runs (about {size_text(needed)}).")
    with closing(in_order(partial(_decode_and_sum, side=side), files, workers)) as results:
        decoded = zip(files, results, strict=True)
        try:
            done = 0
            while done < len(files):
                done = _write_shard(pack, decoded, done, lambda now: progress and progress(now, len(files)))
                pack.refresh()
        except OSError as error:
            rest = len(pack.missing(files))
            return [
                f"The pack is not complete ({reason_of(error)}): {rest:,} of {len(files):,} new images are not in it."
            ]
    return []


def _write_shard(
    pack: Pack, decoded: Iterator[tuple[FileEntry, "_Decoded | str"]], done: int, count: Callable[[int], object]
) -> int:
    """Write the next images as one shard; how many are then done."""
    if shutil.disk_usage(pack.place).free < KEEP_FREE:
        raise OSError(errno.ENOSPC, f"less than {size_text(KEEP_FREE)} left on the disk")
    most = SHARD_BYTES << pack.num_shards // SHARDS_ALIKE
    with ShardWriter(pack.place / f"{_machine()}-{os.getpid()}{_PARTIAL}") as writer:
        while writer.num_bytes < most and (following := next(decoded, None)) is not None:
            file, result = following
            if not isinstance(result, str):
                writer.add(stamp(file), *result)
            elif not isinstance(result, TransientReason):
                writer.leave_out(stamp(file), result)
            done += 1
            count(done)
    return done


class _Decoded(NamedTuple):
    pixels: np.ndarray
    crc: int


def _decode_and_sum(file: FileEntry, side: int | None) -> _Decoded | str:
    pixels = decode_found(file, side)
    if isinstance(pixels, str):
        return pixels
    pixels = np.ascontiguousarray(pixels)
    return _Decoded(pixels, zlib.crc32(pixels.data))


@contextmanager
def _lock(pack: Pack, total: int, progress: Progress | None, say: Say) -> Iterator[None]:
    """Hold the pack's lock, once no other process of this machine (or network) does; show how far that one is."""
    lock = FileLock(pack.place / "lock")
    waiting = False
    while not lock.acquire():
        if not waiting:
            say(f"Waiting for {lock.holder()}, which writes the pack {pack.place}.")
            waiting = True
        time.sleep(_POLL_SECONDS)
        known = pack.refresh()
        if progress is not None:
            progress(min(known, total), total)
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(pack: Pack, say: Say) -> None:
    """Remove damaged shards and what killed processes left; only for the holder of the lock."""
    pack.remove_damaged()
    for path in pack.place.glob("*" + _DAMAGED):
        say(f"{path} had damaged pixels: its images are decoded anew.")
        path.unlink(missing_ok=True)
    for path in pack.place.glob("*" + _PARTIAL):
        with suppress(FileNotFoundError):
            # one of another machine may be in the making, where the file system keeps no locks
            if path.name.startswith(f"{_machine()}-") or time.time() - path.stat().st_mtime > _DAY:
                path.unlink()


def _machine() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum())
