"""Log-sum-exp of each row of a similarity matrix that is never held in memory.

The costly half of NT-Xent is, for every row i of z (N, D),

    L_i = log sum_{j != i} exp(s_ij),    s_ij = z_i . z_j / temperature,

the other half, the positive pairs, being N dot products. Where rows come in groups (the views of an image), a sum
can leave out the row's whole group instead of the row alone; the formulas stay the same. With g = d loss / d L
and P_ij = exp(s_ij - L_i),

    d loss / d z_i = 1 / temperature  sum_{j != i} (g_i P_ij + g_j P_ji) z_j.

Forward and backward each walk once over tiles of s, which are computed, used and overwritten; since s is
symmetric, a tile above the diagonal serves the one below it too. Extra memory is O(N D + tile^2). The order
of additions is fixed, so results are equal bit for bit from run to run; on a CPU threads share the tiles of a large
batch (turns.py).

In a distributed run every process holds all of z, does the rows that are its own, and shares their L (N
numbers in all); the formula then gives the whole gradient of its rows without another exchange.

This file has the tiles as operations of torch, for any device and for fp64. cuda.py has them as two kernels.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr.distributed import DistributedContext
from simclr.losses.operands import Operands
from simclr.losses.turns import Turns, in_threads

__all__ = ["others_logsumexp"]

CPU_TILE = 512
"""Rows and columns of a tile: 1 MiB in fp32, within a core's L2 cache. 384 to 1,024 are about as fast."""

ROWS_PER_THREAD = 4
"""Rows of tiles that each thread needs to be worth more than a share of each operation; with fewer, torch shares."""

GPU_TILE = 4096
"""Large enough that a launch costs nothing beside the work; 64 MiB in fp32."""


def others_logsumexp(
    z: Tensor,
    temperature: float,
    *,
    bounded: bool,
    group: int = 1,
    world: DistributedContext | None = None,
    tile: int | None = None,
    kernels: Operands | None = None,
) -> Tensor:
    """L of each row of `z` (module docstring), differentiable once.

    Args:
        z: (N, D) rows, fp32 or fp64; in a distributed run the rows of all processes, process after process.
        temperature: What dot products are divided by.
        bounded: Promise that exp(z_i . z_j / temperature) and sums of it stay within fp32, both large and
            small, as they do for unit rows and temperatures from 0.03. Saves a fifth of the time.
        group: Rows in a group, which follow each other; a row's sum is over the rows of other groups. Each
            process holds whole groups.
        world: The processes that share the rows. All of them must compute the same scalar from the result;
            backward then leaves in each process the gradient of its own rows, and zero for those of others.
        tile: Rows and columns of a tile; chosen by device when not given.
        kernels: Use the Triton kernels, with these operands; z is fp32 then, with few enough columns.

    Returns:
        (N,), the same in every process. A row that is alone has -inf.
    """
    if tile is None:
        tile = CPU_TILE if z.device.type == "cpu" else GPU_TILE
    tile = max(tile // group, 1) * group  # groups lie within tiles
    return _OthersLogSumExp.apply(z, temperature, bounded, group, world or DistributedContext(), tile, kernels)


class _OthersLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        temperature: float,
        bounded: bool,
        group: int,
        world: DistributedContext,
        tile: int,
        kernels: Operands | None,
    ) -> Tensor:
        own = world.local_slice(len(z))
        if kernels:
            from simclr.losses import cuda

            own_log_sums = cuda.log_sums(z, temperature, own, group=group, bounded=bounded, operands=kernels)
        else:
            reduce = _log_of_sums if bounded else _merged_log_sums
            own_log_sums = reduce(z, temperature, own, group, tile)[own]
        log_sums = world.all_gather_rows(own_log_sums)  # (N,)
        ctx.save_for_backward(z, log_sums)
        ctx.settings = temperature, bounded, group, own, tile, kernels
        return log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        z, log_sums = ctx.saved_tensors
        temperature, bounded, group, own, tile, kernels = ctx.settings
        dz = torch.zeros_like(z)  # (N, D)
        with torch.autocast(z.device.type, enabled=False):
            if kernels:
                from simclr.losses import cuda

                dz[own] = cuda.gradients(
                    z, log_sums, grad, temperature, own, group=group, bounded=bounded, operands=kernels
                )
            else:
                weigh = _bounded_weights_ if bounded else _weights_

                def weights(rows: slice, columns: slice, s: Tensor) -> Tensor:
                    return weigh(s, log_sums[rows], log_sums[columns], grad[rows], grad[columns])

                def to_rows(rows: slice, columns: slice, weights: Tensor) -> None:
                    dz[rows].addmm_(weights, z[columns])

                def to_columns(rows: slice, columns: slice, weights: Tensor) -> None:
                    dz[columns].addmm_(weights.T, z[rows])

                _each_tile(z, temperature, own, group, tile, weights, to_rows, to_columns)
                dz.div_(temperature)
        return dz, None, None, None, None, None, None


def _log_of_sums(z: Tensor, temperature: float, own: slice, group: int, tile: int) -> Tensor:
    """L of the rows `own` for bounded similarities, whose exponentials need no shift."""
    sums = z.new_zeros(len(z))

    def to_rows(rows: slice, _columns: slice, exponentials: Tensor) -> None:
        sums[rows] += exponentials.sum(1)

    def to_columns(_rows: slice, columns: slice, exponentials: Tensor) -> None:
        sums[columns] += exponentials.sum(0)

    _each_tile(z, temperature, own, group, tile, lambda _rows, _columns, s: s.exp_(), to_rows, to_columns)
    return sums.log_()


def _merged_log_sums(z: Tensor, temperature: float, own: slice, group: int, tile: int) -> Tensor:
    """L of the rows `own` for any similarities."""
    log_sums = z.new_full((len(z),), -math.inf)

    def to_rows(rows: slice, _columns: slice, s: Tensor) -> None:
        log_sums[rows] = log_sums[rows].logaddexp(s.logsumexp(1))

    def to_columns(_rows: slice, columns: slice, s: Tensor) -> None:
        log_sums[columns] = log_sums[columns].logaddexp(s.logsumexp(0))

    _each_tile(z, temperature, own, group, tile, lambda _rows, _columns, s: s, to_rows, to_columns)
    return log_sums


def _bounded_weights_(s: Tensor, l_rows: Tensor, l_columns: Tensor, g_rows: Tensor, g_columns: Tensor) -> Tensor:
    """g_i P_ij + g_j P_ji with one exponential a pair, in the memory of `s`."""
    return s.exp_().mul_((g_rows * l_rows.neg().exp())[:, None] + g_columns * l_columns.neg().exp())


def _weights_(s: Tensor, l_rows: Tensor, l_columns: Tensor, g_rows: Tensor, g_columns: Tensor) -> Tensor:
    """g_i P_ij + g_j P_ji for any similarities, in the memory of `s`."""
    of_columns = (s - l_columns).exp_().mul_(g_columns)
    return s.sub_(l_rows[:, None]).exp_().mul_(g_rows[:, None]).add_(of_columns)


def _each_tile(
    z: Tensor,
    temperature: float,
    own: slice,
    group: int,
    tile: int,
    prepare: Callable[[slice, slice, Tensor], Tensor],
    to_rows: Callable[[slice, slice, Tensor], None],
    to_columns: Callable[[slice, slice, Tensor], None],
) -> None:
    """Let each tile of s add to the sums of its rows and, if the transposed tile is also ours, of its columns.

    All are called with the tile's rows and columns; `prepare` with the tile, which has -inf where a row meets its
    group and is overwritten by the next, the others with what `prepare` made of it. Threads may share the tiles; those
    that add to the same sums do so in the order of one thread.
    """
    starts = range(own.start, own.stop, tile)
    turns = Turns(len(starts))

    def work() -> None:
        memory = z.new_empty(min(tile, len(z)) ** 2)
        for row in turns.rows():
            rows = slice(starts[row], min(starts[row] + tile, own.stop))
            for place, columns in enumerate(_columns(rows.start, len(z), own, tile)):
                s = prepare(rows, columns, _similarities(z, temperature, rows, columns, group, memory))
                if row and place == 0:  # the rows above have added to these rows, as their columns
                    turns.wait(row - 1, 2)
                to_rows(rows, columns, s)
                if _mirrored(rows, columns, own):
                    if row:
                        turns.wait(row - 1, place + 2)
                    to_columns(rows, columns, s)
                turns.added(row)

    threads = torch.get_num_threads() if z.device.type == "cpu" else 1
    in_threads(work, turns, threads if len(starts) >= ROWS_PER_THREAD * threads else 1)


def _similarities(z: Tensor, temperature: float, rows: slice, columns: slice, group: int, memory: Tensor) -> Tensor:
    """One tile of s, in `memory`."""
    shape = rows.stop - rows.start, columns.stop - columns.start
    s = memory[: shape[0] * shape[1]].view(shape)
    torch.addmm(s, z[rows], z[columns].T, beta=0, alpha=1 / temperature, out=s)
    if rows == columns:
        groups = len(s) // group
        s.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).fill_(-math.inf)
    return s


def _columns(start: int, total: int, own: slice, tile: int) -> Iterator[slice]:
    """Columns of the tiles of a row that starts there; within the square own x own from the diagonal on, and first."""
    for first, last in ((start, own.stop), (0, own.start), (own.stop, total)):
        for column in range(first, last, tile):
            yield slice(column, min(column + tile, last))


def _mirrored(rows: slice, columns: slice, own: slice) -> bool:
    """Whether the transposed tile is also ours, and not visited."""
    return rows.start < columns.start < own.stop
