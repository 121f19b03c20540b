"""What the Triton kernels of the losses share: tiles, loads and products of split numbers, and how they are started."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from simclr.losses.operands import Operands

__all__ = [
    "TILES",
    "Launch",
    "base2_scale",
    "finite",
    "fitting",
    "largest_tile",
    "load",
    "log_of_sum",
    "pack",
    "products",
    "run",
]


class Launch(NamedTuple):
    """Rows and columns of a tile (powers of two from 16, rows a multiple of columns), warps and stages."""

    rows: int
    columns: int
    warps: int
    stages: int


TILES = (Launch(128, 64, 8, 2), Launch(64, 64, 4, 2), Launch(64, 32, 8, 2), Launch(32, 32, 4, 2))
"""From large to small; the compiler keeps nearly everything of them in registers (docs/lab-notes.md)."""


@triton.jit
def load(z, rows, valid, total, WIDTH: tl.constexpr, PIECES: tl.constexpr):
    """Rows of z, and what their first piece leaves (the same once more where there is one piece)."""
    at = z + rows.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    first = tl.load(at, mask=valid[:, None], other=0.0)
    rest = first
    if PIECES == 2:
        rest = tl.load(at + total.to(tl.int64) * WIDTH, mask=valid[:, None], other=0.0)
    return first, rest


@triton.jit
def products(row, row_rest, column, column_rest, PIECES: tl.constexpr):
    """Dot products of rows and columns; of the four of their pieces the smallest is dropped."""
    s = tl.dot(row, tl.trans(column), input_precision="ieee")
    if PIECES == 2:
        s = tl.dot(row, tl.trans(column_rest), s)
        s = tl.dot(row_rest, tl.trans(column), s)
    return s


@triton.jit
def finite(largest):
    """What exponents are lowered by: their largest, or nothing where there is none."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def log_of_sum(total, shift):
    """Natural logarithm of total x 2^shift, -inf for an empty sum."""
    empty = total == 0.0
    return tl.where(empty, float("-inf"), (shift + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)


def pack(z: Tensor, operands: Operands) -> Tensor:
    """(N, D) -> (pieces, N, width) as the kernels read it; zeros fill the width up to a power of two from 16."""
    z = F.pad(z, (0, max(16, triton.next_power_of_2(z.shape[1])) - z.shape[1]))
    if operands is Operands.FP32:
        return z[None].contiguous()
    first = z.bfloat16()
    pieces = [first] if operands is Operands.BF16 else [first, (z - first).bfloat16()]
    # Triton's interpreter cannot multiply bf16: on a CPU it gets the same numbers as fp32.
    return torch.stack(pieces).to(torch.bfloat16 if z.is_cuda else torch.float32)


def fitting(packed: Tensor) -> Launch:
    """The largest tile whose operands fit the shared memory of their GPU."""
    if packed.dtype == torch.float32:
        return Launch(32, 32, 4, 1)
    room = torch.cuda.get_device_properties(packed.device).shared_memory_per_block_optin  # pyrefly: ignore[missing-attribute]
    return largest_tile(packed.shape[0] * packed.shape[2] * packed.element_size(), room)


def largest_tile(row_bytes: int, shared_memory: int) -> Launch:
    """The largest tile whose rows and columns, the latter twice to load ahead, fit beside 2 KiB of other data."""
    return next(t for t in TILES if (t.rows + t.stages * t.columns) * row_bytes + 2048 <= shared_memory)


def run(kernel: Any, programs: int, packed: Tensor, tile: Launch, *args: Any, **constants: Any) -> None:
    """Start as many programs of a kernel, on the device of its tensors."""
    with torch.cuda.device_of(packed):
        kernel[(programs,)](
            packed, *args, **constants,
            WIDTH=packed.shape[2], PIECES=packed.shape[0], ROWS=tile.rows, COLUMNS=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip


def base2_scale(temperature: float) -> float:
    """What dot products are multiplied by to be exponents of 2."""
    return math.log2(math.e) / temperature
