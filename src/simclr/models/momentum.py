"""A momentum encoder and the queue of keys that it makes (MoCo, He et al. 2020, arXiv:1911.05722, section 3.2).

Shapes: B images, C channels, S x S pixels, K keys in the queue, D the projection's width.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from simclr.errors import UserError
from simclr.losses.nt_xent import l2_normalize, upcast
from simclr.models.encoder import Encoder
from simclr.models.heads import ProjectionHead
from simclr.models.init import seeded


class MomentumEncoder(nn.Module):
    """Encoder and projection head whose weights are a moving average of those of others; they have no gradient.

    Only parameters are averaged. Batch norm normalises by its own batches, and keeps its own running statistics.
    """

    def __init__(self, encoder: Encoder, head: ProjectionHead) -> None:
        super().__init__()
        self.encoder = deepcopy(encoder)
        self.head = deepcopy(head)
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, encoder: Encoder, head: ProjectionHead, momentum: float) -> None:
        """Keep `momentum` of each weight, and take the rest from the same weight of `encoder` and `head`."""
        own: list[Tensor] = list(self.parameters())
        theirs: list[Tensor] = [*encoder.parameters(), *head.parameters()]
        torch._foreach_mul_(own, momentum)
        torch._foreach_add_(own, theirs, alpha=1 - momentum)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) in [0, 1] -> keys (B, D): unit rows, fp32 or fp64."""
        z = self.head(self.encoder(x))
        return l2_normalize(upcast(z))


class KeyQueue(nn.Module):
    """The newest K keys; the oldest make room for new ones. It begins with random ones, as MoCo's does.

    Args:
        length: K.
        width: D.
        seed: Of the random keys.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, length: int, width: int, *, seed: int) -> None:
        super().__init__()
        if length < 1:
            raise UserError(f"A queue of {length} keys was asked for; it needs at least one.")
        with seeded(seed, "queue"):
            self.register_buffer("keys", l2_normalize(torch.randn(length, width)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys (n, D) in place of the oldest; of more than K, the last K stay."""
        length = len(self.keys)
        newest = keys[-length:]
        at = (self.position + torch.arange(len(keys) - len(newest), len(keys), device=keys.device)) % length
        self.keys[at] = newest.to(self.keys.dtype)
        self.position.copy_((self.position + len(keys)) % length)
