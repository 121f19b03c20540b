"""Files: bounded reads of regular files, atomic writes, content digests, a lock, and what the system's errors mean."""

import errno
import hashlib
import json
import os
import re
import secrets
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
_TEMPORARY = re.compile(r"\..+\.(\d{1,10})(?:-[0-9a-f]{8})?\.tmp", re.DOTALL)
"""Name of a file that `replacing` is writing: that of the file it will be, the process, and a random number."""


def reason_of(error: OSError, path: Path | None = None) -> str:
    """What the operating system says went wrong, for the inside of a sentence ("no space left on device").

    Args:
        path: What was being read or written; the reason names the file that the system refused where it is another.
    """
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    named = error.filename if isinstance(error.filename, str) else None
    if error.errno == errno.ENOSPC and _out_of_inodes(named or path):
        reason += ", because no more files can be made there: its inodes are used up"
    if path is not None and named is not None and named != str(path) and not is_temporary(Path(named).name):
        reason += f" ({named})"
    return reason


@contextmanager
def writing(path: Path, *, hint: str = "give another path") -> Iterator[None]:
    """Turn what the operating system refuses while `path` is written into a sentence for the user.

    Args:
        path: The file or folder that the sentence names.
        hint: What to try.

    Raises:
        UserError: An OSError was raised inside, or no file can have this name.
    """
    require_possible(path)
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason_of(error, path)}; {hint}.") from None


def require_possible(path: Path) -> None:
    """Refuse a name that no file can have: one with a null byte, or with text that is not Unicode."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UserError(f"{str(path)!r} cannot be the name of a file; give another one.")


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
        return file.read(os.fstat(file.fileno()).st_size)  # not max_bytes, which would be allocated first


def file_digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of a regular file's content; errors as in `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Give `path` this content, or leave it untouched."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written, which takes its place at the end: fsync, rename, fsync of the folder.

    After an exception `path` is untouched and the other file gone. What a killed process left of an earlier attempt to
    write `path` is removed first.
    """
    sweep(path.parent, path.name)
    temporary = path.with_name(f".{_stem(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _try_lock(file.fileno())  # while it is held, nobody takes the file for the leftover of a killed process
            yield temporary
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files that killed processes left in a folder, and none that is being written.

    Args:
        name: Only those for the file of this name; None: all of them.
    """
    if not folder.is_dir():
        return
    prefix = "." if name is None else f".{_stem(name)}."
    with os.scandir(folder) as entries:
        leftovers = [
            Path(entry.path) for entry in entries if entry.name.startswith(prefix) and is_temporary(entry.name)
        ]
    for leftover in leftovers:
        if not _is_being_written(leftover):
            leftover.unlink(missing_ok=True)


def _stem(name: str) -> str:
    """What a temporary file is named after: the name, cut so that the longer one is allowed too (255 bytes)."""
    return os.fsdecode(os.fsencode(name)[:200])


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that `replacing` gives to what it is writing."""
    return _TEMPORARY.fullmatch(name) is not None


def _is_being_written(temporary: Path) -> bool:
    """Whether a process is at work on it: one that is alive here, or that holds its lock from anywhere."""
    match = _TEMPORARY.fullmatch(temporary.name)
    assert match, temporary
    if int(match[1]) != os.getpid() and _is_alive(int(match[1])):
        return True
    try:
        with open_regular(temporary) as file:
            return not _try_lock(file.fileno())
    except (OSError, UserError):  # gone already, or nothing that we wrote
        return True


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where the call below would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is there, and another user's
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Put a rename on the disk, as far as the file system can."""
    with suppress(PermissionError):  # one may write into a folder without the right to list it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems without it
                raise
        finally:
            os.close(descriptor)


def _out_of_inodes(path: str | Path | None) -> bool:
    """Whether the disk that a path lies on has room for bytes, and none for another file."""
    if path is None or not hasattr(os, "statvfs"):
        return False
    folder = Path(path)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with suppress(OSError):
        status = os.statvfs(folder)
        return status.f_files > 0 and status.f_favail == 0 and status.f_bavail > 0
    return False


Stamp = tuple[int, int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    """Size, times of change and inode: what tells that a file may have another content.

    A program may set the modification time back after exchanging a file, but not the time of the inode's change.
    """
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


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
        while True:
            file = open(self.path, "ab+")  # noqa: SIM115, it stays open while the lock is held
            if not _try_lock(file.fileno()):
                file.close()
                return False
            if _is_same_file(file.fileno(), self.path):
                break
            file.close()  # its last holder has removed it since it was opened, and another may lie there now
        self._file = file
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            file.flush()
        return True

    def holder(self) -> str:
        """Who holds the lock, for a sentence: "process 1234 on host", or "another process" where that is unknown."""
        try:
            record = json.loads(read_regular(self.path, 4096))
            return f"process {int(record['pid'])} on {str(record['host'])[:64]}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back.

        Args:
            remove: Also remove the file, while the lock is still held; `acquire` sees to it that nobody then holds a
                file that is gone.
        """
        if self._file is not None:
            if remove and fcntl is not None:
                with suppress(OSError):
                    self.path.unlink()
            self._file.close()
            self._file = None


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def wait_for_lock(descriptor: int) -> None:
    """Take the lock of an open file as soon as its holder closes it; where there are no locks, go on without."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


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
