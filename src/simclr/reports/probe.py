"""What the layers of networks know, from results of the protocol probe: a table, and values for JSON."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from simclr.evaluation.results import Result
from simclr.reports.evaluation import results_by_subject
from simclr.reports.table import Row, seeds_note, text_table


def probe_text(results: Sequence[Result]) -> str:
    """A row for each layer, a column for each task; the layers of the first subject, then those of the others."""
    by_subject = results_by_subject(results)
    rows: list[Row] = []
    for number, (subject, of_subject) in enumerate(by_subject.items()):
        layers = _layer_rows(of_subject)
        rows += layers if number == 0 else [replace(row, name=f"{subject}: {row.name}") for row in layers]
    note, details = seeds_note(rows), results[0].details
    rows.append(Row("chance", {task: [share] for task, share in details["chance"].items()}, baseline=True))
    notes = [f"What an MLP reads from each layer, accuracy in %, {note}.", *details["notes"]]
    return "\n".join([text_table(rows, corner="layer"), *notes])


def probe_summary(results: Sequence[Result]) -> dict[str, Any]:
    """Plain JSON values: tables by seed of the first subject, and of the others by name."""
    tables = {
        subject: [{"table": _table(result), **result.details} for result in of_subject]
        for subject, of_subject in results_by_subject(results).items()
    }
    first = next(iter(tables))
    return {"seeds": tables.pop(first), "compared": tables}


def _table(result: Result) -> dict[str, dict[str, float]]:
    """Layer -> task -> accuracy in [0, 1]."""
    table: dict[str, dict[str, float]] = {}
    for name in result.metrics:
        layer, _, task = name.rpartition("/")
        table.setdefault(layer, {})[task] = result.value(name)
    return table


def _layer_rows(results: Sequence[Result]) -> list[Row]:
    """A row for each layer, a column for each task; one value per seed."""
    tables = [_table(result) for result in results]
    return [
        Row(layer, {task: [t[layer][task] for t in tables] for task in tasks}) for layer, tasks in tables[0].items()
    ]
