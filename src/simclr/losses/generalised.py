"""The generalised contrastive loss: alignment of an image's views, and a match of all views with a distribution.

Source: Chen, Luo and Li 2021 (arXiv:2011.02803), section 2, and the authors' code,
colabs/intriguing_properties/generalized_contrastive_loss.ipynb of google-research/simclr:

    mean over coordinates of (za - zb)^2 / 2  +  weight x distribution

    logsumexp    mean over views i of log sum_j exp(z_i . z_j / T) - log D, j = i included: decoupled NT-Xent
    normal       sliced Wasserstein distance to standard normal rows: with l2 normalisation, to the uniform hypersphere
    uniform      sliced Wasserstein distance to the uniform hypercube [-1, 1]^D

A sliced Wasserstein distance compares, along the D directions of a random rotation, the sorted coordinates of the views
with those of as many rows drawn from the distribution. The draw is the caller's, so that it can be the same again.

Shapes: n images per process, W processes, N = 2 n W views, D the width.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr.config.pretrain import Prior
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses.nt_xent import check_views, gather_rows, l2_normalize, upcast
from simclr.losses.streamed import others_logsumexp

__all__ = ["Draw", "draw_slices", "generalised_contrastive", "sliced_wasserstein"]


class Draw(NamedTuple):
    """The random part of a sliced Wasserstein distance."""

    rotation: Tensor
    """(D, D) orthogonal; its columns are the directions."""
    rows: Tensor
    """(N, D) rows of the distribution."""


def generalised_contrastive(
    za: Tensor,
    zb: Tensor,
    prior: Prior = "logsumexp",
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    normalize: bool = True,
    draw: Draw | None = None,
    world: DistributedContext | None = None,
) -> Tensor:
    """The authors' `generalized_contrastive_loss`.

    Computed in fp32 (fp64 for fp64 input) under any autocast. Memory grows with N x D, not N x N.

    Args:
        za: (n, D) projections of the first views of this process's images.
        zb: (n, D) projections of their second views, in the same order.
        prior: What the distribution of all views is to match.
        weight: Lambda, of the distribution.
        temperature: Of `logsumexp`; without effect on the others.
        normalize: Whether the projections are scaled to unit length first.
        draw: Of `normal` and `uniform`, the same on all processes: `draw_slices(prior, N, D, seed=..., step=...)`.
        world: The processes that share the batch, as in `nt_xent`.

    Raises:
        UserError: Views of different shape, a temperature that is not positive, or no draw, or one that does not fit.
    """
    check_views(za, zb, temperature)
    with torch.autocast(za.device.type, enabled=False):
        views = upcast(torch.stack([za, zb]))  # (2, n, D)
        if normalize:
            views = l2_normalize(views)
        z = gather_rows(views.flatten(0, 1), world)  # (N, D), process after process
        first, second = z.view(-1, 2, len(za), z.shape[1]).unbind(1)  # (W, n, D)
        alignment = (first - second).square().mean() / 2
        if prior == "logsumexp":
            itself = z.square().sum(1) / temperature  # (N,)
            others = others_logsumexp(z, temperature, bounded=normalize and temperature >= 0.03, world=world)
            match = torch.logaddexp(others, itself).mean() - float(np.log(z.shape[1]))
        else:
            if draw is None or draw.rows.shape != z.shape:
                raise UserError(f"prior {prior!r} needs a draw of {tuple(z.shape)}: see draw_slices")
            # One order for any number of processes: it decides which of two equal rows is sorted first.
            rows = torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
            match = sliced_wasserstein(rows, draw, normalize=normalize)
        return alignment + weight * match


def sliced_wasserstein(z: Tensor, draw: Draw, *, normalize: bool) -> Tensor:
    """Mean over directions and ranks of the squared difference between sorted coordinates.

    Of equal coordinates, that of the earlier row is sorted first.

    Args:
        z: (N, D) rows.
        draw: Directions, and rows of the distribution.
        normalize: Whether the rows of the distribution are scaled to unit length, as those of `z` are.
    """
    rotation, target = draw.rotation.to(z), draw.rows.to(z)
    if normalize:
        target = l2_normalize(target)
    ours, theirs = (x @ rotation for x in (z, target))
    return (ours.sort(dim=0, stable=True).values - theirs.sort(dim=0).values).square().mean()


def draw_slices(
    prior: Prior, rows: int, width: int, *, seed: int, step: int, device: torch.device | str = "cpu"
) -> Draw:
    """Directions and rows of the distribution, a pure function of the arguments.

    The rotation is uniform over the orthogonal matrices (QR of a normal matrix with the signs of R's diagonal), as
    TensorFlow's Orthogonal initialiser draws it. fp32.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    q, r = np.linalg.qr(rng.standard_normal((width, width)))
    drawn = rng.standard_normal((rows, width)) if prior == "normal" else rng.uniform(-1, 1, (rows, width))
    rotation = q * np.where(np.diag(r) < 0, -1, 1)
    return Draw(*(torch.from_numpy(x.astype(np.float32)).to(device) for x in (rotation, drawn)))
