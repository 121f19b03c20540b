"""List the image files of a folder, at any depth, in an order that is the same on every machine.

No file is opened: FIFOs and devices are recognised by their status. Symbolic links to folders are followed once.
"""

import heapq
import os
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from simclr.data.readers.decode import ENDINGS
from simclr.data.source import Skipped, some
from simclr.files import Stamp, reason_of, stamp_of


class FileEntry(NamedTuple):
    """A regular file with the extension of an image; a tuple, because there may be millions."""

    key: str
    """Path below the folder, with forward slashes, in printable form."""
    root: Path
    """The folder; the same object for all of its files."""
    below: str
    """Path below the folder; the same string as the key unless the name is not UTF-8."""
    stamp: Stamp
    """Size in bytes, times and inode at the time of the scan."""
    digest: bytes = b""
    """SHA-256 of its content (`digests.identify`), empty where it is not known."""
    shape: tuple[int, int, int] | None = None
    """Height, width and channels by its header, before shrinking; None where it has no usable one."""

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.root / self.below

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.stamp[0]


class Scan(NamedTuple):
    """Result of a scan: files sorted by key, entries that could not be reached, notes about the rest."""

    files: list[FileEntry]
    skipped: list[Skipped]
    notes: list[str]


def scan_folder(root: Path, besides: Path | None = None) -> Scan:
    """List a folder.

    A folder that is reached twice (through links) is read once, under its real path where that lies inside
    `root`. Links to `root` or to a folder above it are loops and not followed. Hidden folders are left out.

    Args:
        besides: A file that may lie inside and is not data (the label file).
    """
    files: list[FileEntry] = []
    skipped: list[Skipped] = []
    endings: Counter[str] = Counter()
    hidden: list[str] = []
    here = root.resolve()
    seen = {_identity(folder) for folder in here.parents}
    folders, links = [""], []  # keys; links wait until all real folders are read
    while folders or links:
        key = folders.pop() if folders else heapq.heappop(links)
        try:
            identity = _identity(root / key)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(root / key) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            skipped.append(Skipped(_text(key) or ".", f"folder: {reason_of(error)}"))
            continue
        for name in names:  # strings and no Path, which takes longer to make than a file to look at
            below = f"{key}/{name}" if key else name
            path = f"{root}/{below}"
            ending = os.path.splitext(name)[1].lower()
            try:
                status = os.stat(path)  # of what a link leads to
                mode, problem = status.st_mode, "not a regular file"
            except OSError as error:
                status, mode, problem = None, 0, f"cannot be reached: {reason_of(error)}"
            if stat.S_ISDIR(mode):
                if name.startswith("."):
                    hidden.append(below)
                elif os.path.islink(path):
                    heapq.heappush(links, below)
                else:
                    folders.append(below)
            elif ending not in ENDINGS:
                endings[ending] += besides is None or not _same_file(Path(path), besides)
            elif status is not None and stat.S_ISREG(mode):
                files.append(FileEntry(_text(below), root, below, stamp_of(status)))
            else:
                skipped.append(Skipped(_text(below), problem))
    return Scan(sorted(files), sorted(skipped), _notes(+endings, hidden))


def _notes(endings: Counter[str], hidden: list[str]) -> list[str]:
    notes = []
    if endings:
        common = ", ".join(f"{ending or 'no ending'}: {count:,}" for ending, count in endings.most_common(5))
        more = ", ..." if len(endings) > 5 else ""
        files = "1 file" if endings.total() == 1 else f"{endings.total():,} files"
        notes.append(f"{files} with other endings ignored ({common}{more}).")
    if hidden:
        notes.append(f"Hidden folders left out: {some(hidden)}.")
    return notes


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _text(key: str) -> str:
    r"""A key that can be printed and saved: bytes of a name that are not UTF-8 become \x escapes."""
    if key.isascii():
        return key
    text = os.fsencode(key).decode("utf-8", "backslashreplace")
    return key if text == key else text  # the one string, where it can be


def _same_file(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False
