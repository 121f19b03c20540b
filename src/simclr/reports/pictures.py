"""Pictures: the views of a policy, and an evaluation at a glance. PNG bytes out; nothing is shown or written here."""

import string
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simclr.data.images import Images
from simclr.evaluation.duplicates import Duplicates
from simclr.evaluation.label_free import Neighbours, Outlier, nearest_neighbours
from simclr.evaluation.measure import TITLES
from simclr.evaluation.split import Split
from simclr.reports.curve import COLOURS
from simclr.reports.png import png
from simclr.views.policy import Policy
from simclr.views.views import make_views

MAP_ROWS = 2000  # points on the map of features
PAIRS = 24  # of copies in a picture
CHECK = "#588157"
LEGEND_COLUMNS = 3
IMAGE_SIDE = 0.94  # in a grid of images, whose columns are 1 wide

Cell = tuple[Any, str]
"""Which image, and the word above it."""
Pixels = Callable[[Any], np.ndarray]
"""Its pixels, (H, W, C)."""


def draw_views(images: Images, policies: Sequence[Policy], *, rows: int, columns: int | None, seed: int) -> bytes:
    """One row per image: the image itself, then views of it as training would see them in successive epochs.

    Args:
        policies: Of each view of an image in an epoch; those smaller than the first are small crops.
        rows: Images.
        columns: Views of each; None: 8, or all of an epoch if they are more.
    """
    per_epoch = len(policies)
    columns = max(8, per_epoch) if columns is None else columns
    chosen = np.linspace(0, len(images) - 1, min(rows, len(images))).round().astype(int)
    pixels = images.read(chosen)
    shown = [list(pixels)]
    for epoch in range(-(-columns // per_epoch)):
        for views in make_views(pixels, policies, seed=seed, epoch=epoch, indices=chosen, views=range(per_epoch)):
            shown.append(list(views.permute(0, 2, 3, 1).numpy()))  # (rows, S, S, C)
    kinds = ["view" if policy.size == policies[0].size else "small" for policy in policies]
    words = ["image", *(f"{kinds[k % per_epoch]} {_letter(k % per_epoch)}" for k in range(columns))]
    cells = [[((column, row), words[column]) for column in range(columns + 1)] for row in range(len(chosen))]
    sizes = " and ".join(str(size) for size in dict.fromkeys(policy.size for policy in policies))
    title = f"{images.name}: {policies[0].preset} views at {sizes} pixels"
    return _draw_images(title, cells, lambda cell: shown[cell[0]][cell[1]])


def _letter(index: int) -> str:
    """Letters a to z, then numbers: 27, 28, ..."""
    return string.ascii_lowercase[index] if index < len(string.ascii_lowercase) else str(index + 1)


def draw_evaluation(
    features: np.ndarray, split: Split, results: dict[str, dict[str, float]], metrics: list[dict[str, Any]]
) -> bytes:
    """Accuracies beside their baselines, the loss, nearest neighbours of test images, and a map of the features.

    Args:
        features: (m, F) of the test images.
        results: Name -> protocol -> accuracy in [0, 1].
        metrics: Records of the run, if there is one.
    """
    figure = Figure(figsize=(12, 8), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.3))
    draw_accuracies(figure.add_subplot(grid[0, 0]), results)
    _draw_curve(figure.add_subplot(grid[1, 0]), metrics)
    neighbours = figure.add_subplot(grid[0, 1])
    _draw_grid(neighbours, *_in_rows(split.test, nearest_neighbours(features, split.test)), word_height=0.4)
    neighbours.set_title("test images and their nearest neighbours, with their cosine", fontsize=9)
    _draw_map(figure.add_subplot(grid[1, 1]), split.test, features)
    figure.suptitle(f"{split.test.name}: {split.description}", fontsize=10)
    return png(figure)


def draw_neighbours(images: Images, neighbours: list[Neighbours]) -> bytes:
    """Each row: an image, then those nearest to it by their features, with the cosine above."""
    return _draw_images(f"{images.name}: nearest neighbours, by cosine", *_in_rows(images, neighbours))


def draw_copies(copies: Duplicates, images: Images, test: Images | None = None) -> bytes:
    """The most alike pairs, original beside copy, the near ones first: identical ones hardly need a picture.

    Args:
        images: The images that were searched.
        test: The images among which copies were looked for; None: the same.
    """
    pairs = sorted(copies.pairs, key=lambda pair: pair.kind == "identical")[:PAIRS]
    cells = []
    for pair in pairs:
        cells += [((0, pair.original_row), pair.kind), ((1, pair.copy_row), f"{pair.similarity:.3f}")]
    shown = [cells[begin : begin + 8] for begin in range(0, len(cells), 8)]
    parts = (images, images if test is None else test)
    return _draw_images(copies.sentence, shown, lambda cell: parts[cell[0]].read([cell[1]])[0])


def draw_outliers(images: Images, outliers: list[Outlier]) -> bytes:
    """The images that fit their clusters worst, with their silhouettes."""
    cells = [(outlier.row, f"{outlier.silhouette:.2f}") for outlier in outliers]
    shown = [cells[begin : begin + 8] for begin in range(0, len(cells), 8)]
    return _draw_images(
        f"{images.name}: images that fit their cluster worst, by silhouette", shown, lambda row: images.read([row])[0]
    )


def _in_rows(images: Images, neighbours: list[Neighbours]) -> tuple[list[list[Cell]], Pixels]:
    rows = [
        [(n.query_row, "query"), *zip(n.nearest_rows, map("{:.2f}".format, n.cosine), strict=True)] for n in neighbours
    ]
    return rows, lambda row: images.read([row])[0]


def _draw_images(title: str, shown: list[list[Cell]], pixels: Pixels) -> bytes:
    columns, rows = max((len(row) for row in shown), default=1), max(len(shown), 1)
    figure = Figure(figsize=(1.1 * max(columns, 6), 1.25 * rows + 0.5), layout="constrained")
    _draw_grid(figure.subplots(), shown, pixels)
    figure.suptitle("\n".join(textwrap.wrap(title, 90)), fontsize=9)
    return png(figure)


def _draw_grid(axes: Axes, shown: list[list[Cell]], pixels: Pixels, *, word_height: float = 0.22) -> None:
    """Rows of images, each with a word above it, in the same axes: axes for each image would take seven times as long.

    Args:
        word_height: Height of the space for a word, relative to the width of a column.
    """
    row_height = word_height + 1.04 * IMAGE_SIDE
    for row, cells in enumerate(shown):
        top = row * row_height + word_height
        for column, (cell, word) in enumerate(cells):
            image = pixels(cell)
            height, width = np.array(image.shape[:2]) * IMAGE_SIDE / max(image.shape[:2])
            left = column + (1 - width) / 2
            _show(axes, image, extent=(left, left + width, top + height, top))
            axes.text(column + 0.5, top - 0.04, word, fontsize=7, horizontalalignment="center")
    axes.set_xlim(0, max((len(row) for row in shown), default=1))
    axes.set_ylim(max(len(shown), 1) * row_height, 0)
    axes.set_axis_off()


def draw_accuracies(axes: Axes, results: dict[str, dict[str, float]]) -> None:
    """Bars of the accuracies of each protocol, one colour per model; the legend is above the bars."""
    protocols = list(dict.fromkeys(TITLES[protocol] for row in results.values() for protocol in row))
    width = 0.8 / max(len(results), 1)
    for shift, (name, row) in enumerate(results.items()):
        places = [protocols.index(TITLES[p]) + (shift - (len(results) - 1) / 2) * width for p in row]
        bars = axes.bar(
            places, [100 * value for value in row.values()], 0.93 * width, label=name, color=COLOURS.get(name)
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(protocols)), protocols)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy on test images, %")
    legend_rows = -(-len(results) // LEGEND_COLUMNS)
    axes.set_ylim(0, 110 + 8 * legend_rows)
    axes.legend(ncols=LEGEND_COLUMNS, fontsize=8, loc="upper center")


def _draw_curve(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    if not metrics:
        axes.set_axis_off()
        return
    steps = [record["step"] for record in metrics]
    axes.plot(steps, [record["loss"] for record in metrics], "." if len(steps) == 1 else "-", color=COLOURS["encoder"])
    axes.set_xlabel("step")
    axes.set_ylabel("loss", color=COLOURS["encoder"])
    checks = [(record["step"], 100 * record["knn"]) for record in metrics if "knn" in record]
    if checks:
        right = axes.twinx()
        right.plot(*zip(*checks, strict=True), "x-", color=CHECK, markersize=4)
        right.set_ylabel("kNN within the training images, %", color=CHECK)
        right.set_ylim(0, 100)


def _draw_map(axes: Axes, images: Images, features: np.ndarray) -> None:
    """The two directions in which the features vary most (PCA), coloured by class."""
    rows = np.linspace(0, len(features) - 1, min(MAP_ROWS, len(features))).round().astype(int)
    centred = features[rows] - features[rows].mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(rows), 2))
    points[:, : len(directions[:2])] = centred @ directions[:2].T
    assert images.labels is not None
    labels = images.labels[rows]
    classes = np.unique(labels)
    colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"]
    for k, label in enumerate(classes[:20]):
        name = images.classes[label] if images.classes is not None else str(label)
        axes.scatter(*points[labels == label].T[:2], s=5, label=name, color=colours(k))
    shown = f" ({len(classes[:20])} of {len(classes)} classes)" if len(classes) > 20 else ""
    axes.set_title(f"test features, first two principal components{shown}", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(
        fontsize=7,
        markerscale=2,
        ncols=1 if len(classes) <= 12 else 2,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )


def _show(axes: Axes, image: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """Draw an image between the left, right, lower and upper edge."""
    gray = image.shape[-1] == 1
    axes.imshow(
        image[..., 0] if gray else image,
        cmap="gray" if gray else None,
        vmin=0,
        vmax=255 if image.dtype == np.uint8 else 1,
        interpolation="nearest",
        extent=extent,
    )
