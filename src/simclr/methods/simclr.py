"""SimCLR's method: two views of each image, one encoder, one projection head, NT-Xent (paper section 2.1).

Shapes: B images on this process, 2 views of each, F features, D projection width.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from simclr.config.pretrain import PretrainConfig
from simclr.distributed import DistributedContext
from simclr.losses import nt_xent
from simclr.losses.metrics import alignment, contrastive_accuracy_and_entropy, effective_rank, uniformity
from simclr.methods.method import Method
from simclr.models.encoder import Encoder
from simclr.models.heads import ProjectionHead


class SimCLR(Method):
    """Encoder and projection head under the contrastive loss.

    The loss is computed inside `forward`, so that under DistributedDataParallel every gradient passes the reducer.

    Args:
        temperature: Of the loss.
        loss_scale: Factor on the loss that is optimised; the authors' code optimises twice the paper's mean
            (tf2/objective.py adds the two directions), which matters to parameters that LARS does not adapt.
        world: Process group that shares negatives.
        decoupled: Take DCL for NT-Xent: positives stay out of the denominator.
    """

    grad_cache: ClassVar[bool] = True
    metric_formats: ClassVar[Mapping[str, str]] = {
        "contrastive_accuracy": "accuracy {:.1%}",
        "effective_rank": "rank {:.1f}",
    }
    remedy: ClassVar[str] = "Try a lower --lr, a longer --warmup-epochs, or a higher --temperature in a new run."

    def __init__(
        self,
        encoder: Encoder,
        head: ProjectionHead,
        *,
        temperature: float,
        loss_scale: float,
        world: DistributedContext,
        decoupled: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.temperature = temperature
        self.loss_scale = loss_scale
        self.world = world
        self.decoupled = decoupled

    @classmethod
    def build(cls, encoder: Encoder, config: PretrainConfig, context: DistributedContext) -> Self:
        """The method with a fresh projection head, as the settings say."""
        head = ProjectionHead(
            encoder.num_features, kind=config.head, layers=config.head_layers, dim=config.head_dim, seed=config.seed
        )
        return cls(
            encoder, head, temperature=config.temperature, loss_scale=config.loss_scale, world=context,
            decoupled=config.loss == "dcl",
        )  # fmt: skip

    def forward(self, *views: Tensor, detail: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to optimise, and metrics that need no labels.

        Args:
            views: The two views of B images, (B, C, S, S) in [0, 1] each; row i of both shows image i.
            detail: Also compute contrastive accuracy and the measures of collapse, over the images of all processes.

        Returns:
            The scaled global loss (scalar), and detached scalars: `loss` is the mean over 2N.
        """
        return self.loss(*self.encode(*views), detail=detail)

    def encode(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """Features (2B, F) and projections (2B, D) of two views, (B, C, S, S) each."""
        h = self.encoder(torch.cat(views))  # one forward, batch-norm statistics over both
        return h, self.head(h)

    def loss(self, features: Tensor, projections: Tensor, *, detail: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` returns, from the features (2B, F) and projections (2B, D) of both views."""
        za, zb = projections.chunk(2)
        loss = nt_xent(za, zb, self.temperature, world=self.world, decoupled=self.decoupled)
        metrics = {"loss": loss.detach()}
        if detail:
            metrics |= self._health(features.detach(), za.detach(), zb.detach())
        return self.loss_scale * loss, metrics

    def warnings(self, record: Mapping[str, float]) -> list[str]:
        """Signs of collapse."""
        return collapse_signs(record)

    def published(self) -> dict[str, nn.Module | None]:
        """The encoder and its projection head."""
        return {"encoder": self.encoder, "head": self.head}

    @torch.no_grad()
    def _health(self, h: Tensor, za: Tensor, zb: Tensor) -> dict[str, Tensor]:
        ha = self.world.all_gather_rows(h.chunk(2)[0].float())  # (N, F): one view of each image of the global batch
        za, zb = (self.world.all_gather_rows(z.float()) for z in (za, zb))  # (N, D)
        accuracy, entropy = contrastive_accuracy_and_entropy(za, zb, self.temperature)
        return {
            "contrastive_accuracy": accuracy,
            "contrastive_entropy": entropy,
            "alignment": alignment(za, zb),
            "uniformity": uniformity(za),
            "effective_rank": effective_rank(ha),
        }


def collapse_signs(record: Mapping[str, float]) -> list[str]:
    """Sentences for signs that the features have collapsed; empty when they have not."""
    signs = []
    if record.get("effective_rank", float("inf")) < 2:
        signs.append(
            f"the features span {record['effective_rank']:.1f} directions (effective rank): they have collapsed; "
            "try a lower --lr or a higher --temperature."
        )
    if record.get("uniformity", -float("inf")) > -0.1:
        signs.append(
            f"all projections point the same way (uniformity {record['uniformity']:.2f}, 0 is total collapse); "
            "try a lower --lr or a longer --warmup-epochs."
        )
    return signs
