"""Accuracies that `simclr evaluate` left with a run, each checked to be of the very weights that are exported.

Each line of RUN/evaluation/results.jsonl holds the digest of the weights that it is of, and the name of the images.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from simclr.config.encoder import TIMM, TORCHVISION
from simclr.errors import UserError
from simclr.evaluation.measure import TITLES
from simclr.evaluation.metrics import BASELINES, SUPERVISED
from simclr.evaluation.results import Entry, name_of, read_results
from simclr.reports.table import Row
from simclr.weights.folder import Model, digest_of

OWN = "encoder"  # row of what was judged


@dataclass
class Table:
    """Top-1 accuracies on one split of one set of images."""

    data: str | None
    """Name of the images, if any file tells."""
    split: str
    """How they were divided, in words."""
    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    """Row -> protocol's title -> seed -> accuracy in [0, 1], the one that was measured last."""

    @property
    def rows(self) -> list[Row]:
        """The encoder's first, then what it has to beat."""
        names = sorted(self.values, key=lambda name: name in BASELINES)
        columns = {name: {title: list(seeds.values()) for title, seeds in self.values[name].items()} for name in names}
        return [Row(name, columns[name], baseline=name in BASELINES) for name in names]


def results_of(folder: Path, model: Model) -> list[Table]:
    """The tables of a run, or of a network that was fine-tuned or distilled; none where nothing is known.

    Args:
        folder: What `simclr export` was given.
        model: What was loaded from it.
    """
    if (folder / "run.json").is_file():
        return _tables(_accuracies(folder / "evaluation" / "results.jsonl"), digest_of(model.encoder))
    if reported := _reported(folder):
        return reported
    records = _accuracies(folder.parent / "results.jsonl")
    trained = [record for record in records if folder.name.endswith(f"-{name_of(record['key'])[:12]}")]
    return _finetuned(records, trained[0]) if trained else []


def _reported(folder: Path) -> list[Table]:
    """What `simclr finetune` or `simclr distill` measured when it ended, with what stood beside it."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        if "test_accuracy" in summary:
            figures, data = summary["test_accuracy"], None
            split = f"{summary['test_images']:,} test images"
            rows = {OWN: figures["student"], "its teacher": figures["teacher"]}
        else:
            data, split = Path(summary["data"].partition(":")[0]).name, summary["split"]
            rows = {OWN: summary["accuracy"]["top-1"], **summary["baselines"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []  # it was not tested, has not ended, or is a network that `simclr evaluate` trained
    return [Table(data, split, {name: {"top-1": {0: value}} for name, value in rows.items()})]


def _tables(records: list[Entry], weights: str) -> list[Table]:
    """Every split on which the encoder itself was measured, with all rows of that split."""
    own = [record["key"]["data"] for record in records if _is_of(record, weights)]
    found: dict[str, Table] = {}
    for record in records:
        of_other_weights = record["about"]["subject"] == OWN and not _is_of(record, weights)
        if record["key"]["data"] in own and not of_other_weights:
            _add(found, record, weights)
    return list(found.values())


def _finetuned(records: list[Entry], trained: Entry) -> list[Table]:
    """The network's own accuracy, and that of the same network from scratch on the same labels."""
    found: dict[str, Table] = {}
    for record in records:
        key, mine = record["key"], trained["key"]
        from_scratch = key["protocol"] == SUPERVISED and (key["data"], key["seed"]) == (mine["data"], mine["seed"])
        if record is trained or from_scratch:
            _add(found, record, mine["model"]["weights"])
    return list(found.values())


def _add(found: dict[str, Table], record: Entry, weights: str) -> None:
    key, about = record["key"], record["about"]
    split = re.sub(r",? seed \d+", "", about["split"])
    table = found.setdefault(split, Table(about["images"], split))
    row = _row(record, weights)
    if not row.startswith((TIMM, TORCHVISION)):
        row = Path(row).name  # another run's folder: where it lies is nobody's business
    column = table.values.setdefault(row, {}).setdefault(TITLES[key["protocol"]], {})
    column[key["seed"]] = record["value"]["figures"]["top1"]


def _row(record: Entry, weights: str) -> str:
    key = record["key"]
    if key["protocol"] == SUPERVISED:
        return SUPERVISED
    return OWN if _is_of(record, weights) else record["about"]["subject"]


def _is_of(record: Entry, weights: str) -> bool:
    return record["key"]["model"]["weights"] == weights


def _accuracies(file: Path) -> list[Entry]:
    """The accuracies in a result file, in the order in which they were measured."""
    try:
        records, _ = read_results(file)
    except (OSError, UserError):
        return []
    return [record for record in records if record["key"].get("protocol") in TITLES]
