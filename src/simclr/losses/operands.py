"""Whether the Triton kernels of cuda.py compute a loss, and what they multiply.

Tensor cores multiply bf16 numbers (8 bits) and add in fp32. Rows of fp32 are therefore held as sums of two bf16
numbers; rows that are bf16 already need one. docs/lab-notes.md has the errors of each.
"""

from enum import Enum
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["WIDEST", "Operands", "operands_for"]

WIDEST = 256
"""Columns that the kernels can hold; wider rows are torch's to multiply."""


class Operands(Enum):
    """What the kernels make products of; sums, exponentials, weights and gradients are fp32 in any case."""

    FP32 = "fp32"
    """fp32 without tensor cores: many times slower; to check the others by."""

    SPLIT = "split"
    """A number as the sum of two bf16 numbers (16 bits), and three products in place of one. The gradient is off by
    1e-6 to 3e-5 of its norm at temperature 0.1, up to ten times fp32's own error."""

    BF16 = "bf16"
    """For rows that are bf16 numbers already: at least as exact for them as `SPLIT`, for about half the work."""


def operands_for(views: Tensor) -> Operands | None:
    """The kernels' operands for these projections; None where torch's operations do the work.

    The kernels need an NVIDIA GPU from Ampere on and Triton, which comes with torch for CUDA. fp64 is torch's.
    """
    if (
        not views.is_cuda
        or torch.version.cuda is None
        or views.dtype == torch.float64
        or views.shape[-1] > WIDEST
        or torch.cuda.get_device_capability(views.device) < (8, 0)
        or find_spec("triton") is None
    ):
        return None
    return Operands.BF16 if views.dtype == torch.bfloat16 else Operands.SPLIT
