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
from simclr.features import extract, pixels_of
from simclr.models.config import EncoderConfig
from simclr.models.encoder import Encoder, build_encoder

KNN_K = 20
KNN_TEMPERATURE = 0.07  # Wu et al. 2018, arXiv:1805.01978, section 3.4
LINEAR_L2 = (1.0, 1e1, 1e2, 1e3)  # candidates for the l2 strength, 1 / C of scikit-learn
VALIDATION_ROWS = 10_000  # at most so many training rows take part in choosing the strength


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


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of labels met, in [0, 1]."""
    return float((predicted == labels).mean())


def knn(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
    chunk: int = 1024,
) -> np.ndarray:
    """Weighted cosine k-nearest-neighbour classification (Wu et al. 2018), exact.

    Each of the k nearest rows votes for its class with weight exp(cosine / temperature).

    Args:
        train: (n, F) features of the labelled rows.
        labels: (n,) integers.
        test: (m, F) features to classify.
        chunk: Test rows at a time; memory grows with chunk x n.

    Returns:
        (m,) predicted labels. Ties go to the smaller label.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    bank = torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(train)), dim=1)  # (n, F)
    votes_for = torch.from_numpy(targets)
    predicted = []
    for begin in range(0, len(test), chunk):
        queries = torch.from_numpy(np.ascontiguousarray(test[begin : begin + chunk]))
        cosine = torch.nn.functional.normalize(queries, dim=1) @ bank.T  # (chunk, n)
        nearest, rows = cosine.topk(min(k, len(bank)), dim=1)  # (chunk, k)
        votes = torch.zeros(len(queries), len(classes), dtype=torch.float64)
        votes.scatter_add_(1, votes_for[rows], (nearest.double() / temperature).exp())
        predicted.append(votes.argmax(1).numpy())
    return classes[np.concatenate(predicted)] if predicted else np.empty(0, dtype=labels.dtype)


def linear_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    seed: int,
    candidates: tuple[float, ...] = LINEAR_L2,
) -> np.ndarray:
    """Multinomial logistic regression on standardised features (scikit-learn, L-BFGS), the exact optimum.

    The l2 strength is chosen among `candidates` on a fifth of the training rows, then all rows are fitted.
    No test label takes part.

    Returns:
        (m,) predicted labels.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def predict(rows: np.ndarray, strength: float, asked: np.ndarray) -> np.ndarray:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / strength, max_iter=1000, tol=1e-4))
        return np.asarray(model.fit(train[rows], labels[rows]).predict(asked))

    learn, validate = _validation_rows(labels, seed)
    strength = candidates[0]
    if len(candidates) > 1 and len(validate):
        scores = [accuracy(predict(learn, s, train[validate]), labels[validate]) for s in candidates]
        strength = candidates[int(np.argmax(scores))]
    return predict(np.arange(len(train)), strength, test)


def _validation_rows(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to judge by when choosing the probe's strength; every class is in the first."""
    learn, validate = split_indices(labels, fraction=0.2, seed=seed)
    generator = np.random.default_rng(seed)
    if len(learn) > VALIDATION_ROWS:
        learn = np.sort(generator.choice(learn, VALIDATION_ROWS, replace=False))
    if len(np.unique(labels[learn])) < 2:
        return learn, validate[:0]
    return learn, validate
