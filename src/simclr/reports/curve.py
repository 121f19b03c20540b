"""The label-efficiency curve as a table, as sentences and as a picture (PNG bytes)."""

import itertools
import math

import numpy as np

from simclr.evaluation.curve import Count, Curve, Saved, count_name, labels_saved
from simclr.evaluation.metrics import BASELINES, mean_and_spread
from simclr.reports.png import png
from simclr.reports.table import Row, markdown_table, seeds_note, text_table

COLOURS = {
    "encoder": "#2a6f97",
    "random": "#adb5bd",
    "pixels": "#e09f3e",
    "supervised": "#9b2226",
    "hog": "#588157",
    "patches": "#7b2cbf",
}
OTHER_COLOURS = ("#6c584c", "#1b9aaa", "#c77dff", "#386641")
NAME_GAP = 0.05  # of the axis' height: between the names at the ends of the lines
TICK_GAP = 0.06  # of the axis' width: ticks that are nearer are left out, the one with fewer labels first


def curve_table(curve: Curve, *, markdown: bool = False) -> str:
    """A row for each source, a column for each number of labels per class; percent, over seeds."""
    rows = [
        Row(
            source,
            {count_name(count): list(curve.values(source, count).values()) for count in curve.counts},
            baseline=source in BASELINES,
        )
        for source in curve.sources
    ]
    caption = (
        f"Accuracy on {curve.num_test:,} test images in %, {seeds_note(rows)}; labels per class, "
        f"{curve.num_classes} classes, all = {curve.num_labels:,} labels."
    )
    as_text = markdown_table if markdown else text_table
    return "\n".join([as_text(rows, corner="labels per class"), "", " ".join([caption, *curve.notes])])


def when_it_pays(curve: Curve, *, source: str = "encoder", count: Count = 10) -> str:
    """Two sentences: with which numbers of labels the source beats each baseline in every seed, and how many it saves.

    Args:
        count: Labels per class of the example; where the curve has no such point, its middle one.
    """
    saved = labels_saved(curve, source=source)
    counts = list(dict.fromkeys(s.count for s in saved))
    if not saved:
        return f"The curve has no baseline beside {source}, so it cannot say when {source} pays."
    baselines = list(dict.fromkeys(s.baseline for s in saved))
    ahead = [f"of {baseline} {_ahead(curve, source, baseline)}" for baseline in baselines]
    example = count if count in counts else counts[len(counts) // 2]
    reached = next(s.accuracy for s in saved if s.count == example)
    needs = ", ".join(f"{s.baseline} {needed_in_words(s)}" for s in saved if s.count == example)
    return (
        f"{source} is ahead {', and '.join(ahead)}. With {count_name(example)} labels per class it reaches "
        f"{reached:.1%}; for that the others need, in labels per class: {needs}."
    )


def needed_in_words(saved: Saved) -> str:
    """The number of labels per class that a baseline needs, as text."""
    if saved.needed is None:
        return "more than there are" if saved.max_count == "all" else f"more than {count_name(saved.max_count)}"
    if saved.needed == saved.min_labels:
        return f"{saved.needed:,.0f} or fewer"
    return f"{saved.needed:,.{0 if saved.needed >= 10 else 1}f}"


def _ahead(curve: Curve, source: str, baseline: str) -> str:
    """The counts with which the source beats the baseline in every common seed, in words."""
    both, ahead = [], []
    for count in curve.counts:
        ours, theirs = curve.values(source, count), curve.values(baseline, count)
        common = ours.keys() & theirs.keys()
        if common:
            both.append(count)
            if all(ours[seed] > theirs[seed] for seed in common):
                ahead.append(count)
    if not ahead:
        return "with no number of labels in every seed"
    first = both.index(ahead[0])
    if len(ahead) > 2 and both[first : first + len(ahead)] == ahead:
        return f"in every seed with {count_name(ahead[0])} to {count_name(ahead[-1])} labels per class"
    *before, last = map(count_name, ahead)
    listed = f"{', '.join(before)} and {last}" if before else last
    return f"in every seed with {listed} {'label' if ahead == [1] else 'labels'} per class"


def draw_curve(curve: Curve) -> bytes:
    """Mean accuracy and a band of ± one standard deviation over labels per class (log axis); above, labels in all."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    others = itertools.cycle(OTHER_COLOURS)
    ends = []
    for source in curve.sources:
        colour = COLOURS.get(source) or next(others)
        values = {curve.labels_per_class(count): list(curve.values(source, count).values()) for count in curve.counts}
        measured = {place: mean_and_spread(accuracies) for place, accuracies in values.items() if accuracies}
        places = list(measured)
        means = np.array([100 * mean for mean, _ in measured.values()])
        spreads = np.array([100 * (spread or 0.0) for _, spread in measured.values()])
        axes.fill_between(places, means - spreads, means + spreads, color=colour, alpha=0.18, linewidth=0)
        axes.plot(places, means, "o-", color=colour, markersize=3.5, linewidth=1.6)
        ends.append((float(means[-1]), places[-1], source, colour))
    ends.sort(reverse=True)
    low, high = axes.get_ylim()
    heights = _apart([height for height, *_ in ends], NAME_GAP * (high - low))
    for height, (_, place, source, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            source,
            (place, height),
            (7, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,  # also where the names, moved apart, stand below the axes
        )
    ticks = _ticks(curve)
    above = axes.twiny()
    for side in (axes, above):
        side.set_xscale("log")
        side.xaxis.set_minor_locator(NullLocator())
        side.tick_params(labelsize=8)
    axes.set_xticks(list(ticks), list(ticks.values()))
    above.set_xlim(axes.get_xlim())
    above.set_xticks(list(ticks), [f"{round(place * curve.num_classes):,}" for place in ticks])
    axes.set_xlabel("labels per class")
    above.set_xlabel(f"{curve.data}: labels in all {curve.num_classes} classes together")
    axes.set_ylabel(f"accuracy on {curve.num_test:,} test images, %")
    axes.grid(alpha=0.25)
    for side in (axes, above):
        side.spines["right"].set_visible(False)
    return png(figure)


def _apart(heights: list[float], gap: float) -> list[float]:
    """Descending heights at least `gap` apart: the lower one of two that are nearer moves down."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else height)
    return placed


def _ticks(curve: Curve) -> dict[float, str]:
    """Place on the axis -> its name; from the right, those that are not too near to the next."""
    places = {curve.labels_per_class(count): count_name(count) for count in curve.counts}
    gap = TICK_GAP * math.log(max(places) / min(places))
    kept: dict[float, str] = {}
    for place in sorted(places, reverse=True):
        if not kept or math.log(min(kept) / place) >= gap:
            kept[place] = places[place]
    return kept
