"""What fine-tuning and distillation have in common: a cropped and flipped view of each image, an optimiser, an amount.

Imports no torch.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Self

from simclr.config.pretrain import FREE_ON_RESUME
from simclr.config.schedule import learning_rate, peak_lr, total_steps, warmup_steps
from simclr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one training; the defaults are those of SimCLR v1's fine-tuning on all of ImageNet."""

    # ---- optimiser and schedule
    optimizer: Literal["lars", "sgd", "adamw"] = "sgd"
    """LARS as the authors wrote it, SGD with Nesterov momentum, or AdamW."""

    lr: float = 0.05
    """Base learning rate, before scaling."""

    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """Peak rate: lr x batch / 256 (linear), lr x sqrt(batch) (sqrt), or lr itself."""

    momentum: float = 0.9
    """Momentum of LARS and SGD, first beta of AdamW."""

    weight_decay: float = 0.0
    """L2 on what the authors decay (optim.py)."""

    warmup_epochs: float = 0.0
    """Epochs over which the rate climbs from 0 to its peak, before the cosine decay to 0."""

    # ---- amount
    epochs: float = 30.0
    """Passes over the labelled images."""

    min_steps: int = 0
    """With fewer images training goes on until it has this many steps; none where a flag says other epochs."""

    batch_size: int = 4096
    """Images per step over all processes; may exceed the number of images."""

    # ---- views: crop and flip, nothing else
    crop_min: float = 0.08
    """Smallest share of the image's area that a random crop may take."""

    flip: float = 0.5
    """Probability of a left-right flip; 0 where mirror images mean something else, as with letters."""

    # ---- machine and record
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network; auto: bf16 on GPUs that have it, else fp32. Logits and loss are always fp32."""

    deterministic: bool = False
    """On a GPU, only use kernels that give the same bits each time (slower). A CPU always does."""

    workers: int = 2
    """Threads that prepare views; 0: none. Changes no pixel."""

    log_every: int = 50
    """Steps between two records in metrics.jsonl."""

    save_every: int = 500
    """Steps between two checkpoints."""

    max_checkpoints: int = 2
    """Newest checkpoints that are kept."""

    def with_overrides(self, overrides: Callable[[Self], Self]) -> Self:
        """These settings with a user's on top; whoever asks for other epochs means them, so `min_steps` gives way."""
        config = overrides(self)
        named = config.min_steps != self.min_steps
        return config if named or config.epochs == self.epochs else replace(config, min_steps=0)

    def steps(self, num_images: int) -> int:
        """Updates of a training on so many images."""
        return max(total_steps(num_images, self.epochs, self.batch_size), self.min_steps)

    @property
    def peak(self) -> float:
        """Highest learning rate."""
        return peak_lr(self.lr, self.batch_size, self.lr_scaling)

    def learning_rate(self, num_images: int) -> Callable[[int], float]:
        """Step -> rate of a training on so many images."""
        warmup = warmup_steps(num_images, self.warmup_epochs, self.batch_size)
        return partial(learning_rate, peak=self.peak, warmup_steps=warmup, total_steps=self.steps(num_images))

    def result_fields(self) -> dict[str, Any]:
        """The settings that move the result, as JSON can hold them."""
        return {name: value for name, value in asdict(self).items() if name not in FREE_ON_RESUME}

    def __post_init__(self) -> None:
        """Say in one sentence what is wrong with a value."""
        for name, least in (
            ("epochs", 0), ("min_steps", 0), ("batch_size", 2), ("weight_decay", 0), ("warmup_epochs", 0),
            ("workers", 0), ("log_every", 1), ("save_every", 1), ("max_checkpoints", 1),
        ):  # fmt: skip
            self._require(name, getattr(self, name) >= least, f"at least {least}")
        self._require("lr", self.lr > 0, "greater than 0")
        self._require("epochs", self.epochs > 0 or self.min_steps > 0, "greater than 0")
        self._require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._require("flip", 0 <= self.flip <= 1, "a probability between 0 and 1")
        self._require("crop_min", 0 < self.crop_min <= 1, "an area share in (0, 1]")

    def _require(self, name: str, fine: bool, allowed: str) -> None:
        """Refuse the value of a setting that is not `fine`, or not finite."""
        value = getattr(self, name)
        if isinstance(value, float) and not math.isfinite(value):
            fine = False
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} was {value}; it must be {allowed}.")
