"""SHA-256 and shape of each image file: computed once, then kept in the user's cache while the file is the same.

A table, one file for each folder of images, maps a file's path below the folder to its stamp (size, times, inode), the
SHA-256 of its content, and height, width and channels by its header. One file for a folder, and not a database for
all: it is read and written as a whole in a tenth of a second for 50,000 images, carries a checksum of all that it says
(SQLite has none, so a flipped bit would become a wrong digest), appears by one rename, needs no lock on a network's
file system, and is bounded by deleting old ones. Of two processes that write at once the later wins; what that loses
is hashed again.
"""

import io
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np

from simclr.data.pack.place import size_text, user_cache
from simclr.data.readers.decode import DECODER, MAX_FILE_BYTES, Changed, TransientReason, decode_file, silence_pillow
from simclr.data.readers.header import parse_header
from simclr.data.readers.scan import FileEntry
from simclr.errors import UserError
from simclr.files import Stamp, open_regular, reason_of, stamp_of, sweep, write_atomically

RACY_NS = 2_000_000_000
"""The digest of a file that changed less than this before it was hashed is not kept: it could change again within the
resolution of its file system's times (2 s on FAT) without a visible difference. git's index has the same rule."""
MIN_KEPT_FILES, MIN_KEPT_BYTES = 2_000, 16 << 20
"""Smaller folders are hashed each time, which takes less than 20 ms."""
MAX_TABLES, MAX_TABLES_BYTES = 1_000, 1 << 30
"""Of all folders; those unused for longest go first. ImageNet's train part takes 130 MB."""
SPARE_NAMES = 10_000
"""Files that are no longer in the folder, or in another part of it, that a table holds besides three times its own."""
_SAID_BYTES = 1 << 30
"""Hashing more than this takes seconds, and is said."""
_PIECE_BYTES = 1 << 20  # read at a time
_READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # without waiting for a FIFO
_CHUNK = 64  # files in a thread's portion
_VERSION = b"simclr digests"
_MAGIC = _VERSION + b" 2"
_HEADER = struct.Struct("<16s32sQQ")  # magic, what reads headers, number of files, bytes of their names
_STAMP = struct.Struct("<4Q")
_SHAPE = struct.Struct("<3I")  # height, width, channels; zeros for a file without a usable header
_DIGEST_BYTES = 32
_RECORD_BYTES = _STAMP.size + _DIGEST_BYTES + _SHAPE.size
_READER = sha256(f"{DECODER} headers 1".encode()).digest()  # what shapes depend on beside the file
_ALL_BITS = (1 << 64) - 1

Table = dict[bytes, bytes]
"""Path below the folder -> packed stamp, digest and packed shape."""

_unwritten: dict[Path, Table] = {}
"""Tables that could not be written, kept for this process."""


def identify(
    root: Path,
    files: Sequence[FileEntry],
    *,
    workers: int,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[FileEntry], list[str]]:
    """The files with their digests and shapes, from the folder's table where they have not changed since.

    Args:
        root: The folder, or one above all of the files.
        workers: Threads (0: the calling one).
        say: Called with a message before hashing that takes long.
        progress: Called with (done, total) of the files that have to be read.

    Returns:
        The files, with an empty digest and no shape where one cannot be read (`read_header` knows why); sentences for
        the user.
    """
    root = root.resolve()
    names = list(_names(root, files))
    place, problem = _place(root)
    table = _unwritten.get(root) or _load(place, say)
    known: list[FileEntry | None] = [_known(file, table.get(name)) for file, name in zip(files, names, strict=True)]
    missing = [i for i, file in enumerate(known) if file is None]
    if not missing:
        return [file for file in known if file is not None], []
    num_bytes = sum(files[i].num_bytes for i in missing)
    if num_bytes > _SAID_BYTES:
        say(f"Hashing {len(missing):,} files ({size_text(num_bytes)}), once, to know them by their content.")
    hashed = []
    for result in _hash_all([files[i] for i in missing], workers):
        hashed.append(result)
        if progress is not None:
            progress(len(hashed), len(missing))
    new = {
        names[i]: _packed(file.stamp) + file.digest + _SHAPE.pack(*(file.shape or (0, 0, 0)))
        for i, (file, is_lasting) in zip(missing, hashed, strict=True)
        if is_lasting
    }
    notes = []
    if len(new) >= MIN_KEPT_FILES or sum(file.num_bytes for file, is_lasting in hashed if is_lasting) >= MIN_KEPT_BYTES:
        problem = problem or _keep(place, new, set(names), say)
        if problem:
            if root not in _unwritten:
                notes.append(f"Digests of files cannot be kept ({problem}): each start computes them again.")
            _unwritten[root] = table | new
    results = iter(hashed)
    return [next(results)[0] if file is None else file for file in known], notes


def known_digests(root: Path, files: Sequence[FileEntry]) -> list[FileEntry] | None:
    """The files with their digests where all of them are in the table; None where one is not."""
    root = root.resolve()
    table = _unwritten.get(root) or _load(_place(root)[0], lambda _: None)
    entries = [_known(file, table.get(name)) for file, name in zip(files, _names(root, files), strict=True)]
    complete = [file for file in entries if file is not None]
    return complete if len(complete) == len(files) else None


def decode_found(file: FileEntry, side: int | None) -> np.ndarray | str:
    """(H, W, 1 or 3) uint8 pixels of the content that `file.digest` names, or why there are none: `decode_file`.

    A file whose stamp has changed is hashed again, since permissions and links change it too. `Changed` where it has
    another content.
    """
    pixels = decode_file(file.path, side, expected=file.stamp)
    if isinstance(pixels, Changed) or (isinstance(pixels, str) and _stamp_now(file) != file.stamp):
        now, _ = _hash(file)
        if now.digest == file.digest:
            return decode_file(file.path, side, expected=now.stamp)
        return Changed(pixels)
    if isinstance(pixels, np.ndarray) and not file.digest:
        return Changed("changed while it was opened")
    return pixels


def _stamp_now(file: FileEntry) -> Stamp | None:
    try:
        return stamp_of(os.stat(file.path))
    except OSError:
        return None


def _names(root: Path, files: Sequence[FileEntry]) -> Iterator[bytes]:
    """Paths below the folder."""
    prefixes: dict[Path, str] = {}
    for file in files:
        prefix = prefixes.get(file.root)
        if prefix is None:
            below = os.path.relpath(file.root.resolve(), root)
            prefix = prefixes[file.root] = "" if below == "." else below + "/"
        yield os.fsencode(prefix + file.below)


def _known(file: FileEntry, record: bytes | None) -> FileEntry | None:
    if record is None or record[: _STAMP.size] != _packed(file.stamp):
        return None
    shape = _SHAPE.unpack(record[_STAMP.size + _DIGEST_BYTES :])
    digest = record[_STAMP.size : _STAMP.size + _DIGEST_BYTES]
    return FileEntry(file.key, file.root, file.below, file.stamp, digest, shape if shape[2] else None)


def _packed(stamp: Stamp) -> bytes:
    size, mtime, ctime, inode = stamp
    return _STAMP.pack(size, mtime & _ALL_BITS, ctime & _ALL_BITS, inode & _ALL_BITS)


# ---- hashing


def _hash_all(files: Sequence[FileEntry], workers: int) -> Iterator[tuple[FileEntry, bool]]:
    silence_pillow()
    portions = [files[begin : begin + _CHUNK] for begin in range(0, len(files), _CHUNK)]
    if workers < 2 or len(portions) < 2:
        yield from map(_hash, files)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from chain.from_iterable(pool.map(lambda portion: [_hash(file) for file in portion], portions))


def _hash(file: FileEntry) -> tuple[FileEntry, bool]:
    """The file as it is now, with digest and shape, empty where it cannot be read; whether they may be kept.

    By calls of the operating system, which take 7 us for a small file, and `open_regular` with `file_digest` 44.
    """
    begun = time.time_ns()
    try:
        descriptor = os.open(f"{file.root}/{file.below}", _READING)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
                return file, False
            digest, shape, size = sha256(), None, 0
            while piece := os.read(descriptor, _PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
                if size == len(piece) == status.st_size:  # the whole file, which need not be read again
                    shape = parse_header(io.BytesIO(piece))
            if shape is None:
                os.lseek(descriptor, 0, os.SEEK_SET)
                with open(descriptor, "rb", closefd=False) as opened:
                    shape = parse_header(opened)
            before, after = stamp_of(status), stamp_of(os.fstat(descriptor))
        finally:
            os.close(descriptor)
    except OSError:
        return file, False
    if before != after:  # written to just now: no digest holds
        return file, False
    is_lasting = max(after[1], after[2]) < begun - RACY_NS and not isinstance(shape, TransientReason)
    shape = None if isinstance(shape, str) else shape
    return file._replace(stamp=after, digest=digest.digest(), shape=shape), is_lasting


# ---- the tables


def _place(root: Path) -> tuple[Path | None, str]:
    """The table of a folder; None, and why, where there can be none."""
    try:
        folder = user_cache() / "digests"
    except OSError as error:
        return None, reason_of(error)
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in root.name) or "files"
    return folder / f"{name[:40]}-{sha256(os.fsencode(root)).hexdigest()[:16]}.digests", ""


def _load(place: Path | None, say: Callable[[str], None]) -> Table:
    """The table that was kept; an empty one where there is none that can be trusted."""
    if place is None:
        return {}
    try:
        with open_regular(place, MAX_TABLES_BYTES) as file:
            content = file.read()
        if not content.startswith(_MAGIC) and content.startswith(_VERSION):
            return {}  # of another version
        table = _parsed(content)
    except (OSError, UserError):
        return {}
    if table is None:
        say(f"{place} is damaged: the digests of its files are computed anew.")
        return {}
    with suppress(OSError):
        os.utime(place)  # used now: the last to go
    return table


def _parsed(content: bytes) -> Table | None:
    body = memoryview(content)[:-_DIGEST_BYTES]
    if len(content) < _HEADER.size + _DIGEST_BYTES or sha256(body).digest() != content[-_DIGEST_BYTES:]:
        return None
    magic, reader, count, names_bytes = _HEADER.unpack(body[: _HEADER.size])
    begin = _HEADER.size + names_bytes
    if magic != _MAGIC or len(body) != begin + count * _RECORD_BYTES:
        return None
    if reader != _READER:
        return {}  # shapes by another Pillow
    names = bytes(body[_HEADER.size : begin]).split(b"\0") if count else []
    records = (content[at : at + _RECORD_BYTES] for at in range(begin, len(body), _RECORD_BYTES))
    return dict(zip(names, records, strict=True)) if len(names) == count else None


def _keep(place: Path | None, new: Table, present: set[bytes], say: Callable[[str], None]) -> str:
    """Add to the table on the disk; what went wrong, or nothing."""
    assert place is not None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        table = _load(place, say) | new  # again: another process may have written it
        if len(table) > 4 * len(present) + SPARE_NAMES:
            table = {name: record for name, record in table.items() if name in present}
        names = b"\0".join(table)
        body = _HEADER.pack(_MAGIC, _READER, len(table), len(names)) + names + b"".join(table.values())
        write_atomically(place, body + sha256(body).digest())
        _prune(place)
    except OSError as error:
        return f"{place.parent}: {reason_of(error)}"
    return ""


def _prune(newest: Path) -> None:
    """Remove the tables that were not used for longest, until the rest is small enough."""
    sweep(newest.parent)
    tables = []
    for path in newest.parent.glob("*.digests"):
        with suppress(OSError):  # gone meanwhile
            status = path.stat()
            if path != newest:
                tables.append((status.st_mtime, status.st_size, path))
    total = newest.stat().st_size
    for count, (_, size, path) in enumerate(sorted(tables, reverse=True), start=2):
        total += size
        if count > MAX_TABLES or total > MAX_TABLES_BYTES:
            path.unlink(missing_ok=True)
