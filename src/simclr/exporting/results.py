"""Accuracies that `simclr evaluate` left with a run, each checked to be of the very weights that are exported.

RUN/evaluation/results.jsonl knows for each result whose features it is of, to the bit. It does not name the data; a
file of `simclr evaluate --json` in the run's folder does, and where one holds the same result, its name is taken.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from simclr.distributed import World
from simclr.evaluation.ledger import name_of
from simclr.evaluation.measure import TITLES
from simclr.evaluation.subjects import Subject
from simclr.evaluation.table import BASELINES, SUPERVISED, Row
from simclr.models.config import TIMM, TORCHVISION
from simclr.weights import Embedder

OWN = "encoder"  # the ledger's name for what was judged


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


def results_of(folder: Path, model: Embedder) -> list[Table]:
    """The tables of a run, or of a network that was fine-tuned or distilled; none where nothing is known.

    Args:
        folder: What `simclr export` was given.
        model: What was loaded from it.
    """
    if (folder / "run.json").is_file():
        return _tables(folder, _entries(folder / "evaluation" / "results.jsonl"), _identities(model))
    if (folder / "finetune.json").is_file() or (folder / "distill.json").is_file():
        return _reported(folder)
    entries = _entries(folder.parent / "results.jsonl")
    trained = [entry for entry in entries if folder.name.endswith(f"-{name_of(entry['key'])[:12]}")]
    run = folder.parent.parent
    return _finetuned(run, entries, trained[0]) if trained else []


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
        return []  # it was not tested, or has not ended
    return [Table(data, split, {name: {"top-1": {0: value}} for name, value in rows.items()})]


def _tables(run: Path, entries: list[dict[str, Any]], identities: set[str]) -> list[Table]:
    """Every split on which the encoder itself was measured, with all rows of that split."""
    own = [e["key"] for e in entries if e["key"]["identity"] in identities and e["key"]["subject"] == OWN]
    found: dict[str, Table] = {}
    for entry in entries:
        key = entry["key"]
        if not any(_same_images(key, one) for one in own):
            continue
        if key["subject"] == OWN and key["identity"] not in identities:
            continue  # of weights that the run had at another time
        _add(found, run, entry)
    return list(found.values())


def _finetuned(run: Path, entries: list[dict[str, Any]], entry: dict[str, Any]) -> list[Table]:
    """The network's own accuracy, and that of the same network from scratch on the same labels."""
    found: dict[str, Table] = {}
    for other in entries:
        same_labels = _same_images(other["key"], entry["key"]) and other["key"]["seed"] == entry["key"]["seed"]
        if other is entry or (same_labels and other["key"]["protocol"] == SUPERVISED):
            _add(found, run, other)
    return list(found.values())


def _add(found: dict[str, Table], run: Path, entry: dict[str, Any]) -> None:
    key, top1 = entry["key"], entry["value"]["figures"]["top1"]
    split = re.sub(r",? seed \d+", "", key["split"])
    table = found.setdefault(split, Table(None, split))
    row = _row(key)
    if not row.startswith((TIMM, TORCHVISION)):
        row = Path(row).name  # another run's folder: where it lies is nobody's business
    table.values.setdefault(row, {}).setdefault(TITLES[key["protocol"]], {})[key["seed"]] = top1
    table.data = table.data or _data_of(run, entry)


def _row(key: dict[str, Any]) -> str:
    return SUPERVISED if key["protocol"] == SUPERVISED else key["subject"]


def _same_images(key: dict[str, Any], other: dict[str, Any]) -> bool:
    return (key["train"], key["test"]) == (other["train"], other["test"])


def _entries(file: Path) -> list[dict[str, Any]]:
    """The accuracies in a ledger, in the order in which they were measured."""
    needed = {"identity", "split", "train", "test"}
    records = [record for record in _lines(file) if record.get("key", {}).get("protocol") in TITLES]
    return [record for record in records if needed <= set(record["key"])]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue  # cut short by a kill, or empty


def _data_of(run: Path, entry: dict[str, Any]) -> str | None:
    """The name of the data in a file of --json that holds this very result."""
    key = entry["key"]
    wanted = (_row(key), key["protocol"], key["seed"], entry["value"]["figures"]["top1"], entry["value"]["how"])
    for file in sorted([*run.glob("*.json"), *(run / "evaluation").glob("*.json")]):
        try:
            summary = json.loads(file.read_bytes())
            data = summary["protocol"]["data"]
            results = [(r["features"], r["protocol"], r["seed"], r["top1"], r["how"]) for r in summary["results"]]
        except (ValueError, KeyError, TypeError):
            continue  # another file of the run
        if wanted in results:
            source = data if isinstance(data, str) else data[0]
            return Path(source.partition(":")[0]).name
    return None


def _identities(model: Embedder) -> set[str]:
    """What the encoder's results are noted under; the kind of device that computed them is part of it."""
    config = model.encoder.config
    return {
        Subject(
            name=OWN, encoder=model.encoder, preprocessing=model.preprocessing, size=config.size,
            channels=config.channels, world=World(device=torch.device(device)),
        ).identity
        for device in ("cpu", "cuda")
    }  # fmt: skip
