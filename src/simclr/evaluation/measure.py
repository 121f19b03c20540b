"""Subjects x protocols x seeds -> accuracies: the table of an evaluation.

    knn         weighted cosine neighbours on frozen features
    linear      linear classifier on frozen features: the exact optimum or, where images are many, the papers' SGD
    logistic    the transfer protocol: 45 l2 strengths, chosen on a validation split
    finetune    the network (or what comes after a block) trained on the labels
    supervised  the same network from scratch on the same labels

Each result is kept as soon as it is there (ledger.py), under everything that it depends on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from simclr.config.finetune import FINETUNE_RECIPES, FinetuneConfig, find_finetune_recipe
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.finetune import finetune, supervised
from simclr.evaluation.keys import accuracy_key
from simclr.evaluation.knn import KNN_TEMPERATURE, knn_votes
from simclr.evaluation.linear import how_to_probe, linear
from simclr.evaluation.logistic import logistic_probe, optimum_probe
from simclr.evaluation.metrics import SUPERVISED, mean_per_class, top_k
from simclr.evaluation.results import ResultStore, name_of
from simclr.evaluation.split import Split
from simclr.evaluation.subjects import RANDOM, EvaluatedModel
from simclr.training.progress import counting

Protocol = Literal["knn", "linear", "logistic", "finetune", "supervised"]
TITLES: dict[str, str] = {
    "knn": "kNN",
    "linear": "linear",
    "logistic": "logistic",
    "finetune": "fine-tuned",
    SUPERVISED: "fine-tuned",
}
QUIET_SECONDS = 10.0
"""Of a fit, after which its progress is printed where there is no terminal."""
SMALL = 20_000
"""Labelled images up to which the recipes for small data are taken."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the protocols are to do where there is a choice."""

    linear: Literal["auto", "sgd", "optimum"] = "auto"
    recipe: str | None = None
    """How to fine-tune; None: by the number of labels and the encoder's head."""
    over: Callable[[FinetuneConfig], FinetuneConfig] = lambda config: config
    """Puts what a user asks for on top of that recipe."""
    flip: float | None = None
    """Probability of a left-right flip in all training on labels, as in pretraining; None: the recipe's."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One protocol on one subject with one seed."""

    subject: str
    protocol: str
    seed: int
    figures: dict[str, float]
    """top1, mean_per_class and, from six classes on, top5, in [0, 1]; and the l2 strength, where one was chosen."""
    how: str
    """What was done, in a few words."""


def measure(
    protocols: Sequence[Protocol],
    seeds: Sequence[int],
    *,
    subjects_of: Callable[[int], list[EvaluatedModel]],
    split_of: Callable[[int], Split],
    settings: Settings,
    ledger: ResultStore,
    folder: Path | None,
    world: DistributedContext,
    say: Callable[[str], None],
    failed: Callable[[str, UserError], None],
) -> Iterator[Measurement]:
    """Every protocol on every subject that it makes sense for, seed by seed; what the ledger holds is not done again.

    Args:
        subjects_of: The subjects of a seed, the one to be judged first: its network's shape is the supervised one's.
        split_of: The images of a seed.
        folder: Where networks that are trained keep their checkpoints, so that they can be resumed; None: nowhere.
        say: Told what begins.
        failed: Told what cannot be measured, and why; the others still are, unless it raises.

    Raises:
        Stopped: A signal asked to stop in the middle of a training.
    """
    for seed in seeds:
        split, subjects = split_of(seed), subjects_of(seed)
        one = partial(
            _measure, split=split, seed=seed, settings=settings, ledger=ledger, folder=folder, world=world, say=say
        )
        for subject in subjects:
            for protocol in protocols:
                if not makes_sense(protocol, subject, subjects[0]):
                    continue
                try:
                    measured = one(protocol, subject)
                except UserError as error:
                    failed(f"{subject.name}: {protocol}, seed {seed}", error)
                else:
                    yield measured


def _measure(
    protocol: Protocol,
    subject: EvaluatedModel,
    *,
    split: Split,
    seed: int,
    settings: Settings,
    ledger: ResultStore,
    folder: Path | None,
    world: DistributedContext,
    say: Callable[[str], None],
) -> Measurement:
    """From the ledger, or measured now."""
    name = SUPERVISED if protocol == SUPERVISED else subject.name
    config = _training(protocol, subject, split, settings)
    key = accuracy_key(protocol, subject, split, seed, config)

    def run() -> dict[str, Any]:
        say(f"  {name}: {protocol}, seed {seed}")
        place = folder / f"{protocol}-seed{seed}-{name_of(key)[:12]}" if folder else None
        figures, how = _run(protocol, subject, split, seed, settings, config, place, world)
        return {"figures": figures, "how": how}

    about = {"subject": name, "images": split.train.name, "split": split.how}
    return Measurement(subject=name, protocol=protocol, seed=seed, **ledger.get(key, run, about=about))


def makes_sense(protocol: str, subject: EvaluatedModel, first: EvaluatedModel) -> bool:
    """Pixels have no network; a random one is trained once, as the supervised baseline."""
    if protocol == SUPERVISED:
        return subject is first and subject.encoder is not None
    return protocol != "finetune" or (subject.encoder is not None and subject.name != RANDOM)


def _run(
    protocol: Protocol,
    subject: EvaluatedModel,
    split: Split,
    seed: int,
    settings: Settings,
    config: FinetuneConfig | None,
    place: Path | None,
    world: DistributedContext,
) -> tuple[dict[str, float], str]:
    assert split.train.labels is not None and split.test.labels is not None
    labels, asked = split.train.labels, split.test.labels
    if protocol in ("finetune", SUPERVISED) or _by_sgd(protocol, subject, split, settings):
        return _train(protocol, subject, split, seed, config, place, world)
    train, test = subject.features(split.train), subject.features(split.test)
    where = "" if subject.encoder is not None else f", on {subject.size} x {subject.size} pixels"
    if protocol == "knn":
        alone = split.test is split.train
        with fitting("neighbours", world, unit="image") as progress:
            votes = knn_votes(train, labels, test, leave_one_out=alone, device=world.device, progress=progress)
        how = f"k {votes.k}, temperature {KNN_TEMPERATURE}, cosine{', leave-one-out' if alone else ''}{where}"
        return _figures(votes.scores, votes.classes, asked), how
    classes, targets = np.unique(labels, return_inverse=True)  # (K,), (n,)
    probe, how = (optimum_probe, "exact optimum") if protocol == "linear" else (logistic_probe, "best of 45 l2")
    with fitting("fitting", world, unit="thousandth") as progress:
        fitted = probe(train, targets, test, seed=seed, device=world.device, progress=progress)
    how = f"logistic regression on frozen features, {how}{'' if fitted.converged else ', not converged'}{where}"
    return {**_figures(fitted.scores, classes, asked), "l2": fitted.strength}, how


def fitting(
    what: str, world: DistributedContext, *, unit: str
) -> AbstractContextManager[Callable[[int, int], None] | None]:
    """Progress of work that mostly takes seconds: lines only where it takes longer."""
    return counting(what, main=world.is_main, lines=True, unit=unit, after=QUIET_SECONDS)


def _train(
    protocol: Protocol,
    subject: EvaluatedModel,
    split: Split,
    seed: int,
    config: FinetuneConfig | None,
    place: Path | None,
    world: DistributedContext,
) -> tuple[dict[str, float], str]:
    """A network trained on the labels, from the subject's weights or from new ones."""
    assert subject.encoder is not None and config is not None
    train, test = (subject.fitted(images) for images in (split.train, split.test))
    shared: dict[str, Any] = {"seed": seed, "preset": subject.preprocessing, "world": world, "run": place}
    with counting("training", main=world.is_main, lines=True) as progress:
        shared["progress"] = progress
        if protocol == SUPERVISED:
            network = supervised(subject.encoder.config, train, test, config, **shared)
        elif protocol == "linear":
            network = linear(subject.encoder, train, test, config, **shared)
        else:
            network = finetune(subject.encoder, subject.head, train, test, config, **shared)
    how = f"{config.optimizer}, {network.steps} steps of {config.batch_size} crops"
    return _figures(network.scores, network.labels, split.test.labels), how


def _figures(scores: np.ndarray, classes: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """Figures of scores (m, K) whose columns stand for `classes` (K,), against labels (m,)."""
    assert labels is not None
    targets = np.searchsorted(classes, labels)  # (m,) columns
    figures = {
        "top1": top_k(scores, targets, 1),
        "mean_per_class": mean_per_class(scores.argmax(1), targets),
    }
    return figures | ({"top5": top_k(scores, targets, 5)} if len(classes) > 5 else {})


def _by_sgd(protocol: Protocol, subject: EvaluatedModel, split: Split, settings: Settings) -> bool:
    how = how_to_probe(len(split.train)) if settings.linear == "auto" else settings.linear
    return protocol == "linear" and how == "sgd" and subject.encoder is not None


def _training(protocol: Protocol, subject: EvaluatedModel, split: Split, settings: Settings) -> FinetuneConfig | None:
    """The settings by which a protocol trains a network; None where it trains none."""
    num_images = len(split.train)
    if _by_sgd(protocol, subject, split, settings):
        return _flipped(FINETUNE_RECIPES[_sized("linear", num_images)], settings.flip)
    if protocol == SUPERVISED:
        assert subject.encoder is not None
        return supervised_recipe(subject.encoder, num_images, settings.flip)
    if protocol != "finetune":
        return None
    return how_to_finetune(subject, split, settings)


def how_to_finetune(subject: EvaluatedModel, split: Split, settings: Settings) -> FinetuneConfig:
    """What a user asks for, over the recipe that is named, else over the one for these weights and so many labels."""
    num_images = len(split.train)
    if settings.recipe is not None:
        config = _flipped(find_finetune_recipe(settings.recipe), settings.flip)
    elif subject.name == RANDOM:
        assert subject.encoder is not None
        config = supervised_recipe(subject.encoder, num_images, settings.flip)
    else:
        recipe = "small" if num_images <= SMALL else _papers_recipe(subject, split)
        config = _flipped(find_finetune_recipe(recipe), settings.flip)
    return config.with_overrides(settings.over)


def supervised_recipe(network: nn.Module, num_images: int, flip: float | None) -> FinetuneConfig:
    """How a network of this kind is trained from scratch on so many labelled images.

    The papers' SGD with a rate of 0.1 is made for networks with batch norm; others learn by AdamW. (AlexNet by SGD
    stays at chance for hundreds of steps, and sometimes for good.)

    Args:
        flip: Probability of a left-right flip; None: the recipe's.
    """
    batch_norm = any(isinstance(part, _BatchNorm) for part in network.modules())
    return _flipped(FINETUNE_RECIPES[_sized("supervised", num_images) + ("" if batch_norm else "-adamw")], flip)


def _sized(protocol: str, num_images: int) -> str:
    """The name of a protocol's recipe for so many labelled images."""
    return f"small-{protocol}" if num_images <= SMALL else protocol


def _flipped(config: FinetuneConfig, flip: float | None) -> FinetuneConfig:
    return config if flip is None else replace(config, flip=flip)


def _papers_recipe(subject: EvaluatedModel, split: Split) -> str:
    """By the number of layers of the head (3 in SimCLR v2) and the share of the labels that is used."""
    version = "v2" if subject.head is not None and len(subject.head.layers) > 2 else "v1"
    share = len(split.train) / split.num_labelled
    return f"{version}-{'1%' if share <= 0.03 else '10%' if share <= 0.3 else '100%'}"
