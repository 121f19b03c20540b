"""JSON records of a run, validated as a whole when they are read: types are strict and unknown fields are refused.

A record states the version of its schema. One without it is of the time before there were versions, and is still read;
one of a later version is refused by name. Imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from simclr.errors import UserError, shown
from simclr.files import MAX_RECORD_BYTES, read_regular, reason_of

SCHEMA_VERSION = 2
"""Of the records below and of config.json: raise it when an earlier version could not read or would misread one."""

Text = InstanceOf[str]
"""Any text: a path may hold bytes that are not Unicode, which Python keeps as lone surrogates."""
Kind = TypeVar("Kind", bound="Record")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Record(_Strict):
    """A JSON file."""

    schema_version: int = SCHEMA_VERSION


class OptionsRecord(_Strict):
    """How a run opened its images."""

    strict: bool = False
    labels: Text | None = None
    pack: Text = "auto"
    side: int | None = Field(default=None, ge=1)


class LeftOutRecord(_Strict):
    """A file that was no image."""

    key: Text
    reason: Text


class DataRecord(_Strict):
    """The images that a run is trained on."""

    source: Text
    options: OptionsRecord
    name: Text
    images: int = Field(ge=0)
    channels: int = Field(default=3, ge=1)
    classes: list[Text] | None
    left_out: list[LeftOutRecord]
    fingerprint: str


class MachineRecord(_Strict):
    """Versions and hardware; other facts are free."""

    model_config = ConfigDict(extra="allow")

    cpu_threads: int = Field(ge=1, le=1 << 16)


class TaskRecord(_Strict):
    """How `simclr resume` starts a training again."""

    name: Text
    """Of the command."""
    options: dict[str, Any]
    """Its arguments and settings, with absolute paths."""


class RunRecord(Record):
    """run.json: the manifest of a training, whatever its method."""

    data: DataRecord | None = None
    """None: the images were given as an object, or belong to an evaluation."""
    machine: MachineRecord
    method: Text = "simclr"
    settings: str | None = None
    """Digest of those settings in config.json that determine the result (`settings_digest`)."""
    inputs: dict[str, Any] = Field(default_factory=dict)
    """What else determines the result: digests of images, targets and initial weights, seed, version of the code."""
    task: TaskRecord | None = None


class SummaryRecord(Record):
    """summary.json: written when a run ends; the other figures are free."""

    model_config = ConfigDict(extra="allow")

    steps: int = Field(ge=0)


def read_record(path: Path, kind: type[Kind], *, remedy: str) -> Kind:
    """A record of a run.

    Args:
        remedy: What to try where it is damaged.

    Raises:
        UserError: It cannot be read, is no JSON object, is of a later version, or a field is unknown, missing or wrong.
    """
    values = read_json(path, remedy=remedy)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {first_error(error)}; {remedy}.") from None
    except RecursionError:
        raise UserError(f"{path} is damaged: it is nested too deeply; {remedy}.") from None


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """The JSON object in a file, of this schema version or an earlier one.

    Raises:
        UserError: It cannot be read, is no such object, has a key twice or a number that is not finite, or is of a
            later version.
    """
    try:
        values = strict_json(read_regular(path, MAX_RECORD_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error, path)}; {remedy}.") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: it is no valid JSON ({shown(str(error), 200)}); {remedy}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds a {type(values).__name__} in place of an object; {remedy}.")
    version = values.get("schema_version", SCHEMA_VERSION)
    if type(version) is int and version > SCHEMA_VERSION:
        raise UserError(f"{path} was written by a newer simclr; upgrade simclr to read it.")
    return values


def strict_json(content: bytes | str) -> Any:
    """What JSON says.

    Raises:
        ValueError: It is no JSON, has a key twice or a number that is not finite, or is nested too deeply.
    """
    try:
        return json.loads(content, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def first_error(error: ValidationError) -> str:
    """The first thing that does not fit, and where, for the inside of a sentence."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:80] or "the record"
    reason = first["msg"].removeprefix("Value error, ").rstrip(".")[:200]
    return shown(f"{place}: {reason}", 300)


def versioned(values: Mapping[str, Any]) -> bytes:
    """A record as the bytes of its file."""
    return (json.dumps({"schema_version": SCHEMA_VERSION, **values}, indent=2) + "\n").encode()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is there twice")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
