"""Accuracies of models by protocol and seed, from results: the main table of `simclr evaluate`, and values for JSON."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from simclr.evaluation.measure import TITLES
from simclr.evaluation.metrics import BASELINES, SUPERVISED, TOP5_ABOVE, mean_and_spread
from simclr.evaluation.results import Result
from simclr.reports.table import Row, error_note, seeds_note, text_table
from simclr.reports.verdict import is_baseline

TOP5_PROTOCOLS = ("linear", "finetune", SUPERVISED)
"""Protocols whose top-5 accuracy SimCLR reports beside top-1 (tables 6, 7 and B.2)."""


def accuracy_text(results: Sequence[Result]) -> str:
    """A row for each subject, a column for each kind of classifier, and below them what was done.

    Where there are many classes, a second table has the top-5 accuracy of the protocols for which the papers report it.
    """
    rows = accuracy_rows(results)
    lines = [text_table(rows, corner="features"), f"Top-1 accuracy in %, {seeds_note(rows)}."]
    top5 = [result for result in results if result.protocol in TOP5_PROTOCOLS and _has_top5(result)]
    if top5:
        rows = accuracy_rows(top5, "top5")
        lines += [text_table(rows, corner="features"), f"Top-5 accuracy in %, {seeds_note(rows)}."]
    for protocol in dict.fromkeys(result.protocol for result in results):
        subjects_by_description: dict[str, dict[str, None]] = {}
        for result in results:
            if result.protocol == protocol:
                subjects_by_description.setdefault(result.description, {})[result.subject] = None
        for description, subjects in subjects_by_description.items():
            whose = f" of {', '.join(subjects)}" if len(subjects_by_description) > 1 else ""
            lines.append(f"{protocol}{whose}: {description}.")
    if note := layer_note(results):
        lines.append(note)
    num_test = results[0].num_test
    if num_test is not None:
        lines.append(f"Test images: {num_test:,}, so {error_note(num_test)}.")
    return "\n".join(lines)


def layer_note(results: Sequence[Result]) -> str:
    """The layers that features were taken from and the subjects of each; empty where all are the encoder's output."""
    subjects_by_layer: dict[str, dict[str, None]] = {}
    for result in results:
        if result.layer is not None:
            subjects_by_layer.setdefault(result.layer, {})[result.subject] = None
    return " ".join(f"Features of {', '.join(names)}: layer {layer}." for layer, names in subjects_by_layer.items())


def accuracy_rows(results: Sequence[Result], metric: str = "top1") -> list[Row]:
    """Accuracies over seeds: the model under test, others that are compared, then baselines, the strongest first.

    Fine-tuning and training from scratch share a column. The strength of a baseline is its mean over the columns of
    frozen features.

    Args:
        metric: Name of an accuracy that each result has.
    """
    columns = _values_by(results, lambda result: TITLES[result.protocol], metric)
    under_test = results[0].subject

    def place(name: str) -> tuple[bool, float]:
        frozen = [mean_and_spread(values)[0] for title, values in columns[name].items() if title != TITLES[SUPERVISED]]
        return (True, -float(np.mean(frozen)) if frozen else 0.0) if is_baseline(name) else (False, 0.0)

    names = [under_test, *sorted((name for name in columns if name != under_test), key=place)]
    return [Row(name, columns[name], baseline=name in BASELINES) for name in names if name in columns]


def mean_accuracies(
    results: Sequence[Result],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float | None]]]:
    """Subject -> protocol -> mean top-1 accuracy in [0, 1]; and its sample standard deviation, None of one seed."""
    means: dict[str, dict[str, float]] = {}
    spreads: dict[str, dict[str, float | None]] = {}
    for name, row in _values_by(results, lambda result: result.protocol, "top1").items():
        means[name], spreads[name] = {}, {}
        for protocol, values in row.items():
            means[name][protocol], spreads[name][protocol] = mean_and_spread(values)
    return means, spreads


def accuracy_summary(results: Sequence[Result]) -> dict[str, Any]:
    """Plain JSON values: means by name at the top level, "spread", and every single result under "results"."""
    means, spreads = mean_accuracies(results)
    return {
        **means,
        "spread": spreads,
        "results": [
            {
                "features": result.subject,
                "protocol": result.protocol,
                "seed": result.seed,
                **result.metrics,
                "how": result.description,
            }
            for result in results
        ],
    }


def records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as plain JSON values, without details such as the outcomes of single images."""
    return [{name: value for name, value in result.to_dict().items() if name != "details"} for result in results]


def results_by_subject(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Subject -> its results, both in the order in which they come."""
    by_subject: dict[str, list[Result]] = {}
    for result in results:
        by_subject.setdefault(result.subject, []).append(result)
    return by_subject


def _has_top5(result: Result) -> bool:
    return (result.num_classes or 0) > TOP5_ABOVE and result.metrics.get("top5") is not None


def _values_by(
    results: Sequence[Result], column: Callable[[Result], str], metric: str
) -> dict[str, dict[str, list[float]]]:
    """Subject -> column -> accuracies in [0, 1]."""
    accuracies: dict[str, dict[str, list[float]]] = {}
    for result in results:
        accuracies.setdefault(result.subject, {}).setdefault(column(result), []).append(result.value(metric))
    return accuracies
