"""The contract of a training method: all that training, the memory strategies, `plan` and the display know of it.

A method is a module that turns a batch into a loss. How batches are made, how weights are updated, saved and restored,
and what is shown on the way is the same for all of them (training/fit.py). docs/methods.md writes one from scratch.

Shapes: B items on this process, C channels, S x S pixels, F features, D projection width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from simclr.config.encoder import Feature, Scaling
from simclr.config.pretrain import PretrainConfig
from simclr.distributed import DistributedContext
from simclr.models.encoder import Encoder
from simclr.models.heads import ProjectionHead


class Method(nn.Module, ABC):
    """A loss over a batch, and what the rest of the package has to know of it.

    For pretraining, `Method(encoder, config, context)` has to make one; a method whose constructor differs overrides
    `build`. What the loss averages must be right under DistributedDataParallel: gradients are averaged over processes.
    """

    num_views: int = 2
    """Views of each item that `forward` takes."""
    multi_view: ClassVar[bool] = False
    """Whether `forward` takes the views that the settings ask for, of any number and of two sizes."""
    grad_cache: ClassVar[bool] = False
    """Whether `encode` and `loss` are defined, so that gradients can be cached (training/grad_cache.py)."""
    supervised: ClassVar[bool] = False
    """Whether weights decay as in the authors' supervised training and fine-tuning (`optim.supervised_groups`)."""
    metric_formats: ClassVar[Mapping[str, str]] = {}
    """How metrics print while training: name -> format, such as {"contrastive_accuracy": "accuracy {:.1%}"}; those that
    a record lacks are left out."""
    remedy: ClassVar[str] = "Try a lower --lr, or a longer --warmup-epochs, in a new run."
    """What to try where the loss or the weights are no longer finite."""

    capturable: bool = False
    """Whether a CUDA graph can replay updates: without `detail`, `forward` runs the same operations on the device at
    each step, depends on no number of the host that changes, and reads nothing back."""

    trial_multiple: int = 1
    """Trial batches, on which memory and time are measured, have a multiple of so many images."""

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """Height and width of each view that `forward` takes, in pixels."""
        return (self.encoder.config.size,) * self.num_views

    encoder: Encoder
    """The network that is trained; published with each checkpoint."""

    @classmethod
    def build(cls, encoder: Encoder, config: PretrainConfig, context: DistributedContext) -> Self:
        """The method as `simclr pretrain` makes it.

        Args:
            encoder: With fresh or given weights (--init); on the CPU, as everything is that the method adds. A given
                projection head replaces the state of the one that `published` names, if it has the same shape.
            config: All settings of the run.
            context: The processes that share each batch.
        """
        return cls(encoder, config, context)

    @classmethod
    def takes_labels(cls, config: PretrainConfig) -> bool:
        """Whether `forward` takes, after the views, the class of each item, (B,) int64 from 0 on.

        `build` then takes `num_classes` too, and images without a label are refused.
        """
        return False

    @classmethod
    def check(cls, config: PretrainConfig, context: DistributedContext, num_images: int | None = None) -> None:
        """Refuse settings that this method cannot take, in the user's words; before anything is built.

        Args:
            num_images: None: not known yet.

        Raises:
            UserError: A setting has another value than the method can take.
        """

    def prepare_step(self, step: int) -> None:
        """What has to happen once before the forward pass of update `step`, counted from 0, in any memory strategy.

        A momentum encoder follows the weights here. Whatever the method keeps from step to step must be in its buffers
        and parameters, which are saved with each checkpoint.
        """

    @abstractmethod
    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward(*inputs, detail=False)`: the loss to optimise, and metrics.

        Args:
            inputs: Of B items; in pretraining `num_views` tensors (B, C, S, S) in [0, 1], S as in `view_sizes`.
            detail: Whether this step is recorded; metrics that cost time are computed only then.

        Returns:
            The loss (scalar), and detached scalars, `loss` among them.
        """

    def encode(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Features (num_views B, F), from which no gradient is taken, and projections (num_views B, D).

        The rows of the first view come first. Each row may depend on its own chunk of the batch alone.
        """
        raise TypeError(f"{type(self).__name__} does not split its forward pass")

    def observe(self, *inputs: Any) -> None:
        """With gradient caching: called once with the inputs of each chunk, without gradient, before `encode` is."""

    def loss(
        self, features: Tensor, projections: Tensor, *others: Tensor, detail: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` returns, from what `encode` returned for the whole batch of this process.

        Args:
            others: The inputs after the views, such as labels, (B, ...) each.
        """
        raise TypeError(f"{type(self).__name__} does not split its forward pass")

    def trial_inputs(self, n: int) -> tuple[Any, ...]:
        """Random inputs of n items, on the device of the weights, to count memory and to measure time with."""
        channels, device = self.encoder.config.channels, next(self.parameters()).device
        views = [torch.rand(n, channels, size, size, device=device) for size in self.view_sizes]
        return tuple(view.to(memory_format=torch.channels_last) for view in views)

    def warnings(self, record: Mapping[str, float]) -> list[str]:
        """Sentences on what a record of metrics shows to be wrong; the text before a colon names the kind."""
        return []

    def published(self) -> dict[str, nn.Module | None]:
        """Networks that are saved for use: "encoder" and, if there is one, its projection "head"; or "classifier".

        A second encoder, such as a momentum encoder, is "key_encoder" with its "key_head".
        """
        return {"encoder": self.encoder}


def build_head(encoder: Encoder, config: PretrainConfig) -> ProjectionHead:
    """A fresh projection head for this encoder, which returns what the head is to read, as the settings say."""
    reads = reads_beside(config.head_reads or config.feature, config.feature, config.scaling)
    return ProjectionHead(
        encoder.num_features, kind=config.head, layers=config.head_layers, dim=config.head_dim,
        norm=config.head_norm, reads=reads, seed=config.seed,
    )  # fmt: skip


def reads_beside(reads: Feature, feature: Feature, scaling: Scaling) -> Feature | None:
    """`ProjectionHead.reads` beside an encoder that returns these features: None where they are what the head reads."""
    return None if reads == feature and scaling == "none" else reads


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
