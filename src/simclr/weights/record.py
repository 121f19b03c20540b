"""The records that travel with weights (config.json, FILE.json), validated as a whole before anything is built.

They may come from strangers. Types are strict (no text for a number, no 1 for true), unknown fields are refused, and
each count has a limit, for a network is built from them.
"""

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from simclr.config.encoder import MAX_CHANNELS, EncoderConfig, Feature
from simclr.config.records import strict_json
from simclr.errors import UserError, shown
from simclr.files import MAX_RECORD_BYTES, read_regular
from simclr.models.heads import MAX_LAYERS
from simclr.weights.training_progress import TrainingProgress

FORMAT = "simclr-encoder-1"
"""Format and version of config.json; a reader of version 1 refuses version 2 by name."""

MAX_CLASSES = 100_000  # ImageNet-21k has 21,843
MAX_CLASS_NAME = 1000  # characters; a file's name has at most 255

ClassNames = Annotated[list[Annotated[str, Field(max_length=MAX_CLASS_NAME)]], Field(max_length=MAX_CLASSES)]


Record = TypeVar("Record", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class InputRecord(_Strict):
    """What the encoder is fed: there is one range and one layout."""

    range: list[float]
    layout: Literal["NCHW"]
    preprocessing: Literal["google", "torchvision"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.range != [0.0, 1.0]:
            raise ValueError("the range must be [0, 1]")
        return self


class HeadRecord(_Strict):
    """The arguments of `ProjectionHead`."""

    kind: Literal["none", "linear", "nonlinear"]
    layers: int = Field(ge=0, le=MAX_LAYERS)
    dim: int = Field(ge=1, le=MAX_CHANNELS)
    norm: bool = True
    reads: Feature | None = None


class ClassifierRecord(_Strict):
    """Names of the classes in the order of the logits, and the layer of the head that is read."""

    classes: ClassNames
    head_layer: int = Field(ge=0, le=MAX_LAYERS)


class EncoderRecord(_Strict):
    """config.json of an encoder's folder."""

    format: str
    encoder: dict[str, Any]
    input: InputRecord
    num_features: int = Field(ge=1, le=MAX_CHANNELS)
    head: HeadRecord | None = None
    classifier: ClassifierRecord | None = None
    step: int | None = Field(default=None, ge=0)
    total_steps: int | None = Field(default=None, ge=0)
    origin: Any = None
    """Free facts about where the weights come from; nothing is decided by them."""

    @property
    def config(self) -> EncoderConfig:
        """The encoder's own description.

        Raises:
            UserError: A field is unknown or missing, or a value is not allowed.
        """
        return EncoderConfig.from_dict(self.encoder)

    @property
    def progress(self) -> TrainingProgress | None:
        """How far the training had come; None: unknown."""
        return TrainingProgress.from_dict({"step": self.step, "total_steps": self.total_steps})

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.progress  # noqa: B018, it refuses numbers that do not fit together
        return self


class ExportRecord(BaseModel):
    """FILE.json of `simclr export`, or the same in the file's metadata; what is written for others is not read."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    class Preprocessing(BaseModel):
        """What is read of it."""

        preset: Literal["google", "torchvision"]

    format: str
    encoder: dict[str, Any]
    num_features: int = Field(ge=1, le=MAX_CHANNELS)
    preprocessing: Preprocessing
    classes: ClassNames
    library: Literal["torchvision", "timm"] | None = None
    classifier: Annotated[str, Field(max_length=200)] | None = None
    sha256: str = ""
    step: int | None = Field(default=None, ge=0)
    total_steps: int | None = Field(default=None, ge=0)

    @property
    def progress(self) -> TrainingProgress | None:
        """As of an `EncoderRecord`."""
        return TrainingProgress.from_dict({"step": self.step, "total_steps": self.total_steps})

    @property
    def config(self) -> EncoderConfig:
        """As of an `EncoderRecord`."""
        return EncoderConfig.from_dict(self.encoder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file.

    Raises:
        UserError: As `parse_json`, or it is no regular file, or too large.
        OSError: It is not there or may not be read.
    """
    return parse_json(read_regular(path, MAX_RECORD_BYTES), str(path))


def parse_json(content: bytes | str, name: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        name: What is read, for the sentence.

    Raises:
        UserError: It is no JSON, or no object, or has a key twice, NaN, or an infinite number.
    """
    try:
        values = strict_json(content)
    except ValueError as error:
        raise UserError(f"{name} is no valid JSON: {shown(str(error), 200)}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} should hold a JSON object, and holds a {type(values).__name__}.")
    return values


def validated(kind: type[Record], values: Mapping[str, Any], name: str) -> Record:
    """The record that the values make.

    Args:
        name: Where they are from, for the sentence.

    Raises:
        UserError: A field is unknown, missing, of another type or out of its limits.
    """
    try:
        record = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = shown(".".join(str(part) for part in first["loc"])) or "the record"
        reason = first["msg"].removeprefix("Value error, ")
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(f"{name} does not fit: {place}: {shown(reason, 200)}{more}.") from None
    except RecursionError:
        raise UserError(f"{name} does not fit: it is nested too deeply.") from None
    return record


def require_class_names(classes: list[str], name: str) -> None:
    """Refuse names with control characters, which a terminal would obey.

    Raises:
        UserError: A name has one.
    """
    bad = next((text for text in classes if text != escaped(text)), None)
    if bad is not None:
        raise UserError(f"{name} does not fit: the class name '{shown(ascii(bad)[1:-1])}' has control characters.")


def escaped(text: str) -> str:
    """The text, control characters and lone surrogates written as escapes."""
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
