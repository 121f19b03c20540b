"""Whether pretraining paid: the model under test against the strongest baseline of each protocol, beyond chance.

The number that decides is the difference of the mean accuracies with the same labels and the same test images. Its 95 %
interval has two independent parts, added in quadrature: what other labels, splits and random weights would have
given (Student's t over the paired differences of the seeds), and what other test images would have given (the binomial
error of both accuracies, as if they were independent, which overstates it). Neither says what another training of the
same encoder would have given: that takes several runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from simclr.config.encoder import TIMM, TORCHVISION
from simclr.evaluation.measure import TITLES
from simclr.evaluation.metrics import BASELINES, mean_and_spread
from simclr.evaluation.results import Result
from simclr.evaluation.subjects import is_initial

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The model under test against the strongest baseline of one column of the table."""

    column: str
    baseline: str
    difference: float
    """Of the mean accuracies; positive: the model under test is better."""
    margin: float | None
    """Half of the 95 % interval of the difference; None where it cannot be known."""
    num_seeds: int
    num_test: int

    @property
    def outcome(self) -> Literal["better", "equal", "worse", "unknown"]:
        """Whether the difference is larger than chance."""
        if self.margin is None:
            return "unknown"
        if abs(self.difference) <= self.margin:
            return "equal"
        return "better" if self.difference > 0 else "worse"


def is_baseline(name: str) -> bool:
    """Whether a row is what one has without pretraining: hand-made features, given weights, labels alone.

    Given weights are random or published ones, and those that pretraining began from. Another run or encoder that is
    compared is no baseline.
    """
    return name in BASELINES or name.startswith((TIMM, TORCHVISION)) or is_initial(name)


def comparisons(
    results: Sequence[Result], *, labels_drawn: bool, against: Callable[[str], bool] = is_baseline
) -> list[Comparison]:
    """One for each column in which both the model under test and a baseline were measured.

    Args:
        results: Accuracies, those of the model under test first.
        labels_drawn: Whether a part of the labels was drawn by the seed; then one seed has no interval.
        against: Whether a name is that of a baseline to compare with.
    """
    under_test = results[0].subject
    if under_test in BASELINES:
        return []
    of_layer = "" if results[0].layer is None else f" on layer {results[0].layer}"
    by_column: dict[str, dict[str, dict[int, Result]]] = {}  # column -> subject -> seed -> result
    for result in results:
        column = by_column.setdefault(TITLES[result.protocol] + of_layer, {})
        if result.subject == under_test or against(result.subject):
            column.setdefault(result.subject, {})[_seed(result)] = result
    compared = []
    for column, by_subject in by_column.items():
        ours = by_subject.pop(under_test, {})
        both = [_compare(column, ours, theirs, labels_drawn) for theirs in by_subject.values() if ours.keys() & theirs]
        if both:
            compared.append(min(both, key=lambda one: one.difference))
    return compared


def _compare(column: str, ours: dict[int, Result], theirs: dict[int, Result], labels_drawn: bool) -> Comparison:
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [(ours[seed].value("top1"), theirs[seed].value("top1")) for seed in seeds]
    difference, spread = mean_and_spread([a - b for a, b in pairs])
    first = theirs[seeds[0]]
    assert first.num_test is not None
    a, b = (mean_and_spread(values)[0] for values in zip(*pairs, strict=True))
    of_images = _quantile(None) * math.sqrt((a * (1 - a) + b * (1 - b)) / first.num_test)
    of_seeds = 0.0 if spread is None else _quantile(len(seeds) - 1) * spread / math.sqrt(len(seeds))
    known = spread is not None or not labels_drawn
    return Comparison(
        column=column, baseline=first.subject, difference=difference,
        margin=math.hypot(of_images, of_seeds) if known else None, num_seeds=len(seeds), num_test=first.num_test,
    )  # fmt: skip


def _quantile(degrees: int | None) -> float:
    """Of Student's t for a two-sided interval; None: of the normal distribution."""
    from scipy.stats import norm, t

    share = 0.5 + CONFIDENCE / 2
    return float(norm.ppf(share) if degrees is None else t.ppf(share, degrees))


def _seed(result: Result) -> int:
    assert result.seed is not None
    return result.seed


def verdict_text(compared: Sequence[Comparison], *, own_start: bool = False) -> str:
    """One sentence; empty where nothing was compared.

    Args:
        own_start: The baseline is what the model under test was pretrained from.
    """
    if not compared:
        return ""
    pretraining = "further pretraining" if own_start else "pretraining"
    known = [one for one in compared if one.margin is not None]
    if not known:
        listed = ", ".join(f"{one.column} {_points(one)} against {one.baseline}" for one in compared)
        return f"Whether {pretraining} paid cannot be told from one draw of the labels ({listed}): give --seeds 3."
    clauses = [
        f"{words} {_listed([_difference(one, named=not own_start) for one in those])}"
        for outcome, words in _WORDS.items()
        if (those := [one for one in known if one.outcome == outcome])
    ]
    seeds = max(one.num_seeds for one in known)
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    whom = f"its own start, {known[0].baseline}," if own_start else "the strongest baseline of each column,"
    return (
        f"Against {whom} {pretraining} {_listed(clauses, '; ')} "
        f"(95 % intervals, from {over} and {known[0].num_test:,} test images)."
    )


_WORDS = {
    "better": "paid in",
    "equal": "made no difference beyond chance in",
    "worse": "did worse in",
}


def verdict_summary(compared: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Plain JSON values."""
    return [{**asdict(one), "outcome": one.outcome} for one in compared]


def _difference(one: Comparison, *, named: bool) -> str:
    against = f" against {one.baseline}" if named else ""
    return f"{one.column} ({_points(one)}{against})"


def _points(one: Comparison) -> str:
    margin = "" if one.margin is None else f" ± {100 * one.margin:.1f}"
    return f"{100 * one.difference:+.1f}{margin} points"


def _listed(words: Sequence[str], comma: str = ", ") -> str:
    *before, last = words
    return f"{comma.join(before)}{comma.rstrip() if comma == '; ' else ''} and {last}" if before else last
