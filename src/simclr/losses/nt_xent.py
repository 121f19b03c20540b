"""NT-Xent, the contrastive loss of SimCLR, and its decoupled form DCL, for two views of each image or more.

Sources: Chen et al. 2020 (arXiv:2002.05709), equation 1 and algorithm 1; Yeh et al. 2021 (arXiv:2110.06848).

Shapes: n images per process, W processes, V views of each image, N = V n W rows, D the width.

`nt_xent_dense` and `nt_xent_views_dense` are the definitions: what one reads and what tests trust. `nt_xent` and
`nt_xent_views` compute the same numbers, whichever way suits the size: densely, or streamed over tiles of the
similarity matrix (losses/streamed.py, on GPUs losses/cuda.py), or with the rows shared out over the processes of a
distributed run.
"""

import math
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses.bank import bank_logsumexp
from simclr.losses.operands import Operands, operands_for
from simclr.losses.streamed import others_logsumexp

__all__ = [
    "check_stack",
    "check_views",
    "gather_rows",
    "l2_normalize",
    "nt_xent",
    "nt_xent_dense",
    "nt_xent_streamed",
    "nt_xent_views",
    "nt_xent_views_dense",
    "nt_xent_views_streamed",
    "upcast",
]

STREAM_FROM_ROWS = 640
"""Where streaming overtakes the dense form, forward and backward (D = 128, 1 and 2 threads)."""


def nt_xent(
    za: Tensor,
    zb: Tensor,
    temperature: float = 0.1,
    normalize: bool = True,
    *,
    world: DistributedContext | None = None,
    decoupled: bool = False,
    bank: Tensor | None = None,
) -> Tensor:
    """Mean over all views of the cross entropy of picking a view's partner among all other views.

    The authors' code optimises twice this: the mean over the first views plus the mean over the second.
    Logits are fp32 (fp64 for fp64 input) under any autocast. Memory grows with N x D, not N x N. Gradients of
    gradients are not defined for large batches. On a GPU the unit rows of bf16 projections are rounded to bf16
    once more; those of fp32 projections are multiplied with 16 bits (losses/operands.py).

    Args:
        za: (n, D) projections of the first views of this process's images.
        zb: (n, D) projections of their second views, in the same order.
        temperature: What similarities are divided by; 0.1 for ImageNet (paper table 5), 0.5 for CIFAR (B.9).
        normalize: Whether similarities are cosines, else dot products.
        world: The processes that share the batch. Every process gets the loss of the global batch, and
            gradients scaled such that their mean over processes (what DistributedDataParallel takes) is the
            exact gradient of that loss. All processes hold the same n, and must let the result into their
            backward pass alike.
        decoupled: Leave the partner out of the denominator (DCL); the loss may then be negative.
        bank: (K, D) keys of other images, without gradient and the same on all processes, which are further negatives
            of every view (the memory of SimCLR v2); unit rows where `normalize`.

    Returns:
        A scalar, in nats.

    Raises:
        UserError: A temperature that is not positive, views of different shape, or too few images.
    """
    check_views(za, zb, temperature)
    if _few(2 * len(za), world) and not decoupled and bank is None:
        return nt_xent_dense(za, zb, temperature, normalize)
    return nt_xent_views(torch.stack([za, zb]), temperature, normalize, world=world, decoupled=decoupled, bank=bank)


def nt_xent_views(
    views: Tensor,
    temperature: float = 0.1,
    normalize: bool = True,
    *,
    world: DistributedContext | None = None,
    decoupled: bool = False,
    bank: Tensor | None = None,
) -> Tensor:
    """`nt_xent` for any number of views.

    The mean over ordered pairs (i, p) of two views of one image of

        -s_ip + log sum_j exp(s_ij)

    over all j other than i itself, so that an image's further views stay in the sum, as in SupCon's L_out
    (Khosla et al. 2020, arXiv:2004.11362); or, if `decoupled`, over all views j of other images.

    Args:
        views: (V, n, D) projections, V from 2; `views[v, i]` shows this process's image i.
        temperature: As in `nt_xent`, like those that follow.
    """
    check_stack(views, temperature)
    images = views.shape[1] * (world.size if world else 1)
    if decoupled and images < 2:
        raise UserError("the decoupled loss was given 1 image, but its negatives are other images: give at least two")
    if _few(len(views) * images, world) and (bank is None or len(bank) < STREAM_FROM_ROWS):
        return nt_xent_views_dense(views, temperature, normalize, decoupled, bank)
    return nt_xent_views_streamed(views, temperature, normalize, world=world, decoupled=decoupled, bank=bank)


def nt_xent_dense(za: Tensor, zb: Tensor, temperature: float = 0.1, normalize: bool = True) -> Tensor:
    """The definition of `nt_xent`, with the whole similarity matrix in memory."""
    with torch.autocast(za.device.type, enabled=False):
        z = upcast(torch.cat([za, zb]))  # (N, D)
        if normalize:
            z = l2_normalize(z)
        logits = z @ z.T / temperature  # (N, N)
        logits.fill_diagonal_(-math.inf)  # a view is not its own negative
        partner = torch.arange(len(z), device=z.device).roll(len(za))  # (N,) row of the other view
        return F.cross_entropy(logits, partner)


def nt_xent_views_dense(
    views: Tensor,
    temperature: float = 0.1,
    normalize: bool = True,
    decoupled: bool = False,
    bank: Tensor | None = None,
) -> Tensor:
    """The definition of `nt_xent_views`, with the whole similarity matrix in memory."""
    with torch.autocast(views.device.type, enabled=False):
        z = upcast(views).flatten(0, 1)  # (N, D)
        if normalize:
            z = l2_normalize(z)
        logits = z @ z.T / temperature  # (N, N)
        rows = torch.arange(len(z), device=z.device).view(views.shape[:2])  # (V, n) which row shows what
        own_views = rows.T.repeat(len(views), 1)  # (N, V) rows of the image that a row shows
        left_out = own_views if decoupled else rows.view(-1, 1)
        negatives = logits.scatter(1, left_out, -math.inf)  # (N, N)
        if bank is not None:
            keys = bank.to(z.dtype, copy=True)  # the bank may change before the backward pass
            negatives = torch.cat([negatives, z @ keys.T / temperature], dim=1)  # (N, N + K)
        log_sums = negatives.logsumexp(1)  # (N,)
        view = torch.arange(len(views), device=z.device).repeat_interleave(views.shape[1])[:, None]  # (N, 1)
        others = torch.arange(len(views) - 1, device=z.device)  # (V - 1,)
        partners = own_views.gather(1, others + (others >= view))  # (N, V - 1)
        return (log_sums[:, None] - logits.gather(1, partners)).mean()


def nt_xent_streamed(
    za: Tensor, zb: Tensor, temperature: float = 0.1, normalize: bool = True, *, world: DistributedContext | None = None
) -> Tensor:
    """`nt_xent` without the similarity matrix, on any number of processes."""
    return nt_xent_views_streamed(torch.stack([za, zb]), temperature, normalize, world=world)


def nt_xent_views_streamed(
    views: Tensor,
    temperature: float = 0.1,
    normalize: bool = True,
    *,
    world: DistributedContext | None = None,
    decoupled: bool = False,
    bank: Tensor | None = None,
) -> Tensor:
    """`nt_xent_views` without the similarity matrix, on any number of processes."""
    with torch.autocast(views.device.type, enabled=False):
        kernels = operands_for(views)
        views = upcast(views)  # (V, n, D)
        if normalize:
            views = l2_normalize(views)
        if kernels is Operands.BF16:  # for every product alike, that of a positive pair too
            views = views + (views.bfloat16().float() - views).detach()
        # Unit rows have similarities in [-1, 1]; from here on exp(similarity / temperature) is safe in fp32.
        bounded = normalize and temperature >= 0.03
        num_views, batch, width = views.shape
        # A decoupled sum leaves out an image's views together, so they are neighbours.
        rows = views.transpose(0, 1).flatten(0, 1) if decoupled else views.flatten(0, 1)  # (V n, D)
        z = gather_rows(rows, world)  # process after process
        log_sums = others_logsumexp(
            z, temperature, bounded=bounded, group=num_views if decoupled else 1, world=world, kernels=kernels
        )  # (N,)
        if bank is not None:
            of_bank = _bank_sums(z, bank, temperature, world, kernels is not None)  # (N,)
            log_sums = torch.logaddexp(log_sums, of_bank)
        of_view = z.view(-1, num_views, 1 if decoupled else batch, width).unbind(1)  # (n W, 1, D) or (W, n, D) each
        pairs = [(first * second).sum(-1) / temperature for first, second in combinations(of_view, 2)]
        return log_sums.mean() - torch.stack(pairs).mean()


def l2_normalize(x: Tensor) -> Tensor:
    """Rows (last dimension) of unit length, as TensorFlow's l2_normalize: squared norms from 1e-12."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def _bank_sums(z: Tensor, bank: Tensor, temperature: float, world: DistributedContext | None, kernels: bool) -> Tensor:
    """Log-sum-exp over the bank of every row of z, (N,); each process computes its own rows, and has their gradient."""
    if world is None or world.size == 1:
        return bank_logsumexp(z, bank, temperature, kernels=kernels)
    own = world.local_slice(len(z))
    sums = bank_logsumexp(z[own], bank, temperature, kernels=kernels)
    everyones = world.all_gather_rows(sums)
    return torch.cat([everyones[: own.start], sums, everyones[own.stop :]])


def gather_rows(rows: Tensor, world: DistributedContext | None) -> Tensor:
    """Rows of all processes, one process after the other, for a scalar that every process computes from them alike."""
    return _GatherRows.apply(rows, world) if world is not None and world.size > 1 else rows


class _GatherRows(torch.autograd.Function):
    """`gather_rows` for several processes.

    Backward needs no exchange: the gradient of our rows is ours to keep. It is multiplied by the number of
    processes because DistributedDataParallel averages over them what should be summed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: DistributedContext) -> Tensor:
        ctx.world = world
        return world.all_gather_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        own = ctx.world.local_slice(len(grad))
        return grad[own] * ctx.world.size, None


def upcast(x: Tensor) -> Tensor:
    """fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _few(rows: int, world: DistributedContext | None) -> bool:
    """Whether the dense form is the faster one."""
    return (world is None or world.size == 1) and rows < STREAM_FROM_ROWS


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


def check_stack(views: Tensor, temperature: float) -> None:
    """Refuse what a loss of several views is not defined for."""
    if views.ndim != 3 or len(views) < 2:
        raise UserError(
            f"the views have shape {tuple(views.shape)}: it must be (views, images, width) with at least two views, "
            "in each the same images in the same order"
        )
    check_views(views[0], views[1], temperature)
