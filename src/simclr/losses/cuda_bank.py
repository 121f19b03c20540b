"""A Triton kernel for the log-sum-exps of bank.py and their gradient: no similarity leaves the chip.

Each program takes a tile of rows over one strip of the bank and writes its largest similarity, its sum of exponentials
below that, and the keys weighted by them; the strips are then merged in a fixed order. There are no atomics, so results
are equal bit for bit from run to run. Exponents are in base 2; sums, exponentials and weights are fp32, and operands.py
says what products are made of.

Shapes: rows z (n, D), bank (K, D), P strips.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr.losses.cuda_tiles import Launch, base2_scale, finite, fitting, load, pack, products, run
from simclr.losses.operands import Operands

__all__ = ["log_sums_and_means"]

PROGRAMS = 512
"""About as many programs are started, so that few rows fill a GPU too: two for each multiprocessor of a large one."""


def log_sums_and_means(
    rows: Tensor, bank: Tensor, temperature: float, *, operands: Operands, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """L of each row (n,) in nats, and the mean of the bank under its softmax (n, D); fp32.

    Args:
        rows: (n, D) fp32, D up to `WIDEST`.
        bank: (K, D) fp32.
        temperature: What dot products are divided by.
        operands: Precision of the products.
        launch: Chosen by width, operands and device when not given.
    """
    packed_rows, packed_bank = pack(rows, operands), pack(bank, operands)
    tile = launch or fitting(packed_bank)
    row_tiles, column_tiles = triton.cdiv(len(rows), tile.rows), triton.cdiv(len(bank), tile.columns)
    strips = max(1, min(column_tiles, PROGRAMS // row_tiles))
    per_strip = triton.cdiv(column_tiles, strips)  # column tiles
    strips = triton.cdiv(column_tiles, per_strip)
    largest = rows.new_empty(strips, len(rows))
    sums = torch.empty_like(largest)
    weighted = rows.new_empty(strips, len(rows), packed_rows.shape[2])
    run(
        _bank_kernel, row_tiles * strips, packed_bank, tile,
        packed_rows, largest, sums, weighted, len(bank), len(rows), row_tiles, per_strip, base2_scale(temperature),
    )  # fmt: skip
    top = largest.amax(0)  # (n,)
    lowered = torch.exp2(largest - top)  # (P, n)
    total = (sums * lowered).sum(0)  # (n,)
    means = (weighted * lowered[:, :, None]).sum(0) / total[:, None]
    return (top + total.log2()) * math.log(2), means[:, : rows.shape[1]]


@triton.jit(do_not_specialize=["num_keys", "num_rows", "row_tiles", "per_strip"])
def _bank_kernel(
    bank, rows, largest, sums, weighted, num_keys, num_rows, row_tiles, per_strip, scale,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Largest similarity, sum and weighted keys of one row tile over one strip of column tiles."""
    row_tile = tl.program_id(0) % row_tiles
    strip = tl.program_id(0) // row_tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    row_valid = row < num_rows
    z_row, z_row_rest = load(rows, row, row_valid, num_rows, WIDTH, PIECES)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    row_keys = tl.zeros((ROWS, WIDTH), tl.float32)
    end = tl.minimum((strip + 1) * per_strip, tl.cdiv(num_keys, COLUMNS))
    for column_tile in range(strip * per_strip, end):
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        valid = column < num_keys
        key, key_rest = load(bank, column, valid, num_keys, WIDTH, PIECES)  # (COLUMNS, WIDTH) each
        s = scale * products(z_row, z_row_rest, key, key_rest, PIECES)  # (ROWS, COLUMNS)
        s = tl.where(valid[None, :], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = finite(new_max)
        lowered = tl.exp2(row_max - shift)
        w = tl.exp2(s - shift[:, None])
        row_sum = row_sum * lowered + tl.sum(w, 1)
        row_keys = row_keys * lowered[:, None]
        w_first = w.to(bank.dtype.element_ty)
        row_keys = tl.dot(w_first, key, row_keys, input_precision="ieee")
        if bank.dtype.element_ty == tl.bfloat16:
            row_keys = tl.dot((w - w_first.to(tl.float32)).to(tl.bfloat16), key, row_keys)
        if PIECES == 2:
            row_keys = tl.dot(w_first, key_rest, row_keys)
        row_max = new_max
    at = strip.to(tl.int64) * num_rows + row
    tl.store(largest + at, row_max, mask=row_valid)
    tl.store(sums + at, row_sum, mask=row_valid)
    tl.store(weighted + at[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], row_keys, mask=row_valid[:, None])
