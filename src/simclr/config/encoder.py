"""Which encoder, and what it expects of its input. Imports no torch, so that the command line stays quick.

The ResNets are those of google-research/simclr, resnet.py; `resnet10`, `small` and the strided stem are ours.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from simclr.errors import UserError, shown

TIMM, TORCHVISION = "timm/", "torchvision/"
Stem = Literal["auto", "cifar", "strided", "imagenet"]
STEMS: tuple[Stem, ...] = get_args(Stem)
Feature = Literal["h", "stage4", "stages3-4", "stages1-4"]
FEATURES: tuple[Feature, ...] = get_args(Feature)
STAGES_READ: dict[Feature, int] = {"stage4": 1, "stages3-4": 2, "stages1-4": 4}
"""Features on grids -> last stages of a ResNet that they are read from."""
Scaling = Literal["none", "standardised", "whitened"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
GRID = 4  # cells a side, at most, that a stage's feature map is averaged to
CIFAR_STEM_UP_TO = 32  # pixels; the authors' run.py takes the small stem at and below this size


MAX_CHANNELS = 1 << 16
"""Of any layer; SimCLR's widest network, ResNet-50 (4x), has 8,192."""
MAX_INPUT_CHANNELS = 1024  # hyperspectral cameras have up to some hundred
MAX_SIZE = 2048  # pixels; timm's largest models take 1,024, and a batch of 256 colour images of 2,048 is 13 GB
MAX_NAME = 200  # characters of an encoder's name; timm's longest has 70

ADAPTABLE = tuple(f"{TORCHVISION}resnet{depth}" for depth in (18, 34, 50, 101, 152))


class ResNetShape(NamedTuple):
    """Blocks of a ResNet before the width multiplier."""

    bottleneck: bool
    blocks: tuple[int, int, int, int]
    width: float = 1.0


RESNETS = {
    "small": ResNetShape(False, (1, 1, 1, 1), width=0.25),  # 16-32-64-128 channels, for CPUs
    "resnet10": ResNetShape(False, (1, 1, 1, 1)),
    "resnet18": ResNetShape(False, (2, 2, 2, 2)),
    "resnet34": ResNetShape(False, (3, 4, 6, 3)),
    "resnet50": ResNetShape(True, (3, 4, 6, 3)),
    "resnet101": ResNetShape(True, (3, 4, 23, 3)),
    "resnet152": ResNetShape(True, (3, 8, 36, 3)),
    "resnet200": ResNetShape(True, (3, 24, 36, 3)),
}


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder's architecture and input, as they travel with its weights.

    Raises:
        UserError: A value is not allowed, or does not go with the others.
    """

    name: str
    """One of `RESNETS`, or timm/NAME or torchvision/NAME for a model of theirs."""

    _: KW_ONLY

    channels: int
    """Channels of the input: 1 for gray, 3 for colour."""

    size: int
    """Height and width of the input, in pixels."""

    width: float = 1.0
    """Multiplier on every channel count of a ResNet, whole or fractional (SimCLR section 4.1: 1, 2, 4)."""

    stem: Stem = "auto"
    """First layers of a ResNet: 3x3 (cifar), 3x3/2 (strided; ours, for CPUs), or 7x7/2 and max-pool (imagenet); auto:
    cifar up to size 32, else imagenet."""

    sk: bool = False
    """Selective kernels in a ResNet's bottlenecks, and ResNet-D's stem and shortcuts (SimCLR v2 section 2). A switch,
    for the authors have but one ratio beside 0, 0.0625, and any turns ResNet-D on."""

    mean: tuple[float, ...] | None = None
    """Per channel, subtracted from pixels in [0, 1]; None: pixels go in as they are, as the authors do."""

    std: tuple[float, ...] | None = None
    """Per channel, divides what `mean` left."""

    stem_padding: int = 1
    """Of an imported torchvision ResNet's cifar stem: pixels that its convolution pads; solo-learn's pads 2."""

    stem_relu: bool = True
    """Of an imported torchvision ResNet's cifar stem: whether a ReLU follows; lightly's CIFAR-10 example loses it."""

    feature: Feature = "h"
    """What the encoder returns and the head reads: h, after the global average pool (SimCLR section 2.1); or feature
    maps of a ResNet's stages, which keep positions, averaged to at most 4 x 4 cells and put side by side: of the last
    stage (stage4), the last two or all four. The weights are the same."""

    scaling: Scaling = "none"
    """What is done to the features that are returned (`models/feature_scaling.py`): none, standardised by training
    images, or whitened: standardised, with the largest principal components shrunk."""

    def __post_init__(self) -> None:
        _check_name(self.name)
        for name, limit in (("channels", MAX_INPUT_CHANNELS), ("size", MAX_SIZE)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise UserError(
                    f"The encoder's {name} was {_value(value)}; it must be a whole number from 1 to {limit}."
                )
        if type(self.sk) is not bool:
            raise UserError(f"The encoder's sk was {_value(self.sk)}; it must be true or false.")
        self._check_width()
        if not isinstance(self.stem, str) or self.stem not in STEMS:
            raise UserError(f"The stem was {_value(self.stem)}; it must be one of {', '.join(STEMS)}.")
        if type(self.stem_padding) is not int or self.stem_padding not in range(4) or type(self.stem_relu) is not bool:
            raise UserError("The encoder's stem_padding must be from 0 to 3, and its stem_relu true or false.")
        if self.is_external and self.sk:
            raise UserError(
                f"{self.name} was given --sk; selective kernels are made for our ResNets, such as resnet50."
            )
        if self.is_external and (self.width != 1.0 or self.stem != "auto") and not self.is_adapted:
            raise UserError(
                f"{self.name} was given the width {self.width} and the stem {self.stem!r}; timm and torchvision models "
                "have their own, so leave the width at 1 and the stem at auto, or take a ResNet."
            )
        if (self.stem_padding != 1 or not self.stem_relu) and not (self.is_adapted and self.stem == "cifar"):
            raise UserError(
                f"{self.name} with the {self.stem} stem was given stem_padding {self.stem_padding} and stem_relu "
                f"{self.stem_relu}; only the cifar stem of a torchvision ResNet has other than 1 and true."
            )
        if not isinstance(self.feature, str) or self.feature not in FEATURES:
            raise UserError(f"The features were {_value(self.feature)}; they must be one of {', '.join(FEATURES)}.")
        if self.feature != "h" and self.is_external:
            raise UserError(
                f"{self.name} was given the features {self.feature}; they are read from the stages of our ResNets, "
                "such as resnet18, and of others h alone."
            )
        if not isinstance(self.scaling, str) or self.scaling not in SCALINGS:
            raise UserError(f"The scaling was {_value(self.scaling)}; it must be one of {', '.join(SCALINGS)}.")
        self._check_normalisation()

    @property
    def is_external(self) -> bool:
        """Whether the encoder is a model of timm or torchvision."""
        return self.name.startswith((TIMM, TORCHVISION))

    @property
    def is_adapted(self) -> bool:
        """Whether the encoder is a torchvision ResNet of another width or stem, as other libraries train them."""
        return self.name in ADAPTABLE and self.stem in ("auto", "cifar") and (self.width != 1.0 or self.stem != "auto")

    @property
    def resolved_stem(self) -> Stem:
        """The stem of a ResNet, with auto decided by the size."""
        if self.stem == "auto":
            return "cifar" if self.size <= CIFAR_STEM_UP_TO else "imagenet"
        return self.stem

    @property
    def grids(self) -> tuple[int, ...]:
        """Cells a side of the feature maps that features are read from, first stage first; empty for h."""
        halvings = {"cifar": 0, "strided": 1, "imagenet": 2}[self.resolved_stem]
        sides = [math.ceil(self.size / 2 ** (halvings + stage)) for stage in range(4)]  # of a ResNet's four stages
        return () if self.feature == "h" else tuple(min(GRID, s) for s in sides[-STAGES_READ[self.feature] :])

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON values, `scaling` only where there is any: records were written before it was."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if (key, value) != ("scaling", "none")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EncoderConfig":
        """The inverse of `to_dict`.

        Raises:
            UserError: A field is unknown or missing, or a value is not allowed.
        """
        known = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted({"name", "channels", "size"} - set(values))
        if unknown or missing:
            problems = [f"{shown(str(key))} is unknown" for key in unknown[:3]] + [
                f"{key} is missing" for key in missing
            ]
            raise UserError(f"The encoder's description does not fit: {', '.join(problems)}; fields: {sorted(known)}.")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def _check_width(self) -> None:
        width = self.width
        if not _is_number(width) or width <= 0:
            raise UserError(f"The width multiplier was {_value(width)}; it must be a number greater than 0.")
        if self.is_external and self.name not in ADAPTABLE:
            return
        shape = RESNETS[self.name.removeprefix(TORCHVISION)]
        limit = MAX_CHANNELS / ((2048 if shape.bottleneck else 512) * shape.width)
        if width > limit:
            raise UserError(
                f"A width multiplier of {width:g} is more than {self.name} can have; take at most {limit:g}."
            )
        if self.is_external:
            return
        least = (2 if self.sk else 1) / (64 * RESNETS[self.name].width)  # ResNet-D's stem begins with half the channels
        if width < least:
            raise UserError(f"A width multiplier of {width} leaves {self.name} no channel; take at least {least}.")

    def _check_normalisation(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise UserError("Only one of mean and std was given; give both, or neither for pixels as they are.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None:
                continue
            if not isinstance(values, tuple) or not all(_is_number(value) for value in values):
                raise UserError(f"The encoder's {name} must be a list of numbers, one per channel.")
            if len(values) != self.channels:
                raise UserError(f"The {name} has {len(values)} values; it needs one per channel, {self.channels}.")
        if self.std is not None and min(self.std) <= 0:
            raise UserError(f"The std was {shown(str(self.std))}; every value must be greater than 0.")


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e30 and not math.isnan(value)


def _value(value: Any) -> str:
    """A value for a sentence; of a container, which may be huge, its type alone."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of more than 64 bits"
    return shown(repr(value)) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _check_name(name: str) -> None:
    if not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable():
        raise UserError(f"The encoder's name was {_value(name)}; it must be a text of at most {MAX_NAME} characters.")
    if name in RESNETS or (name.startswith((TIMM, TORCHVISION)) and name not in (TIMM, TORCHVISION)):
        return
    close = difflib.get_close_matches(name.lower(), RESNETS, n=2, cutoff=0.5)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise UserError(
        f"There is no encoder {name!r}{hint}; known: {', '.join(RESNETS)}, {TIMM}NAME and {TORCHVISION}NAME."
    )
