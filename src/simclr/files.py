"""Files: bounded reads of regular files, content digests, and a lock that one process at a time holds."""

import errno
import hashlib
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path

from simclr.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no file locks, so two processes are not kept apart there
    fcntl = None

MAX_RECORD_BYTES = 16 << 20
"""Size limit of a JSON record (config.json, run.json, ...); the largest that we write, the class names of ImageNet-21k
with their accuracies, has 2 MB."""


def reason_of(error: OSError) -> str:
    """What the operating system says went wrong, for the inside of a sentence ("no space left on device")."""
    return (error.strerror or str(error) or type(error).__name__).lower()


@contextmanager
def open_regular(path: Path, max_bytes: int | None = None) -> Iterator[BufferedReader]:
    """Open a regular file for reading; a FIFO, a device or a folder is refused instead of waited for.

    Args:
        path: The file; symbolic links are followed.
        max_bytes: Refuse a larger file; None: no limit.

    Raises:
        UserError: It is not a regular file, or larger than `max_bytes`.
        OSError: It is not there or may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file; give a file that can be read from beginning to end.")
        if max_bytes is not None and status.st_size > max_bytes:
            raise UserError(f"{path} has {status.st_size:,} bytes; such a file has at most {max_bytes:,}.")
        yield file


def read_regular(path: Path, max_bytes: int) -> bytes:
    """All bytes of a regular file of at most `max_bytes`; errors as in `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read(max_bytes)


def file_digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of a regular file's content; errors as in `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileLock:
    """An exclusive lock on a file, held by one process at a time.

    The operating system keeps it (flock), so it ends with the process that held it, however that ended: the file that
    stays behind is no obstacle. It counts between processes of one machine and, where the network's file system keeps
    locks, between machines. Where there are no locks at all, `acquire` succeeds for everyone.

    Args:
        path: The lock file. Its content, who holds the lock, is only for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BufferedRandom | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free; whether it is now held. Never waits.

        Raises:
            OSError: The lock file cannot be made.
        """
        if self._file is not None:
            return True
        file = open(self.path, "ab+")  # noqa: SIM115, it stays open while the lock is held
        if not _try_lock(file.fileno()):
            file.close()
            return False
        self._file = file
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            file.flush()
        return True

    def holder(self) -> str:
        """Who holds the lock, for a sentence: "process 1234 on host", or "another process" where that is unknown."""
        try:
            found = json.loads(read_regular(self.path, 4096))
            return f"process {int(found['pid'])} on {str(found['host'])[:64]}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Give the lock back; the file stays, because removing it would let two processes hold two files."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _try_lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
