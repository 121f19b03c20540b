"""Learning from labels: an encoder, the first layers of its projection head, a linear classifier, cross-entropy.

Where an image may show several classes, cross-entropy is that of one two-way classifier for each.

One module for every protocol of the papers that trains on labels: fine-tuning (SimCLR section 4.1 and B.5, SimCLR v2
section 2), the linear probe (B.6) and training from scratch (B.3). They differ in what is trained. `Supervised` is the
last one with the views and the schedule of pretraining.

Shapes: B images on this process, C channels, S x S pixels.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.methods.method import Method
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder
from simclr.models.resnet import ResNet

if TYPE_CHECKING:
    from simclr.config.pretrain import PretrainConfig

TuneFrom = Literal["all", 0, 1, 2, 3, 4, "none"]
"""What is trained besides the classifier, which always is. "all": everything. 0: everything after the stem. 1 to 4:
everything after that block group, so 4 leaves the head's layers. "none": nothing else, the linear probe."""


class Classify(Method):
    """Cross-entropy of a `Classifier`, with the rest frozen from the input up to some block.

    0 to 4 are `fine_tune_after_block` of the authors. We follow their TF2 code, which trains the layers of the
    projection head; the TF1 code never does. In neither code is frozen wholly frozen: TF1 lets batch norm of the frozen
    blocks go on with batch statistics and move its averages unless all four are frozen, and TF2 always does. Here a
    frozen part runs in inference mode, as the paper says of the linear probe, and none of its parameters or buffers
    moves.

    The loss is the mean over this process's images. Shares are equal and DistributedDataParallel averages gradients,
    so the gradient is that of the global batch.

    Args:
        network: Trained in place.
        tune_from: What is trained.
        world: The processes that share the batch.

    Raises:
        UserError: A block group of an encoder that has none.
    """

    num_views: int = 1
    supervised: ClassVar[bool] = True
    metric_formats: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy {:.1%}"}
    remedy: ClassVar[str] = "Try a lower --lr."

    def __init__(self, network: Classifier, *, tune_from: TuneFrom = "all", world: DistributedContext) -> None:
        super().__init__()
        self.network = network
        self.world = world
        self._frozen = tuple(_frozen(network, tune_from))
        for part in self._frozen:
            part.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor, targets: Tensor, *, detail: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to optimise, and metrics.

        Args:
            x: (B, C, S, S) in [0, 1].
            targets: (B,) int64 classes, or, where an image may show several, (B, K) in {1, 0, -1} as `Images.targets`.
            detail: Take the metrics over all processes, and add the share of images that are classified rightly.

        Returns:
            The mean loss (scalar), and detached scalars: `loss` and, with `detail`, `accuracy`.
        """
        logits = self.network(x)  # (B, K)
        loss = F.cross_entropy(logits, targets) if targets.ndim == 1 else many_classes(logits, targets)
        if not detail:
            return loss, {"loss": loss.detach()}
        right = share_right(logits.detach(), targets)
        mean_loss, accuracy = self.world.all_reduce_mean(torch.stack([loss.detach(), right]))
        return loss, {"loss": mean_loss, "accuracy": accuracy}

    @property
    def encoder(self) -> Encoder:  # pyrefly: ignore[bad-override]
        """The encoder below the classifier."""
        return self.network.encoder

    def trial_inputs(self, n: int) -> tuple[Any, ...]:
        """Random views of n images and a class of each."""
        (view,) = super().trial_inputs(n)
        return view, torch.randint(self.network.linear.out_features, (n,), device=view.device)

    def published(self) -> dict[str, nn.Module | None]:
        """The network with its classifier."""
        return {"classifier": self.network}

    def train(self, mode: bool = True) -> "Classify":
        """As of any module, but that frozen parts stay in inference mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self


class Supervised(Classify):
    """Supervised training as a method of pretraining: one view of each image, any augmentation, all labels.

    The supervised networks of SimCLR's tables 1 and B.3 and figure 7 differ from the contrastive ones in their loss.
    The classifier reads what the projection head would; its zero weights make the first loss log K.
    """

    @classmethod
    def build(
        cls, encoder: Encoder, config: "PretrainConfig", context: DistributedContext, *, num_classes: int = 0
    ) -> Self:
        """Encoder and classifier, as the settings say."""
        return cls(Classifier(encoder, None, num_classes), world=context)

    @classmethod
    def takes_labels(cls, config: "PretrainConfig") -> bool:
        """It learns from nothing else."""
        return True

    @classmethod
    def check(cls, config: "PretrainConfig", context: DistributedContext, num_images: int | None = None) -> None:
        """Refuse settings that have no effect."""
        for name in ("queue", "ema", "symmetric", "bn_splits", "loss", "normalize", "negatives", "probe"):
            if getattr(config, name) != getattr(type(config), name):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} has no effect on --method supervised, which has no contrast; leave it out.")

    def published(self) -> dict[str, nn.Module | None]:
        """The encoder, and the network with its classifier."""
        return {"encoder": self.encoder, "classifier": self.network}


def many_classes(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the classes that are known of an image, averaged over images.

    The papers do not state their loss for VOC 2007; the sum makes it K two-way classifiers side by side.

    Args:
        logits: (B, K).
        targets: (B, K), 1 shown, 0 not, -1 not known.
    """
    each = F.binary_cross_entropy_with_logits(logits, (targets == 1).to(logits.dtype), reduction="none")  # (B, K)
    return (each * (targets >= 0)).sum(dim=1).mean()


def share_right(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of images whose class has the highest logit; of known (image, class) pairs on the right side of 0."""
    if targets.ndim == 1:
        return (logits.argmax(dim=1) == targets).to(logits.dtype).mean()
    known = targets >= 0
    return (((logits > 0) == (targets == 1)) & known).sum().to(logits.dtype) / known.sum().clamp(min=1)


def _frozen(network: Classifier, tune_from: TuneFrom) -> list[nn.Module]:
    """The parts that are not trained; layers of the head that no input reaches are among them."""
    head = network.head
    idle = [] if head is None else [*head.layers[network.head_layer :]]
    if tune_from == "all":
        return idle
    if tune_from == "none":
        return [network.encoder] if head is None else [network.encoder, head]
    if tune_from == 4:
        return [network.encoder, *idle]
    backbone = network.encoder.backbone
    if not isinstance(backbone, ResNet):
        raise UserError(
            f"Fine-tuning was to begin after block group {tune_from}, and {network.encoder.config.name} has no such "
            "groups; take all, 4 (the whole encoder is frozen) or none (the classifier alone is trained)."
        )
    return [backbone.stem, *list(backbone.groups)[:tune_from], *idle]
