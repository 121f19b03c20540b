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
         per class, 2, 5, ... and all classes, mean over ten draws of them. Kappa is the accuracy corrected for chance,
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
from simclr.evaluation.keys import accuracy_key, labelled_digest
from simclr.evaluation.logistic import linear_probe
from simclr.evaluation.measure import about_split
from simclr.evaluation.metrics import BASELINES
from simclr.evaluation.results import About, Measured, Result, ResultStore, name_of
from simclr.evaluation.split import Split, split_data
from simclr.evaluation.subjects import PIXELS, RANDOM, EvaluatedModel, open_subject
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder, build_encoder
from simclr.reports.evaluation import records
from simclr.reports.table import Row, markdown_table, seeds_note
from simclr.tasks.distill_images import distill_images
from simclr.training.fit import Execution
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
    store = ResultStore(args.out / "results.jsonl", DistributedContext())
    measure, rows_of = CLAIMS[args.claim]
    for data in args.data:
        results = measure(args, data, store)
        rows = rows_of(results)
        print(f"\n{args.claim}, {data}: accuracy in %, {seeds_note(rows)}\n\n{markdown_table(rows)}", flush=True)
        table = {row.name: {column: list(values) for column, values in row.values.items()} for row in rows}
        content = {"machine": machine(), "table": table, "records": records(results)}
        write_json(args.out / f"{args.claim}-{Path(data).name}.json", content)


# ---- how deep, from which layer


def depth(args: argparse.Namespace, data: str, store: ResultStore) -> list[Result]:
    """Fine-tuning for each of --depths, head layer and share of the labels; metric top1."""
    train, test = open_data(data), open_data(data, split="test")
    results = []
    for seed, run in enumerate(args.runs):
        subject = subjects(run, seed)[0]
        for labels in args.labels:
            split = split_data(train, test, seed=seed, labels=None if labels == "100%" else labels)
            for tune_from in args.depths:
                for head_layer in (0, 1):
                    name = f"{named(tune_from)}, head layer {head_layer}"
                    config = replace(FINETUNE_RECIPES["small"], tune_from=tune_from, head_layer=head_layer)
                    key = accuracy_key("finetune", subject, split, seed, config) | {"protocol": "claim depth"}
                    assert subject.encoder is not None
                    make = partial(
                        finetune, subject.encoder, subject.head, subject.fitted(split.train),
                        subject.fitted(split.test), config, seed=seed, preset=subject.preprocessing,
                    )  # fmt: skip
                    about = replace(about_split(name, split), split=f"{labels} labels")
                    results.append(kept(store, key, lambda make=make: make().accuracy, about))
    return results


def depth_rows(results: list[Result]) -> list[Row]:
    """Rows: what is trained and the head layer; columns: share of the labels."""
    return rows_by(results, lambda result: result.split)


def named(tune_from: int | str) -> str:
    """What is trained, in words."""
    words = {"none": "classifier alone", "all": "whole network", 4: "head and classifier"}
    return words.get(tune_from, f"from block group {tune_from + 1 if isinstance(tune_from, int) else tune_from} on")


# ---- which base


def base(args: argparse.Namespace, data: str, store: ResultStore) -> list[Result]:
    """The teacher, and students that begin at several networks; metric top1."""
    train, test = open_data(data), open_data(data, split="test")
    results = []
    for seed, run in enumerate(args.runs):
        own, other = (load(place) for place in (run, args.runs[(seed + 1) % len(args.runs)]))
        split = split_data(train, test, seed=seed, labels=TEACHERS_LABELS)
        shape, preprocessing = own.encoder.config, own.preprocessing
        teacher = finetune(
            own.encoder, own.head, split.train, split.test, FINETUNE_RECIPES["small"], seed=seed,
            preset=preprocessing,
        )  # fmt: skip
        parts = {"train": labelled_digest(train), "test": labelled_digest(split.test)}
        key = {
            "protocol": "claim base", "version": {"training": TRAINING_VERSION},
            "model": {"weights": digest_of(teacher.network)}, "data": parts, "settings": {}, "seed": seed,
        }  # fmt: skip
        results.append(kept(store, key, lambda teacher=teacher: teacher.accuracy, about_split("teacher", split)))
        taught_by = Model(teacher.network.encoder, preprocessing, classifier=teacher.network, classes=teacher.classes)
        students = {
            "the same base": own.encoder,
            "the base of another run": other.encoder,
            "fresh weights": build_encoder(shape, seed=seed),
            "fresh weights, half as wide": build_encoder(replace(shape, width=shape.width / 2), seed=seed),
        }
        for name, encoder in students.items():
            key |= {
                "model": {"teacher": digest_of(teacher.network), "weights": digest_of(encoder)},
                "settings": DISTILLATION.result_fields(),
            }
            place = args.out / f"student-{name_of(key)[:12]}"
            make = partial(taught, taught_by, encoder, train, split.test, seed, place)
            results.append(kept(store, key, make, about_split(f"student from {name}", split)))
    return results


def base_rows(results: list[Result]) -> list[Row]:
    """Rows: the teacher, and where its students begin; one column."""
    return rows_by(results, lambda _: "accuracy")


def taught(teacher: Model, encoder: Encoder, train: Images, test: Images, seed: int, place: Path) -> float:
    """Test accuracy of a student that begins at this encoder."""
    found = distill_images(
        teacher,
        Classifier(encoder, None, len(teacher.classes)),
        train,
        DISTILLATION,
        seed=seed,
        execution=Execution(run=place),
        test=test,
    )
    assert found.accuracy is not None
    return found.accuracy


# ---- how many classes


def classes(args: argparse.Namespace, data: str, store: ResultStore) -> list[Result]:
    """The linear probe of each subject; metrics: number of classes -> accuracy."""
    train, test = open_data(data), open_data(data, split="test")
    results = []
    for seed, run in enumerate(args.runs):
        split = split_data(train, test, seed=seed, labels=f"{LABELS_A_CLASS}/class")
        for subject in subjects(run, seed):
            key = accuracy_key("linear", subject, split, seed)
            key |= {"protocol": "claim classes", "settings": key["settings"] | {"draws": DRAWS}}
            make = partial(by_count, subject, split, seed)
            name = subject.name if subject.name in BASELINES else "encoder"
            results.append(store.get(key, lambda make=make: Measured(metrics=make()), about_split(name, split)))
    return results


def classes_rows(results: list[Result]) -> list[Row]:
    """Rows: features; columns: accuracy, then kappa, for each number of classes."""
    accuracies: dict[str, dict[int, list[float]]] = {}
    for result in results:
        row = accuracies.setdefault(result.subject, {})
        for count in result.metrics:
            row.setdefault(int(count), []).append(result.value(count))
    return [
        Row(
            name,
            {f"{count} classes": values for count, values in row.items()}
            | {f"kappa, {count}": [(a - 1 / count) / (1 - 1 / count) for a in v] for count, v in row.items()},
            baseline=name in BASELINES,
        )
        for name, row in accuracies.items()
    ]


def by_count(subject: EvaluatedModel, split: Split, seed: int) -> dict[str, float | None]:
    """Number of classes -> accuracy of the linear probe, the mean over draws of so many classes."""
    learn, truth = split.train.labels, split.test.labels
    assert learn is not None and truth is not None
    features = subject.features(split.train), subject.features(split.test)  # (n, F), (m, F)
    there = np.unique(learn)
    random = np.random.default_rng(seed)
    means: dict[str, float | None] = {}
    for count in (*(n for n in (2, 5) if n < len(there)), len(there)):
        each = []
        for _ in range(DRAWS if count < len(there) else 1):
            drawn = random.choice(there, count, replace=False)
            rows, queries = np.isin(learn, drawn), np.isin(truth, drawn)
            probe = linear_probe(features[0][rows], learn[rows], features[1][queries], seed=seed)
            right = probe.predicted == truth[queries]
            each.append(np.mean([right[truth[queries] == label].mean() for label in probe.classes]))
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


def kept(store: ResultStore, key: dict[str, Any], make: Callable[[], float], about: About) -> Result:
    """A result with the metric top1, from the store or measured now."""
    result = store.get(key, lambda: Measured(metrics={"top1": make()}), about)
    name = f"{about.data_name}, {about.split}, {about.subject}, seed {result.seed}"
    print(f"{name}: {100 * result.value('top1'):.1f}", flush=True)
    return result


def rows_by(results: list[Result], column: Callable[[Result], str]) -> list[Row]:
    """A row for each subject: top-1 accuracies over seeds by column."""
    table: dict[str, dict[str, list[float]]] = {}
    for result in results:
        table.setdefault(result.subject, {}).setdefault(column(result), []).append(result.value("top1"))
    return [Row(name, columns) for name, columns in table.items()]


Claim = tuple[Callable[[argparse.Namespace, str, ResultStore], list[Result]], Callable[[list[Result]], list[Row]]]
"""What measures, and what makes a table of the results."""
CLAIMS: dict[str, Claim] = {
    "depth": (depth, depth_rows), "base": (base, base_rows), "classes": (classes, classes_rows),
}  # fmt: skip

if __name__ == "__main__":
    main()
