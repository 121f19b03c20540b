"""Pseudo-labels: labels for the images that have none, from features, for a training on labels.

The probability of a class is, up to a factor, the product of what label propagation says (`propagation.py`) and what
the linear probe says (`linear_probe`), both made from the labelled images and the features of all images to learn from.
Every image takes its most probable class as label, however certain it is: the more certain half of each class did no
better on held-out training images, and the most certain half of all, which are those of the easiest classes, much worse
(docs/few-labels.md). In the training, labelled images are repeated until they are as many as the others, as Iscen et
al. 2019 (arXiv:1904.04717) have a fixed share of them in each batch.

Labels that images have beside those that may be used are not read, and no test image takes part.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from simclr.config.finetune import FinetuneConfig
from simclr.data.images import Images
from simclr.errors import UserError
from simclr.evaluation.logistic import FitOptions, linear_probe
from simclr.evaluation.propagation import certainty, propagate
from simclr.evaluation.split import Split
from simclr.training.progress import counting

if TYPE_CHECKING:
    from simclr.evaluation.subjects import EvaluatedModel

PSEUDO_LABELS_VERSION = 1
"""Raise it when the same features and labels give other pseudo-labels (also PROPAGATION_VERSION, LOGISTIC_VERSION)."""


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """Labels and pseudo-labels of n images to learn from."""

    pool: Images
    """All n, without labels."""
    labels: np.ndarray
    """(n,) int64: the label that an image has, else its most probable one."""
    certainty: np.ndarray
    """(n,) 1 - entropy / log K of its probabilities, in [0, 1]; 1 for an image that has a label."""
    given: np.ndarray
    """(n,) whether an image has a label."""

    @property
    def count(self) -> int:
        """Number of pseudo-labels."""
        return int((~self.given).sum())

    @cached_property
    def images(self) -> Images:
        """The images to train on, with labels and pseudo-labels as labels; labelled ones are repeated."""
        given, others = np.flatnonzero(self.given), np.flatnonzero(~self.given)
        rows = np.concatenate([np.tile(given, max(1, round(len(others) / len(given)))), others])
        return replace(self.pool.subset(rows), labels=self.labels[rows])

    @property
    def description(self) -> str:
        """What a training learns from, for people."""
        return f"{self.count:,} pseudo-labels beside {int(self.given.sum()):,} labels"


def pseudo_labels(split: Split, subject: "EvaluatedModel", *, seed: int) -> PseudoLabels:
    """Pseudo-labels for the images of a split that have no label.

    Args:
        split: Its training images are the labelled ones.
        subject: Whose features are taken.
        seed: Of the linear probe's validation rows.

    Raises:
        UserError: Each image to learn from has a label, or the features are not finite.
    """
    pool, rows = require_unlabelled(split)
    assert split.train.labels is not None
    features = subject.features(pool)  # (n, F)
    known = np.full(len(pool), -1, np.int64)
    known[rows] = split.train.labels
    world = subject.world
    with counting("Neighbours", main=world.is_main) as progress:
        propagated = propagate(features, known, device=world.device, progress=progress)
    with counting("Fitting", main=world.is_main, unit="thousandth") as progress:
        options = FitOptions(device=world.device, progress=progress)
        scores = linear_probe(features[rows], split.train.labels, features, seed=seed, options=options).scores  # (n, K)
    probabilities = _product(propagated.probabilities, scores)
    given = known >= 0
    labels = np.where(given, known, propagated.classes[probabilities.argmax(1)])
    sure = np.where(given, 1.0, certainty(probabilities))
    return PseudoLabels(pool, labels, sure, given)


def require_unlabelled(split: Split) -> tuple[Images, np.ndarray]:
    """The images to learn from, and the rows of those that have a label.

    Raises:
        UserError: There are no others.
    """
    if split.pool is None or split.pool_rows is None or len(split.pool_rows) == len(split.pool):
        raise UserError(
            f"--pseudo-labels is for images without a label, and all {len(split.train):,} images of {split.train.name} "
            "to learn from have one; give fewer --labels, or leave it out."
        )
    return split.pool, split.pool_rows


def same_steps(config: FinetuneConfig, num_labelled: int, num_images: int) -> FinetuneConfig:
    """Settings by which a training on `num_images` has the steps and the warm-up of one on `num_labelled`."""
    warmup_epochs = config.warmup_epochs * num_labelled / num_images
    return replace(config, epochs=0.0, min_steps=config.steps(num_labelled), warmup_epochs=warmup_epochs)


def _product(probabilities: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(n, K) probabilities times the softmax of logits, scaled to sum 1."""
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities) + scores  # -inf: impossible by propagation
    logits -= logits.max(1, keepdims=True)
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)
