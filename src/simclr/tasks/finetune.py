"""`simclr finetune RUN DATA --out FOLDER`: an encoder and labelled images -> a classifier, and how good it is.

FOLDER/
  encoder/        what `simclr.load(FOLDER).classify` reads
  evaluation/     results.jsonl: the accuracies as results
  pseudo_labels.csv   with --pseudo-labels: key, class and certainty of each image without a label
  summary.json    settings, accuracies, and what they have to beat; written at the end
  run.json, config.json, checkpoints/, metrics.jsonl, timing.jsonl   as of any run: `simclr resume FOLDER` continues
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from simclr import distributed
from simclr.config.finetune import FinetuneConfig, find_finetune_recipe
from simclr.config.overrides import Overrides
from simclr.config.pretrain import require_seed
from simclr.config.records import versioned
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.finetune import Finetuned
from simclr.evaluation.keys import classifier_key, majority_key
from simclr.evaluation.measure import (
    EvaluationContext,
    Settings,
    about_split,
    choose_finetune_config,
    measure_one,
    pseudo_labels_source,
    train_subject,
    training_images,
)
from simclr.evaluation.metrics import accuracies
from simclr.evaluation.pseudo_labels import PseudoLabels, pseudo_labels, require_unlabelled
from simclr.evaluation.results import Measured, Result, ResultStore
from simclr.evaluation.split import Split
from simclr.evaluation.subjects import PIXELS, RANDOM, WITHOUT_NETWORK, EvaluatedModel
from simclr.reports.table import error_note
from simclr.tasks.evaluation_session import Session, check_network
from simclr.tasks.opening import DataOptions, lasting, require_writable, side_of, write
from simclr.tasks.options.labels import Evaluate, Finetune
from simclr.tasks.pretrain_images import data_record
from simclr.tasks.resume import task_record
from simclr.tasks.tables import open_table
from simclr.training.device import same_threads
from simclr.training.fit import Execution
from simclr.training.lock import hold
from simclr.training.progress import counting, say
from simclr.training.run import RunFolder
from simclr.weights.training_progress import TrainingProgress

CLASSIFIER, MAJORITY, RAW_PIXELS = "classifier", "always the commonest class", "kNN on raw pixels"
METRIC_NAMES = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
"""Metric of a result -> its name in the table and in summary.json."""
PIXELS_MOST = 1 << 30
"""Bytes of raw pixels, as features, up to which their accuracy stands beside the classifier's."""
TOP5_FROM = 10
"""Classes from which on the top 5 tell something."""
NAMED_MOST = 20
"""Classes up to which each one's accuracy is printed; with more, the WORST of them."""
WORST = 5


def finetune(options: Finetune, overrides: Overrides) -> None:
    """The command.

    Args:
        overrides: Puts the flags that were given on top of a recipe.

    Raises:
        UserError: RUN, DATA, settings and FOLDER do not go together.
    """
    _check(options)
    with distributed.joined(options.device) as world, hold(options.out, world):
        _finetune(options, overrides, world)


def _finetune(options: Finetune, overrides: Overrides, world: DistributedContext) -> None:
    session = Session.open(_as_evaluation(options), ["finetune"], world)
    session.tell_unfinished()
    split = session.split(options.seed)
    session.tell(f"{session.train.name}: {split.description}.")
    subject, pixels = session.subjects()
    if options.run == RANDOM:
        shape = session.like
        session.tell(f"A new {shape.name} of width {shape.width:g} for images of {shape.size} pixels.")
    config, notes = choose_finetune_config(
        subject, split, Settings(recipe=options.finetune_recipe, overrides=overrides, flip=session.flip)
    )
    for note in notes:
        session.tell(note)
    if options.pseudo_labels:
        require_unlabelled(split)
    session.tell(
        f"Training by {config.optimizer}, rate {config.lr:g}: {config.steps(len(split.train)):,} steps of "
        f"{config.batch_size} images (--epochs changes it)."
    )
    manifest = {
        "data": data_record(session.train, lasting(options.data), asdict(DataOptions.of(options))),
        "task": task_record("finetune", options, overrides),
    }
    labels = _pseudo_labels(options, session, subject, split) if options.pseudo_labels else None
    network = _train(options, session, subject, split, config, labels, manifest)
    if world.is_main:
        store = ResultStore(options.out / "evaluation" / "results.jsonl")
        results = _results(network, split, subject, pixels, store)
        _tell(options, network, split, results, subject.progress, labels)


def _check(options: Finetune) -> None:
    """What can be wrong before any image is opened."""
    if options.run in WITHOUT_NETWORK:
        raise UserError(f"{options.run} is no network; give a run's folder, timm/NAME, torchvision/NAME or random.")
    require_seed(options.seed)
    check_network(options)
    if options.finetune_recipe is not None:
        find_finetune_recipe(options.finetune_recipe)
    require_writable(options.out / "summary.json")
    run = RunFolder(options.out)
    if not run.exists:
        run.refuse_existing()


def _as_evaluation(options: Finetune) -> Evaluate:
    """The same images, encoder and labels as `simclr evaluate` would take."""
    return Evaluate(
        run=options.run, data=(options.data,), labels=options.labels, seed=options.seed, compare=(PIXELS,),
        encoder=options.encoder, width=options.width, stem=options.stem, sk=options.sk, size=options.size,
        out=options.out, labels_file=options.labels_file, pack=options.pack,
        pack_side=options.pack_side, cache="off", device=options.device,
    )  # fmt: skip


def _pseudo_labels(options: Finetune, session: Session, subject: EvaluatedModel, split: Split) -> PseudoLabels:
    """Pseudo-labels; of a training that is continued, those that it began with."""
    run, world = RunFolder(options.out), session.world
    threads = world.on_main(lambda: run.cpu_threads if run.exists else None)
    if threads is not None:
        same_threads(threads, world)  # the last bits of features depend on it
    source = pseudo_labels_source(subject, from_scratch=subject.name == RANDOM)
    labels = pseudo_labels(split, source, seed=options.seed)
    session.tell(f"Training on {labels.description}, by {source.description or 'the features of the encoder'}.")
    return labels


def _write_pseudo_labels(path: Path, labels: PseudoLabels, classes: list[str] | None) -> None:
    """A row for each image without a label."""
    rows = np.flatnonzero(~labels.given)
    names = [str(label) if classes is None else classes[label] for label in labels.labels[rows].tolist()]
    with open_table(path, {"key": str, "class": str, "certainty": float}) as add:
        add([[labels.pool.keys[row] for row in rows.tolist()], names, labels.certainty[rows].tolist()])


def _train(
    options: Finetune,
    session: Session,
    subject: EvaluatedModel,
    split: Split,
    config: FinetuneConfig,
    labels: PseudoLabels | None,
    manifest: dict[str, Any],
) -> Finetuned:
    """From the subject's weights or, for `random`, from those that training from scratch begins with."""
    learn, config = training_images(split, config, labels)
    train, test = (subject.fitted(images) for images in (learn, split.test))
    with counting("training", main=session.world.is_main, lines=True) as progress:
        execution = Execution(world=session.world, run=RunFolder(options.out), manifest=manifest, progress=progress)
        return train_subject(
            subject, train, test, config, seed=options.seed, from_scratch=subject.name == RANDOM, execution=execution
        )


def _results(
    network: Finetuned, split: Split, subject: EvaluatedModel, pixels: EvaluatedModel, store: ResultStore
) -> dict[str, Result]:
    """Accuracies of the classifier, and of baselines that cost nothing, by the names under which they are printed."""
    device = subject.world.device
    labels = split.train.labels
    assert labels is not None and split.test.labels is not None
    test_labels = split.test.labels

    def of_classifier() -> Measured:
        metrics = accuracies(network.scores, network.labels, test_labels)
        return Measured(metrics=metrics, details={"by_class": _by_class(network)})

    def of_frequencies() -> Measured:
        classes, counts = np.unique(labels, return_counts=True)  # (K,) each
        scores = np.tile(counts.astype(float), (len(test_labels), 1))  # (m, K)
        return Measured(metrics=accuracies(scores, classes, test_labels), description="class frequencies")

    key = classifier_key(
        network.network,
        network.network.encoder.config,
        network.classes,
        subject.preprocessing,
        split.test,
        network.seed,
        device.type,
    )
    results = {
        CLASSIFIER: store.get(key, of_classifier, about_split("encoder", split)),
        MAJORITY: store.get(majority_key(split), of_frequencies, about_split(MAJORITY, split)),
    }
    if (len(split.train) + len(split.test)) * 4 * pixels.channels * pixels.size**2 > PIXELS_MOST:
        say("kNN on raw pixels is left out: so many images would take too much memory.")
        return results
    context = EvaluationContext(store=store, world=DistributedContext(device=device))
    return results | {RAW_PIXELS: measure_one("knn", pixels, split, network.seed, Settings(), context)}


def _tell(
    options: Finetune,
    network: Finetuned,
    split: Split,
    results: dict[str, Result],
    progress: TrainingProgress | None,
    labels: PseudoLabels | None,
) -> None:
    """The accuracies on standard output and in summary.json, beside the baselines."""
    measured = results[CLASSIFIER]
    by_class = measured.details["by_class"]
    shown = ("top1", "top5", "mean_per_class") if len(network.classes) >= TOP5_FROM else ("top1", "mean_per_class")
    accuracy = {METRIC_NAMES[name]: measured.value(name) for name in shown}
    baselines = {name: result.value("top1") for name, result in results.items() if name != CLASSIFIER}
    num_test = len(split.test)
    num_pseudo = 0 if labels is None else labels.count
    and_pseudo = f" and {num_pseudo:,} pseudo-labels" if labels is not None else ""
    print(f"Test accuracy of {options.run}, trained on {len(split.train):,} labels{and_pseudo}, in %:")
    for name, value in accuracy.items():
        print(f"  {name:<32}{100 * value:5.1f}")
    print("Baselines, top-1:")
    for name, value in baselines.items():
        print(f"  {name:<32}{100 * value:5.1f}")
    worst = sorted(by_class, key=lambda name: by_class[name])[: WORST if len(by_class) > NAMED_MOST else None]
    print(f"{'The worst' if len(worst) < len(by_class) else 'All'} of {len(by_class)} classes:")
    for name in worst:
        print(f"  {name:<32}{100 * by_class[name]:5.1f}")
    print(f"Test images: {num_test:,}, so {error_note(num_test, 'top-1')}.")
    summary = {
        "run": options.run, "data": options.data, "split": split.description, "labels": options.labels,
        "seed": options.seed, "images": len(split.train), "test_images": num_test, "steps": network.steps,
        "accuracy": accuracy, "encoder_progress": None if progress is None else progress.to_dict(),
        "baselines": baselines, "classes": network.classes, "by_class": by_class, "settings": asdict(network.config),
    }  # fmt: skip
    if labels is not None:
        summary["pseudo_labels"] = num_pseudo
        _write_pseudo_labels(options.out / "pseudo_labels.csv", labels, split.train.classes)
    write(options.out / "summary.json", versioned(summary))
    side = side_of(Path(options.run), options.data, options.pack_side)
    shrunk = "" if side is None else f" --pack-side {side}"
    say(f"The classifier is in {options.out}: `simclr predict {options.out} IMAGES --out FILE.csv{shrunk}` uses it.")


def _by_class(network: Finetuned) -> dict[str, float]:
    """Top-1 accuracy within each class that is tested."""
    right = network.scores.argmax(1) == network.targets  # (m,)
    return {
        name: float(right[network.targets == column].mean())
        for column, name in enumerate(network.classes)
        if (network.targets == column).any()
    }
