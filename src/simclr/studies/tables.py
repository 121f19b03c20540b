"""A study's measurements as a table, as JSON, and as a picture in the paper's form."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from simclr.evaluation.metrics import mean_and_spread
from simclr.reports.png import png
from simclr.reports.table import with_spread
from simclr.studies.run import Measurement
from simclr.studies.study import Arm, Study

RANKED_FROM = 4
"""Values of the paper from which on their order is compared with ours."""

LETTERS_IN_A_ROW = 40
"""Of all names below the bars, up to which they stand side by side."""


def accuracies(study: Study, measurements: Sequence[Measurement], arm: Arm, protocol: str) -> list[float]:
    """The study's metric in % of an arm, one for each seed that did not diverge."""
    return [
        100 * result.value(study.metric)
        for measurement in measurements
        if measurement.arm == arm.name
        for result in measurement.results
        if result.protocol == protocol and result.metrics[study.metric] is not None
    ]


def protocols_of(measurements: Sequence[Measurement]) -> list[str]:
    """The protocols that were measured, in the order of the evaluation."""
    return list(dict.fromkeys(result.protocol for one in measurements for result in one.results))


def table(study: Study, arms: Sequence[Arm], measurements: Sequence[Measurement]) -> str:
    """Mean and standard deviation over seeds of each arm's accuracy beside the paper's, as Markdown."""
    protocols = protocols_of(measurements)
    has_paper = any(arm.paper is not None for arm in arms)
    has_choice = any(arm.candidates for arm in arms)
    heads = [study.title, *protocols, *(["paper"] if has_paper else []), *(["chosen"] if has_choice else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    mark = "*" if study.second_hand else ""
    for arm in arms:
        by_protocol = [accuracies(study, measurements, arm, protocol) for protocol in protocols]
        cells = [with_spread(values, percent=False) if values else "diverged" for values in by_protocol]
        if has_paper:
            cells.append("" if arm.paper is None else f"{arm.paper:.1f}{mark}")
        if has_choice:
            cells.append(_chosen(measurements, arm))
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(study: Study, arms: Sequence[Arm], measurements: Sequence[Measurement], how: str) -> str:
    """The page of a study: claim, table, and how far the order agrees with the paper's.

    Args:
        how: What was run, in a sentence.
    """
    parts = [f"{study.source}: {study.claim}", how, table(study, arms, measurements)]
    diverged = sorted({one.arm for one in measurements if one.diverged})
    if diverged:
        parts.append(f"Diverged with one seed or more: {', '.join(diverged)}.")
    agreements = _agreements(study, arms, measurements)
    if agreements:
        parts.append(f"Rank correlation of our means with the paper's (Spearman): {', '.join(agreements)}.")
    if study.second_hand and any(arm.paper is not None for arm in arms):
        parts.append("* read off the figure or known second-hand, not from the paper's text.")
    return "\n\n".join(parts) + "\n"


def rank_agreement(study: Study, arms: Sequence[Arm], measurements: Sequence[Measurement]) -> float | None:
    """Spearman's correlation of our means with the paper's values; None where there are too few, or all are equal."""
    pairs = []
    for arm in arms:
        ours = accuracies(study, measurements, arm, study.protocols(arm)[0])
        if arm.paper is not None and ours:
            pairs.append((mean_and_spread(ours)[0], arm.paper))
    if len(pairs) < RANKED_FROM or len({ours for ours, _ in pairs}) == 1:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _agreements(study: Study, arms: Sequence[Arm], measurements: Sequence[Measurement]) -> list[str]:
    """Over all points, and within each series where there are several; those that have enough values."""
    series = list(dict.fromkeys(arm.series for arm in arms))
    groups = {"": arms} | ({name: [arm for arm in arms if arm.series == name] for name in series} if series[1:] else {})
    said = []
    for name, group in groups.items():
        agreement = rank_agreement(study, group, measurements)
        if agreement is not None:
            said.append(f"{agreement:.2f}" + (f" within {name}" if name else ""))
    return said


def as_json(study: Study, arms: Sequence[Arm], measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "study": study.name,
        "source": study.source,
        "arms": [
            {"name": arm.name, "settings": {**study.settings, **arm.settings}, "paper": arm.paper} for arm in arms
        ],
        "measurements": [
            {**asdict(one), "settings": dict(one.settings), "results": [result.to_dict() for result in one.results]}
            for one in measurements
        ],
    }


def draw(study: Study, arms: Sequence[Arm], measurements: Sequence[Measurement]) -> bytes:
    """The study's picture: our means, with the spread over seeds, in the paper's form. PNG."""
    means: dict[tuple[str, Any], tuple[float, float]] = {}
    for arm in arms:
        values = accuracies(study, measurements, arm, study.protocols(arm)[0])
        mean, spread = mean_and_spread(values) if values else (np.nan, None)
        means[arm.series, arm.point] = mean, spread or 0.0
    series = list(dict.fromkeys(arm.series for arm in arms))
    points = list(dict.fromkeys(arm.point for arm in arms))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(max(5.0, 0.9 * len(points)), 3.8), layout="constrained")
        axes = figure.subplots()
        {"bars": _bars, "lines": _lines, "matrix": _matrix}[study.shape](axes, means, series, points)
        axes.set_title(f"{study.title} ({study.source})", fontsize=9, wrap=True)
        axes.set_xlabel(study.axis)
        if study.shape != "matrix":
            axes.set_ylabel({"top1": "top-1 accuracy, %", "kappa": "kappa, %"}[study.metric])
            if any(series):
                axes.legend(frameon=False)
        return png(figure, dpi=100)


Means = Mapping[tuple[str, Any], tuple[float, float]]
"""(series, point) -> mean and standard deviation."""


def _bars(axes: Axes, means: Means, series: Sequence[str], points: Sequence[Any]) -> None:
    width = 0.8 / len(series)
    for k, name in enumerate(series):
        there = [(place, means[name, point]) for place, point in enumerate(points) if (name, point) in means]
        axes.bar(
            [place + (k - (len(series) - 1) / 2) * width for place, _ in there], [mean for _, (mean, _) in there],
            width, yerr=[spread for _, (_, spread) in there], label=name, capsize=2,
        )  # fmt: skip
    names = [str(point) for point in points]
    axes.set_xticks(range(len(points)), names, rotation=20 * (sum(map(len, names)) > LETTERS_IN_A_ROW))
    lowest = min((mean - spread for mean, spread in means.values() if np.isfinite(mean)), default=0.0)
    axes.set_ylim(bottom=max(0.0, lowest - 5))


def _lines(axes: Axes, means: Means, series: Sequence[str], points: Sequence[Any]) -> None:
    for name in series:
        there = [point for point in points if (name, point) in means]
        mean, spread = zip(*(means[name, point] for point in there), strict=True)
        axes.errorbar([points.index(point) for point in there], mean, yerr=spread, marker="o", capsize=2, label=name)
    axes.set_xticks(range(len(points)), [str(point) for point in points])


def _matrix(axes: Axes, means: Means, series: Sequence[str], points: Sequence[Any]) -> None:
    cells = np.array([[means.get((name, point), (np.nan, 0.0))[0] for point in points] for name in series])
    axes.imshow(cells, cmap="viridis", aspect="auto")
    middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="wk"[int(value > middle)])
    axes.set_xticks(range(len(points)), [str(point) for point in points])
    axes.set_yticks(range(len(series)), series)


def _chosen(measurements: Sequence[Measurement], arm: Arm) -> str:
    settings = next((one.settings for one in measurements if one.arm == arm.name), {})
    return ", ".join(f"{name} {value}" for name, value in settings.items())
