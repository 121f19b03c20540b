"""The loss of SimCLR's method as its settings choose it."""

from dataclasses import dataclass

from torch import Tensor

from simclr.config.pretrain import MULTI_VIEW_LOSSES, QUEUE_LOSSES, LossName, Prior
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses.generalised import draw_slices, generalised_contrastive
from simclr.losses.nt_xent import nt_xent, nt_xent_views
from simclr.losses.pairwise import margin_triplet, nt_logistic
from simclr.losses.supcon import supcon

__all__ = ["ContrastiveLoss"]


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """A loss of V views of n images on this process, (V, n, D), over the images of all processes."""

    name: LossName = "nt-xent"
    temperature: float = 0.1
    """What similarities are divided by; without effect on `margin`."""
    normalize: bool = True
    """Whether projections are scaled to unit length."""
    semi_hard: bool = False
    """Of `nt-logistic` and `margin`: the semi-hard negative alone."""
    margin: float = 0.8
    """Of `margin`."""
    prior: Prior = "logsumexp"
    """Of `generalised`."""
    prior_weight: float = 1.0
    """Of `generalised`."""
    seed: int = 0
    """Of what `generalised` draws at each step."""

    @property
    def takes_labels(self) -> bool:
        """Whether the loss needs the class of each image."""
        return self.name == "supcon"

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can replay it (`Method.capturable`)."""
        return self.name in QUEUE_LOSSES

    def __call__(
        self,
        views: Tensor,
        *,
        world: DistributedContext,
        bank: Tensor | None = None,
        step: int = 0,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            views: (V, n, D) projections; `views[v, i]` shows this process's image i.
            world: The processes that share the batch, as in `nt_xent`.
            bank: (K, D) keys of earlier batches, which are further negatives (of `nt-xent` and `dcl`).
            step: Of the training, which decides what is drawn.
            labels: (n,) class of each image, where the loss takes labels.

        Raises:
            UserError: The loss cannot take these views, or lacks labels.
        """
        if bank is not None and self.name not in QUEUE_LOSSES:
            raise UserError(f"the loss {self.name} takes no keys of earlier batches")
        if len(views) != 2 and self.name not in MULTI_VIEW_LOSSES:
            raise UserError(f"the loss {self.name} takes two views of each image, and was given {len(views)}")
        if self.name == "supcon":
            if labels is None:
                raise UserError("the loss supcon needs the class of each image")
            return supcon(views, labels, self.temperature, self.normalize, world=world)
        decoupled = self.name == "dcl"
        if len(views) > 2:
            return nt_xent_views(
                views, self.temperature, self.normalize, world=world, decoupled=decoupled, bank=bank
            )  # fmt: skip
        za, zb = views.unbind()
        if self.name == "nt-logistic":
            return nt_logistic(za, zb, self.temperature, self.normalize, world=world, semi_hard=self.semi_hard)
        if self.name == "margin":
            return margin_triplet(za, zb, self.margin, self.normalize, world=world, semi_hard=self.semi_hard)
        if self.name == "generalised":
            return self._generalised(za, zb, world, step)
        return nt_xent(za, zb, self.temperature, self.normalize, world=world, decoupled=decoupled, bank=bank)

    def _generalised(self, za: Tensor, zb: Tensor, world: DistributedContext, step: int) -> Tensor:
        draw = None
        if self.prior != "logsumexp":
            rows = 2 * len(za) * world.size
            draw = draw_slices(self.prior, rows, za.shape[1], seed=self.seed, step=step, device=za.device)
        return generalised_contrastive(
            za, zb, self.prior, weight=self.prior_weight, temperature=self.temperature, normalize=self.normalize,
            draw=draw, world=world,
        )  # fmt: skip
