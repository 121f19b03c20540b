"""Learning-rate schedules: warm-up from zero, then SimCLR's cosine to zero (paper section 2.2 and B.6), or steps.

Counts are rounded as in the authors' model.py and data.py (google-research/simclr, commit 383d414), so that a
run has exactly their number of steps. A step is one update of the weights by one global batch.
"""

import math
from typing import Literal

from simclr.errors import UserError

__all__ = ["Decay", "Scaling", "learning_rate", "peak_lr", "total_steps", "warmup_steps"]

Scaling = Literal["linear", "sqrt", "none"]
Decay = Literal["cosine", "steps"]


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, decay: Decay = "cosine") -> float:
    """Learning rate of update `step` (the first is 0, at which a warm-up gives 0).

    Args:
        step: 0 .. total_steps - 1; beyond that the rate stays 0.
        peak: Highest learning rate, reached at `warmup_steps`.
        warmup_steps: Length of the linear part; 0 starts at the peak.
        total_steps: Length of the whole schedule, warm-up included.
        decay: "steps" is a tenth of the peak from 60 % of the schedule on, and a hundredth from 80 % (MoCo v1 at epochs
            120 and 160 of 200, its linear evaluation at 60 and 80 of 100).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay == "steps":
        if step >= total_steps:
            return 0.0
        return peak * 0.1 ** ((10 * step >= 6 * total_steps) + (10 * step >= 8 * total_steps))
    decay_steps = max(total_steps - warmup_steps, 1)
    progress = min((step - warmup_steps) / decay_steps, 1.0)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def peak_lr(base: float, batch_size: int, scaling: Scaling) -> float:
    """Learning rate at the end of warm-up for a global batch of `batch_size` images.

    "linear" is base x batch / 256 (paper section 2.2, base 0.3); "sqrt" is base x sqrt(batch) (paper section
    B.1, base 0.075: the same 4.8 at batch 4096); "none" is the base itself.
    """
    if scaling == "linear":
        return base * batch_size / 256
    if scaling == "sqrt":
        return base * math.sqrt(batch_size)
    if scaling == "none":
        return base
    raise UserError(f"learning-rate scaling {scaling!r} is unknown: choose linear, sqrt or none")


def total_steps(num_examples: int, epochs: float, batch_size: int) -> int:
    """Number of updates in `epochs` passes over `num_examples` images; the authors round down and add one."""
    return int(num_examples * epochs // batch_size) + 1


def warmup_steps(num_examples: int, epochs: float, batch_size: int) -> int:
    """Number of updates in a warm-up of `epochs` passes over `num_examples` images, rounded down."""
    return round(epochs * num_examples // batch_size)
