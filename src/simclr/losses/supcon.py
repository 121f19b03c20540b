"""SupCon: the contrastive loss whose positives are all views of an image's class.

Source: Khosla et al. 2020 (arXiv:2004.11362), equation 2, L_out.

Shapes: n images per process, W processes, V views of each image, N = V n W views, D the width.
"""

import math

import torch
from torch import Tensor

from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses.anchors import mean_over_anchors
from simclr.losses.nt_xent import check_stack, l2_normalize, upcast

__all__ = ["supcon", "supcon_dense"]


def supcon(
    views: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    normalize: bool = True,
    *,
    world: DistributedContext | None = None,
) -> Tensor:
    """The mean over views i, and over the positives p of i, of -s_ip + log sum_j exp(s_ij), for all views j but i.

    Positives are the other views of the same image and all views of images with the same label. Where no label occurs
    twice this is `nt_xent_views`. Computed in fp32 (fp64 for fp64 input) under any autocast. Memory grows with N x D,
    not N x N. Gradients of gradients are not defined.

    Args:
        views: (V, n, D) projections, V from 2; `views[v, i]` shows this process's image i.
        labels: (n,) class of each image; a negative number is no class, and has no equal.
        temperature: What similarities are divided by; the paper uses 0.1.
        normalize: Whether similarities are cosines, else dot products.
        world: The processes that share the batch, as in `nt_xent`.

    Returns:
        A scalar, in nats.

    Raises:
        UserError: A temperature that is not positive, or shapes that do not fit.
    """
    _check(views, labels, temperature)
    with torch.autocast(views.device.type, enabled=False):
        rows = upcast(views).transpose(0, 1).flatten(0, 1)  # (n V, D): views of an image are neighbours
        if normalize:
            rows = l2_normalize(rows)
        of_images = (world or DistributedContext()).all_gather_rows(labels)
        image = torch.arange(len(of_images), device=rows.device).repeat_interleave(len(views))  # (N,)
        label = of_images.repeat_interleave(len(views))  # (N,)

        def anchor_loss(z: Tensor, part: slice) -> Tensor:
            return _of_anchors(z, part, image, label, temperature).sum()

        return mean_over_anchors(rows, anchor_loss, world)


def supcon_dense(views: Tensor, labels: Tensor, temperature: float = 0.1, normalize: bool = True) -> Tensor:
    """The definition of `supcon`, with the whole similarity matrix in memory."""
    _check(views, labels, temperature)
    with torch.autocast(views.device.type, enabled=False):
        z = upcast(views).flatten(0, 1)
        if normalize:
            z = l2_normalize(z)
        image = torch.arange(len(labels), device=z.device).repeat(len(views))
        return _of_anchors(z, slice(0, len(z)), image, labels.repeat(len(views)), temperature).mean()


def _of_anchors(z: Tensor, part: slice, image: Tensor, label: Tensor, temperature: float) -> Tensor:
    """The loss of the anchors `part` of the N rows of `z`, of which `image` and `label` say what they show."""
    logits = z[part] @ z.T / temperature  # (A, N)
    anchor = torch.arange(part.start, part.stop, device=z.device)[:, None]
    itself = anchor == torch.arange(len(z), device=z.device)
    same_class = (label[part, None] == label) & (label[part, None] >= 0)
    positive = (same_class | (image[part, None] == image)) & ~itself  # (A, N)
    log_sums = logits.masked_fill(itself, -math.inf).logsumexp(1)  # (A,)
    return log_sums - logits.masked_fill(~positive, 0).sum(1) / positive.sum(1)


def _check(views: Tensor, labels: Tensor, temperature: float) -> None:
    check_stack(views, temperature)
    if labels.shape != views.shape[1:2]:
        raise UserError(f"{tuple(labels.shape)} labels for {views.shape[1]} images: give one label for each image")
