"""SimCLR v2's distillation table on small sets: what a small student gains from a teacher with few labels.

    python benchmarks/distillation.py fashion-mnist --runs runs/fashion-mnist-{0,1,2} --out runs/distillation

For each pretrained run, which is one seed: the teacher is the run fine-tuned on a few labels; the student has 7/16 of
its width, and so at most a quarter of its parameters. The student learns from the labels alone (the supervised recipe),
from the teacher on the labelled images, and from the teacher on all training images; both distillations make equally
many steps. Beside them a linear classifier on the raw pixels of the labelled images. Accuracy is that of
the last checkpoint on the test images. What is measured is kept: the script can be stopped and called again.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from simclr.config.distill import DISTILL_RECIPES, DistillConfig
from simclr.config.encoder import EncoderConfig
from simclr.config.finetune import FINETUNE_RECIPES
from simclr.config.schedule import total_steps
from simclr.data.images import Images
from simclr.data.opening import open_data
from simclr.evaluation.finetune import TRAINING_VERSION, finetune, supervised
from simclr.evaluation.keys import labelled_digest
from simclr.evaluation.logistic import LOGISTIC_VERSION, linear_probe
from simclr.evaluation.measure import about_split
from simclr.evaluation.metrics import accuracy
from simclr.evaluation.results import Measured, Result, ResultStore, name_of
from simclr.evaluation.split import Split, split_data
from simclr.models.classifier import Classifier
from simclr.models.encoder import build_encoder
from simclr.models.inference import pixels_of
from simclr.reports.evaluation import results_by_subject
from simclr.reports.table import Row, markdown_table, seeds_note
from simclr.tasks.distill_images import distill_images
from simclr.training.fit import Execution
from simclr.training.run import describe_machine, open_run
from simclr.weights.folder import Model, digest_of, load

TEACHER, PIXELS = "teacher, fine-tuned", "raw pixels, linear"
TUNING: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.0, "epochs": 10, "min_steps": 500}
"""Of the teacher: a shorter training than `small`, by which the figures in docs/distillation.md were taken."""
WAYS = ("student, labels only", "student, distilled on the labelled images", "student, distilled on all images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="images with labels: what `simclr evaluate` takes")
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="pretrained runs; the k-th is seed k")
    parser.add_argument("--labels", default="1%", help="labels of the teacher: 1%%, 10/class, ...")
    parser.add_argument("--epochs", type=float, default=6, help="of distillation, over all images")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--width", type=float, default=7 / 16, help="of the student, as a share of the teacher's")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    args = parser.parse_args()
    train = open_data(args.data)
    test = open_data(args.data, split="test") if train.has_own_split else None
    store = ResultStore(args.out / "results.jsonl")
    results: list[Result] = []
    for seed, run in enumerate(args.runs):
        for result in results_of_seed(args, run, seed, train, test, store):
            results.append(result)
            seconds = result.details["seconds"]
            print(f"seed {seed}, {result.subject}: {result.value('top1'):.1%} ({seconds:.0f} s)", flush=True)
    table = markdown_table(rows(results), corner=f"{train.name}, {args.labels} of the labels")
    print(f"\n{table}\n\nTop-1 accuracy in %, {seeds_note(rows(results))}.")
    content = {
        "results": [result.to_dict() for result in results],
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "machine": describe_machine(),
    }
    (args.out / "distillation.json").write_text(json.dumps(content, indent=2) + "\n")
    (args.out / "distillation.md").write_text(table + "\n")


def results_of_seed(
    args: argparse.Namespace, run: Path, seed: int, train: Images, test: Images | None, store: ResultStore
) -> list[Result]:
    """The five results of a seed, from the store where they are known."""
    everything = split_data(train, test, seed=seed)
    few = split_data(train, test, seed=seed, labels=args.labels)
    base, flip = load(run), open_run(run).config.flip
    tuning = replace(FINETUNE_RECIPES["small"], **TUNING, flip=flip)
    scratch = replace(FINETUNE_RECIPES["small-supervised"], flip=flip)
    shape = replace(base.encoder.config, width=args.width * base.encoder.config.width)
    on_all = replace(DISTILL_RECIPES["small-distill"], epochs=args.epochs, temperature=args.temperature, flip=flip)
    steps = total_steps(len(everything.train), on_all.epochs, on_all.batch_size)
    on_few = replace(on_all, epochs=0, min_steps=steps)
    key: dict[str, Any] = {
        "protocol": "distillation benchmark",
        "version": {"training": TRAINING_VERSION, "logistic": LOGISTIC_VERSION},
        "model": {"weights": digest_of(base.encoder), "preprocessing": base.preprocessing},
        "data": {
            "train": labelled_digest(few.train), "unlabelled": labelled_digest(everything.train),
            "test": labelled_digest(few.test),
        },
        "settings": {"teacher": tuning.result_fields()},
        "seed": seed,
    }  # fmt: skip

    def key_of(**settings: Any) -> dict[str, Any]:
        return key | {"settings": key["settings"] | settings}

    @cache
    def teacher() -> Model:
        place = args.out / f"teacher-{name_of(key)}"
        finetune(
            base.encoder, base.head, few.train, few.test, tuning,
            seed=seed, preset=base.preprocessing, execution=Execution(run=place),
        )  # fmt: skip
        return load(place)

    def taught(images: Images, config: DistillConfig) -> Measured:
        settings = {"images": images.fingerprint, "student": config.result_fields() | asdict(shape)}
        place = args.out / f"student-{name_of(key_of(**settings))}"
        begin = Classifier(build_encoder(shape, seed=seed), None, len(teacher().classes))
        done = distill_images(
            teacher(), begin, images, config, seed=seed, test=few.test, execution=Execution(run=place)
        )
        assert done.accuracy is not None
        return measured(done.accuracy, parameters=parameters(begin), steps=done.steps)

    def from_labels() -> Measured:
        done = supervised(shape, few.train, few.test, scratch, seed=seed, preset=base.preprocessing)
        return measured(done.accuracy, parameters=parameters(done.network), steps=done.steps)

    def of_teacher() -> Measured:
        network, queries = teacher().classifier, few.test
        assert network is not None and queries.labels is not None and queries.classes is not None
        predicted = np.array(teacher().classify(queries))
        share = accuracy(predicted, np.array(queries.classes)[queries.labels])
        return measured(share, parameters=parameters(network))

    work: dict[str, tuple[dict[str, Any], Callable[[], Measured]]] = {
        TEACHER: ({}, of_teacher),
        WAYS[0]: (scratch.result_fields() | asdict(shape), from_labels),
        WAYS[1]: (on_few.result_fields() | asdict(shape), lambda: taught(few.train, on_few)),
        WAYS[2]: (on_all.result_fields() | asdict(shape), lambda: taught(everything.train, on_all)),
        PIXELS: ({}, lambda: measured(of_pixels(few, base.encoder.config, seed))),
    }
    results = [
        store.get(key_of(subject=subject, student=student), lambda make=make: timed(make), about_split(subject, few))
        for subject, (student, make) in work.items()
    ]
    sizes = [result.details["parameters"] for result in results[:2]]
    assert sizes[1] <= sizes[0] / 4, "the student has more than a quarter of the parameters"
    return results


def measured(accuracy: float, *, parameters: int | None = None, steps: int | None = None) -> Measured:
    return Measured(metrics={"top1": accuracy}, details={"parameters": parameters, "steps": steps})


def of_pixels(split: Split, like: EncoderConfig, seed: int) -> float:
    assert split.train.labels is not None and split.test.labels is not None
    classes, targets = np.unique(split.train.labels, return_inverse=True)  # (K,), (n,)
    train, test = (pixels_of(images, size=like.size) for images in (split.train, split.test))
    scores = linear_probe(train, targets, test, seed=seed).scores  # (m, K)
    return accuracy(classes[scores.argmax(1)], split.test.labels)


def parameters(network: Classifier) -> int:
    """Without layers of the projection head, which a classifier on h leaves behind."""
    return sum(p.numel() for part in (network.encoder, network.linear) for p in part.parameters())


def timed(make: Callable[[], Measured]) -> Measured:
    begun = time.perf_counter()
    done = make()
    return replace(done, details=done.details | {"seconds": round(time.perf_counter() - begun, 1)})


def rows(results: list[Result]) -> list[Row]:
    table = []
    for subject, of_subject in results_by_subject(results).items():
        size = of_subject[0].details["parameters"]
        name = subject if size is None else f"{subject}, {size:,} parameters"
        table.append(Row(name, {"accuracy, %": [result.value("top1") for result in of_subject]}))
    return table


if __name__ == "__main__":
    main()
