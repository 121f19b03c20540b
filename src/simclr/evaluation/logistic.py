"""Logistic regression on frozen features: the transfer protocol of the paper, and the linear probe of small data.

SimCLR (section B.8.1), after Kornblith et al. 2019 (arXiv:1805.08974): l2-regularised multinomial logistic regression
by L-BFGS, l2 chosen among 45 logarithmically spaced values on a validation split, then fitted again on
training and validation rows together. With several labels per image (VOC 2007) it is one binary regression per class;
the paper does not say.

The objective is the mean cross entropy + l2 / 2 x the sum of squared coefficients; intercepts are free. In
scikit-learn's terms C = 1 / (n l2). Two classes are a softmax too; scikit-learn's single vector is the difference of
ours, at C = 2 / (n l2).

Shapes: n rows, F features, K classes, m queries.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from simclr.data.splits import split_indices
from simclr.errors import UserError
from simclr.evaluation.lbfgs import MEMORY, Pairs, Problem, minimise
from simclr.evaluation.metrics import mean_average_precision_11, top_k
from simclr.models.inference import require_finite

LOGISTIC_VERSION = 1
"""Raise it when the same features, labels and l2 values give other classifiers by more than the tolerance: objective,
scaling, validation rows, minimiser (lbfgs.py)."""
L2_PATH = tuple(np.logspace(5, -6, 45).tolist())  # the paper's: 45 values from 1e-6 to 1e5
LINEAR_L2_VALUES = (1.0, 1e1, 1e2, 1e3)  # n x l2, which is 1 / C of scikit-learn
VALIDATION_ROWS = 10_000  # at most so many training rows take part in choosing among LINEAR_L2_VALUES
TOL = 3e-5  # norm of the gradient; scikit-learn stops where no component of it is larger than 1e-4

Device = torch.device | str
Metric = Callable[[np.ndarray, np.ndarray], float]
"""(scores (m, K), targets (m,) or (m, K)) -> a number, the higher the better."""


@dataclass(frozen=True)
class Weights:
    """A linear classifier, float64. A class that the training rows lack scores -inf (one that all have, +inf)."""

    coefficients: np.ndarray
    """(K, F)"""
    intercepts: np.ndarray
    """(K,)"""
    l2: float
    converged: bool
    """Whether the gradient's norm came down to the tolerance."""

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(m, K) logits."""
        return features.astype(np.float64, copy=False) @ self.coefficients.T + self.intercepts


@dataclass(frozen=True)
class Probe:
    """Scores of a classifier for the queries, and how its l2 was chosen."""

    scores: np.ndarray
    """(m, K) logits of the queries."""
    classes: np.ndarray
    """(K,) the labels that the columns stand for."""
    l2: float
    """The chosen l2 (of `linear_probe`: n x l2)."""
    validation_scores: dict[float, float]
    """l2 -> metric on the validation rows; empty if nothing had to be chosen."""
    converged: bool
    """Whether every fit reached the tolerance."""

    @property
    def predicted(self) -> np.ndarray:
        """(m,) the label with the highest score; ties go to the smaller label."""
        return self.classes[self.scores.argmax(1)]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How the fits of a probe run."""

    device: Device = "cpu"
    progress: Callable[[int, int], None] | None = None
    """Called with (done, total) thousandths of a fit, several times within each."""


ON_CPU = FitOptions()


def logistic_probe(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    *,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int,
    metric: Metric | None = None,
    l2_values: Sequence[float] = L2_PATH,
    options: FitOptions = ON_CPU,
) -> Probe:
    """The transfer protocol: the l2 that does best on validation rows, then a fit to all labelled rows.

    Of equally good values the largest is taken. No test label takes part: none is given.

    Args:
        train: (n, F) features.
        labels: (n,) classes 0 .. K-1; or (n, K) of 1, 0 and -1 (ignored) where an image may have several.
        queries: (m, F) features to classify.
        validation: Features and labels to choose by; None: a fifth of the training rows, by class.
        seed: Of that split.
        metric: What the choice maximises; None: top-1 accuracy, or 11-point mAP for (n, K) labels.
        l2_values: The values to choose among. With a single one nothing is set apart.
        options: Device and progress.

    Raises:
        UserError: NaN or infinite features, labels below 0, fewer than two classes, or no row left to validate with.
    """
    require_finite(queries, "test")
    rows, targets = _labelled_rows((train, labels), validation)
    multi_label = labels.ndim == 2
    num_classes = targets.shape[1] if multi_label else int(targets.max()) + 1
    metric = metric or (mean_average_precision_11 if multi_label else lambda scores, truth: top_k(scores, truth, 1))

    best, validation_scores, converged = None, {}, True
    fits = _FitProgress(options.progress, len(set(l2_values)) + 1 if len(l2_values) > 1 else 1)
    if len(l2_values) > 1:
        learn, validate = _held_out_rows(labels, None if validation is None else len(rows), seed)
        held_out = rows[validate].astype(np.float64, copy=False)
        for weights in path(
            rows[learn].astype(np.float64, copy=False), targets[learn], num_classes, l2_values=l2_values,
            device=options.device, progress=fits,
        ):  # fmt: skip
            validation_scores[weights.l2] = metric(weights.scores(held_out), targets[validate])
            converged &= weights.converged
            if best is None or validation_scores[weights.l2] > validation_scores[best.l2]:
                best = weights
    l2 = l2_values[0] if best is None else best.l2
    final = fit(
        rows.astype(np.float64, copy=False), targets, num_classes, l2=l2, start=best, device=options.device,
        progress=fits,
    )  # fmt: skip
    return Probe(final.scores(queries), np.arange(num_classes), l2, validation_scores, converged and final.converged)


def linear_probe(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    *,
    seed: int,
    l2_values: Sequence[float] = LINEAR_L2_VALUES,
    options: FitOptions = ON_CPU,
) -> Probe:
    """Multinomial logistic regression on standardised features to convergence: the linear probe of small data.

    It is scikit-learn's LogisticRegression(C=1 / value) after StandardScaler. The value is chosen among `l2_values` on
    a fifth of the training rows, then all rows are fitted. Of equally good ones the first is taken, and also where
    each class has a single row, so that none is left to choose with. No test label takes part.

    Args:
        train: (n, F) features.
        labels: (n,) integers, of any values.
        queries: (m, F) features to classify.
        seed: Of the validation rows.
        l2_values: Values of n x l2.
        options: Device and progress.

    Raises:
        UserError: NaN or infinite features, or a single class.
    """
    require_finite(train, "training")
    require_finite(queries, "test")
    classes, targets = np.unique(labels, return_inverse=True)

    def l2_of(value: float, rows: int) -> float:
        return value / rows * (2 if len(classes) == 2 else 1)  # scikit-learn has one vector for two classes

    learn, validate = _validation_rows(targets, seed)
    validation_scores, converged, chosen = {}, True, l2_values[0]
    chooses = len(l2_values) > 1 and len(validate) > 0
    fits = _FitProgress(options.progress, len(set(l2_values)) + 1 if chooses else 1)
    if chooses:
        scale = _standardise(train[learn])
        held_out, ordered = scale(train[validate]), sorted(l2_values, reverse=True)
        weights_by_l2 = path(
            scale(train[learn]), targets[learn], len(classes), device=options.device, progress=fits,
            l2_values=[l2_of(value, len(learn)) for value in ordered],
        )  # fmt: skip
        for value, weights in zip(ordered, weights_by_l2, strict=True):
            validation_scores[value] = top_k(weights.scores(held_out), targets[validate], 1)
            converged &= weights.converged
        chosen = max(l2_values, key=validation_scores.__getitem__)
    scale = _standardise(train)
    final = fit(scale(train), targets, len(classes), l2=l2_of(chosen, len(train)), device=options.device, progress=fits)
    return Probe(final.scores(scale(queries)), classes, chosen, validation_scores, converged and final.converged)


def path(
    features: np.ndarray,
    targets: np.ndarray,
    num_classes: int,
    *,
    l2_values: Sequence[float] = L2_PATH,
    device: Device = "cpu",
    tol: float = TOL,
    progress: "_FitProgress | None" = None,
) -> Iterator[Weights]:
    """The L-BFGS solution at each l2, from the largest to the smallest, each started from the ones before.

    Arguments and errors are those of `fit`.
    """
    problem = Problem(features, targets, num_classes, device)
    pairs: Pairs = deque(maxlen=MEMORY)
    points = [problem.origin()]  # the last two solutions
    ordered = sorted(set(l2_values), reverse=True)
    for i, l2 in enumerate(ordered):
        start = points[-1]
        if i > 1:  # a straight line in log l2 halves the evaluations
            ratio = math.log(ordered[i - 1] / l2) / math.log(ordered[i - 2] / ordered[i - 1])
            start = start + min(ratio, 1.0) * (points[-1] - points[-2])
        point, converged = minimise(problem, l2, start, pairs, tol, progress)
        if progress is not None:
            progress.done()
        points = [points[-1], point]
        yield Weights(*problem.weights(point), l2, converged)


def fit(
    features: np.ndarray,
    targets: np.ndarray,
    num_classes: int,
    *,
    l2: float,
    start: Weights | None = None,
    device: Device = "cpu",
    tol: float = TOL,
    progress: "_FitProgress | None" = None,
) -> Weights:
    """The L-BFGS solution at one l2, in float64.

    The coefficients are within about tol / l2 of the exact ones (the objective is strongly convex in them).

    Args:
        features: (n, F), finite.
        targets: (n,) classes 0 .. K-1; or (n, K) of 1, 0 and -1 (ignored) for one binary regression per class, each
            with the mean over its own known rows.
        l2: Above 0, which makes the solution unique but for a number added to a softmax's intercepts: their mean is 0.
        start: Weights near the solution.
        tol: Norm of the gradient to reach, with features centred.

    Raises:
        UserError: Fewer than two classes, or no class with images with it and without it.
    """
    problem = Problem(features, targets, num_classes, device)
    point = problem.origin() if start is None else problem.point(start.coefficients, start.intercepts)
    point, converged = minimise(problem, l2, point, deque(maxlen=MEMORY), tol, progress)
    if progress is not None:
        progress.done()
    return Weights(*problem.weights(point), l2, converged)


class _FitProgress:
    """Progress over several fits and within each, as calls of (done, total) thousandths of a fit."""

    def __init__(self, progress: Callable[[int, int], None] | None, count: int) -> None:
        self._progress, self._total = progress, 1000 * count
        self._ended = self._shown = 0

    def __call__(self, share: float) -> None:
        """A share of the fit at hand, in [0, 1]; the gradient may grow in between, what is shown does not shrink."""
        if self._progress is not None:
            self._shown = max(self._shown, self._ended + int(1000 * share))
            self._progress(self._shown, self._total)

    def done(self) -> None:
        """The fit at hand has ended."""
        self._ended += 1000
        self(0.0)


def _labelled_rows(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the training rows and, behind them, of the validation rows."""
    parts = [train] if validation is None else [train, validation]
    for (features, _), what in zip(parts, ("training", "validation"), strict=False):
        require_finite(features, what)
    rows, targets = (np.concatenate(column) for column in zip(*parts, strict=True))
    if targets.ndim == 1 and len(targets) and targets.min() < 0:
        raise UserError(f"{(targets < 0).sum():,} rows to learn from have no label; leave them out, or label them.")
    return rows, targets


def _held_out_rows(labels: np.ndarray, total: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to choose l2 on.

    Args:
        labels: Of the training rows.
        total: Number of the training rows and the validation rows behind them; None: there are no such, and a fifth of
            the training rows is taken.
    """
    if total is None:
        learn, validate = split_indices(len(labels) if labels.ndim == 2 else labels, fraction=0.2, seed=seed)
    else:
        learn, validate = np.arange(len(labels)), np.arange(len(labels), total)
    if not len(validate):
        raise UserError(
            "The strength of the logistic regression is chosen on labels that are held out, and of a single label per "
            "class none can be; give two labels per class or more, or take the protocol linear."
        )
    return learn, validate


def _standardise(rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that brings features, in float64, to mean 0 and variance 1 over `rows`."""
    mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    deviation = np.where(deviation > 1e-9 * np.abs(mean), deviation, 1)  # constant features, but for rounding, stay
    return lambda features: (features - mean) / deviation


def _validation_rows(targets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to validate with when l2 is chosen; none of the latter if the others have one class."""
    learn, validate = split_indices(targets, fraction=0.2, seed=seed)
    generator = np.random.default_rng(seed)
    if len(learn) > VALIDATION_ROWS:
        learn = np.sort(generator.choice(learn, VALIDATION_ROWS, replace=False))
    if len(np.unique(targets[learn])) < 2:
        return learn, validate[:0]
    return learn, validate
