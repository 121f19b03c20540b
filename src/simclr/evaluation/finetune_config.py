"""How a network is trained on labels: settings, and the papers' recipes by name. Imports no torch.

Sources: SimCLR appendix B.3 (supervised), B.5 (semi-supervised, v1) and B.6 (linear probe); SimCLR v2 section 3 and the
README of google-research/simclr (v2). Recipes whose name begins with `small` are ours (docs/lab-notes.md).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from simclr.config import FREE_ON_RESUME
from simclr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of one training on labels; the defaults are SimCLR v1's for all of ImageNet."""

    # ---- what is trained
    head_layer: int = 0
    """Layers of the projection head under the classifier: 0 in SimCLR v1, 1 in v2 where labels are few."""

    tune_from: Literal["all", 0, 1, 2, 3, 4, "none"] = "all"
    """The whole network (all), what comes after the stem (0) or a block group (1 to 4), or the classifier (none)."""

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
    """L2 on what the authors decay (optim.supervised_groups)."""

    warmup_epochs: float = 0.0
    """Epochs over which the rate climbs from 0 to its peak, before the cosine decay to 0."""

    batch_norm_decay: float | None = None
    """Share of the old running statistics that a step keeps; unset: what the encoder has, 0.9 for the authors'."""

    # ---- amount
    epochs: float = 30.0
    """Passes over the labelled images."""

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
    """Arithmetic of the network; auto: bf16 on GPUs that have it, else fp32. Logits and loss are always fp32."""

    deterministic: bool = False
    """On a GPU, only use kernels that give the same bits each time (slower). A CPU always does."""

    workers: int = 2
    """Threads that prepare views; 0: none. Changes no pixel."""

    log_every: int = 50
    """Steps between two records in metrics.jsonl."""

    save_every: int = 500
    """Steps between two checkpoints."""

    def deciding(self) -> dict[str, Any]:
        """The settings that move the result, as JSON can hold them."""
        return {name: value for name, value in asdict(self).items() if name not in FREE_ON_RESUME}

    def __post_init__(self) -> None:
        """Say in one sentence what is wrong with a value."""
        for name, least in (
            ("head_layer", 0), ("epochs", 0), ("least_steps", 0), ("batch_size", 2), ("weight_decay", 0),
            ("warmup_epochs", 0), ("workers", 0), ("log_every", 1), ("save_every", 1),
        ):  # fmt: skip
            _require(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")
        _require("lr", self.lr, self.lr > 0, "greater than 0")
        _require("epochs", self.epochs, self.epochs > 0 or self.least_steps > 0, "greater than 0")
        _require("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        decay = self.batch_norm_decay
        _require("batch_norm_decay", decay, decay is None or 0 <= decay < 1, "in [0, 1)")
        _require("flip", self.flip, 0 <= self.flip <= 1, "a probability between 0 and 1")
        _require("crop_min", self.crop_min, 0 < self.crop_min <= 1, "an area share in (0, 1]")
        _require("tune_from", self.tune_from, self.tune_from in ("all", 0, 1, 2, 3, 4, "none"), "all, 0 to 4, or none")


def _require(name: str, value: object, fine: bool, allowed: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        fine = False
    if not fine:
        raise UserError(f"--{name.replace('_', '-')} was {value}; it must be {allowed}.")


_V1 = FinetuneConfig()
_V2 = FinetuneConfig(optimizer="lars", lr=0.005, lr_scaling="sqrt", batch_size=1024)
_V2_WIDE = replace(_V2, lr=0.002)  # width above 1, selective kernels
_SMALL = FinetuneConfig(lr=0.03, lr_scaling="none", batch_size=64, epochs=10, least_steps=500, crop_min=0.3)

FINETUNE_RECIPES: dict[str, FinetuneConfig] = {
    "v1-1%": replace(_V1, epochs=60),
    "v1-10%": _V1,
    "v1-100%": _V1,
    "v2-1%": replace(_V2, epochs=60, head_layer=1),
    "v2-10%": replace(_V2, head_layer=1),
    "v2-100%": _V2,
    "v2-wide-1%": replace(_V2_WIDE, epochs=60, head_layer=1),
    "v2-wide-10%": replace(_V2_WIDE, head_layer=1),
    "v2-wide-100%": _V2_WIDE,
    "linear": FinetuneConfig(tune_from="none", lr=0.1, epochs=90),
    "supervised": FinetuneConfig(lr=0.1, weight_decay=1e-4, epochs=90),
    "small": _SMALL,
    "small-linear": replace(_SMALL, tune_from="none", lr=0.1),
    "small-supervised": replace(_SMALL, lr=0.1, weight_decay=1e-4, least_steps=1000),
}
"""`FINETUNE_RECIPES["v2-1%"]`, and `dataclasses.replace` for what is to differ."""


def find_finetune_recipe(name: str) -> FinetuneConfig:
    """The recipe of that name."""
    if name not in FINETUNE_RECIPES:
        raise UserError(f"There is no fine-tuning recipe {name!r}; there are {', '.join(FINETUNE_RECIPES)}.")
    return FINETUNE_RECIPES[name]
