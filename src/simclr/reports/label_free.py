"""Geometry of features and copies among images, from results of the protocol label-free."""

from collections.abc import Sequence
from typing import Any

from simclr.data.images import Images
from simclr.evaluation.duplicates import Duplicates
from simclr.evaluation.label_free import LabelFree
from simclr.evaluation.metrics import BASELINES
from simclr.evaluation.results import Result
from simclr.reports.pictures import draw_copies, draw_neighbours, draw_outliers
from simclr.reports.table import Row, text_table

MAX_NAMED_PAIRS = 10
"""Pairs of copies that are printed."""


def label_free_text(results: Sequence[Result]) -> str:
    """A row for each subject, and the copies that the first result names."""
    first = results[0].details
    copies = [Duplicates.from_dict(first[name]) for name in ("within", "across") if first[name] is not None]
    return "\n".join(
        [
            text_table([_row(result) for result in results], corner="features", percent=False, digits=2),
            f"Alignment: of two crops of {first['alignment_rows']:,} images, lower is closer. Uniformity: of "
            f"{first['uniformity_rows']:,} images, lower is wider spread. Silhouette: of {first['num_clusters']} "
            "clusters.",
            *(line for part in copies for line in _copies_lines(part)),
        ]
    )


def label_free_summary(results: Sequence[Result]) -> dict[str, Any]:
    """Plain JSON values: subject -> metrics and details."""
    return {result.subject: result.metrics | result.details for result in results}


def label_free_pictures(result: Result, images: Images, test: Images | None) -> dict[str, bytes]:
    """File name -> PNG of neighbours, of images that fit their clusters worst, and of copies where there are some.

    Args:
        result: Of the images that are given, as the subject sees them.
    """
    measured = LabelFree.from_plain(result.metrics | result.details)
    pictures = {
        "neighbours.png": draw_neighbours(images, measured.neighbours),
        "worst-clustered.png": draw_outliers(images, measured.outliers),
    }
    if measured.within is not None and measured.within.pairs:
        pictures["copies-within.png"] = draw_copies(measured.within, images)
    if measured.across is not None and measured.across.pairs and test is not None:
        pictures["copies-across.png"] = draw_copies(measured.across, images, test)
    return pictures


def _row(result: Result) -> Row:
    metrics, details = result.metrics, result.details
    alignment = metrics["alignment"]
    columns = {
        "alignment": [] if alignment is None else [alignment],
        "uniformity": [result.value("uniformity")],
        "effective rank": [result.value("effective_rank")],
        "of": [details["num_features"]],
        "silhouette": [result.value("silhouette")],
    }
    return Row(result.subject, columns, baseline=result.subject in BASELINES)


def _copies_lines(copies: Duplicates) -> list[str]:
    """How many there are, and the first pairs by name."""
    pairs = copies.pairs[:MAX_NAMED_PAIRS]
    num_more = len(copies.pairs) - len(pairs)
    more = [f"  and {num_more:,} more, all in --json"] if num_more else []
    return [copies.sentence, *(f"  {pair.copy} shows {pair.original} ({pair.similarity:.3f})" for pair in pairs), *more]
