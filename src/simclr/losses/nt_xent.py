"""NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020, arXiv:2002.05709, equation 1 and algorithm 1).

Shapes: n images per process, W processes, N = 2 n W rows (two views of every image), D the width.

`nt_xent_dense` is the definition: what one reads and what tests trust. `nt_xent` computes the same number,
whichever way suits the size: densely, or streamed over tiles of the similarity matrix (losses/streamed.py),
or with the rows shared out over the processes of a distributed run.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from simclr.distributed import World
from simclr.errors import UserError
from simclr.losses.streamed import others_logsumexp

__all__ = ["check_views", "l2_normalize", "nt_xent", "nt_xent_dense", "nt_xent_streamed", "precise"]

STREAM_FROM_ROWS = 640
"""Where streaming overtakes the dense form, forward and backward (D = 128, 1 and 2 threads)."""


def nt_xent(
    za: Tensor, zb: Tensor, temperature: float = 0.1, normalize: bool = True, *, world: World | None = None
) -> Tensor:
    """Mean over all views of the cross entropy of picking a view's partner among all other views.

    The authors' code optimises twice this: the mean over the first views plus the mean over the second.
    Logits are fp32 (fp64 for fp64 input) under any autocast. Memory grows with N x D, not N x N. Gradients of
    gradients are not defined for large batches.

    Args:
        za: (n, D) projections of the first views of this process's images.
        zb: (n, D) projections of their second views, in the same order.
        temperature: What similarities are divided by; 0.1 for ImageNet (paper table 5), 0.5 for CIFAR (B.9).
        normalize: Whether similarities are cosines, else dot products.
        world: The processes that share the batch. Every process gets the loss of the global batch, and
            gradients scaled such that their mean over processes (what DistributedDataParallel takes) is the
            exact gradient of that loss. All processes hold the same n, and must let the result into their
            backward pass alike.

    Returns:
        A scalar, in nats.

    Raises:
        UserError: A temperature that is not positive, views of different shape, or no image.
    """
    check_views(za, zb, temperature)
    if (world is None or world.size == 1) and 2 * len(za) < STREAM_FROM_ROWS:
        return nt_xent_dense(za, zb, temperature, normalize)
    return nt_xent_streamed(za, zb, temperature, normalize, world=world)


def nt_xent_dense(za: Tensor, zb: Tensor, temperature: float = 0.1, normalize: bool = True) -> Tensor:
    """The definition of `nt_xent`, with the whole similarity matrix in memory."""
    with torch.autocast(za.device.type, enabled=False):
        z = precise(torch.cat([za, zb]))  # (N, D)
        if normalize:
            z = l2_normalize(z)
        logits = z @ z.T / temperature  # (N, N)
        logits.fill_diagonal_(-math.inf)  # a view is not its own negative
        partner = torch.arange(len(z), device=z.device).roll(len(za))  # (N,) row of the other view
        return F.cross_entropy(logits, partner)


def nt_xent_streamed(
    za: Tensor, zb: Tensor, temperature: float = 0.1, normalize: bool = True, *, world: World | None = None
) -> Tensor:
    """`nt_xent` without the similarity matrix, on any number of processes."""
    with torch.autocast(za.device.type, enabled=False):
        views = precise(torch.stack([za, zb]))  # (2, n, D)
        if normalize:
            views = l2_normalize(views)
        # Unit rows have similarities in [-1, 1]; from here on exp(similarity / temperature) is safe in fp32.
        bounded = normalize and temperature >= 0.03
        num_views, batch, width = views.shape
        if world is not None and world.size > 1:
            z = _GatherRows.apply(views.flatten(0, 1), world)  # (N, D), process after process
        else:
            z = views.flatten(0, 1)  # (N, D)
        log_sums = others_logsumexp(z, temperature, bounded=bounded, world=world)  # (N,)
        first, second = z.view(-1, num_views, batch, width).unbind(1)  # (W, n, D) each
        positives = (first * second).sum(-1) / temperature  # (W, n)
        return log_sums.mean() - positives.mean()


def l2_normalize(x: Tensor) -> Tensor:
    """Rows (last dimension) of unit length, as TensorFlow's l2_normalize: squared norms from 1e-12."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


class _GatherRows(torch.autograd.Function):
    """Rows of all processes, for a scalar that every process computes from them alike.

    Backward needs no exchange: the gradient of our rows is ours to keep. It is multiplied by the number of
    processes because DistributedDataParallel averages over them what should be summed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.all_gather_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        own = ctx.world.local_slice(len(grad))
        return grad[own] * ctx.world.size, None


def precise(x: Tensor) -> Tensor:
    """fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_views(za: Tensor, zb: Tensor, temperature: float) -> None:
    """Refuse what the loss is not defined for."""
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature is {temperature}, it must be a positive number: try 0.1 or 0.5")
    if za.shape != zb.shape or za.ndim != 2:
        raise UserError(
            f"the two views have shapes {tuple(za.shape)} and {tuple(zb.shape)}: "
            "both must be (images, width), one row an image, in the same order"
        )
    if za.numel() == 0:
        raise UserError(f"the views have shape {tuple(za.shape)}, nothing to contrast: give at least one image")
