"""Location of a folder's pack, whether a pack is worthwhile, and whether the disk has room for it."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from simclr.data.readers.scan import FileEntry
from simclr.errors import UserError

SLOW_SECONDS = 5.0
"""A pack is made where decoding takes longer than this on one core."""
SECONDS_PER_FILE, SECONDS_PER_BYTE = 1.5e-4, 1 / 35e6
"""Of decoding on one core: PNG files of 28 x 28, and JPEG files of 500 x 375 and 90 KB (docs/lab-notes.md)."""
SIDES = (512, 384, 320, 256, 224, 192, 160, 128, 96, 64)
"""Shorter sides that are proposed where native size does not fit."""
KEEP_FREE = 1 << 30
"""Bytes of the disk that a pack leaves to others, such as the checkpoints of the run."""
UNKNOWN_FREE = 4 * 10**9
"""Bytes taken as free where the operating system does not say: what a small machine has to spare."""


def pack_place(setting: str, root: Path, files: Sequence[FileEntry], side: int | None) -> Path | None:
    """The folder of the pack of `root`, or None where none is wanted.

    Args:
        setting: "off"; "auto", which is the user's cache folder if decoding is slow enough to be worth it; else a
            folder that holds packs.
        side: Largest shorter side of the images; packs of different sides are different packs.

    Raises:
        UserError: the pack would lie among the images.
        OSError: the user has no cache folder.
    """
    if setting == "off":
        return None
    root = root.resolve()
    if setting == "auto":
        seconds = len(files) * SECONDS_PER_FILE + sum(file.num_bytes for file in files) * SECONDS_PER_BYTE
        if seconds < SLOW_SECONDS:
            return None
        packs = user_cache() / "packs"
    else:
        packs = Path(setting).expanduser().resolve()
        if packs == root or root in packs.parents:
            raise UserError(f"The pack would lie inside the images' folder {root}: give --pack another folder, or off.")
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in root.name) or "images"
    identity = sha256(os.fsencode(root) + f"\0{side}".encode()).hexdigest()
    return packs / f"{name[:40]}-{identity[:12]}"


def user_cache() -> Path:
    """The user's cache folder, ~/.cache/simclr.

    Raises:
        OSError: This user has no home folder, as in containers that are run under a number.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):
        return Path(cache) / "simclr"
    try:
        return Path.home() / ".cache" / "simclr"
    except RuntimeError:
        raise OSError(errno.ENOENT, "this user has no home folder, and XDG_CACHE_HOME is not set") from None


def room_for(place: Path, files: Sequence[FileEntry], side: int | None) -> tuple[int, str | None]:
    """Bytes that the pixels of `files` take, judging by their headers, and what to do where they do not fit."""
    free = shutil.disk_usage(place).free
    shapes = np.array([file.shape or (0, 0, 0) for file in files], np.int64).reshape(-1, 3)
    needed = _num_bytes(shapes, side)
    if needed + KEEP_FREE <= free:
        return needed, None
    smaller = [s for s in SIDES if side is None or s < side]
    fitting = [s for s in smaller if _num_bytes(shapes, s) + KEEP_FREE <= free]
    proposal = f"--pack-side {fitting[0]} would fit, or " if fitting else ""
    return needed, (
        f"There is no room for the pack: it needs about {size_text(needed)}, and {place} has {size_text(free)} free. "
        f"{proposal}--pack names a folder on a larger disk."
    )


def free_memory() -> int:
    """Bytes of memory that are free on this machine and in this process's container or batch job."""
    return min([_machine_free(), *_cgroups_free()])


def size_text(num_bytes: int) -> str:
    """For a sentence."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _num_bytes(shapes: np.ndarray, side: int | None) -> int:
    """Bytes that the pixels of images take; shapes are (n, 3) heights, widths and channels before shrinking."""
    sizes = shapes[:, :2]
    if side is not None:
        sizes = sizes * np.minimum(1, side / np.maximum(1, sizes.min(axis=1, keepdims=True, initial=1 << 30)))
    return int((sizes.prod(axis=1) * shapes[:, 2]).sum())


def _machine_free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return UNKNOWN_FREE


def _cgroups_free() -> Iterator[int]:
    """What is left to each cgroup above this process that has a limit; files that it caches can be given back."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":  # version 2
            root, cached = Path("/sys/fs/cgroup"), ("inactive_file ", "active_file ")
            limit, usage = "memory.max", "memory.current"
        elif controllers == "memory":  # version 1
            root, cached = Path("/sys/fs/cgroup/memory"), ("total_inactive_file ", "total_active_file ")
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inside = root / place.lstrip("/")
        for folder in (inside, *inside.parents):
            if (folder / limit).is_file() and (folder / limit).read_text().strip() != "max":
                stat = (folder / "memory.stat").read_text().splitlines()
                given_back = sum(int(entry.split()[1]) for entry in stat if entry.startswith(cached))
                yield int((folder / limit).read_text()) - int((folder / usage).read_text()) + given_back
            if folder == root:
                break
