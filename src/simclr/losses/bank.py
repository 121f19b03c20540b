"""Log-sum-exp of rows against a bank of keys that have no gradient: MoCo's queue, the memory of SimCLR v2.

    L_i = log sum_j exp(z_i . bank_j / temperature)

Only the rows have a gradient, so that of L_i is the mean of the bank under the softmax, over the temperature. One pass
over tiles of the bank gives that mean beside L itself: no n x K matrix is held, nothing is read again in backward, and
the bank may change before it.

Shapes: n rows, K keys in the bank, D the width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr.losses.operands import Operands

__all__ = ["bank_logsumexp"]

ROWS, COLUMNS = 256, 1024
"""Of a tile on the CPU: 1 MiB in fp32, within a core's L2 cache."""

GPU_TILE = 8192
"""Rows and columns of a tile of torch's operations on a GPU."""


def bank_logsumexp(
    rows: Tensor,
    bank: Tensor,
    temperature: float,
    *,
    kernels: bool = False,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """L of each row (module docstring), differentiable once, by the rows alone.

    Args:
        rows: (n, D), fp32 or fp64.
        bank: (K, D), K at least 1.
        temperature: What dot products are divided by.
        kernels: Use the Triton kernel, for fp32 rows on a GPU (`operands_for` says which).
        tile: Rows and columns of a tile; chosen by device when not given.

    Returns:
        (n,).
    """
    if tile is None:
        tile = (ROWS, COLUMNS) if rows.device.type == "cpu" else (GPU_TILE, GPU_TILE)
    return _BankLogSumExp.apply(rows, bank.detach().to(rows.dtype), temperature, tile, kernels)


class _BankLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, bank: Tensor, temperature: float, tile: tuple[int, int], kernels: bool
    ) -> Tensor:
        if kernels:
            from simclr.losses import cuda_bank  # Triton takes half a second to import

            log_sums, mean_keys = cuda_bank.log_sums_and_means(rows, bank, temperature, operands=Operands.SPLIT)
        else:
            log_sums, mean_keys = _log_sums_and_means(rows, bank, temperature, tile)
        ctx.save_for_backward(mean_keys)
        ctx.temperature = temperature
        return log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (mean_keys,) = ctx.saved_tensors
        return mean_keys * (grad_outputs[0] / ctx.temperature)[:, None], None, None, None, None


def _log_sums_and_means(rows: Tensor, bank: Tensor, temperature: float, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """L of each row (n,), and the bank's mean under its softmax (n, D).

    Exponents are lowered by the largest that a row has met so far, and what was added up before is lowered when a
    larger one comes.
    """
    log_sums, means = rows.new_empty(len(rows)), torch.empty_like(rows)
    for start in range(0, len(rows), tile[0]):
        part = slice(start, start + tile[0])
        q = rows[part] / temperature
        largest = q.new_full((len(q), 1), -math.inf)
        total, weighted = q.new_zeros(len(q), 1), torch.zeros_like(q)
        for first in range(0, len(bank), tile[1]):
            keys = bank[first : first + tile[1]]
            s = q @ keys.T  # (rows, columns)
            raised = torch.maximum(largest, s.amax(1, keepdim=True))
            lowered = (largest - raised).exp_()
            s.sub_(raised).exp_()
            total.mul_(lowered).add_(s.sum(1, keepdim=True))
            weighted.mul_(lowered).addmm_(s, keys)
            largest = raised
        log_sums[part] = (largest + total.log()).squeeze(1)
        means[part] = weighted / total
    return log_sums, means
