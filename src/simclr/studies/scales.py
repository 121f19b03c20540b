"""What the studies of SimCLR train where they say nothing else, at each scale.

At the scale of the paper: SimCLR v1 on ImageNet for 100 epochs, and a linear classifier trained by SGD. On a CPU:
the 16-wide ResNet-10 of the recipe cpu with the paper's features h, trained by AdamW for eight epochs, 128 a batch;
crops from 0.3 of the image on, half the colour distortion and a temperature of 0.2, as in that recipe; the exact probe.
"""

from collections.abc import Mapping
from typing import Any

from simclr.studies.study import Scale

__all__ = ["RATE", "SIMCLR_ON_A_CPU", "base", "base_v2", "evaluation", "pick"]

RATE = {"lr": 5e-3 / 16, "lr_scaling": "sqrt", "warmup_epochs": 0.5, "knn_every": 0}  # 5e-3 at 256 images
"""Of trainings on a CPU by AdamW, at any batch size."""
SIMCLR_ON_A_CPU = {
    "recipe": "cpu", "optimizer": "adamw", "momentum": 0.9, "feature": "h", "scaling": "none", **RATE,
}  # fmt: skip
"""The network and the views of the recipe cpu with the paper's features."""

_CPU = {**SIMCLR_ON_A_CPU, "batch_size": 128, "epochs": 8}
_PAPER = {"recipe": "imagenet-v1", "epochs": 100}
_PAPER_V2 = {"recipe": "v2-r50", "epochs": 800}


def base(scale: Scale) -> Mapping[str, Any]:
    """Settings of a training."""
    return _CPU if scale == "cpu" else _PAPER


def base_v2(scale: Scale) -> Mapping[str, Any]:
    """Settings of a training of SimCLR v2; on a CPU those of v1."""
    return _CPU if scale == "cpu" else _PAPER_V2


def evaluation(scale: Scale, **options: Any) -> Mapping[str, Any]:
    """Options of the evaluation."""
    measured = {"protocol": ("linear", "knn")} if scale == "cpu" else {"protocol": "linear", "linear": "sgd"}
    return {**measured, **options}


def pick(scale: Scale, *, cpu: Any, paper: Any) -> Any:
    """What belongs to the scale."""
    return cpu if scale == "cpu" else paper
