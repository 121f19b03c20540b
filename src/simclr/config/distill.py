"""How a student is distilled: settings, and recipes by name. Imports no torch.

Sources: SimCLR v2 (arXiv:2006.10029), section 2 and 3.3: 400 epochs, with the learning-rate schedule, weight decay and
batch size of pretraining; random crops and flips, nothing else. The recipe whose name begins with `small` is ours.
"""

from dataclasses import dataclass

from simclr.config.training import DownstreamConfig
from simclr.errors import UserError

SMALL = 100_000
"""Images up to which the recipe for small sets is taken."""
SELF, SMALLER = 0.1, 1.0
"""Temperatures of the paper: a teacher of a student of its own shape, and of a smaller one."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(DownstreamConfig):
    """Settings of one distillation."""

    temperature: float = SMALLER
    """Temperature of both softmaxes; unset: 0.1 if the student has the teacher's architecture, as in the paper, else
    1."""

    alpha: float = 1.0
    """Weight of the distillation loss; 1 - alpha is the weight of the cross-entropy on the labels (--labels)."""

    def __post_init__(self) -> None:
        """Say in one sentence what is wrong with a value."""
        super().__post_init__()
        self._require("temperature", self.temperature > 0, "greater than 0")
        self._require("alpha", 0 <= self.alpha <= 1, "in [0, 1]")


DISTILL_RECIPES: dict[str, DistillConfig] = {
    "v2-distill": DistillConfig(
        optimizer="lars", lr=0.1, lr_scaling="sqrt", weight_decay=1e-4, warmup_epochs=20, epochs=400
    ),
    "small-distill": DistillConfig(
        optimizer="sgd", lr=0.1, lr_scaling="none", warmup_epochs=0, epochs=12, min_steps=1000, batch_size=128,
        crop_min=0.3,
    ),
}  # fmt: skip
"""`DISTILL_RECIPES["v2-distill"]`, and `dataclasses.replace` for what is to differ."""


def find_distill_recipe(name: str) -> DistillConfig:
    """The recipe of that name."""
    if name not in DISTILL_RECIPES:
        raise UserError(f"There is no recipe {name!r} for distillation; there are {', '.join(DISTILL_RECIPES)}.")
    return DISTILL_RECIPES[name]
