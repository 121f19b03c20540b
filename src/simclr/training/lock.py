"""The lock of a folder that a process is writing: no other process can write it at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.files import FileLock, writing

LOCK = ".lock"
"""Of a folder that a process is writing: held by that process (`hold`)."""

_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""Folders that this thread holds."""


@contextmanager
def hold(folder: Path, world: DistributedContext) -> Iterator[None]:
    """Keep every other process from writing a folder, by the lock FOLDER/.lock, until the end of the block.

    The main process takes the lock; the folder is made if it is missing, and removed again if it stays empty. The lock
    ends with the process, so one that was left by a killed process is no obstacle. Blocks for the same folder may
    lie within one another.

    Raises:
        UserError: Another process holds the folder, or it cannot be written; in every process of the world.
    """
    place = folder.absolute()
    if place in _held.get():
        yield
        return
    lock, made = FileLock(place / LOCK), []
    world.on_main(lambda: _acquire(folder, lock, made))
    token = _held.set(_held.get() | {place})
    try:
        yield
    finally:
        _held.reset(token)
        if world.is_main:
            _release(lock, made)


def _acquire(folder: Path, lock: FileLock, made: list[Path]) -> None:
    """Take the lock of a folder, adding the folders that are made for it to `made`, innermost first."""
    try:
        with writing(folder):
            acquired = None
            while acquired is None:
                made[:] = [place for place in (folder, *folder.parents) if not place.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    acquired = lock.acquire()
                except FileNotFoundError:
                    if folder.is_dir():  # else its last holder left it empty, and has removed it just now
                        raise
        if not acquired:
            raise UserError(f"{folder} is being written by {lock.holder()}; wait for its end, or stop it first.")
    except BaseException:
        _release(lock, made)
        raise


def _release(lock: FileLock, made: list[Path]) -> None:
    lock.release(remove=True)
    for folder in made:
        with suppress(OSError):  # not empty, or another process has begun there
            folder.rmdir()
