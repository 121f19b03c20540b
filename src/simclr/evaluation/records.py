"""Results as they come, kept so that a long evaluation can be stopped and called again.

One JSON object a line: `key` says what was measured on what, `value` what came out. A line that a kill cut short is
passed over.
"""

import json
import os
from pathlib import Path
from typing import Any

from simclr.errors import UserError

Key = dict[str, Any]


class Records:
    """Values by key, in memory and, given a path, in a file.

    Args:
        path: The file, made with the first value; None: nothing outlives the process.
        main: Whether this process writes; the others only remember.

    Raises:
        UserError: The file cannot be read, or, later, be written.
    """

    def __init__(self, path: Path | None, *, main: bool = True) -> None:
        self.path, self._main = path, main
        self._values: dict[str, Any] = {}
        self.reused = 0
        """Values that `get` found and that stood in the file before."""
        if path is not None:
            try:
                lines = path.read_bytes().splitlines() if path.exists() else []
            except OSError as error:
                raise UserError(
                    f"The results in {path} cannot be read: {error.strerror}; name another --out."
                ) from None
            for line in lines:
                try:
                    record = json.loads(line)
                    self._values[_text(record["key"])] = record["value"]
                except (ValueError, KeyError, TypeError):
                    continue
        self._old = frozenset(self._values)

    def get(self, key: Key) -> Any | None:
        """The value of this key, None where there is none."""
        text = _text(key)
        self.reused += text in self._old
        return self._values.get(text)

    def add(self, key: Key, value: Any) -> None:
        """Keep a value; on disk when the call returns."""
        self._values[_text(key)] = value
        if self.path is None or not self._main:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.exists() and not _ends_a_line(self.path)
            with open(self.path, "a") as file:
                file.write(("\n" if torn else "") + json.dumps({"key": key, "value": value}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; name another --out.") from None


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return file.read() in (b"\n", b"")
