"""What the studies of SimCLR train where they say nothing else, at each scale.

At the scale of the paper: SimCLR v1 on ImageNet for 100 epochs, and a linear classifier trained by SGD. On a CPU:
the 16-wide ResNet-10 of the recipe cpu with the paper's features h, trained by AdamW for eight epochs batches of 128;
crops from 0.3 of the image on, half the colour distortion and a temperature of 0.2, as in that recipe; the exact probe.
"""

from collections.abc import Mapping
from typing import Any

from simclr.studies.study import Scale

__all__ = ["base", "evaluation", "pick"]

_CPU = {
    "recipe": "cpu", "optimizer": "adamw", "momentum": 0.9, "feature": "h", "scaling": "none", "batch_size": 128,
    "lr": 5e-3 / 16, "lr_scaling": "sqrt", "warmup_epochs": 0.5, "knn_every": 0, "epochs": 8,
}  # fmt: skip
_PAPER = {"recipe": "imagenet-v1", "epochs": 100}


def base(scale: Scale) -> Mapping[str, Any]:
    """Settings of a training."""
    return _CPU if scale == "cpu" else _PAPER


def evaluation(scale: Scale, **options: Any) -> Mapping[str, Any]:
    """Options of the evaluation."""
    measured = {"protocol": ("linear", "knn")} if scale == "cpu" else {"protocol": "linear", "linear": "sgd"}
    return {**measured, **options}


def pick(scale: Scale, *, cpu: Any, paper: Any) -> Any:
    """What belongs to the scale."""
    return cpu if scale == "cpu" else paper
