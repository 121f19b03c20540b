"""The loss of SimCLR's method as its settings choose it: one of those that compare views of images without labels."""

from dataclasses import dataclass

from torch import Tensor

from simclr.config.pretrain import MULTI_VIEW_LOSSES, LossName, Prior
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses.generalised import draw_slices, generalised_contrastive
from simclr.losses.nt_xent import nt_xent, nt_xent_views
from simclr.losses.pairwise import margin_triplet, nt_logistic

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
    def multi_view(self) -> bool:
        """Whether the loss takes more than two views, and keys of earlier batches."""
        return self.name in MULTI_VIEW_LOSSES

    def __call__(
        self, views: Tensor, *, world: DistributedContext, bank: Tensor | None = None, step: int = 0
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            views: (V, n, D) projections; `views[v, i]` shows this process's image i.
            world: The processes that share the batch, as in `nt_xent`.
            bank: (K, D) keys of earlier batches, which are further negatives (of `nt-xent` and `dcl`).
            step: Of the training, which decides what is drawn.

        Raises:
            UserError: The loss cannot take these views.
        """
        decoupled = self.name == "dcl"
        if self.multi_view and len(views) > 2:
            return nt_xent_views(
                views, self.temperature, self.normalize, world=world, decoupled=decoupled, bank=bank
            )  # fmt: skip
        if len(views) != 2 or (bank is not None and not self.multi_view):
            raise UserError(f"the loss {self.name} takes two views of each image, and no keys of earlier batches")
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
