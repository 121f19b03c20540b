"""Logistic regression on frozen features: the transfer protocol of the paper, and the exact optimum for small data.

SimCLR (section B.8.1), after Kornblith et al. 2019 (arXiv:1805.08974): l2-regularised multinomial logistic regression
by L-BFGS, the strength chosen among 45 logarithmically spaced values on a validation split, then fitted again on
training and validation rows together. With several labels an image (VOC 2007) it is one binary regression a class; the
paper does not say.

The objective is the mean cross entropy + l2 / 2 x the sum of squared coefficients; intercepts are free. In
scikit-learn's terms C = 1 / (n l2). Two classes are a softmax too; scikit-learn's single vector is the difference of
ours, at C = 2 / (n l2).

Shapes: n rows, F features, K classes, m rows to classify.
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
"""Raise it when the same features, labels and strengths give other classifiers by more than the tolerance: objective,
scaling, rows to choose by, minimiser (lbfgs.py)."""
L2_PATH = tuple(np.logspace(5, -6, 45).tolist())  # the paper's: 45 values from 1e-6 to 1e5
OPTIMUM_STRENGTHS = (1.0, 1e1, 1e2, 1e3)  # 1 / C of scikit-learn: n x l2
VALIDATION_ROWS = 10_000  # at most so many training rows take part in choosing among OPTIMUM_STRENGTHS
TOL = 3e-5  # norm of the gradient; scikit-learn stops where no component of it is larger than 1e-4

Device = torch.device | str
Metric = Callable[[np.ndarray, np.ndarray], float]
"""(scores (m, K), targets (m,) or (m, K)) -> a figure, the higher the better."""


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
    """What a classifier makes of the test rows, and how its strength was chosen."""

    scores: np.ndarray
    """(m, K) logits of the test rows."""
    classes: np.ndarray
    """(K,) the labels that the columns stand for."""
    strength: float
    """The l2 (of `optimum_probe`: n x l2) that was chosen."""
    validation_scores: dict[float, float]
    """The metric on the validation rows, by strength; empty if nothing had to be chosen."""
    converged: bool
    """Whether every fit reached the tolerance."""

    @property
    def predicted(self) -> np.ndarray:
        """(m,) the label with the highest score; ties go to the smaller label."""
        return self.classes[self.scores.argmax(1)]


def logistic_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int,
    metric: Metric | None = None,
    strengths: Sequence[float] = L2_PATH,
    standardise: bool = False,
    num_classes: int | None = None,
    device: Device = "cpu",
    tol: float = TOL,
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """The transfer protocol: the strength that does best on validation rows, then a fit to all labelled rows.

    Of equally good strengths the strongest is taken. No test label takes part: none is given.

    Args:
        train: (n, F) features.
        labels: (n,) classes 0 .. K-1; or (n, K) of 1, 0 and -1 (ignored) where an image may have several.
        test: (m, F) features to classify.
        validation: Features and labels to choose by; None: a fifth of the training rows, by class.
        seed: Of that split.
        metric: What the choice maximises; None: top-1 accuracy, or 11-point mAP for (n, K) labels.
        strengths: Values of l2. With a single one there is nothing to choose, and nothing is set apart.
        standardise: Scale each feature to mean 0 and variance 1 over the rows fitted; the paper does not.
        num_classes: K, if a class may be missing in `labels`; None: as far as the labels go.
        progress: Called with (done, total) thousandths of a fit, several times within each.

    Raises:
        UserError: NaN or infinite features, labels below 0, fewer than two classes, or no row left to validate with.
    """
    multi_label = labels.ndim == 2
    parts = [(train, labels)] if validation is None else [(train, labels), validation]
    for (features, _), what in zip(parts, ("training", "validation"), strict=False):
        require_finite(features, what)
    require_finite(test, "test")
    rows, targets = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not multi_label and len(targets) and targets.min() < 0:
        raise UserError(f"{(targets < 0).sum():,} rows to learn from have no label; leave them out, or label them.")
    num_classes = num_classes or (targets.shape[1] if multi_label else int(targets.max()) + 1)
    if validation is None:
        learn, validate = split_indices(len(labels) if multi_label else labels, fraction=0.2, seed=seed)
    else:
        learn, validate = np.arange(len(train)), np.arange(len(train), len(rows))
    metric = metric or (mean_average_precision_11 if multi_label else lambda scores, truth: top_k(scores, truth, 1))

    best, judged, converged = None, {}, True
    told = _Fits(progress, len(set(strengths)) + 1 if len(strengths) > 1 else 1)
    if len(strengths) > 1:
        if not len(validate):
            raise UserError(
                "The strength of the logistic regression is chosen on labels that are held out, and of a single label "
                "a class none can be; give two labels a class or more, or take the protocol linear."
            )
        scale = _scale(rows[learn], standardise)
        judge = scale(rows[validate])
        for weights in path(
            scale(rows[learn]), targets[learn], num_classes, strengths=strengths, device=device, tol=tol, told=told
        ):
            judged[weights.l2] = metric(weights.scores(judge), targets[validate])
            converged &= weights.converged
            if best is None or judged[weights.l2] > judged[best.l2]:
                best = weights
    strength = strengths[0] if best is None else best.l2
    scale = _scale(rows, standardise)
    final = fit(scale(rows), targets, num_classes, l2=strength, start=best, device=device, tol=tol, told=told)
    scores = final.scores(scale(test))
    return Probe(scores, np.arange(num_classes), strength, judged, converged and final.converged)


def optimum_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    seed: int,
    candidates: Sequence[float] = OPTIMUM_STRENGTHS,
    device: Device = "cpu",
    tol: float = TOL,
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Multinomial logistic regression on standardised features, the exact optimum: the linear probe of small data.

    It is scikit-learn's LogisticRegression(C=1 / strength) after StandardScaler. The strength is chosen among
    `candidates` on a fifth of the training rows, then all rows are fitted. Of equally good ones the first is taken, and
    also where each class has a single row, so that none is left to choose with. No test label takes part.

    Args:
        train: (n, F) features.
        labels: (n,) integers, of any values.
        test: (m, F) features to classify.
        seed: Of the validation rows.
        progress: Called with (done, total) thousandths of a fit, several times within each.

    Raises:
        UserError: NaN or infinite features, or a single class.
    """
    require_finite(train, "training")
    require_finite(test, "test")
    classes, targets = np.unique(labels, return_inverse=True)

    def l2(strength: float, rows: int) -> float:
        return strength / rows * (2 if len(classes) == 2 else 1)  # scikit-learn has one vector for two classes

    learn, validate = _validation_rows(targets, seed)
    judged, converged, strength = {}, True, candidates[0]
    told = _Fits(progress, len(set(candidates)) + 1 if len(candidates) > 1 and len(validate) else 1)
    if len(candidates) > 1 and len(validate):
        scale = _scale(train[learn], standardise=True)
        judge, ordered = scale(train[validate]), sorted(candidates, reverse=True)
        strengths = [l2(candidate, len(learn)) for candidate in ordered]
        fits = path(
            scale(train[learn]), targets[learn], len(classes), strengths=strengths, device=device, tol=tol, told=told
        )
        for candidate, weights in zip(ordered, fits, strict=True):
            judged[candidate] = top_k(weights.scores(judge), targets[validate], 1)
            converged &= weights.converged
        strength = max(candidates, key=judged.__getitem__)
    scale = _scale(train, standardise=True)
    final = fit(scale(train), targets, len(classes), l2=l2(strength, len(train)), device=device, tol=tol, told=told)
    return Probe(final.scores(scale(test)), classes, strength, judged, converged and final.converged)


def path(
    features: np.ndarray,
    targets: np.ndarray,
    num_classes: int,
    *,
    strengths: Sequence[float] = L2_PATH,
    device: Device = "cpu",
    tol: float = TOL,
    told: "_Fits | None" = None,
) -> Iterator[Weights]:
    """The optimum at each strength, from the strongest to the weakest, each started from the ones before.

    Arguments and errors are those of `fit`.
    """
    problem = Problem(features, targets, num_classes, device)
    pairs: Pairs = deque(maxlen=MEMORY)
    points = [problem.origin()]  # the last two optima
    ordered = sorted(set(strengths), reverse=True)
    for i, l2 in enumerate(ordered):
        start = points[-1]
        if i > 1:  # a straight line in log l2 halves the evaluations
            ratio = math.log(ordered[i - 1] / l2) / math.log(ordered[i - 2] / ordered[i - 1])
            start = start + min(ratio, 1.0) * (points[-1] - points[-2])
        point, converged = minimise(problem, l2, start, pairs, tol, told)
        if told is not None:
            told.done()
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
    told: "_Fits | None" = None,
) -> Weights:
    """The optimum at one strength, in float64.

    The coefficients are within about tol / l2 of the exact ones (the objective is strongly convex in them).

    Args:
        features: (n, F), finite.
        targets: (n,) classes 0 .. K-1; or (n, K) of 1, 0 and -1 (ignored) for one binary regression a class, each with
            the mean over its own known rows.
        l2: Above 0, which makes the optimum unique but for a number added to a softmax's intercepts: their mean is 0.
        start: Weights near the optimum.
        tol: Norm of the gradient to reach, with features centred.

    Raises:
        UserError: Fewer than two classes, or no class with images with it and without it.
    """
    problem = Problem(features, targets, num_classes, device)
    point = problem.origin() if start is None else problem.point(start.coefficients, start.intercepts)
    point, converged = minimise(problem, l2, point, deque(maxlen=MEMORY), tol, told)
    if told is not None:
        told.done()
    return Weights(*problem.weights(point), l2, converged)


class _Fits:
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


def _scale(rows: np.ndarray, standardise: bool) -> Callable[[np.ndarray], np.ndarray]:
    """What brings features to float64 and, if asked, to mean 0 and variance 1 over `rows`."""
    if not standardise:
        return lambda features: features.astype(np.float64, copy=False)
    mean, deviation = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    deviation = np.where(deviation > 1e-9 * np.abs(mean), deviation, 1)  # constant features, but for rounding, stay
    return lambda features: (features - mean) / deviation


def _validation_rows(targets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to judge by when choosing the strength; none of these if the others have one class."""
    learn, validate = split_indices(targets, fraction=0.2, seed=seed)
    generator = np.random.default_rng(seed)
    if len(learn) > VALIDATION_ROWS:
        learn = np.sort(generator.choice(learn, VALIDATION_ROWS, replace=False))
    if len(np.unique(targets[learn])) < 2:
        return learn, validate[:0]
    return learn, validate
