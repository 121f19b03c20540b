"""`simclr finetune RUN DATA --out FOLDER`: an encoder and labelled images -> a classifier, and how good it is.

FOLDER/
  encoder/        what `simclr.load(FOLDER).classify` reads
  summary.json    settings, accuracies, and what they have to beat; written at the end
  run.json, config.json, checkpoints/, metrics.jsonl, timing.jsonl   as of any run: `simclr resume FOLDER` goes on
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
from simclr.evaluation.knn import knn
from simclr.evaluation.measure import Settings, choose_finetune_config, train_subject
from simclr.evaluation.metrics import mean_per_class, top_k
from simclr.evaluation.split import Split
from simclr.evaluation.subjects import PIXELS, RANDOM, WITHOUT_NETWORK, EvaluatedModel
from simclr.reports.table import error_note
from simclr.tasks.evaluate import Session
from simclr.tasks.opening import DataOptions, lasting, require_writable, side_of, write
from simclr.tasks.options.labels import Evaluate, Finetune
from simclr.tasks.pretrain_images import data_record
from simclr.tasks.resume import task_record
from simclr.training.fit import Execution
from simclr.training.lock import hold
from simclr.training.progress import counting, say
from simclr.training.run import RunFolder
from simclr.weights.training_progress import TrainingProgress

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
    config = choose_finetune_config(
        subject, split, Settings(recipe=options.finetune_recipe, overrides=overrides, flip=session.flip)
    )
    session.tell(
        f"Training by {config.optimizer}, rate {config.lr:g}: {config.steps(len(split.train)):,} steps of "
        f"{config.batch_size} images (--epochs changes it)."
    )
    manifest = {
        "data": data_record(session.train, lasting(options.data), asdict(DataOptions.of(options))),
        "task": task_record("finetune", options, overrides),
    }
    network = _train(options, session, subject, split, config, manifest)
    if world.is_main:
        _tell(options, network, split, pixels, subject.progress)


def _check(options: Finetune) -> None:
    """What can be wrong before any image is opened."""
    if options.run in WITHOUT_NETWORK:
        raise UserError(f"{options.run} is no network; give a run's folder, timm/NAME, torchvision/NAME or random.")
    require_seed(options.seed)
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
        size=options.size, out=options.out, labels_file=options.labels_file, pack=options.pack,
        pack_side=options.pack_side, cache="off", device=options.device,
    )  # fmt: skip


def _train(
    options: Finetune,
    session: Session,
    subject: EvaluatedModel,
    split: Split,
    config: FinetuneConfig,
    manifest: dict[str, Any],
) -> Finetuned:
    """From the subject's weights or, for `random`, from those that training from scratch begins with."""
    train, test = (subject.fitted(images) for images in (split.train, split.test))
    with counting("training", main=session.world.is_main, lines=True) as progress:
        execution = Execution(world=session.world, run=RunFolder(options.out), manifest=manifest, progress=progress)
        return train_subject(
            subject, train, test, config, seed=options.seed, from_scratch=subject.name == RANDOM, execution=execution
        )


def _tell(
    options: Finetune, network: Finetuned, split: Split, pixels: EvaluatedModel, progress: TrainingProgress | None
) -> None:
    """The accuracies on standard output and in summary.json, beside those that cost nothing."""
    accuracies = _accuracies(network)
    by_class = _by_class(network)
    baselines = _baselines(split, pixels)
    num_test = len(split.test)
    print(f"Test accuracy of {options.run}, trained on {len(split.train):,} labels, in %:")
    for name, value in accuracies.items():
        print(f"  {name:<32}{100 * value:5.1f}")
    print("Beside it, top-1:")
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
        "accuracy": accuracies, "encoder_progress": None if progress is None else progress.to_dict(),
        "baselines": baselines, "classes": network.classes, "by_class": by_class, "settings": asdict(network.config),
    }  # fmt: skip
    write(options.out / "summary.json", versioned(summary))
    side = side_of(Path(options.run), options.data, options.pack_side)
    shrunk = "" if side is None else f" --pack-side {side}"
    say(f"The classifier is in {options.out}: `simclr predict {options.out} IMAGES --out FILE.csv{shrunk}` uses it.")


def _accuracies(network: Finetuned) -> dict[str, float]:
    scores, targets = network.scores, network.targets
    accuracies = {"top-1": top_k(scores, targets, 1)}
    if len(network.classes) >= TOP5_FROM:
        accuracies["top-5"] = top_k(scores, targets, 5)
    return accuracies | {"mean per class": mean_per_class(scores.argmax(1), targets)}


def _by_class(network: Finetuned) -> dict[str, float]:
    """Top-1 accuracy within each class that is tested."""
    right = network.scores.argmax(1) == network.targets  # (m,)
    return {
        name: float(right[network.targets == column].mean())
        for column, name in enumerate(network.classes)
        if (network.targets == column).any()
    }


def _baselines(split: Split, pixels: EvaluatedModel) -> dict[str, float]:
    """What the commonest class and the nearest raw pixels reach, from the same labels."""
    train, test = split.train.labels, split.test.labels
    assert train is not None and test is not None
    labels, counts = np.unique(train, return_counts=True)
    accuracies = {"always the commonest class": float((test == labels[counts.argmax()]).mean())}
    if (len(train) + len(test)) * 4 * pixels.channels * pixels.size**2 > PIXELS_MOST:
        say("Raw pixels are left out beside it: so many images would take too much memory.")
        return accuracies
    near = knn(pixels.features(split.train), train, pixels.features(split.test))
    return accuracies | {"kNN on raw pixels": float((near == test).mean())}
