"""Settings of every training: amount, optimiser and schedule, precision, records. Imports no torch."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Self

from simclr.config.schedule import learning_rate, peak_lr, total_steps, warmup_steps
from simclr.errors import UserError

FREE_ON_RESUME = frozenset({"workers", "save_every", "max_checkpoints", "knn_every", "cuda_graph"})
"""Settings that a resumed run may change: they do not affect its result."""

BEFORE = {"nesterov": True, "lr_decay": "cosine"}
"""Later settings, with what held before there were they."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings that all trainings share; what trains sets its own defaults."""

    # ---- amount
    epochs: float
    """Passes over the images."""

    batch_size: int
    """Images per step over all processes."""

    # ---- optimiser and schedule
    optimizer: Literal["lars", "sgd", "adamw", "muon"]
    """LARS as the authors wrote it, SGD with Nesterov momentum, AdamW, or Muon, which makes updates orthogonal."""

    nesterov: bool = True
    """Nesterov momentum for SGD; MoCo uses plain momentum."""

    lr: float
    """Base learning rate, before scaling."""

    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """Peak rate: lr x batch / 256 (linear), lr x sqrt(batch) (sqrt), or lr itself (B.1)."""

    warmup_epochs: float
    """Epochs of linear warm-up from 0 to the peak rate, before it decays."""

    lr_decay: Literal["cosine", "steps"] = "cosine"
    """Decay after the warm-up: cosine to 0, or steps to a tenth at 60 % and to a hundredth at 80 % of the steps, as in
    MoCo v1."""

    weight_decay: float
    """L2 on the weights; batch-norm parameters and biases are exempt."""

    momentum: float = 0.9
    """Momentum of LARS, SGD and Muon, first beta of AdamW."""

    # ---- views
    crop_min: float = 0.08
    """Smallest share of the image's area that a random crop may take."""

    flip: float = 0.5
    """Probability of a left-right flip; 0 where mirror images have another meaning, as with letters."""

    # ---- machine
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the network; auto: bf16 on GPUs that support it, else fp32. The loss is always fp32."""

    deterministic: bool = False
    """On a GPU, use deterministic kernels only (slower). On a CPU all kernels are deterministic."""

    workers: int = 2
    """Threads that decode images and prepare views ahead of the network; 0: none. Changes no pixel."""

    # ---- record
    log_every: int
    """Steps between two records in metrics.jsonl."""

    save_every: int = 500
    """Steps between two checkpoints; one is always written at the end."""

    max_checkpoints: int = 2
    """Number of newest checkpoints that are kept."""

    def steps(self, num_images: int) -> int:
        """Updates of a training on so many images."""
        return total_steps(num_images, self.epochs, self.batch_size)

    @property
    def peak(self) -> float:
        """Highest learning rate."""
        return peak_lr(self.lr, self.batch_size, self.lr_scaling)

    def learning_rate(self, num_images: int) -> Callable[[int], float]:
        """Step -> rate of a training on so many images."""
        warmup = warmup_steps(num_images, self.warmup_epochs, self.batch_size)
        total = self.steps(num_images)
        return partial(learning_rate, peak=self.peak, warmup_steps=warmup, total_steps=total, decay=self.lr_decay)

    def __post_init__(self) -> None:
        """Say in one sentence what is wrong with a value."""
        for name, minimum in (
            ("batch_size", 2), ("weight_decay", 0), ("warmup_epochs", 0),
            ("workers", 0), ("log_every", 1), ("save_every", 1), ("max_checkpoints", 1),
        ):  # fmt: skip
            self._require_min(name, minimum)
        self._require_positive("lr")
        self._require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._require_probability("flip")
        self._require("crop_min", 0 < self.crop_min <= 1, "an area share in (0, 1]")

    def _require(self, name: str, is_allowed: bool, allowed: str) -> None:
        """Reject the value of a setting that is not allowed, or not finite."""
        value = getattr(self, name)
        if not is_allowed or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} was {value}; it must be {allowed}.")

    def _require_min(self, name: str, minimum: int) -> None:
        self._require(name, getattr(self, name) >= minimum, f"at least {minimum}")

    def _require_positive(self, name: str) -> None:
        self._require(name, getattr(self, name) > 0, "greater than 0")

    def _require_probability(self, name: str) -> None:
        self._require(name, 0 <= getattr(self, name) <= 1, "a probability between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DownstreamConfig(TrainingConfig):
    """What fine-tuning and distillation share; the defaults are those of SimCLR v1's fine-tuning on all of ImageNet.

    The views are cropped and flipped, nothing else.
    """

    epochs: float = 30.0
    min_steps: int = 0
    """Minimum number of steps, however few the images are; 0 if --epochs is given without it."""

    batch_size: int = 4096
    """Images per step over all processes; may exceed the number of images."""

    optimizer: Literal["lars", "sgd", "adamw", "muon"] = "sgd"
    lr: float = 0.05
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    """L2 on the weights that the authors decay (training/optim.py)."""

    log_every: int = 50

    def with_overrides(self, overrides: Callable[[Self], Self]) -> Self:
        """These settings with a user's on top; whoever asks for other epochs means them, so `min_steps` gives way."""
        config = overrides(self)
        named = config.min_steps != self.min_steps
        return config if named or config.epochs == self.epochs else replace(config, min_steps=0)

    def steps(self, num_images: int) -> int:
        """Updates of a training on so many images."""
        return max(super().steps(num_images), self.min_steps)

    def result_fields(self) -> dict[str, Any]:
        """The settings that determine the result, as JSON can hold them.

        A later setting is among them only where it has another value than all trainings had before there was it, so
        that results and unfinished trainings of earlier versions stay valid.
        """
        values = {name: value for name, value in asdict(self).items() if name not in FREE_ON_RESUME}
        return {name: value for name, value in values.items() if name not in BEFORE or value != BEFORE[name]}

    def __post_init__(self) -> None:
        """Say in one sentence what is wrong with a value."""
        super().__post_init__()
        for name in ("epochs", "min_steps"):
            self._require_min(name, 0)
        self._require("epochs", self.epochs > 0 or self.min_steps > 0, "greater than 0")
