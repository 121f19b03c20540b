"""Several data sets, each with its metric, in one table: from results of transfer."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from simclr.evaluation.metrics import BASELINES
from simclr.evaluation.results import Result
from simclr.evaluation.transfer import Difference
from simclr.reports.table import Row, seeds_note, text_table


def transfer_scores(results: Sequence[Result]) -> dict[str, dict[str, list[float]]]:
    """The summary table: subject -> data set -> one score per seed, and "mean" over the sets at the end.

    A subject that was not measured on all sets has no mean.
    """
    sets = list(dict.fromkeys(result.data_name for result in results))
    table: dict[str, dict[str, list[float]]] = {}
    for subject in dict.fromkeys(result.subject for result in results):
        by_seed: dict[int, dict[str, float]] = {}
        for result in results:
            if result.subject == subject:
                by_seed.setdefault(result.seed, {})[result.data_name] = result.value("score")
        table[subject] = {name: [scores[name] for scores in by_seed.values() if name in scores] for name in sets}
        if all(set(scores) == set(sets) for scores in by_seed.values()):
            table[subject]["mean"] = [float(np.mean(list(scores.values()))) for scores in by_seed.values()]
    return table


def transfer_text(results: Sequence[Result], differences: Sequence[Difference]) -> str:
    """The table, the metric of each set, and whether subjects differ by more than chance."""
    rows = [Row(name, columns, baseline=name in BASELINES) for name, columns in transfer_scores(results).items()]
    metrics = dict.fromkeys(f"{result.data_name}: {result.data['metric']}" for result in results)
    tests = [
        f"{d.data}, seed {d.seed}: {d.first} - {d.second} = {100 * d.difference:+.1f} points, p = {d.p:.2g}"
        for d in differences
    ]
    return "\n".join([text_table(rows, corner="features"), f"In %, {seeds_note(rows)}. {'; '.join(metrics)}.", *tests])


def transfer_summary(results: Sequence[Result], differences: Sequence[Difference]) -> dict[str, Any]:
    """Plain JSON values, without the credits of single images."""
    plain = [
        {
            "subject": result.subject,
            "data": result.data_name,
            "metric": result.data["metric"],
            **result.metrics,
            "chosen": result.details["chosen"],
            "seed": result.seed,
            "converged": result.details["converged"],
        }
        for result in results
    ]
    return {
        "table": transfer_scores(results), "results": plain, "differences": [asdict(each) for each in differences],
    }  # fmt: skip
