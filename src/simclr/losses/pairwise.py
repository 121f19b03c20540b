"""NT-Logistic and margin triplet: the losses that SimCLR compares NT-Xent with (paper tables 2 and 4).

Source: Chen et al. 2020 (arXiv:2002.05709), section 5.1, tables 2 and 4; semi-hard negatives: Schroff et al. 2015
(arXiv:1503.03832), section 3.2. The authors released no code for them.

An anchor is a view of an image. Its positive is the other view of that image, and its negatives are the other views of
all other images: those of one augmentation only, as in the paper's comparison. With s the cosine similarities,

    NT-Logistic     -log sigmoid(s+ / T) - mean over negatives of log sigmoid(-s- / T)
    margin triplet  mean over negatives of max(s- - s+ + m, 0)

The paper writes one negative; the mean over all is ours, so that positive and negatives weigh alike for any batch.
Semi-hard mining takes one negative in place of all: the one closest to the anchor among those that are farther than the
positive. Where there is none, nothing is pushed away: the triplet loss is 0, NT-Logistic keeps its positive.

Shapes: n images per process, W processes, N = 2 n W views, D the width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses.anchors import mean_over_anchors
from simclr.losses.nt_xent import check_views, l2_normalize, upcast

__all__ = ["margin_triplet", "margin_triplet_dense", "nt_logistic", "nt_logistic_dense"]


def nt_logistic(
    za: Tensor,
    zb: Tensor,
    temperature: float = 0.1,
    normalize: bool = True,
    *,
    world: DistributedContext | None = None,
    semi_hard: bool = False,
) -> Tensor:
    """Mean over all views of the NT-Logistic loss.

    Computed in fp32 (fp64 for fp64 input) under any autocast. Memory grows with N x D, not N x N. Gradients of
    gradients are not defined.

    Args:
        za: (n, D) projections of the first views of this process's images.
        zb: (n, D) projections of their second views, in the same order.
        temperature: What similarities are divided by; the paper tries 0.1, 0.2, 0.5 and 1.
        normalize: Whether similarities are cosines, else dot products.
        world: The processes that share the batch, as in `nt_xent`.
        semi_hard: Take the semi-hard negative alone.

    Returns:
        A scalar, in nats.

    Raises:
        UserError: A temperature that is not positive, views of different shape, or fewer than two images.
    """
    check_views(za, zb, temperature)
    return _mean(za, zb, normalize, world, lambda s, image: _logistic(s / temperature, image, semi_hard))


def margin_triplet(
    za: Tensor,
    zb: Tensor,
    margin: float = 0.8,
    normalize: bool = True,
    *,
    world: DistributedContext | None = None,
    semi_hard: bool = False,
) -> Tensor:
    """Mean over all views of the margin triplet loss, in units of similarity; otherwise as `nt_logistic`.

    Args:
        margin: How much more similar the positive has to be than a negative; the paper tries 0, 0.4, 0.8 and 1.6.
    """
    check_views(za, zb, 1.0)
    _check_margin(margin)
    return _mean(za, zb, normalize, world, lambda s, image: _triplet(s, image, margin, semi_hard))


def nt_logistic_dense(
    za: Tensor, zb: Tensor, temperature: float = 0.1, normalize: bool = True, semi_hard: bool = False
) -> Tensor:
    """The definition of `nt_logistic`, with the whole similarity matrix in memory."""
    s, image = _similarities_dense(za, zb, normalize)
    return _logistic(s / temperature, image, semi_hard).mean()


def margin_triplet_dense(
    za: Tensor, zb: Tensor, margin: float = 0.8, normalize: bool = True, semi_hard: bool = False
) -> Tensor:
    """The definition of `margin_triplet`, with the whole similarity matrix in memory."""
    s, image = _similarities_dense(za, zb, normalize)
    return _triplet(s, image, margin, semi_hard).mean()


def _logistic(s: Tensor, image: Tensor, semi_hard: bool) -> Tensor:
    """NT-Logistic of each anchor, (A,).

    Args:
        s: (A, M) similarities over the temperature, of each anchor with the other view of each of M images.
        image: (A, 1) which of the M images an anchor shows.
    """
    positive = s.gather(1, image)  # (A, 1)
    if semi_hard:
        hardest, exists = _semi_hard(s, positive)
        pushed = torch.where(exists, -F.logsigmoid(-hardest), 0)  # (A, 1)
    else:
        pushed = (-F.logsigmoid(-s)).scatter(1, image, 0).sum(1, keepdim=True) / (s.shape[1] - 1)
    return (pushed - F.logsigmoid(positive)).squeeze(1)


def _triplet(s: Tensor, image: Tensor, margin: float, semi_hard: bool) -> Tensor:
    """Margin triplet loss of each anchor, (A,); arguments as in `_logistic`, without a temperature."""
    positive = s.gather(1, image)  # (A, 1)
    if semi_hard:
        hardest, exists = _semi_hard(s, positive)
        return torch.where(exists, (hardest - positive + margin).clamp_min(0), 0).squeeze(1)
    return (s - positive + margin).clamp_min(0).scatter(1, image, 0).sum(1) / (s.shape[1] - 1)


def _semi_hard(s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The largest similarity below the positive's, and whether there is one, (A, 1) each.

    Where there is none, the similarity is that of some image, which the caller leaves out.
    """
    below = s.masked_fill(s >= positive, -math.inf)  # the positive itself is not below
    place = below.argmax(1, keepdim=True)
    return s.gather(1, place), below.gather(1, place) > -math.inf


def _mean(
    za: Tensor,
    zb: Tensor,
    normalize: bool,
    world: DistributedContext | None,
    of_anchors: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The mean over all anchors of `of_anchors(s, image)`, some anchors at a time."""
    _check_images(len(za) * (world.size if world else 1))
    with torch.autocast(za.device.type, enabled=False):
        rows = upcast(torch.stack([za, zb], 1).flatten(0, 1))  # (2 n, D): views of an image are neighbours
        if normalize:
            rows = l2_normalize(rows)

        def anchor_loss(z: Tensor, part: slice) -> Tensor:
            anchor = torch.arange(part.start, part.stop, device=z.device)
            s = (z[part] @ z.T).view(len(anchor), -1, 2)  # (A, M, 2)
            other_view = (1 - anchor % 2).view(-1, 1, 1).expand(-1, s.shape[1], 1)
            return of_anchors(s.gather(2, other_view).squeeze(2), (anchor // 2)[:, None]).sum()

        return mean_over_anchors(rows, anchor_loss, world)


def _similarities_dense(za: Tensor, zb: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """(2n, n) similarities of each view with the other view of each image, and the (2n, 1) image that it shows."""
    _check_images(len(za))
    with torch.autocast(za.device.type, enabled=False):
        za, zb = upcast(za), upcast(zb)
        if normalize:
            za, zb = l2_normalize(za), l2_normalize(zb)
        image = torch.arange(len(za), device=za.device).repeat(2)[:, None]
        return torch.cat([za @ zb.T, zb @ za.T]), image


def _check_images(images: int) -> None:
    if images < 2:
        raise UserError("the loss was given 1 image, but its negatives are other images: give at least two")


def _check_margin(margin: float) -> None:
    if not 0 <= margin < math.inf:
        raise UserError(f"margin is {margin}, it must be a number from 0 on: try 0.4 or 0.8")
