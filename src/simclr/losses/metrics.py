"""What the features look like, without labels: the live signs of health of a contrastive run.

Shapes: n images, D the projection's width, F the feature's. Nothing here has a gradient, and no N x N matrix
is stored. Results are scalar tensors on the input's device.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from simclr.distributed import DistributedContext
from simclr.losses.nt_xent import check_views, l2_normalize, upcast

__all__ = ["alignment", "contrastive_accuracy_and_entropy", "effective_rank", "uniformity"]

CHUNK = 1024
"""Rows of similarities held at a time."""


@torch.no_grad()
def contrastive_accuracy_and_entropy(
    za: Tensor, zb: Tensor, temperature: float = 0.1, normalize: bool = True, *, world: DistributedContext | None = None
) -> tuple[Tensor, Tensor]:
    """How well a first view finds its partner among the second views of the batch, and how sure it is.

    As in the authors' code the choice is among the N second views only, not the 2N - 1 other views of the
    loss. With p = softmax over j of za_i . zb_j / temperature, accuracy is the share of rows whose largest p
    is at j = i, and entropy the mean of -sum_j p_j log(p_j + 1e-8), in nats: from 0 (certain) to log N (all
    views look alike).

    Args:
        za: (n, D) projections of the first views of this process's images.
        zb: (n, D) projections of their second views, in the same order.
        temperature: As in the loss.
        normalize: As in the loss.
        world: The processes that share the batch, N = n x processes; every process gets the global figures.
    """
    check_views(za, zb, temperature)
    world = world or DistributedContext()
    with torch.autocast(za.device.type, enabled=False):
        za, zb = upcast(za), upcast(zb)
        if normalize:
            za, zb = l2_normalize(za), l2_normalize(zb)
        partners = world.all_gather_rows(zb)  # (N, D)
        first = world.local_slice(len(partners)).start
        hits, entropy = za.new_zeros(()), za.new_zeros(())
        for rows in _chunks(len(za)):
            p = (za[rows] @ partners.T).div_(temperature).softmax(1)  # (rows, N)
            own = torch.arange(first + rows.start, first + rows.stop, device=za.device)
            hits += (p.argmax(1) == own).sum()
            entropy -= (p * (p + 1e-8).log()).sum()
        accuracy, entropy = world.all_reduce_mean(torch.stack([hits, entropy]) / len(za)).unbind()
        return accuracy, entropy


@torch.no_grad()
def alignment(za: Tensor, zb: Tensor, alpha: float = 2.0) -> Tensor:
    """Mean of |u - v|^alpha over positive pairs of unit length (Wang & Isola 2020, arXiv:2005.10242).

    0 when the views of an image coincide; 2 on average for alpha = 2 when they have nothing in common.

    Args:
        za: (n, D) projections of the first views.
        zb: (n, D) projections of the second views, in the same order.
        alpha: The power.
    """
    distances = (l2_normalize(upcast(za)) - l2_normalize(upcast(zb))).norm(dim=1)  # (n,)
    return distances.pow(alpha).mean()


@torch.no_grad()
def uniformity(z: Tensor, t: float = 2.0) -> Tensor:
    """Log of the mean of exp(-t |u - v|^2) over pairs of different rows of unit length (Wang & Isola 2020).

    0 when all rows coincide (collapse); about -2t when they spread evenly over a sphere of many dimensions.

    Args:
        z: (n, D) projections of different images, at least 2.
        t: Sharpness of the kernel.
    """
    with torch.autocast(z.device.type, enabled=False):
        u = l2_normalize(upcast(z))
        total = u.new_zeros(())
        for rows in _chunks(len(u)):
            kernel = (u[rows] @ u.T).sub_(1.0).mul_(2 * t).exp_()  # (rows, n); |u - v|^2 = 2 - 2 u.v
            kernel.diagonal(rows.start).zero_()
            total += kernel.sum()
        return (total / (len(u) * (len(u) - 1))).log()


@torch.no_grad()
def effective_rank(h: Tensor) -> Tensor:
    """Number of directions that the features use: exp of the singular values' entropy (RankMe, arXiv:2210.02885).

    With p_k = s_k / sum(s) + 1e-7 it is exp(-sum p_k log p_k): from 1 (collapse to a line) to min(n, F). Not
    a number when a feature is not finite.

    Args:
        h: (n, F) features; n well above F for an estimate that does not depend on n. Costs n F min(n, F).
    """
    h = upcast(h)
    if not h.isfinite().all():  # the decomposition would raise, and a measure must not end the run
        return h.new_tensor(math.nan)
    singular = torch.linalg.svdvals(h)  # (min(n, F),)
    p = singular / singular.sum().clamp_min(torch.finfo(h.dtype).tiny) + 1e-7
    return (-(p * p.log()).sum()).exp()


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, CHUNK):
        yield slice(start, min(start + CHUNK, length))
