"""Triton kernels for the log-sum-exps of streamed.py and their gradient: no similarity leaves the chip.

Shapes: z is (N, D); rows `own` are this process's, and each row's own group of `group` neighbours is left out of
its sum (streamed.py has the formulas).

Forward computes each pair of own rows once, N^2 D operations for a process on its own: a tile on or above the
diagonal adds its row sums to its rows and its column sums to its columns. The sums of tiles go to memory as they
are and are added afterwards in a fixed order. Backward gives each block of rows to one program, which walks over
all columns and writes its gradient once, 4 N^2 D operations. Neither has atomics, so results are equal bit for bit
from run to run. Exponents are in base 2, the hardware's.

Sums, exponentials, weights and gradients are fp32; what products are made of, operands.py says.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from simclr.losses.cuda_tiles import Launch, base2_scale, finite, fitting, load, log_of_sum, pack, products, run
from simclr.losses.operands import Operands

__all__ = ["gradients", "log_sums"]

BAND = 8192
"""Rows of one forward launch, a multiple of every tile: partial sums then take 80 x N numbers, where z has N x D."""

STRIP = 8
"""Column tiles that one program of the forward walks over."""


def log_sums(
    z: Tensor,
    temperature: float,
    own: slice,
    *,
    group: int,
    bounded: bool,
    operands: Operands,
    launch: Launch | None = None,
) -> Tensor:
    """L of the rows `own`, in nats: (own,) fp32.

    Args:
        z: (N, D) fp32, D up to `WIDEST`.
        temperature: What dot products are divided by.
        own: Rows to do; they begin and end with a group.
        group: Neighbouring rows that are not each other's negatives.
        bounded: No running maximum is needed.
        operands: Precision of the products.
        launch: Chosen by width, operands and device when not given.
    """
    packed = pack(z, operands)
    tile = launch or fitting(packed)
    sums = z.new_full((own.stop - own.start,), 0.0 if bounded else -math.inf)
    for first in range(own.start, own.stop, BAND):
        last = min(first + BAND, own.stop)
        # Columns are counted from the band's first row, round to the rows that come before our own.
        columns = len(z) - first + own.start
        row_tiles, strips = triton.cdiv(last - first, tile.rows), triton.cdiv(columns, tile.columns * STRIP)
        of_rows = sums.new_empty(strips, last - first)
        of_columns = sums.new_empty(row_tiles, columns)
        of_columns[:, : last - first] = 0.0 if bounded else -math.inf  # what tiles below the diagonal would add
        run(
            _sums_kernel, row_tiles * strips, packed, tile,
            of_rows, of_columns, len(z), first, last, columns, row_tiles, group, base2_scale(temperature),
            STRIP=STRIP, BOUNDED=bounded,
        )  # fmt: skip
        rows, rest = slice(first - own.start, last - own.start), slice(first - own.start, None)
        of_columns = of_columns[:, : own.stop - first]  # beyond are the rows of other processes
        if bounded:
            sums[rows] += of_rows.sum(0)
            sums[rest] += of_columns.sum(0)
        else:
            sums[rows] = sums[rows].logaddexp(of_rows.logsumexp(0))
            sums[rest] = sums[rest].logaddexp(of_columns.logsumexp(0))
    return sums.log_() if bounded else sums


def gradients(
    z: Tensor,
    log_sums: Tensor,
    grad: Tensor,
    temperature: float,
    own: slice,
    *,
    group: int,
    bounded: bool,
    operands: Operands,
    launch: Launch | None = None,
) -> Tensor:
    """Gradient of the rows `own`: (own, D) fp32.

    Args:
        z: As in `log_sums`, like those not named here.
        log_sums: (N,) L of all rows.
        grad: (N,) gradient with respect to L.
    """
    packed = pack(z, operands)
    tile = launch or fitting(packed)
    # A row's factors: its gradient times exp(-L); without a bound L is only subtracted from a similarity.
    weights = grad * log_sums.neg().exp() if bounded else grad.contiguous()
    out = z.new_empty(own.stop - own.start, packed.shape[2])
    run(
        _gradients_kernel, triton.cdiv(len(out), tile.rows), packed, tile,
        weights, log_sums / math.log(2), out, len(z), own.start, own.stop, group,
        base2_scale(temperature), 1 / temperature, BOUNDED=bounded,
    )  # fmt: skip
    return out[:, : z.shape[1]]


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total", "first", "last", "columns", "row_tiles", "group"])
def _sums_kernel(
    z, of_rows, of_columns, total, first, last, columns, row_tiles, group, scale,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Sums (bounded) or log-sum-exps of one row tile of the band first .. last over one strip of column tiles."""
    row_tile = tl.program_id(0) % row_tiles
    strip = tl.program_id(0) // row_tiles
    row_offset = row_tile * ROWS + tl.arange(0, ROWS)  # (ROWS,) counted from the band's first row
    row = first + row_offset
    row_valid = row < last
    row_group = row // group
    z_row, z_row_rest = load(z, row, row_valid, total, WIDTH, PIECES)
    row_sum = tl.zeros((ROWS,), tl.float32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)

    begin = tl.maximum(strip * STRIP, row_tile * (ROWS // COLUMNS))  # below the diagonal are mirrors of those above
    end = tl.minimum(strip * STRIP + STRIP, tl.cdiv(columns, COLUMNS))
    for column_tile in range(begin, end):
        column_offset = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        column_valid = column_offset < columns
        column = first + column_offset
        column = tl.where(column < total, column, column - total)
        z_column, z_column_rest = load(z, column, column_valid, total, WIDTH, PIECES)
        s = scale * products(z_row, z_row_rest, z_column, z_column_rest, PIECES)  # (ROWS, COLUMNS)
        kept = (row_group[:, None] != (column // group)[None, :]) & row_valid[:, None] & column_valid[None, :]
        s = tl.where(kept, s, float("-inf"))
        if BOUNDED:
            e = tl.exp2(s)
            row_sum += tl.sum(e, 1)
            column_part = tl.sum(e, 0)
        else:
            new_max = tl.maximum(row_max, tl.max(s, 1))
            shift = finite(new_max)
            row_sum = row_sum * tl.exp2(row_max - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
            row_max = new_max
            shift = finite(tl.max(s, 0))
            column_part = log_of_sum(tl.sum(tl.exp2(s - shift[None, :]), 0), shift)
        to = of_columns + row_tile.to(tl.int64) * columns + column_offset
        tl.store(to, column_part, mask=column_valid & (column_offset >= (row_tile + 1) * ROWS))

    row_part = row_sum if BOUNDED else log_of_sum(row_sum, finite(row_max))
    tl.store(of_rows + strip.to(tl.int64) * (last - first) + row_offset, row_part, mask=row_valid)


@triton.jit(do_not_specialize=["total", "own_start", "own_stop", "group"])
def _gradients_kernel(
    z, weights, logs, out, total, own_start, own_stop, group, scale, out_scale,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of own rows, from all columns."""
    row_offset = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,) counted from own_start
    row = own_start + row_offset
    row_valid = row < own_stop
    row_group = row // group
    z_row, z_row_rest = load(z, row, row_valid, total, WIDTH, PIECES)
    row_weight = tl.load(weights + row, mask=row_valid, other=0.0)
    row_log = tl.load(logs + row, mask=row_valid, other=0.0)
    gradient = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, total, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = column < total
        z_column, z_column_rest = load(z, column, valid, total, WIDTH, PIECES)  # (COLUMNS, WIDTH) each
        column_weight = tl.load(weights + column, mask=valid, other=0.0)
        s = scale * products(z_row, z_row_rest, z_column, z_column_rest, PIECES)  # (ROWS, COLUMNS)
        kept = (row_group[:, None] != (column // group)[None, :]) & valid[None, :]
        s = tl.where(kept, s, float("-inf"))
        if BOUNDED:
            w = tl.exp2(s) * (row_weight[:, None] + column_weight[None, :])
        else:
            column_log = tl.load(logs + column, mask=valid, other=0.0)
            w = tl.exp2(s - row_log[:, None]) * row_weight[:, None]
            w += tl.exp2(s - column_log[None, :]) * column_weight[None, :]
        w_first = w.to(z.dtype.element_ty)
        gradient = tl.dot(w_first, z_column, gradient, input_precision="ieee")
        if z.dtype.element_ty == tl.bfloat16:  # weights near 1 cancel against the positive pairs: 8 bits are too few
            gradient = tl.dot((w - w_first.to(tl.float32)).to(tl.bfloat16), z_column, gradient)
        if PIECES == 2:
            gradient = tl.dot(w_first, z_column_rest, gradient)
    to = out + row_offset.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(to, gradient * out_scale, mask=row_valid[:, None])
