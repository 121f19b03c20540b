"""Accuracies, average precision, and the permutation test for a difference between two encoders.

The transfer tables of SimCLR (section B.8) use top-1 accuracy, mean accuracy per class or 11-point mean average
precision, by data set, and a permutation test between two encoders.

Shapes: n images, K classes. All metrics are shares in [0, 1].
"""

from collections.abc import Sequence

import numpy as np

from simclr.errors import UserError

METRICS_VERSION = 1
"""Raise it when the same scores and labels give another metric."""
SUPERVISED = "supervised"
"""Name of the network that is trained on the labels alone."""
BASELINES = ("hog", "patches", "pixels", "random", SUPERVISED)
"""Names of the models that others are compared with."""
TOP5_ABOVE = 10
"""Classes above which tables have top-5 accuracy too: the papers report it on ImageNet, not on sets of ten classes."""
RECALLS = np.arange(11) / 10  # at which VOC 2007 reads the precision
CHUNK = 1 << 22  # coin tosses held at a time: 32 MB


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1) of at least one value; None as the deviation of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def accuracies(scores: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """The metrics of a classifier in the tables: top1, mean_per_class and, from six classes on, top5.

    A further metric belongs here; METRICS_VERSION is then raised, so that stored results are measured anew.

    Args:
        scores: (m, K), higher is likelier.
        classes: (K,) the labels that the columns stand for, ascending.
        labels: (m,)
    """
    targets = np.searchsorted(classes, labels)  # (m,) columns
    metrics: dict[str, float | None] = {
        "top1": top_k(scores, targets, 1),
        "mean_per_class": mean_per_class(scores.argmax(1), targets),
    }
    return metrics | ({"top5": top_k(scores, targets, 5)} if len(classes) > 5 else {})


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of labels that are predicted.

    Raises:
        UserError: There are no labels.
    """
    _require_some(labels)
    return float((predicted == labels).mean())


def top_k(scores: np.ndarray, targets: np.ndarray, k: int) -> float:
    """Share of images whose class is among the k with the highest scores; equal scores go to the smaller class.

    Args:
        scores: (n, K), higher is likelier; -inf is allowed.
        targets: (n,) classes 0 .. K-1. One outside, such as a class that the scores do not know, counts as wrong.

    Raises:
        UserError: NaN scores, no images, or k < 1.
    """
    _require_numbers(scores)
    _require_some(targets)
    if k < 1:
        raise UserError(f"Top-{k} accuracy is not defined; give k of at least 1.")
    known = (targets >= 0) & (targets < scores.shape[1])
    column = np.where(known, targets, 0)[:, None]
    own = np.take_along_axis(scores, column, 1)  # (n, 1)
    ahead = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < column))  # (n, K)
    return float((known & (ahead.sum(1) < k)).mean())


def mean_per_class(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy within each class, averaged over the classes that occur in `labels`.

    Raises:
        UserError: There are no labels.
    """
    _require_some(labels)
    _, members, counts = np.unique(labels, return_inverse=True, return_counts=True)
    met = np.bincount(members, weights=predicted == labels)  # (K,)
    return float((met / counts).mean())


def mean_average_precision_11(scores: np.ndarray, relevant: np.ndarray) -> float:
    """VOC 2007's mean average precision (Everingham et al. 2010, section 4.2).

    A class's average precision is the mean, over the recalls 0, 0.1, ..., 1, of the highest precision reached at that
    recall or beyond. Of equal scores the earlier row ranks first, as in the order of the data. A class without a
    relevant image has no precision and stays out of the mean.

    Args:
        scores: (n, K), higher is likelier; infinite ones are allowed.
        relevant: (n, K), 1 relevant, 0 not, -1 ignored, which is what VOC calls difficult.

    Raises:
        UserError: NaN scores, or no class has a relevant image.
    """
    _require_numbers(scores)
    precisions = [
        _average_precision(scores[known, k], relevant[known, k] == 1)
        for k, known in enumerate((relevant >= 0).T)
        if (relevant[:, k] == 1).any()
    ]
    if not precisions:
        raise UserError("No class has an image that shows it, so there is no average precision; check the labels.")
    return float(np.mean(precisions))


def _average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    hits = np.cumsum(relevant[np.argsort(-scores, kind="stable")])  # (n,) relevant ones among the first 1 .. n
    precision = hits / np.arange(1, len(hits) + 1)
    best_from = np.maximum.accumulate(precision[::-1])[::-1]  # (n,) highest precision at this rank or a later one
    # recall reaches j/10 at the first rank with 10 * hits >= j * all, in integers: no rounding of 0.1 * 3
    ranks = np.searchsorted(10 * hits, np.arange(11) * hits[-1])
    return float(best_from[ranks].mean())


def permutation_test(
    correct_a: np.ndarray, correct_b: np.ndarray, *, samples: int = 100_000, seed: int
) -> tuple[float, str]:
    """Paired two-sided permutation test of the difference between two encoders.

    If the two were equally good, which outcome of an image belongs to which encoder would be a coin toss. The p-value
    is the share of tosses with a difference of means at least as large as the one seen. The paper draws 100,000
    (Transfer appendix). Where outcomes are only right or wrong, the share over all 2^n tosses is known without
    drawing: the tosses that favour an encoder follow a binomial distribution (McNemar's exact test).

    Args:
        correct_a, correct_b: (n,) outcomes of the same images: booleans, or any score of an image.

    Returns:
        p in (0, 1], and the method: "exact", or "100,000 samples", where it is (hits + 1) / (samples + 1).

    Raises:
        UserError: NaN outcomes, no images, or different numbers of them.
    """
    if correct_a.shape != correct_b.shape:
        raise UserError(
            f"The permutation test compares outcomes of the same images; here are {len(correct_a):,} of one encoder "
            f"and {len(correct_b):,} of the other."
        )
    _require_some(correct_a)
    differences = correct_a.astype(np.float64) - correct_b.astype(np.float64)
    _require_numbers(differences)
    differences = differences[differences != 0]  # (d,) the other images change nothing
    sizes = np.abs(differences)
    if not len(sizes) or sizes.min() == sizes.max():
        return _binomial_p(int((differences > 0).sum()), len(differences)), "exact"
    seen = abs(differences.sum()) - 1e-12 * sizes.sum()  # sums that differ by rounding count as equal
    generator = np.random.default_rng(seed)
    hits, chunk = 0, max(1, CHUNK // len(differences))
    for begin in range(0, samples, chunk):
        swapped = generator.integers(0, 2, (min(chunk, samples - begin), len(differences)), dtype=np.int8)
        hits += int((np.abs(differences.sum() - 2 * (swapped @ differences)) >= seen).sum())
    return (hits + 1) / (samples + 1), f"{samples:,} samples"


def _binomial_p(heads: int, tosses: int) -> float:
    """Share of outcomes of so many coin tosses that are at least as lopsided."""
    from scipy.stats import binom

    return float(min(1.0, 2 * binom.cdf(min(heads, tosses - heads), tosses, 0.5)))


def _require_some(labels: np.ndarray) -> None:
    if not len(labels):
        raise UserError("There is no labelled image to measure an accuracy on; give data with some.")


def _require_numbers(scores: np.ndarray) -> None:
    if np.isnan(scores).any():
        raise UserError("Some scores are NaN (not a number); the features or the classifier that gave them are broken.")
