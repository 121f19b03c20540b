"""How good is an encoder? kNN and a linear probe on frozen features, beside raw pixels and a random encoder.

Every protocol takes arrays of features, so that pixels, random and trained encoders pass through the same code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from simclr.augment.policy import Semantics
from simclr.data.images import Images
from simclr.data.splits import label_subset, split_indices
from simclr.errors import UserError
from simclr.evaluation.knn import knn
from simclr.evaluation.logistic import OPTIMUM_STRENGTHS, optimum_probe
from simclr.evaluation.metrics import accuracy
from simclr.features import extract, pixels_of
from simclr.models.config import EncoderConfig
from simclr.models.encoder import Encoder, build_encoder


@dataclass(frozen=True)
class Split:
    """Labelled images to learn a classifier from, and others to test it on."""

    train: Images
    test: Images
    how: str


def split_data(train: Images, test: Images | None, *, seed: int, labels: str | None = None) -> Split:
    """Training and test images: the data's own split where it has one, else 80/20, stratified by class.

    Args:
        test: The data's own test images, if any.
        seed: Of the 80/20 split and of the choice of labelled images.
        labels: How many labels the classifiers may use, such as "1%" or "10/class"; None: all.

    Raises:
        UserError: There are no labels, or fewer than two classes.
    """
    train, test = _labelled(train), None if test is None else _labelled(test)
    if test is not None:
        how = f"the data's own split, {len(train):,} to learn from and {len(test):,} to test"
    else:
        assert train.labels is not None
        learn, hold = split_indices(train.labels, fraction=0.2, seed=seed)
        train, test = train.subset(learn), train.subset(hold)
        how = f"80/20 by class, seed {seed}: {len(train):,} to learn from and {len(test):,} to test"
    if not len(test):
        raise UserError(f"{train.name} leaves no labelled image to test with; give more images of each class.")
    assert train.labels is not None
    if labels is not None:
        chosen = label_subset(train.labels, labels, seed=seed)
        train = train.subset(chosen)
        how += f", {len(train):,} labels used ({labels}, seed {seed})"
    assert train.labels is not None
    if len(np.unique(train.labels)) < 2:
        raise UserError(f"{train.name} has a single class among the images to learn from; evaluation needs two.")
    return Split(train, test, how)


def _labelled(images: Images) -> Images:
    """The images that have a label."""
    if images.labels is None or not (images.labels >= 0).any():
        raise UserError(
            f"{images.name} has no labels, and evaluation needs them; give a folder with one sub-folder per class "
            "(or --labels-file with path,label lines), or an .npz file with y."
        )
    return images.subset(np.flatnonzero(images.labels >= 0))


def evaluate(
    encoder: Encoder, split: Split, *, semantics: Semantics, seed: int, progress: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """kNN and linear accuracy of the encoder, of its random twin and of the pixels themselves.

    Args:
        encoder: Trained, on the device where it is to run.
        semantics: Whose evaluation preprocessing the encoder was trained with.
        seed: Of the random encoder's weights and of the probe's validation split.
        progress: Told what is being done.

    Returns:
        {"encoder" | "random" | "pixels": {"knn": accuracy, "linear": accuracy}}, accuracies in [0, 1].
    """
    device = next(encoder.parameters()).device
    random = random_encoder(encoder.config, seed=seed).to(device)
    sources = {
        "encoder": lambda images: extract(encoder, images, semantics=semantics),
        "random": lambda images: extract(random, images, semantics=semantics),
        "pixels": lambda images: pixels_of(images, size=encoder.config.size, semantics=semantics),
    }
    results = {}
    for name, features_of in sources.items():
        progress(f"{name}: features")
        train, test = features_of(split.train), features_of(split.test)
        assert split.train.labels is not None and split.test.labels is not None
        progress(f"{name}: kNN and linear probe")
        results[name] = {
            "knn": accuracy(knn(train, split.train.labels, test), split.test.labels),
            "linear": accuracy(linear_probe(train, split.train.labels, test, seed=seed), split.test.labels),
        }
    return results


def random_encoder(config: EncoderConfig, *, seed: int) -> Encoder:
    """The baseline of the same shape: random weights, at their strongest.

    Training begins with every residual branch switched off (its last gamma is 0), so that a ResNet is a chain of
    strided 1x1 convolutions that see a few pixels: a straw man (17 % kNN on digits, where this one reaches 84 %).
    Here the branches are on.
    """
    encoder = build_encoder(config, seed=seed)
    for module in encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            torch.nn.init.ones_(module.weight)
    return encoder


def linear_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    seed: int,
    candidates: tuple[float, ...] = OPTIMUM_STRENGTHS,
) -> np.ndarray:
    """(m,) labels predicted by `optimum_probe`, the exact optimum."""
    return optimum_probe(train, labels, test, seed=seed, candidates=candidates).predicted
