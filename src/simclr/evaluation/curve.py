"""The label-efficiency curve: accuracy over the number of labels per class. It shows whether pretraining pays.

Every source of features (an encoder, a random one, raw pixels) gets the same linear classifier on the same few labels,
and beside them stands the network that is trained on those labels alone. Each seed draws its own labels, nested: those
of 1 per class lie among those of 2. So the spread over seeds is that of the choice of labels, which with few
labels is most of the uncertainty.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from simclr.data.images import Images
from simclr.data.splits import label_subset
from simclr.errors import UserError
from simclr.evaluation.logistic import linear_probe
from simclr.evaluation.metrics import BASELINES, SUPERVISED, mean_and_spread
from simclr.evaluation.results import Result

if TYPE_CHECKING:
    from simclr.evaluation.split import Split

CURVE_VERSION = 1
"""Raise it when the same features and labels give another point of the curve: the choice of labels, the classifier."""

Count = int | Literal["all"]
"""Labels per class; "all": every label that there is, whatever the classes' sizes."""

Key = tuple[str, Count, int]
"""Which result: source, labels per class, seed."""


@dataclass(frozen=True)
class Curve:
    """Accuracies of a label-efficiency curve, with what is needed to print and to draw them."""

    data: str
    num_classes: int
    num_labels: int
    """Of all training images: what "all" stands for."""
    num_test: int
    results: Mapping[Key, float]
    """(source, labels per class, seed) -> accuracy on the test images, in [0, 1]."""
    notes: tuple[str, ...] = ()
    """Sentences about what was left out."""

    @cached_property
    def sources(self) -> list[str]:
        """In the order of the first result of each."""
        return list(dict.fromkeys(source for source, _, _ in self.results))

    @cached_property
    def counts(self) -> list[Count]:
        """From few labels to "all"."""
        return sorted({count for _, count, _ in self.results}, key=_order)

    def values(self, source: str, count: Count) -> dict[int, float]:
        """Seed -> accuracy; empty where nothing was measured."""
        by_seed = {seed: value for (s, c, seed), value in self.results.items() if (s, c) == (source, count)}
        return dict(sorted(by_seed.items()))

    def labels_per_class(self, count: Count) -> float:
        """A place on the axis; for "all" the mean over classes."""
        return self.num_labels / self.num_classes if count == "all" else count

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "data": self.data,
            "num_classes": self.num_classes,
            "num_labels": self.num_labels,
            "num_test": self.num_test,
            "notes": list(self.notes),
            "results": [
                {"source": source, "labels_a_class": count, "seed": seed, "accuracy": value}
                for (source, count, seed), value in self.results.items()
            ],
        }

    @classmethod
    def from_results(cls, results: Sequence[Result], notes: Sequence[str] = ()) -> "Curve":
        """The curve that results of the protocol "curve" make up, all of one data set (`protocols.curve_results`)."""
        first = results[0]
        assert first.num_classes is not None and first.num_train is not None and first.num_test is not None
        points = {(r.subject, r.settings["labels_per_class"], r.seed): r.value("top1") for r in results}
        return cls(first.data_name, first.num_classes, first.num_train, first.num_test, points, tuple(notes))


@dataclass(frozen=True)
class Saved:
    """How many labels a baseline needs to reach what a source reaches with `count` labels per class."""

    baseline: str
    count: Count
    accuracy: float
    """What the source reaches: the mean over seeds."""
    needed: float | None
    """Labels per class that the baseline needs, interpolated; None: more than were tried."""
    min_labels: float
    """The fewest labels per class that the baseline was tried with; where it is there already, `needed` is that."""
    max_count: Count
    """The most labels per class that it was tried with."""


def labels_curve(
    sources: Mapping[str, Callable[[Images], np.ndarray]],
    split: "Split",
    *,
    counts: Sequence[Count] | None = None,
    seeds: Sequence[int],
    classify: Callable[..., np.ndarray] | None = None,
    supervised: Callable[[Images, Images, int], float] | None = None,
    keep: Callable[[Key, Callable[[], float]], float] = lambda _key, make: make(),
    progress: Callable[[str], None] = lambda sentence: None,
) -> Curve:
    """Accuracy over labels per class, for several sources of features and for training from scratch.

    Features of a source are computed once, for all training and test images; the few labels only index them.

    Args:
        sources: Name -> function from n images to their (n, F) features.
        split: Images to learn from (-1: no label, never used) and labelled images to test on.
        counts: Labels per class, integers and "all"; None: 1, 2, 5, 10, 20, ... as far as the smallest class has
            them, then "all". Larger ones than the smallest class has are left out, which `notes` say.
        seeds: Each draws its own labels by `label_subset`, and is handed to `classify` and `supervised`.
        classify: (train (n, F), labels (n,), test (m, F), seed=seed) -> (m,) predicted labels; None: `linear_probe`,
            whose l2 is chosen among the few labels too.
        supervised: (training images, test images, seed) -> accuracy of the network trained on those alone.
        keep: Called with the key of a point and what measures it; a store answers from what it holds. A
            source of which nothing is measured computes no features.
        progress: Called with what is being done.

    Raises:
        UserError: Fewer than two classes, or no count that the smallest class has.
    """
    assert split.train.labels is not None and split.test.labels is not None and SUPERVISED not in sources
    labels = split.train.labels
    sizes = np.unique(labels[labels >= 0], return_counts=True)[1]  # (K,)
    if len(sizes) < 2:
        raise UserError(
            f"{split.train.name} has {len(sizes)} of the two or more classes that a curve over labels needs; give "
            "images of more classes to learn from."
        )
    counts, notes = _possible(counts, sizes)
    for note in notes:
        progress(note)
    results: dict[Key, float] = {}

    def measured(source: str, count: Count, seed: int, accuracy_of: Callable[[np.ndarray, int], float]) -> float:
        progress(f"{source}, {count_name(count)} labels per class, seed {seed}")
        return accuracy_of(_chosen(labels, count, seed), seed)

    def measure(source: str, accuracy_of: Callable[[np.ndarray, int], float]) -> None:
        for seed in seeds:
            for count in counts:
                key = (source, count, seed)
                results[key] = keep(key, partial(measured, source, count, seed, accuracy_of))

    for source, features_of in sources.items():
        measure(source, _on_features(features_of, split, classify or _optimum))
    if supervised is not None:
        measure(SUPERVISED, lambda rows, seed: supervised(split.train.subset(rows), split.test, seed))
    return Curve(split.train.name, len(sizes), int(sizes.sum()), len(split.test), results, tuple(notes))


def labels_saved(curve: Curve, *, source: str = "encoder", baselines: Sequence[str] | None = None) -> list[Saved]:
    """How many labels per class each baseline needs to reach the accuracy that the source reaches with n.

    Between two measured counts the mean accuracy is taken as a straight line over the logarithm of the labels; where
    a curve goes up and down, its first crossing counts.

    Args:
        source: Whose accuracy is to be reached.
        baselines: None: hog, patches, pixels and supervised, as far as the curve has them.
    """
    if baselines is None:
        baselines = [name for name in BASELINES if name != "random" and name in curve.sources]
    saved = []
    for baseline in baselines:
        points = _means(curve, baseline)
        max_count = max((count for count in curve.counts if curve.values(baseline, count)), key=_order)
        for count in curve.counts:
            values = curve.values(source, count)
            if values:
                target = mean_and_spread(list(values.values()))[0]
                needed = _first_crossing(points, target)
                saved.append(Saved(baseline, count, target, needed, min_labels=points[0][0], max_count=max_count))
    return saved


def _possible(counts: Sequence[Count] | None, sizes: np.ndarray) -> tuple[list[Count], list[str]]:
    """Counts that the smallest class has, in order and without doubles, and what to say about the others."""
    smallest = int(sizes.min())
    if counts is None:
        powers = range(len(str(smallest)))
        steps = [step * 10**power for power in powers for step in (1, 2, 5) if step * 10**power <= smallest]
        everything = smallest == sizes.max() and smallest in steps  # then "all" is the same labels
        return [*(steps[:-1] if everything else steps), "all"], []
    if any(count != "all" and count < 1 for count in counts):
        raise UserError(f"{list(counts)} are no numbers of labels per class: give 1 and above, or 'all'.")
    wanted: list[Count] = list(dict.fromkeys(sorted(counts, key=_order)))
    kept: list[Count] = [count for count in wanted if _order(count) <= smallest or count == "all"]
    left_out = [count for count in wanted if count not in kept]
    if not kept:
        raise UserError(
            f"The smallest class has {smallest:,} labelled images, fewer than {count_name(left_out[0])}; ask for fewer "
            "labels per class, or for 'all'."
        )
    if left_out:
        listed = ", ".join(map(count_name, left_out))
        return kept, [f"Left out: {listed} labels per class; the smallest class has {smallest:,} images."]
    return kept, []


def _chosen(labels: np.ndarray, count: Count, seed: int) -> np.ndarray:
    """Rows that keep their label, sorted."""
    return np.flatnonzero(labels >= 0) if count == "all" else label_subset(labels, f"{count}/class", seed=seed)


def _on_features(
    features_of: Callable[[Images], np.ndarray], split: "Split", classify: Callable[..., np.ndarray]
) -> Callable[[np.ndarray, int], float]:
    """(rows, seed) -> test accuracy of the classifier on these rows; features wait for the first call."""
    features: list[np.ndarray] = []

    def accuracy_of(rows: np.ndarray, seed: int) -> float:
        if not features:
            features.extend((features_of(split.train), features_of(split.test)))  # (n, F), (m, F)
        train, test = features
        assert split.train.labels is not None and split.test.labels is not None
        predicted = classify(train[rows], split.train.labels[rows], test, seed=seed)
        return float((predicted == split.test.labels).mean())

    return accuracy_of


def _optimum(train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, seed: int) -> np.ndarray:
    return linear_probe(train, labels, test, seed=seed).predicted


def _means(curve: Curve, source: str) -> list[tuple[float, float]]:
    """(labels per class, mean accuracy) of each measured count, from few labels to many."""
    measured = [(curve.labels_per_class(c), list(curve.values(source, c).values())) for c in curve.counts]
    return [(place, mean_and_spread(values)[0]) for place, values in measured if values]


def _first_crossing(points: list[tuple[float, float]], target: float) -> float | None:
    """Where a line through the points, straight over log x, first reaches the target."""
    if points[0][1] >= target:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= target:
            return math.exp(math.log(x0) + (target - y0) / (y1 - y0) * (math.log(x1) - math.log(x0)))
    return None


def count_name(count: Count) -> str:
    """The number of labels per class as text, or "all"."""
    return count if count == "all" else f"{count:,}"


def _order(count: Count) -> float:
    return math.inf if count == "all" else count
