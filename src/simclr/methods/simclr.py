"""SimCLR's method: two views of each image, one encoder, one projection head, NT-Xent (paper section 2.1).

Other losses take the place of NT-Xent where the settings say so (losses/contrastive.py).

With more views than two, all of an image's views are positives of each other: the full graph of pairs of CMC (Tian et
al. 2020, arXiv:1906.05849), and for SimCLR of ECPP (arXiv:2401.05730). Small crops are views like the others. As in
SwAV (Caron et al. 2020, arXiv:2006.09882, src/resnet50.py of its code) the encoder sees the views of each size in one
forward, and the head sees all views in one.

Shapes: B images on this process, V views of each, F features, D projection width.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from simclr.config.pretrain import PretrainConfig
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses.contrastive import ContrastiveLoss
from simclr.losses.metrics import alignment, contrastive_accuracy_and_entropy, effective_rank, uniformity
from simclr.methods.method import Method, build_head, collapse_signs
from simclr.models.encoder import Encoder
from simclr.models.heads import LinearClassifier, ProjectionHead
from simclr.models.momentum import KeyQueue, MomentumEncoder


class SimCLR(Method):
    """Encoder and projection head under the contrastive loss.

    The loss is computed inside `forward`, so that under DistributedDataParallel every gradient passes the reducer.

    Args:
        criterion: The loss of the projections.
        loss_scale: Factor on the loss that is optimised; the authors' code optimises twice the paper's mean
            (tf2/objective.py adds the two directions), which matters to parameters that LARS does not adapt.
        world: Process group that shares negatives.
        memory: Keys of earlier batches that are further negatives of every view (SimCLR v2, arXiv:2006.10029, section 2
            and appendix D); None: none.
        view_sizes: Height and width of each view in pixels, those of a size side by side; None: two of the encoder's.
        num_classes: Of the images, where the loss (SupCon) or the probe takes labels; `forward` then takes them after
            the views.

    Attributes:
        probe: A linear classifier of `num_classes` that learns beside, from what the encoder returns for every view,
            without a gradient to the encoder (paper B.6, and tf2/run.py of the authors); None: none.
    """

    multi_view: ClassVar[bool] = True
    grad_cache: ClassVar[bool] = True
    metric_formats: ClassVar[Mapping[str, str]] = {
        "contrastive_accuracy": "accuracy {:.1%}",
        "effective_rank": "rank {:.1f}",
        "probe_accuracy": "probe {:.1%}",
    }
    remedy: ClassVar[str] = "Try a lower --lr, a longer --warmup-epochs, or a higher --temperature in a new run."

    def __init__(
        self,
        encoder: Encoder,
        head: ProjectionHead,
        *,
        criterion: ContrastiveLoss,
        loss_scale: float,
        world: DistributedContext,
        memory: "Memory | None" = None,
        view_sizes: Sequence[int] | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.criterion = criterion
        self.loss_scale = loss_scale
        self.world = world
        self.memory = memory
        self.capturable = memory is None and criterion.capturable
        self.step = 0
        self.num_views = 2 if view_sizes is None else len(view_sizes)
        self._view_sizes = None if view_sizes is None else tuple(view_sizes)
        self._num_classes = num_classes
        self.probe: LinearClassifier | None = None

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """Height and width of each view, in pixels."""
        return super().view_sizes if self._view_sizes is None else self._view_sizes

    @classmethod
    def build(
        cls, encoder: Encoder, config: PretrainConfig, context: DistributedContext, *, num_classes: int = 0
    ) -> Self:
        """The method with a fresh projection head, as the settings say."""
        head = build_head(encoder, config)
        memory = None
        if config.queue:
            memory = Memory(encoder, head, length=config.queue, momentum=config.ema, seed=config.seed)
        method = cls(
            encoder, head, criterion=_criterion(config), loss_scale=config.loss_scale, world=context, memory=memory,
            view_sizes=config.view_sizes, num_classes=num_classes,
        )  # fmt: skip
        if config.probe:
            method.probe = LinearClassifier(encoder.num_features, num_classes, seed=config.seed)
        return method

    @classmethod
    def takes_labels(cls, config: PretrainConfig) -> bool:
        """With SupCon, and with a probe."""
        return _criterion(config).takes_labels or config.probe

    @classmethod
    def check(cls, config: PretrainConfig, context: DistributedContext, num_images: int | None = None) -> None:
        """Refuse settings that have no effect."""
        if config.symmetric or config.bn_splits != PretrainConfig.bn_splits:
            name = "--symmetric" if config.symmetric else "--bn-splits"
            raise UserError(
                f"{name} is a setting of MoCo and has no effect on SimCLR; leave it out, or give --method moco."
            )
        if config.ema != PretrainConfig.ema and not config.queue:
            raise UserError("--ema has no effect without a queue of keys; give --queue too, such as --queue 65536.")

    def prepare_step(self, step: int) -> None:
        """Let the momentum encoder, if there is one, follow the weights as the last step left them."""
        self.step = step
        if self.memory is not None:
            self.memory.encoder.follow(self.encoder, self.head, self.memory.momentum)

    def forward(self, *inputs: Tensor, detail: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to optimise, and metrics that need no labels.

        Args:
            inputs: V views of B images, (B, C, S, S) in [0, 1] each, S as in `view_sizes`; row i of each shows image i.
                Where the loss takes labels, the (B,) int64 class of each image follows.
            detail: Also compute contrastive accuracy and the measures of collapse, over the images of all processes.

        Returns:
            The scaled global loss (scalar), and detached scalars: `loss` is the mean over 2N.
        """
        self.observe(*inputs)
        return self.loss(*self.encode(*inputs), *inputs[self.num_views :], detail=detail)

    def observe(self, *inputs: Tensor) -> None:
        """Make keys for the queue of the V views of b images, but for small crops: SwAV's queue takes none either."""
        if self.memory is not None:
            views = inputs[: self.num_views]
            self.memory.observe(*(view for view in views if view.shape == views[0].shape))

    def encode(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features (V B, F) and projections (V B, D) of V views, (B, C, S, S) each; labels after them are ignored."""
        views = inputs[: self.num_views]
        of_sizes = [torch.cat(list(group)) for _, group in groupby(views, key=lambda view: view.shape)]
        h = torch.cat([self.encoder(x) for x in of_sizes])  # batch-norm statistics over all views of a size
        return h, self.head(h)

    def loss(
        self, features: Tensor, projections: Tensor, *others: Tensor, detail: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` returns, from features (V B, F) and projections (V B, D) of all views, and any labels (B,)."""
        labels = others[0] if others else None
        z = projections.unflatten(0, (self.num_views, -1))  # (V, B, D)
        bank = None if self.memory is None else self.memory.queue.keys
        of_loss = labels if self.criterion.takes_labels else None
        loss = self.criterion(z, world=self.world, bank=bank, step=self.step, labels=of_loss)
        if self.memory is not None:
            self.memory.store(self.world)
        metrics = {"loss": loss.detach()}
        if detail:
            metrics |= self._health(features.detach()[: z.shape[1]], *z.detach()[:2])
        optimised = self.loss_scale * loss
        if self.probe is not None:
            assert labels is not None
            of_views = labels.repeat(self.num_views)  # (V B,)
            logits = self.probe(features.detach().to(self.probe.weight.dtype))  # (V B, K)
            optimised = optimised + functional.cross_entropy(logits, of_views)
            if detail:
                right = (logits.detach().argmax(1) == of_views).to(loss.dtype).mean()
                metrics["probe_accuracy"] = self.world.all_reduce_mean(right)
        return optimised, metrics

    def trial_inputs(self, n: int) -> tuple[Tensor, ...]:
        """Random views of n images, and a class of each where the loss or the probe takes labels."""
        views = super().trial_inputs(n)
        if not (self.criterion.takes_labels or self.probe is not None):
            return views
        return *views, torch.randint(max(self._num_classes, 1), (n,), device=views[0].device)

    def warnings(self, record: Mapping[str, float]) -> list[str]:
        """Signs of collapse."""
        return collapse_signs(record)

    def published(self) -> dict[str, nn.Module | None]:
        """The encoder and its projection head, and those of the momentum encoder if there is one."""
        networks: dict[str, nn.Module | None] = {"encoder": self.encoder, "head": self.head}
        if self.memory is not None:
            networks |= {"key_encoder": self.memory.encoder.encoder, "key_head": self.memory.encoder.head}
        return networks

    @torch.no_grad()
    def _health(self, ha: Tensor, za: Tensor, zb: Tensor) -> dict[str, Tensor]:
        """Metrics of the first view's features (B, F) and of the first two views' projections (B, D)."""
        ha = self.world.all_gather_rows(ha.float())  # (N, F): one view of each image of the global batch
        za, zb = (self.world.all_gather_rows(z.float()) for z in (za, zb))  # (N, D)
        accuracy, entropy = contrastive_accuracy_and_entropy(
            za, zb, self.criterion.temperature, self.criterion.normalize
        )
        return {
            "contrastive_accuracy": accuracy,
            "contrastive_entropy": entropy,
            "alignment": alignment(za, zb),
            "uniformity": uniformity(za),
            "effective_rank": effective_rank(ha),
        }


def _criterion(config: PretrainConfig) -> ContrastiveLoss:
    """The loss that the settings choose."""
    return ContrastiveLoss(
        name=config.loss, temperature=config.temperature, normalize=config.normalize,
        semi_hard=config.negatives == "semi-hard", margin=config.margin, prior=config.prior,
        prior_weight=config.prior_weight, seed=config.seed,
    )  # fmt: skip


class Memory(nn.Module):
    """The memory of SimCLR v2: a momentum encoder, and the queue of what it made of earlier batches.

    The authors did not release its code. They name 65,536 keys and a momentum of 0.999 (appendix D), and say that the
    memory adds to the negatives of the batch (section 2). Here those stay what they are in SimCLR.

    Shapes: V views of b images in a chunk.

    Args:
        encoder: Whose moving average makes the keys.
        head: Its projection head.
        length: Keys that are kept.
        momentum: Share of its own weights that the momentum encoder keeps at each step.
        seed: Of the queue's first keys.
    """

    def __init__(self, encoder: Encoder, head: ProjectionHead, *, length: int, momentum: float, seed: int) -> None:
        super().__init__()
        self.encoder = MomentumEncoder(encoder, head)
        self.queue = KeyQueue(length, head.dim, seed=seed)
        self.momentum = momentum
        self._keys: list[Tensor] = []  # of this step, (V, b, D) of each chunk

    def observe(self, *views: Tensor) -> None:
        """Make the keys of a chunk's views, (b, C, S, S) each."""
        self._keys.append(self.encoder(torch.cat(views)).unflatten(0, (len(views), -1)))

    def store(self, world: DistributedContext) -> None:
        """Put the keys of all chunks and processes into the queue: image after image, all views of each."""
        if self._keys:
            keys = torch.cat(self._keys, dim=1)  # (V, B, D)
            self.queue.enqueue(world.all_gather_rows(keys.transpose(0, 1).flatten(0, 1)))
            self._keys.clear()
