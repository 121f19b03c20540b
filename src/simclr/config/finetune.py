"""How a network is trained on labels: settings, and the papers' recipes by name. Imports no torch.

Sources: SimCLR appendix B.3 (supervised), B.5 (semi-supervised, v1) and B.6 (linear probe); SimCLR v2 section 3 and the
README of google-research/simclr (v2, cifar-linear). Recipes whose name begins with `small` or ends in `adamw` are ours
(docs/lab-notes.md).
"""

from dataclasses import dataclass, replace
from typing import Literal

from simclr.config.training import DownstreamConfig
from simclr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(DownstreamConfig):
    """Settings of one training on labels; the defaults are SimCLR v1's for all of ImageNet."""

    head_layer: int = 0
    """Layers of the projection head under the classifier: 0 in SimCLR v1, 1 in v2 where labels are few."""

    tune_from: Literal["all", 0, 1, 2, 3, 4, "none"] = "all"
    """Part that is trained: the whole network (all), the layers after the stem (0) or after a block group (1 to 4), or
    the classifier only (none)."""

    batch_norm_decay: float | None = None
    """Decay of the running statistics of batch norm at each step; unset: as in the encoder, 0.9 for the authors'
    encoders."""

    def __post_init__(self) -> None:
        """Say in one sentence what is wrong with a value."""
        super().__post_init__()
        decay = self.batch_norm_decay
        self._require("head_layer", self.head_layer >= 0, "at least 0")
        self._require("batch_norm_decay", decay is None or 0 <= decay < 1, "in [0, 1)")
        self._require("tune_from", self.tune_from in ("all", 0, 1, 2, 3, 4, "none"), "all, 0 to 4, or none")


_V1 = FinetuneConfig()
_V2 = FinetuneConfig(optimizer="lars", lr=0.005, lr_scaling="sqrt", batch_size=1024)
_V2_WIDE = replace(_V2, lr=0.002)  # width above 1, selective kernels
_SMALL = FinetuneConfig(
    lr=0.1, lr_scaling="none", weight_decay=1e-4, batch_size=64, epochs=30, min_steps=1000, crop_min=0.3
)
_ADAMW = FinetuneConfig(optimizer="adamw", lr=3.75e-5, lr_scaling="sqrt", weight_decay=0.05)  # 3e-4 at 64 images

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
    "cifar-linear": FinetuneConfig(tune_from="none", lr=0.1, batch_size=512, epochs=100),  # README, for CIFAR-10
    "moco-linear": FinetuneConfig(  # main_lincls.py of facebookresearch/moco
        tune_from="none", lr=30.0, nesterov=False, lr_decay="steps", batch_size=256, epochs=100
    ),
    "supervised": FinetuneConfig(lr=0.1, weight_decay=1e-4, epochs=90),
    "small": _SMALL,
    "small-linear": replace(_SMALL, tune_from="none", weight_decay=0.0, epochs=10, min_steps=500),
    "small-supervised": _SMALL,
    "supervised-adamw": replace(_ADAMW, batch_size=1024, warmup_epochs=5, epochs=90),
    "small-supervised-adamw": replace(_ADAMW, batch_size=64, epochs=30, min_steps=1000, crop_min=0.3),
}
"""`FINETUNE_RECIPES["v2-1%"]`, and `dataclasses.replace` for what is to differ."""

_FOR_V2 = "SimCLR v2 (section 3, and README of google-research/simclr)"
FINETUNE_SUMMARIES: dict[str, str] = {
    "v1-1%": "SimCLR (B.5): all of the network, from h, on 1 % of ImageNet's labels.",
    "v1-10%": "SimCLR (B.5): the same on 10 %.",
    "v1-100%": "SimCLR (B.5): the same on all labels.",
    "v2-1%": f"{_FOR_V2}: from the first layer of the projection head, on 1 % of ImageNet's labels.",
    "v2-10%": f"{_FOR_V2}: the same on 10 %.",
    "v2-100%": f"{_FOR_V2}: from h, on all labels.",
    "v2-wide-1%": "SimCLR v2, for selective kernels or a width above 1: v2-1% at a lower rate (second-hand).",
    "v2-wide-10%": "SimCLR v2, for selective kernels or a width above 1: v2-10% at a lower rate (second-hand).",
    "v2-wide-100%": "SimCLR v2, for selective kernels or a width above 1: v2-100% at a lower rate (second-hand).",
    "linear": "SimCLR (B.6): a linear classifier on the frozen encoder, on ImageNet.",
    "cifar-linear": "README of google-research/simclr: a linear classifier on the frozen encoder, on CIFAR-10.",
    "moco-linear": "MoCo (main_lincls.py): a linear classifier on the frozen encoder, on ImageNet.",
    "supervised": "SimCLR v2's supervised baseline (the authors' issues 10 and 110): from scratch, on ImageNet.",
    "small": "Ours, for data sets of up to 100,000 labelled images.",
    "small-linear": "Ours: a linear classifier on the frozen encoder, by SGD on crops of up to 20,000 images.",
    "small-supervised": "Ours: from scratch, on up to 20,000 images.",
    "supervised-adamw": "Ours: from scratch, for networks without batch norm.",
    "small-supervised-adamw": "Ours: from scratch on up to 20,000 images, for networks without batch norm.",
}
"""Recipe -> whose settings it has, and what for."""

SMALL = 20_000
"""Labelled images up to which a network from scratch, or a linear classifier by SGD, takes a recipe of ours for few."""
SMALL_SET = 100_000
"""Labelled images, used or not, up to which a data set is small: the papers' fine-tuning recipes have batches of 1,024
and 4,096 images and are made for ImageNet. CIFAR-10 and fashion-mnist are small, and so they are in distillation."""


def choose_finetune_recipe(*, head_layers: int, is_wide: bool, num_labels: int, num_labelled: int) -> tuple[str, str]:
    """Name of the recipe that an encoder is fine-tuned by, and why.

    Args:
        head_layers: Layers of the projection head beside the encoder, 0 without one; SimCLR v2 has 3.
        is_wide: Whether the encoder has selective kernels or a width above 1; SimCLR v2 tunes these at a lower rate.
        num_labels: Labelled images to train on.
        num_labelled: Those that the data set has, apart from test images.
    """
    if num_labelled <= SMALL_SET:
        return "small", f"{num_labelled:,} labelled images, at most {SMALL_SET:,}: a small data set"
    share = num_labels / num_labelled
    part = "1%" if share <= 0.03 else "10%" if share <= 0.3 else "100%"  # between the papers' shares: the nearer ratio
    labels = f"{100 * share:.3g} % of {num_labelled:,} labels"
    if head_layers <= 2:
        head = f"a projection head of {head_layers} layers" if head_layers else "no projection head beside the encoder"
        return f"v1-{part}", f"{head}, {labels}"
    shape = ", an encoder with selective kernels or a width above 1" if is_wide else ""
    return f"{'v2-wide' if is_wide else 'v2'}-{part}", f"a projection head of {head_layers} layers{shape}, {labels}"


def find_finetune_recipe(name: str) -> FinetuneConfig:
    """The recipe of that name."""
    if name not in FINETUNE_RECIPES:
        raise UserError(f"There is no fine-tuning recipe {name!r}; there are {', '.join(FINETUNE_RECIPES)}.")
    return FINETUNE_RECIPES[name]
