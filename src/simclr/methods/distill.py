"""A teacher's probabilities learned by a student, on images without labels (SimCLR v2, arXiv:2006.10029, section 2).

    alpha x distillation (all images of the batch) + (1 - alpha) x cross-entropy (those of them that carry a label)

Each term is a mean over its own images of the global batch. So with few labels some batches have none, and then their
second term is 0.

Shapes: B images on this process, C channels, S x S pixels (the teacher may see another S), K classes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.distributed import DistributedContext
from simclr.losses import distillation
from simclr.methods.method import Method
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder


class Distill(Method):
    """A student under a frozen teacher.

    The teacher is no part of this module, so that neither optimiser, nor checkpoints, nor DistributedDataParallel know
    of it. It is put into inference mode, and none of its parameters and buffers moves or gets a gradient.

    DistributedDataParallel averages gradients over processes of equal shares: the first term's mean over this process's
    images is therefore right as it is, and the second's sum is divided by the labelled images of all, times processes.

    Args:
        student: Trained in place; layers of its head that no input reaches are frozen.
        teacher: (B, C, S, S) -> (B, K) logits, on the student's device.
        temperature: Of both sides' softmax.
        alpha: Weight of the teacher; 1: labels do not count.
        world: The processes that share the batch.
    """

    num_views: int = 1
    metric_formats: ClassVar[Mapping[str, str]] = {"agreement": "agreement {:.1%}"}
    remedy: ClassVar[str] = "Try a lower --lr, or a longer --warmup-epochs."

    def __init__(
        self,
        student: Classifier,
        teacher: nn.Module,
        *,
        temperature: float,
        alpha: float = 1.0,
        world: DistributedContext,
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher.eval(),)  # in a tuple it is no submodule
        self.temperature = temperature
        self.alpha = alpha
        self.world = world
        if student.head is not None:
            for idle in student.head.layers[student.head_layer :]:
                idle.requires_grad_(False)
        self.train()

    def forward(
        self, x: Tensor, x_teacher: Tensor, targets: Tensor | None = None, labelled: int = 0, *, detail: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to optimise, and metrics.

        Args:
            x: (B, C, S, S) in [0, 1], what the student sees.
            x_teacher: (B, C, S', S') in [0, 1], the same views at the teacher's size.
            targets: (B,) int64 classes, -1 for an image without a label.
            labelled: How many images of the global batch carry a label.
            detail: Take the metrics over all processes, and add `agreement`, the share of images of which teacher and
                student think the same class likeliest, and, if there are any, `accuracy` on those with a label.

        Returns:
            This process's loss (scalar), whose mean over processes is that of the global batch, and detached scalars.
        """
        with torch.no_grad():
            taught = self._teacher[0](x_teacher)  # (B, K)
        logits = self.student(x)  # (B, K)
        loss = self.alpha * distillation(logits, taught, self.temperature)
        right = logits.new_zeros(())
        if targets is not None and labelled:
            share = labelled / self.world.size
            wrong = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")  # 0 where no image has a label
            loss = loss + (1 - self.alpha) * wrong / share
            right = (logits.detach().argmax(dim=1) == targets).sum().to(logits.dtype) / share
        if not detail:
            return loss, {"loss": loss.detach()}
        agreement = (logits.detach().argmax(dim=1) == taught.argmax(dim=1)).to(loss.dtype).mean()
        figures = self.world.all_reduce_mean(torch.stack([loss.detach(), agreement, right]))
        metrics = dict(zip(("loss", "agreement", "accuracy"), figures, strict=True))
        if not labelled:
            del metrics["accuracy"]
        return loss, metrics

    @property
    def encoder(self) -> Encoder:  # pyrefly: ignore[bad-override]
        """The student's encoder."""
        return self.student.encoder

    def trial_inputs(self, n: int) -> tuple[Any, ...]:
        """The same random views of n images for the student and its teacher."""
        (view,) = super().trial_inputs(n)
        return view, view

    def published(self) -> dict[str, nn.Module | None]:
        """The student with its classifier."""
        return {"classifier": self.student}
