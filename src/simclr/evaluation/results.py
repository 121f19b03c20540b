"""`Result`: the one record of a measurement, and the store that keeps results as JSON lines.

A line of a result file holds the fields of a `Result` and a checksum of them. Only whole lines with the right checksum
count; others, of a kill, a damaged disk or another version of this file, are left alone and not used. Several
processes may append to one file at once.
"""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, InstanceOf, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from simclr import __version__
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.first_schema import upgraded
from simclr.files import open_regular, reason_of, wait_for_lock
from simclr.training.progress import say

SCHEMA_VERSION = 2
"""Of a line: raise it when an earlier version could not read or would misread one. Lines of schema 1, which has no
number, are read too (`first_schema.py`)."""

Entry = dict[str, Any]
"""What JSON can hold."""

KEY_FIELDS = ("protocol", "version", "model", "data", "settings", "seed")
"""The fields of a `Result` that determine its metrics."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a computation gives: the part of a `Result` that its key determines."""

    metrics: dict[str, float | None]
    """Name -> value. Accuracies and scores are shares in [0, 1]; None: not defined here, such as after divergence."""
    details: Entry = field(default_factory=dict)
    """What else there is to keep, such as the outcome of each test image."""
    description: str = ""
    """What was done, in a few words."""


@dataclass(frozen=True, kw_only=True)
class About:
    """Names and counts for readers of a result. They determine nothing; the key holds the digests."""

    subject: str = ""
    """The model under test as the user named it: "encoder", "random", "pixels", "supervised", a path, timm/NAME."""
    data_name: str = ""
    split: str = ""
    """How images were divided into training and test images, in words."""
    num_train: int | None = None
    """Labelled images to learn from."""
    num_test: int | None = None
    num_classes: int | None = None
    """Classes to learn."""


@validated_dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Result:
    """One measurement: one protocol on one model, one data set and one seed.

    The fields of `KEY_FIELDS` determine the metrics; the store is keyed by them. All values are such as JSON can hold.

    Raises:
        ValidationError: A field has another type, or a metric is not finite.
    """

    protocol: str
    version: dict[str, int]
    """Version of each part of the computation, such as {"knn": 1}; no release of the package."""
    model: Entry
    """"weights": SHA-256 (hexadecimal) of the weights, None for pixels and for training from scratch; network,
    preprocessing, kind of device, and "head" where the projection head takes part."""
    data: Entry
    """Part ("train", "validation", "test") -> SHA-256 (hexadecimal) of its images and labels."""
    settings: Entry
    seed: int
    metrics: dict[str, float | None]
    details: Entry = field(default_factory=dict)
    description: str = ""
    subject: InstanceOf[str] = ""
    data_name: InstanceOf[str] = ""
    split: InstanceOf[str] = ""
    num_train: int | None = None
    num_test: int | None = None
    num_classes: int | None = None
    software: dict[str, str] = field(default_factory=dict)
    """Library -> version that computed the result; no part of the key, since between versions numbers agree to
    rounding."""
    schema_version: int = SCHEMA_VERSION

    @property
    def key(self) -> Entry:
        """The fields that determine the metrics."""
        return {name: getattr(self, name) for name in KEY_FIELDS}

    @property
    def weights(self) -> str | None:
        """SHA-256 (hexadecimal) of the weights under test."""
        return self.model.get("weights")

    @property
    def layer(self) -> str | None:
        """Layer of the network whose output was taken as features; None: the encoder's features."""
        return self.settings.get("layer")

    def value(self, metric: str) -> float:
        """A metric that is defined for this result."""
        number = self.metrics[metric]
        assert number is not None, (metric, self.protocol)
        return number

    def named(self, about: About) -> "Result":
        """The same result under the names that the present call uses."""
        return replace(self, **asdict(about))

    def to_dict(self) -> Entry:
        """Plain JSON values; `Result(**values)` reads them back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class ResultStore:
    """Finished measurements, in memory and, where there is a file, on the disk.

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
        self._known: dict[str, Result] = {}
        self._num_read = _size_of(file)  # bytes; what other processes append from now on lies behind them
        self._appended: set[str] = set()  # names of the results there
        self._writes = file is not None and self._world.is_main
        if file is not None:
            self._known = self._world.broadcast(_results_by_name(file) if self._world.is_main else {})
        self._from_file = frozenset(self._known)

    def get(self, key: Entry, make: Callable[[], Measured], about: About | None = None) -> Result:
        """The result kept under `key`, else what `make` gives, which is kept before it is returned.

        Args:
            key: `KEY_FIELDS`: all that determines the result, the version of the computation included (`keys.py`).
            make: Called by every process, or by none.
            about: Names and counts of this call. A result from the file is returned under these too.
        """
        about = about or About()
        name = name_of(key)
        self.reused += name in self._from_file
        if name not in self._known:
            values = _as_json({**key, **asdict(make()), **asdict(about), "software": _software()})
            result = Result(**values)
            if self._writes:
                self._append(result)
            self._known[name] = result
        return self._known[name].named(about)

    def _append(self, result: Result) -> None:
        assert self.file is not None
        file, record = self.file, result.to_dict()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(record | {"check": _checksum(record)}).encode()
            append_line(file, line, unless=lambda: self._is_kept_by_another(result))
        except OSError as error:
            self._writes = False
            say(f"Results cannot be kept in {file} ({reason_of(error)}); those of this call are kept in memory only.")

    def _is_kept_by_another(self, result: Result) -> bool:
        """Whether another process has kept the same result while it was computed here."""
        assert self.file is not None
        try:
            size = _size_of(self.file)
            self._appended |= {name_of(other.key) for other in read_results(self.file, self._num_read)[0]}
            self._num_read = size
        except (OSError, UserError):
            return False
        return name_of(result.key) in self._appended


def name_of(key: Entry) -> str:
    """A short name, fit for a folder, that stands for all of the key: 32 hexadecimal digits of its SHA-256."""
    return sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def read_results(file: Path, begin: int = 0) -> tuple[list[Result], int]:
    """The intact lines of a result file, in the order in which they were written, and the number of all others.

    Args:
        begin: Bytes to skip.

    Raises:
        OSError: The file is there and cannot be read.
        UserError: It is no regular file.
    """
    try:
        with open_regular(file) as lines:
            lines.seek(begin)
            content = lines.read().split(b"\n")
    except FileNotFoundError:
        return [], 0
    parsed = [_parse(line) for line in content if line.strip()]
    results = [result for result in parsed if result is not None]
    return results, len(parsed) - len(results)


def append_line(file: Path, line: bytes, *, unless: Callable[[], bool] = lambda: False) -> None:
    """Add a line to a file in one write, which no other process's write can tear.

    Args:
        unless: Called while no other process may write; True: nothing is written.

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


def _size_of(file: Path | None) -> int:
    """In bytes; 0 where there is none."""
    try:
        return 0 if file is None else file.stat().st_size
    except OSError:
        return 0


def _results_by_name(file: Path) -> dict[str, Result]:
    """The results of a file by the names of their keys; prints what cannot be used."""
    try:
        results, num_others = read_results(file)
    except OSError as error:
        say(f"{file} cannot be read ({reason_of(error)}); results in it are computed again.")
        return {}
    except UserError as error:
        say(f"{error} Results are computed again.")
        return {}
    if num_others:
        lines = "line is" if num_others == 1 else "lines are"
        say(f"{num_others:,} {lines} damaged or of another version in {file}, and not used.")
    return {name_of(result.key): result for result in results}


def _parse(line: bytes) -> Result | None:
    """An intact result, or None."""
    try:
        record = json.loads(line)
        if record.pop("check") != _checksum(record):
            return None
        if "schema_version" not in record:
            record = upgraded(record)
        elif record["schema_version"] != SCHEMA_VERSION:
            return None
        return Result(**record)
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _checksum(record: Entry) -> str:
    """Of what reading the line gives."""
    return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _as_json(values: Entry) -> Entry:
    """What reading gives: lists for tuples, plain floats for NumPy's."""
    return json.loads(json.dumps(values))


@cache
def _software() -> dict[str, str]:
    return {
        "simclr": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip
