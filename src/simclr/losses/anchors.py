"""Means over anchors of losses that each need one row of similarities, in memory that grows with N x D, not N x N.

Value and gradient of some anchors at a time are computed in the forward pass, so that no more of the similarity matrix
than their rows is held, and backward has nothing left to do. Several processes share the anchors.

Shapes: n images per process, W processes, V views of each image, N = V n W rows, D the width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr.distributed import DistributedContext

__all__ = ["ANCHORS_AT_A_TIME", "mean_over_anchors"]

ANCHORS_AT_A_TIME = 256
"""Rows of the similarity matrix held at once."""

AnchorLoss = Callable[[Tensor, slice], Tensor]
"""(N, D) rows of all processes and which of them are anchors -> the sum of these anchors' losses."""


def mean_over_anchors(rows: Tensor, anchor_loss: AnchorLoss, world: DistributedContext | None = None) -> Tensor:
    """The mean over all N anchors, for a gradient with respect to `rows`.

    Args:
        rows: (V n, D) rows of this process.
        anchor_loss: What an anchor contributes; `anchor_loss(z, part)` gets the rows of all processes, one process
            after the other. Differentiated once; the same operations on every process.
        world: The processes that share the batch. Every process gets the global mean, and a gradient scaled such that
            its mean over processes (what DistributedDataParallel takes) is exact.
    """
    return _MeanOverAnchors.apply(rows, anchor_loss, world or DistributedContext())


class _MeanOverAnchors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor_loss: AnchorLoss, world: DistributedContext) -> Tensor:
        z = world.all_gather_rows(rows.detach())  # (N, D)
        own = world.local_slice(len(z))
        total, dz = z.new_zeros(()), torch.zeros_like(z)
        for start in range(own.start, own.stop, ANCHORS_AT_A_TIME):
            part = slice(start, min(start + ANCHORS_AT_A_TIME, own.stop))
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                of_part = anchor_loss(leaf, part)
            if ctx.needs_input_grad[0]:
                dz += torch.autograd.grad(of_part, leaf)[0]
            total += of_part.detach()
        dz = world.all_reduce_sum(dz)
        ctx.save_for_backward(dz[own] * (world.size / len(z)))
        return world.all_reduce_sum(total) / len(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        return ctx.saved_tensors[0] * grad, None, None
