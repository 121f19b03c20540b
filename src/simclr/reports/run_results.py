"""Accuracies that `simclr evaluate` left with a run, each checked to be of the very weights that are exported.

Each line of RUN/evaluation/results.jsonl is a `Result`: it holds the digest of the weights and the name of the images.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from simclr.config.encoder import TIMM, TORCHVISION
from simclr.errors import UserError
from simclr.evaluation.measure import TITLES
from simclr.evaluation.metrics import BASELINES, SUPERVISED
from simclr.evaluation.results import Result, name_of, read_results
from simclr.evaluation.subjects import INIT, is_initial
from simclr.models.encoder import read_as
from simclr.reports.table import Row
from simclr.training.run import RunFolder
from simclr.weights.folder import Model, digest_of

OWN = "encoder"  # row of the model under test
LAYER = ", layer "
"""Between the name of a row and the layer whose output was taken as features."""
BESIDE = {"teacher": "its teacher", "pixels": "kNN on raw pixels"}
"""Model that was measured beside a classifier -> its row."""


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

        def is_baseline(name: str) -> bool:
            return name.partition(LAYER)[0] in BASELINES

        names = sorted(self.values, key=is_baseline)
        columns = {name: {title: list(seeds.values()) for title, seeds in self.values[name].items()} for name in names}
        return [Row(name, columns[name], baseline=is_baseline(name)) for name in names]


def results_of(folder: Path, model: Model) -> list[Table]:
    """The tables of a run, or of a network that was fine-tuned or distilled; none where nothing is known.

    Args:
        folder: What `simclr export` was given.
        model: What was loaded from it.
    """
    if RunFolder(folder).is_pretraining:
        results = _accuracies(folder / "evaluation" / "results.jsonl")
        return _tables(results, digest_of(model.encoder), digest_of(read_as(model.encoder, "h")))
    if model.classifier is not None:
        results = _read(folder / "evaluation" / "results.jsonl")
        if tables := _of_classifier(results, digest_of(model.classifier)):
            return tables
    if reported := _reported(folder):
        return reported
    results = _accuracies(folder.parent / "results.jsonl")
    trained = [result for result in results if folder.name.endswith(f"-{name_of(result.key)[:12]}")]
    return _finetuned(results, trained[0]) if trained else []


def _of_classifier(results: list[Result], weights: str) -> list[Table]:
    """What `simclr finetune` or `simclr distill` measured when it ended, and beside it on the same test images."""
    own = [result for result in results if result.protocol == "classifier" and result.weights == weights]
    if not own:
        return []
    table = Table(own[-1].data_name, own[-1].split)
    for result in (own[-1], *results):
        if result.data["test"] == own[-1].data["test"] and result.protocol in ("classifier", "majority", "knn"):
            row = OWN if result.weights == weights else BESIDE.get(result.subject, result.subject)
            table.values[row] = {"top-1": {0: result.value("top1")}}
    return [table]


def _reported(folder: Path) -> list[Table]:
    """The same from summary.json, for folders of versions that wrote no results."""
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


def _tables(results: list[Result], weights: str, unscaled: str) -> list[Table]:
    """Every split on which the encoder itself was measured, with all rows of that split.

    Args:
        weights: Digest of the encoder.
        unscaled: Digest of the encoder without the scaling of its features, as it is where another layer is read.
    """

    def digest(result: Result) -> str:
        return weights if result.layer is None else unscaled

    own = [result.data for result in results if result.weights == digest(result)]
    tables: dict[str, Table] = {}
    for result in results:
        of_other_weights = result.subject == OWN and result.weights != digest(result)
        if result.data in own and not of_other_weights:
            _add(tables, result, digest(result))
    return list(tables.values())


def _finetuned(results: list[Result], trained: Result) -> list[Table]:
    """The network's own accuracy, and that of the same network from scratch on the same labels."""
    tables: dict[str, Table] = {}
    for result in results:
        from_scratch = result.protocol == SUPERVISED and (result.data, result.seed) == (trained.data, trained.seed)
        if result is trained or from_scratch:
            _add(tables, result, trained.weights)
    return list(tables.values())


def _add(tables: dict[str, Table], result: Result, weights: str | None) -> None:
    split = re.sub(r",? seed \d+", "", result.split)
    table = tables.setdefault(split, Table(result.data_name, split))
    row = _row_name(result, weights)
    if is_initial(row):
        row = INIT
    elif not row.startswith((TIMM, TORCHVISION)):
        row = Path(row).name  # another run's folder: paths of this machine stay here
    row += "" if result.layer is None else f"{LAYER}{result.layer}"
    column = table.values.setdefault(row, {}).setdefault(TITLES[result.protocol], {})
    column[result.seed] = result.value("top1")


def _row_name(result: Result, weights: str | None) -> str:
    if result.protocol == SUPERVISED:
        return SUPERVISED
    return OWN if result.weights == weights else result.subject


def _accuracies(file: Path) -> list[Result]:
    """The accuracies in a result file, in the order in which they were measured."""
    return [result for result in _read(file) if result.protocol in TITLES]


def _read(file: Path) -> list[Result]:
    try:
        return read_results(file)[0]
    except (OSError, UserError):
        return []
