"""Three claims of Nguyen, Nguyen & Le 2021 (arXiv:2108.00587) about SimCLR v2, each as a comparison on your own runs.

    python benchmarks/claims.py depth   data/emoji --runs runs/emoji-0 runs/emoji-1 runs/emoji-2
    python benchmarks/claims.py base    data/emoji --runs runs/emoji-0 runs/emoji-1 runs/emoji-2
    python benchmarks/claims.py classes data/emoji fashion-mnist --runs runs/emoji-0 runs/emoji-1 runs/emoji-2

depth    How much of the network should be fine-tuned, and from which layer of the projection head, with 1 %, 10 % and
         100 % of the labels? Rows: what is trained x head layer.
base     Does distillation work better where student and teacher come from the same pretrained base? A teacher that was
         fine-tuned on 10 % of the labels teaches, on all images and for equally many steps, students that begin at its
         own base, at the base of the next run, at fresh weights, and at fresh weights of half the width.
classes  Is transfer better where the target has fewer classes? One frozen encoder, a linear probe, equally many labels
         a class, 2, 5, ... and all classes, mean over ten draws of them. Kappa is the accuracy corrected for chance,
         (a - 1/K) / (1 - 1/K); accuracy is the mean over classes, whose sizes differ from draw to draw.

Each run stands for one seed. Accuracy is that of the last step on the test images, no choice is made on them. Raw
pixels and a random encoder stand beside. Results are kept in --out as they come: call again to go on. The paper's own
numbers are not in any text that we could read; these are its questions, not its tables.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import machine, write_json
from simclr.config.distill import DISTILL_RECIPES
from simclr.config.finetune import FINETUNE_RECIPES
from simclr.data.images import Images
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.finetune import TRAINING_VERSION, digest_of, finetune
from simclr.evaluation.logistic import LOGISTIC_VERSION, optimum_probe
from simclr.evaluation.metrics import BASELINES
from simclr.evaluation.results import ResultStore, name_of
from simclr.evaluation.split import Split, split_data
from simclr.evaluation.subjects import PIXELS, RANDOM, EvaluatedModel, open_subject
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder, build_encoder
from simclr.reports.table import Row, markdown_table, seeds_note
from simclr.tasks.distill import distill
from simclr.weights.folder import Model, load

DEPTHS = ("none", 4, 3, 2, 1, "all")
"""What is trained besides the classifier, as `--finetune.tune-from` takes it."""
LABELS = ("1%", "10%", "100%")
TEACHERS_LABELS = "10%"
DISTILLATION = replace(DISTILL_RECIPES["small-distill"], temperature=1.0)
"""The same for all, so that only the student's beginning differs."""
LABELS_A_CLASS = 20
DRAWS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("claim", choices=[*CLAIMS])
    parser.add_argument("data", nargs="+", help="labelled images: folder, .npz file or name")
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="pretrained runs, one a seed")
    parser.add_argument("--depths", nargs="+", default=DEPTHS, type=lambda d: int(d) if d.isdigit() else d)
    parser.add_argument("--labels", nargs="+", default=LABELS)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ledger = ResultStore(args.out / "results.jsonl", DistributedContext())
    for data in args.data:
        rows = CLAIMS[args.claim](args, data, ledger)
        print(f"\n{args.claim}, {data}: accuracy in %, {seeds_note(rows)}\n\n{markdown_table(rows)}", flush=True)
        found = {row.name: {column: list(values) for column, values in row.values.items()} for row in rows}
        write_json(args.out / f"{args.claim}-{Path(data).name}.json", {"machine": machine(), "table": found})


# ---- how deep, from which layer


def depth(args: argparse.Namespace, data: str, ledger: ResultStore) -> list[Row]:
    """Rows: what is trained and the head layer; columns: share of the labels."""
    train, test = open_data(data), open_data(data, split="test")
    table: dict[str, dict[str, list[float]]] = {}
    for seed, run in enumerate(args.runs):
        subject = subjects(run, seed)[0]
        for labels in args.labels:
            split = split_data(train, test, seed=seed, labels=None if labels == "100%" else labels)
            for tune_from in args.depths:
                for head_layer in (0, 1):
                    name = f"{named(tune_from)}, head layer {head_layer}"
                    config = replace(FINETUNE_RECIPES["small"], tune_from=tune_from, head_layer=head_layer)
                    key = {
                        "claim": "depth", "version": TRAINING_VERSION,
                        "encoder": subject.identity, "seed": seed, "config": config.result_fields(),
                        "train": split.train.fingerprint, "test": split.test.fingerprint,
                    }  # fmt: skip
                    assert subject.encoder is not None
                    make = partial(
                        finetune, subject.encoder, subject.head, subject.fitted(split.train),
                        subject.fitted(split.test), config, seed=seed, preset=subject.preprocessing,
                    )  # fmt: skip
                    value = kept(ledger, key, lambda make=make: make().accuracy)
                    print(f"{data}, {labels}, {name}, seed {seed}: {100 * value:.1f}", flush=True)
                    table.setdefault(name, {}).setdefault(f"{labels} labels", []).append(value)
    return [Row(name, columns) for name, columns in table.items()]


def named(tune_from: int | str) -> str:
    """What is trained, in words."""
    words = {"none": "classifier alone", "all": "whole network", 4: "head and classifier"}
    return words.get(tune_from, f"from block group {tune_from + 1 if isinstance(tune_from, int) else tune_from} on")


# ---- which base


def base(args: argparse.Namespace, data: str, ledger: ResultStore) -> list[Row]:
    """Rows: the teacher, and where its students begin; one column."""
    train, test = open_data(data), open_data(data, split="test")
    table: dict[str, list[float]] = {}
    for seed, run in enumerate(args.runs):
        own, other = (load(place) for place in (run, args.runs[(seed + 1) % len(args.runs)]))
        split = split_data(train, test, seed=seed, labels=TEACHERS_LABELS)
        shape, preprocessing = own.encoder.config, own.preprocessing
        teacher = finetune(
            own.encoder, own.head, split.train, split.test, FINETUNE_RECIPES["small"], seed=seed,
            preset=preprocessing,
        )  # fmt: skip
        table.setdefault("teacher", []).append(teacher.accuracy)
        taught_by = Model(teacher.network.encoder, preprocessing, classifier=teacher.network, classes=teacher.classes)
        students = {
            "the same base": own.encoder,
            "the base of another run": other.encoder,
            "fresh weights": build_encoder(shape, seed=seed),
            "fresh weights, half as wide": build_encoder(replace(shape, width=shape.width / 2), seed=seed),
        }
        for name, encoder in students.items():
            key = {
                "claim": "base", "version": TRAINING_VERSION,
                "teacher": digest_of(teacher.network), "student": digest_of(encoder), "seed": seed,
                "config": DISTILLATION.result_fields(), "train": train.fingerprint, "test": split.test.fingerprint,
            }  # fmt: skip

            place = args.out / f"student-{name_of(key)[:12]}"
            value = kept(ledger, key, partial(taught, taught_by, encoder, train, split.test, seed, place))
            print(f"{data}, student from {name}, seed {seed}: {100 * value:.1f}", flush=True)
            table.setdefault(f"student from {name}", []).append(value)
    return [Row(name, {"accuracy": values}) for name, values in table.items()]


def taught(teacher: Model, encoder: Encoder, train: Images, test: Images, seed: int, place: Path) -> float:
    """Test accuracy of a student that begins at this encoder."""
    found = distill(
        teacher, Classifier(encoder, None, len(teacher.classes)), train, DISTILLATION, place, seed=seed, test=test
    )
    assert found.accuracy is not None
    return found.accuracy


# ---- how many classes


def classes(args: argparse.Namespace, data: str, ledger: ResultStore) -> list[Row]:
    """Rows: features; columns: accuracy, then kappa, for each number of classes."""
    train, test = open_data(data), open_data(data, split="test")
    accuracies: dict[str, dict[int, list[float]]] = {}
    for seed, run in enumerate(args.runs):
        split = split_data(train, test, seed=seed, labels=f"{LABELS_A_CLASS}/class")
        for subject in subjects(run, seed):
            key = {
                "claim": "classes", "version": LOGISTIC_VERSION,
                "subject": subject.identity, "seed": seed, "draws": DRAWS,
                "train": split.train.fingerprint, "test": split.test.fingerprint,
            }  # fmt: skip
            found = ledger.get(key, partial(by_count, subject, split, seed))
            row = accuracies.setdefault(subject.name if subject.name in BASELINES else "encoder", {})
            for count, value in found.items():
                row.setdefault(int(count), []).append(value)
    return [
        Row(
            name,
            {f"{count} classes": values for count, values in row.items()}
            | {f"kappa, {count}": [(a - 1 / count) / (1 - 1 / count) for a in v] for count, v in row.items()},
            baseline=name in BASELINES,
        )
        for name, row in accuracies.items()
    ]


def by_count(subject: EvaluatedModel, split: Split, seed: int) -> dict[str, float]:
    """Number of classes -> accuracy of the linear probe, the mean over draws of so many classes."""
    learn, ask = split.train.labels, split.test.labels
    assert learn is not None and ask is not None
    features = subject.features(split.train), subject.features(split.test)  # (n, F), (m, F)
    there = np.unique(learn)
    random = np.random.default_rng(seed)
    means = {}
    for count in (*(n for n in (2, 5) if n < len(there)), len(there)):
        each = []
        for _ in range(DRAWS if count < len(there) else 1):
            drawn = random.choice(there, count, replace=False)
            rows, asked = np.isin(learn, drawn), np.isin(ask, drawn)
            probe = optimum_probe(features[0][rows], learn[rows], features[1][asked], seed=seed)
            right = probe.predicted == ask[asked]
            each.append(np.mean([right[ask[asked] == label].mean() for label in probe.classes]))
        means[str(count)] = float(np.mean(each))
    return means


# ---- shared


def subjects(run: Path, seed: int) -> list[EvaluatedModel]:
    """The run's encoder, a random one of its shape, and pixels."""
    model = load(run)
    open_one: Callable[[str], EvaluatedModel] = partial(
        open_subject, like=model.encoder.config, preprocessing=model.preprocessing, seed=seed,
        cache=FeatureCache(None), world=DistributedContext(),
    )  # fmt: skip
    return [open_one(name) for name in (str(run), RANDOM, PIXELS)]


def kept(ledger: ResultStore, key: dict[str, Any], make: Callable[[], float]) -> float:
    return ledger.get(key, lambda: {"accuracy": make()})["accuracy"]


CLAIMS = {"depth": depth, "base": base, "classes": classes}

if __name__ == "__main__":
    main()
