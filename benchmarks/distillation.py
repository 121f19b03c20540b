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
from simclr.evaluation.logistic import optimum_probe
from simclr.evaluation.metrics import accuracy
from simclr.evaluation.results import ResultStore, name_of
from simclr.evaluation.split import Split, split_data
from simclr.models.classifier import Classifier
from simclr.models.encoder import build_encoder
from simclr.models.inference import pixels_of
from simclr.reports.table import Row, markdown_table, seeds_note
from simclr.tasks.distill import distill
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
    ledger = ResultStore(args.out / "results.jsonl")
    results: list[dict[str, Any]] = []
    for seed, run in enumerate(args.runs):
        for result in one_seed(args, run, seed, train, test, ledger):
            results.append({"seed": seed, **result})
            print(f"seed {seed}, {result['what']}: {result['accuracy']:.1%} ({result['seconds']:.0f} s)", flush=True)
    table = markdown_table(rows(results), corner=f"{train.name}, {args.labels} of the labels")
    print(f"\n{table}\n\nTop-1 accuracy in %, {seeds_note(rows(results))}.")
    content = {
        "results": results,
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "machine": describe_machine(),
    }
    (args.out / "distillation.json").write_text(json.dumps(content, indent=2) + "\n")
    (args.out / "distillation.md").write_text(table + "\n")


def one_seed(
    args: argparse.Namespace, run: Path, seed: int, train: Images, test: Images | None, ledger: ResultStore
) -> list[dict[str, Any]]:
    """The five results of a seed, from the ledger where they are known."""
    everything = split_data(train, test, seed=seed)
    few = split_data(train, test, seed=seed, labels=args.labels)
    base, flip = load(run), open_run(run).config.flip
    tuning = replace(FINETUNE_RECIPES["small"], **TUNING, flip=flip)
    scratch = replace(FINETUNE_RECIPES["small-supervised"], flip=flip)
    shape = replace(base.encoder.config, width=args.width * base.encoder.config.width)
    on_all = replace(DISTILL_RECIPES["small-distill"], epochs=args.epochs, temperature=args.temperature, flip=flip)
    steps = total_steps(len(everything.train), on_all.epochs, on_all.batch_size)
    on_few = replace(on_all, epochs=0, min_steps=steps)
    key = {
        "version": TRAINING_VERSION,
        "run": digest_of(base.encoder), "seed": seed, "few": few.train.fingerprint, "all": everything.train.fingerprint,
        "test": few.test.fingerprint, "tuning": tuning.result_fields(),
    }  # fmt: skip

    @cache
    def teacher() -> Model:
        place = args.out / f"teacher-{name_of(key)}"
        finetune(base.encoder, base.head, few.train, few.test, tuning, seed=seed, preset=base.preprocessing, run=place)
        return load(place)

    def taught(images: Images, config: DistillConfig) -> dict[str, Any]:
        place = (
            args.out
            / f"student-{name_of({**key, 'images': images.fingerprint, **config.result_fields(), **asdict(shape)})}"
        )
        begin = Classifier(build_encoder(shape, seed=seed), None, len(teacher().classes))
        done = distill(teacher(), begin, images, config, place, seed=seed, test=few.test)
        assert done.accuracy is not None
        return {"accuracy": done.accuracy, "parameters": parameters(begin), "steps": done.steps}

    def from_labels() -> dict[str, Any]:
        done = supervised(shape, few.train, few.test, scratch, seed=seed, preset=base.preprocessing)
        return {"accuracy": done.accuracy, "parameters": parameters(done.network), "steps": done.steps}

    def of_teacher() -> dict[str, Any]:
        network, asked = teacher().classifier, few.test
        assert network is not None and asked.labels is not None and asked.classes is not None
        named = np.array(teacher().classify(asked))
        share = accuracy(named, np.array(asked.classes)[asked.labels])
        return {"accuracy": share, "parameters": parameters(network), "steps": None}

    work: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
        TEACHER: ({}, of_teacher),
        WAYS[0]: (scratch.result_fields() | asdict(shape), from_labels),
        WAYS[1]: (on_few.result_fields() | asdict(shape), lambda: taught(few.train, on_few)),
        WAYS[2]: (on_all.result_fields() | asdict(shape), lambda: taught(everything.train, on_all)),
        PIXELS: (
            {},
            lambda: {"accuracy": of_pixels(few, base.encoder.config, seed), "parameters": None, "steps": None},
        ),
    }
    found = [
        {"what": what, **ledger.get({**key, "what": what, **settings}, lambda make=make: timed(make))}
        for what, (settings, make) in work.items()
    ]
    assert found[1]["parameters"] <= found[0]["parameters"] / 4, "the student has more than a quarter of the parameters"
    return found


def of_pixels(split: Split, like: EncoderConfig, seed: int) -> float:
    assert split.train.labels is not None and split.test.labels is not None
    classes, targets = np.unique(split.train.labels, return_inverse=True)  # (K,), (n,)
    train, test = (pixels_of(images, size=like.size) for images in (split.train, split.test))
    scores = optimum_probe(train, targets, test, seed=seed).scores  # (m, K)
    return accuracy(classes[scores.argmax(1)], split.test.labels)


def parameters(network: Classifier) -> int:
    """Without layers of the projection head, which a classifier on h leaves behind."""
    return sum(p.numel() for part in (network.encoder, network.linear) for p in part.parameters())


def timed(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    begun = time.perf_counter()
    return make() | {"seconds": round(time.perf_counter() - begun, 1)}


def rows(results: list[dict[str, Any]]) -> list[Row]:
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result["what"], []).append(result)
    return [
        Row(what + ("" if own[0]["parameters"] is None else f", {own[0]['parameters']:,} parameters"),
            {"accuracy, %": [one["accuracy"] for one in own]})
        for what, own in found.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
