"""How a student is distilled: settings, and recipes by name. Imports no torch.

Sources: SimCLR v2 (arXiv:2006.10029), section 2 and 3.3: 400 epochs, with the learning-rate schedule, weight decay and
batch size of pretraining; random crops and flips, nothing else. The recipe whose name begins with `small` is ours.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from simclr.config import FREE_ON_RESUME
from simclr.errors import UserError

SMALL = 100_000
"""Images up to which the recipe for small sets is taken."""
SELF, SMALLER = 0.1, 1.0
"""Temperatures of the paper: a teacher of a student of its own shape, and of a smaller one."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of one distillation; the defaults are SimCLR v2's on ImageNet."""

    # ---- loss
    temperature: float = SMALLER
    """Of both sides' softmax; unset, it is 0.1 where the student has the teacher's shape, as in the paper, else 1."""

    alpha: float = 1.0
    """Weight of the teacher; what is left of 1 goes to the cross-entropy of the images with a label (--labels)."""

    # ---- optimiser and schedule
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    """LARS as the authors wrote it, SGD with Nesterov momentum, or AdamW."""

    lr: float = 0.1
    """Base learning rate, before scaling."""

    lr_scaling: Literal["linear", "sqrt", "none"] = "sqrt"
    """Peak rate: lr x batch / 256 (linear), lr x sqrt(batch) (sqrt), or lr itself."""

    momentum: float = 0.9
    """Momentum of LARS and SGD, first beta of AdamW."""

    weight_decay: float = 1e-4
    """L2 on the weights; batch-norm parameters, biases and the classifier are exempt, as in pretraining."""

    warmup_epochs: float = 20.0
    """Epochs over which the rate climbs from 0 to its peak, before the cosine decay to 0: a twentieth in v2."""

    # ---- amount
    epochs: float = 400.0
    """Passes over the images."""

    least_steps: int = 0
    """With fewer images training goes on until it has this many steps."""

    batch_size: int = 4096
    """Images per step over all processes; may exceed the number of images."""

    # ---- views: crop and flip, nothing else
    crop_min: float = 0.08
    """Smallest share of the image's area that a random crop may take."""

    flip: float = 0.5
    """Probability of a left-right flip; 0 where mirror images mean something else, as with letters."""

    # ---- machine and record
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of both networks; auto: bf16 on GPUs that have it, else fp32. Logits and loss are always fp32."""

    deterministic: bool = False
    """On a GPU, only use kernels that give the same bits each time (slower). A CPU always does."""

    workers: int = 2
    """Threads that prepare views; 0: none. Changes no pixel."""

    log_every: int = 50
    """Steps between two records in metrics.jsonl."""

    save_every: int = 500
    """Steps between two checkpoints."""

    keep: int = 2
    """Checkpoints that are kept."""

    def deciding(self) -> dict[str, Any]:
        """The settings that move the result, as JSON can hold them."""
        return {name: value for name, value in asdict(self).items() if name not in FREE_ON_RESUME}

    def __post_init__(self) -> None:
        """Say in one sentence what is wrong with a value."""
        for name, least in (
            ("epochs", 0), ("least_steps", 0), ("batch_size", 2), ("weight_decay", 0), ("warmup_epochs", 0),
            ("workers", 0), ("log_every", 1), ("save_every", 1), ("keep", 1),
        ):  # fmt: skip
            _require(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")
        for name in ("temperature", "lr"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "greater than 0")
        _require("epochs", self.epochs, self.epochs > 0 or self.least_steps > 0, "greater than 0")
        _require("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]")
        _require("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        _require("flip", self.flip, 0 <= self.flip <= 1, "a probability between 0 and 1")
        _require("crop_min", self.crop_min, 0 < self.crop_min <= 1, "an area share in (0, 1]")


def _require(name: str, value: object, fine: bool, allowed: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        fine = False
    if not fine:
        raise UserError(f"--{name.replace('_', '-')} was {value}; it must be {allowed}.")


DISTILL_RECIPES: dict[str, DistillConfig] = {
    "v2-distill": DistillConfig(),
    "small-distill": DistillConfig(
        optimizer="sgd", lr=0.1, lr_scaling="none", warmup_epochs=0, epochs=12, least_steps=1000, batch_size=128,
        crop_min=0.3,
    ),
}  # fmt: skip
"""`DISTILL_RECIPES["v2-distill"]`, and `dataclasses.replace` for what is to differ."""


def find_distill_recipe(name: str) -> DistillConfig:
    """The recipe of that name."""
    if name not in DISTILL_RECIPES:
        raise UserError(f"There is no recipe {name!r} for distillation; there are {', '.join(DISTILL_RECIPES)}.")
    return DISTILL_RECIPES[name]
