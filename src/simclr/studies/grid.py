"""What a study is, and how it is run: every arm with every seed is pretrained, evaluated, and kept in a folder."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from simclr.evaluation.results import Result
from simclr.tasks.api import Run, evaluate, pretrain, resume
from simclr.training.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of trainings that differ in the settings under study.

    Attributes:
        name: Of the study.
        title: What is compared.
        source: Where the paper has it.
        claim: The paper's finding, in a sentence.
        base: Settings that all arms share, a recipe among them.
        arms: Name -> the settings of that arm on top.
    """

    name: str
    title: str
    source: str
    claim: str
    base: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]


def run_study(
    study: Study, data: str, *, out: Path, seeds: Sequence[int], settings: Mapping[str, Any] | None = None,
    protocol: Sequence[str] = ("knn", "linear"),
) -> dict[str, list[Result]]:  # fmt: skip
    """The results of each arm over the seeds; what the folder `out` already holds is not made again.

    Args:
        data: Labelled images with a test part.
        out: Each run is in a folder of it that its settings name, so that equal arms of two studies are one run.
        settings: On top of every arm, such as {"epochs": 4}.
        protocol: Of `simclr evaluate`.
    """
    results: dict[str, list[Result]] = {arm: [] for arm in study.arms}
    for seed in seeds:  # a seed at a time, so that what is cut off has whole comparisons
        for arm, own in study.arms.items():
            run = _trained(data, out, dict(study.base) | dict(own) | dict(settings or {}) | {"seed": seed})
            results[arm] += evaluate(run, data, protocol=protocol, compare=[], seed=seed)
    return results


def table(study: Study, results: Mapping[str, Sequence[Result]]) -> str:
    """Mean and standard deviation over seeds of each arm's top-1 accuracy, in %, as Markdown."""
    protocols = list(dict.fromkeys(result.protocol for of_arm in results.values() for result in of_arm))
    lines = [f"| {study.title} | {' | '.join(protocols)} |", "|---" * (1 + len(protocols)) + "|"]
    for arm, of_arm in results.items():
        cells = [_spread([r.metrics["top1"] for r in of_arm if r.protocol == name]) for name in protocols]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _trained(data: str, out: Path, settings: Mapping[str, Any]) -> Run:
    name = "-".join(f"{key}={value}" for key, value in sorted(settings.items()))
    folder = out / sha256(name.encode()).hexdigest()[:16]
    run = RunFolder(folder)
    if not run.exists:
        return pretrain(data, out=folder, **settings)
    return Run(folder) if run.is_finished else resume(folder)


def _spread(shares: Sequence[float | None]) -> str:
    values = [100 * share for share in shares if share is not None]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
