"""What is done and need not be done again: one JSON line for each piece of work, under a key of all that it depends on.

A line that was cut short by a kill counts as not written.
"""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from simclr import __version__
from simclr.distributed import World
from simclr.errors import UserError

Entry = dict[str, Any]
"""What JSON can hold."""


class Ledger:
    """Finished pieces of work, in memory and, where there is a file, on the disk.

    Args:
        file: JSON lines; None: nothing outlives this object.
        world: The processes that share the work; all make the same calls, and the main one writes.

    Raises:
        UserError: The file cannot be read or written.
    """

    def __init__(self, file: Path | None, world: World | None = None) -> None:
        self.file = file
        self.reused = 0
        """Calls of `get` that were answered from the file."""
        self._world = World() if world is None else world
        self._known: dict[str, Entry] = {}
        if file is not None:
            self._known = self._world.broadcast(_read(file) if self._world.is_main else {})
        self._old = frozenset(self._known)

    def get(self, key: Entry, make: Callable[[], Entry]) -> Entry:
        """What is noted under `key`, else what `make` gives, which is noted before it is returned."""
        key = {**key, "version": __version__}  # other code, other results
        name = name_of(key)
        self.reused += name in self._old
        if name not in self._known:
            value = make()
            if self._world.is_main and self.file is not None:
                _append(self.file, {"key": key, "value": value})
            self._known[name] = value
        return self._known[name]


def name_of(key: Entry) -> str:
    """A short name, fit for a folder, that stands for all of the key."""
    return sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Entry]:
    known: dict[str, Entry] = {}
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); name another folder for the results.") from error
    for line in lines:
        try:
            record = json.loads(line)
            known[name_of(record["key"])] = record["value"]
        except (ValueError, KeyError, TypeError):
            continue  # cut short by a kill, or empty
    return known


def _append(file: Path, record: Entry) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab+") as lines:
            if lines.tell():
                lines.seek(-1, os.SEEK_END)
                lines.write(b"" if lines.read() == b"\n" else b"\n")  # a line of its own behind one that was cut short
            lines.write(json.dumps(record).encode() + b"\n")
            lines.flush()
            os.fsync(lines.fileno())
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); name another folder for the results.") from error
