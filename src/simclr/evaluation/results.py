"""Result store: one JSON line for each finished piece of work, under a key of all that decides it (`keys.py`).

A line holds the key, the value, what a person wants to know about it (`about`: decides nothing) and a checksum of the
three. Only whole lines with the right checksum count; others, of a kill, a damaged disk or an older version of this
file, are left alone and not used. Several processes may append to one file at once.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr import __version__
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.files import open_regular, reason_of, wait_for_lock
from simclr.training.progress import say

Entry = dict[str, Any]
"""What JSON can hold."""


class ResultStore:
    """Finished pieces of work, in memory and, where there is a file, on the disk.

    A file that cannot be read or written loses nothing of what is computed: a warning is printed once, and the results
    of this process stay in memory.

    Args:
        file: JSON lines; None: nothing outlives this object.
        world: The processes that share the work; all make the same calls, and the main one writes.
    """

    def __init__(self, file: Path | None, world: DistributedContext | None = None) -> None:
        self.file = file
        self.reused = 0
        """Calls of `get` that were answered from the file."""
        self._world = DistributedContext() if world is None else world
        self._known: dict[str, Entry] = {}
        self._writes = file is not None and self._world.is_main
        if file is not None:
            self._known = self._world.broadcast(_values(file) if self._world.is_main else {})
        self._old = frozenset(self._known)

    def get(self, key: Entry, make: Callable[[], Entry], *, about: Mapping[str, Any] | None = None) -> Entry:
        """The value kept under `key`, else what `make` gives, which is kept before it is returned.

        Args:
            key: All that decides the value, the version of the computation included.
            make: Called by every process, or by none.
            about: Kept beside the value for readers, such as names; decides nothing.
        """
        name = name_of(key)
        self.reused += name in self._old
        if name not in self._known:
            value = make()
            if self._writes:
                self._append(self.file, {"key": key, "value": value, "about": {**(about or {}), **_versions()}})
            self._known[name] = value
        return self._known[name]

    def _append(self, file: Path | None, record: Entry) -> None:
        assert file is not None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(record | {"check": _checksum(record)}).encode()
            append_line(file, line, unless=lambda: _holds(file, name_of(record["key"])))
        except OSError as error:
            self._writes = False
            say(f"Results cannot be kept in {file} ({reason_of(error)}); those of this call are kept in memory only.")


def name_of(key: Entry) -> str:
    """A short name, fit for a folder, that stands for all of the key."""
    return sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def read_results(file: Path) -> tuple[list[Entry], int]:
    """The intact lines of a result file, in the order in which they were written, and the number of all others.

    Raises:
        OSError: The file is there and cannot be read.
        UserError: It is no regular file.
    """
    try:
        with open_regular(file) as lines:
            content = lines.read().split(b"\n")
    except FileNotFoundError:
        return [], 0
    parsed = [_parse(line) for line in content if line.strip()]
    found = [record for record in parsed if record is not None]
    return found, len(parsed) - len(found)


def append_line(file: Path, line: bytes, *, unless: Callable[[], bool] = lambda: False) -> None:
    """Add a line to a file in one write, which no other process's write can tear.

    Args:
        unless: Asked while no other process may write; True: nothing is written.

    Raises:
        OSError: The file cannot be written, or not all of the line; what was cut short is closed by the next line.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        wait_for_lock(descriptor)
        if unless():
            return
        size = os.fstat(descriptor).st_size
        if size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":  # behind a line that was cut short
                line = b"\n" + line
        line += b"\n"
        if os.write(descriptor, line) < len(line):
            raise OSError("the disk took only a part of the line")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds(file: Path, name: str) -> bool:
    """Whether another process has kept the result of this name while it was computed here."""
    try:
        return any(name_of(record["key"]) == name for record in read_results(file)[0])
    except (OSError, UserError):
        return False


def _values(file: Path) -> dict[str, Entry]:
    """The values of a result file by the names of their keys; says what cannot be used."""
    try:
        records, others = read_results(file)
    except OSError as error:
        say(f"{file} cannot be read ({reason_of(error)}); results in it are computed again.")
        return {}
    except UserError as error:
        say(f"{error} Results are computed again.")
        return {}
    if others:
        lines = "line is" if others == 1 else "lines are"
        say(f"{others:,} {lines} damaged or of another version in {file}, and not used.")
    return {name_of(record["key"]): record["value"] for record in records}


def _parse(line: bytes) -> Entry | None:
    """An intact record, or None."""
    try:
        record = json.loads(line)
        intact = record.pop("check") == _checksum(record)
        return record if intact and isinstance(record["key"], dict) and isinstance(record["value"], dict) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _checksum(record: Entry) -> str:
    """Of what reading the line gives."""
    return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _versions() -> Entry:
    """What computed a result: kept with it, and no part of its key."""
    return {
        "simclr": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip
