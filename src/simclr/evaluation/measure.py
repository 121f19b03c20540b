"""Models under test x protocols x seeds -> results with accuracies: the main table of an evaluation.

    knn         weighted cosine neighbours on frozen features
    linear      linear classifier on frozen features: the exact optimum or, where images are many, SGD on random crops
    logistic    the transfer protocol: 45 values of l2, chosen on a validation split
    finetune    the network (or what comes after a block) trained on the labels
    supervised  the same network from scratch on the same labels

Each result is kept in the store as soon as it is there (`results.py`), under everything that determines it (`keys.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from simclr.config.encoder import CIFAR_STEM_UP_TO
from simclr.config.finetune import (
    FINETUNE_RECIPES,
    SMALL,
    FinetuneConfig,
    choose_finetune_recipe,
    find_finetune_recipe,
)
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.finetune import Finetuned, finetune, supervised
from simclr.evaluation.keys import accuracy_key
from simclr.evaluation.knn import KNN_TEMPERATURE, knn_votes
from simclr.evaluation.logistic import FitOptions, linear_probe, logistic_probe
from simclr.evaluation.metrics import SUPERVISED, accuracies
from simclr.evaluation.pseudo_labels import PseudoLabels, pseudo_labels, require_unlabelled, same_steps
from simclr.evaluation.results import About, Measured, Result, ResultStore, name_of
from simclr.evaluation.split import Split
from simclr.evaluation.subjects import PIXELS, RANDOM, EvaluatedModel, open_subject
from simclr.models.classifier import read_for
from simclr.training.fit import Execution
from simclr.training.progress import counting

Protocol = Literal["knn", "linear", "logistic", "finetune", "supervised"]
ACCURACIES: tuple[Protocol, ...] = get_args(Protocol)
"""The protocols whose results are accuracies of one classifier."""
TITLES: dict[str, str] = {
    "knn": "kNN",
    "linear": "linear",
    "logistic": "logistic",
    "finetune": "fine-tuned",
    SUPERVISED: "fine-tuned",
}
QUIET_SECONDS = 10.0
"""Duration of a fit after which its progress is printed where there is no terminal."""
MAX_ROWS_FOR_OPTIMUM = 100_000
"""Labelled images up to which the linear protocol takes the exact optimum; features of width 2,048 then take 0.8 GB."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Choices that the protocols leave open."""

    linear: Literal["auto", "sgd", "optimum"] = "auto"
    recipe: str | None = None
    """Recipe of fine-tuning; None: by head, width and share of labels (`choose_finetune_recipe`)."""
    overrides: Callable[[FinetuneConfig], FinetuneConfig] = lambda config: config
    """Returns the recipe with the settings that a user gives."""
    flip: float | None = None
    """Probability of a left-right flip in all training on labels, as in pretraining; None: the recipe's."""
    pseudo_labels: bool = False
    """Whether networks that are fine-tuned or trained from scratch get pseudo-labels for images without a label."""


@dataclass(frozen=True, kw_only=True)
class EvaluationContext:
    """Where an evaluation runs and what it keeps; passed to every protocol."""

    store: ResultStore
    """A result that it holds is not computed again."""
    world: DistributedContext = field(default_factory=DistributedContext)
    folder: Path | None = None
    """Where networks that are trained keep their checkpoints, so that they can be resumed; None: nowhere."""
    say: Callable[[str], None] = lambda sentence: None
    """Called with what begins."""


def about_split(subject: str, split: Split) -> About:
    """Names and counts of a result on a split, for readers."""
    labels = split.train.labels
    assert labels is not None
    return About(
        subject=subject, data_name=split.train.name, split=split.description, num_train=int((labels >= 0).sum()),
        num_test=len(split.test), num_classes=len(np.unique(labels[labels >= 0])),
    )  # fmt: skip


def measure(
    protocols: Sequence[Protocol],
    seeds: Sequence[int],
    *,
    subjects_of: Callable[[int], list[EvaluatedModel]],
    split_of: Callable[[int], Split],
    settings: Settings,
    context: EvaluationContext,
    failed: Callable[[str, UserError], None],
) -> Iterator[Result]:
    """Every protocol on every subject that it makes sense for, seed by seed; results in the store are not made again.

    Metrics: top1, mean_per_class and, from six classes on, top5, shares in [0, 1]; and l2, the weight of the
    regularisation, where it was chosen.

    Args:
        subjects_of: The subjects of a seed, the model under test first: its network's shape is the supervised one's.
        split_of: The images of a seed.
        failed: Called with what cannot be measured, and why; the others still are, unless it raises.

    Raises:
        Stopped: A signal asked to stop in the middle of a training.
    """
    for seed in seeds:
        split, subjects = split_of(seed), subjects_of(seed)
        for subject in subjects:
            for protocol in protocols:
                if not makes_sense(protocol, subject, subjects[0]):
                    continue
                try:
                    result = measure_one(protocol, subject, split, seed, settings, context)
                except UserError as error:
                    failed(f"{subject.name}: {protocol}, seed {seed}", error)
                else:
                    yield result


def measure_one(
    protocol: Protocol, subject: EvaluatedModel, split: Split, seed: int, settings: Settings, context: EvaluationContext
) -> Result:
    """One protocol on one subject: from the store, or measured now."""
    name = SUPERVISED if protocol == SUPERVISED else subject.name
    config, notes = _training(protocol, subject, split, settings)
    source = None
    if settings.pseudo_labels and protocol in ("finetune", SUPERVISED):
        require_unlabelled(split)
        source = pseudo_labels_source(subject, from_scratch=protocol == SUPERVISED)
    key = accuracy_key(protocol, subject, split, seed, config, source)

    def run() -> Measured:
        context.say(f"  {name}: {protocol}, seed {seed}")
        for note in notes:
            context.say(f"  {note}")
        if config is None:
            return _classify(protocol, subject, split, seed, context.world)
        folder = context.folder / f"{protocol}-seed{seed}-{name_of(key)[:12]}" if context.folder else None
        labels = None if source is None else pseudo_labels(split, source, seed=seed)
        return _train(protocol, subject, split, seed, config, labels, folder, context.world)

    return context.store.get(key, run, about_split(name, split))


def makes_sense(protocol: str, subject: EvaluatedModel, first: EvaluatedModel) -> bool:
    """Whether a protocol applies: pixels and hand-made features have no network to train.

    A random network is trained once, as the supervised baseline.

    Args:
        first: The model under test, whose shape the supervised baseline has.
    """
    if protocol == SUPERVISED:
        return subject is first and subject.encoder is not None
    return protocol != "finetune" or (subject.encoder is not None and subject.name != RANDOM)


def _classify(
    protocol: Protocol, subject: EvaluatedModel, split: Split, seed: int, world: DistributedContext
) -> Measured:
    """A classifier on frozen features: nearest neighbours or logistic regression."""
    assert split.train.labels is not None and split.test.labels is not None
    labels, truth = split.train.labels, split.test.labels  # (n,), (m,)
    train, test = subject.features(split.train), subject.features(split.test)  # (n, F), (m, F)
    of_pixels = f", on {subject.description}" if subject.description else ""
    if protocol == "knn":
        leave_one_out = split.test is split.train
        with fitting("neighbours", world, unit="image") as progress:
            votes = knn_votes(train, labels, test, leave_one_out=leave_one_out, device=world.device, progress=progress)
        description = (
            f"k {votes.k}, temperature {KNN_TEMPERATURE}, cosine{', leave-one-out' if leave_one_out else ''}{of_pixels}"
        )
        return Measured(metrics=accuracies(votes.scores, votes.classes, truth), description=description)
    classes, targets = np.unique(labels, return_inverse=True)  # (K,), (n,)
    probe, solver = (linear_probe, "exact optimum") if protocol == "linear" else (logistic_probe, "best of 45 l2")
    with fitting("fitting", world, unit="thousandth") as progress:
        options = FitOptions(device=world.device, progress=progress)
        fitted = probe(train, targets, test, seed=seed, options=options)
    converged = "" if fitted.converged else ", not converged"
    return Measured(
        metrics={**accuracies(fitted.scores, classes, truth), "l2": fitted.l2},
        description=f"logistic regression on frozen features, {solver}{converged}{of_pixels}",
    )


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
    config: FinetuneConfig,
    labels: PseudoLabels | None,
    folder: Path | None,
    world: DistributedContext,
) -> Measured:
    """A network trained on the labels and pseudo-labels, from the subject's weights or from new ones."""
    assert split.test.labels is not None
    learn, config = training_images(split, config, labels)
    train, test = (subject.fitted(images) for images in (learn, split.test))
    with counting("training", main=world.is_main, lines=True) as progress:
        execution = Execution(world=world, run=folder, progress=progress)
        network = train_subject(
            subject, train, test, config, seed=seed, from_scratch=protocol == SUPERVISED, execution=execution
        )
    return Measured(
        metrics=accuracies(network.scores, network.labels, split.test.labels),
        description=f"{config.optimizer}, {network.steps} steps of {config.batch_size} crops"
        + ("" if labels is None else f", {labels.description}"),
    )


def pseudo_labels_source(subject: EvaluatedModel, *, from_scratch: bool) -> EvaluatedModel:
    """Whose features give pseudo-labels to a training: the network's own; raw pixels where it begins from scratch.

    Pixels need no network, and give better pseudo-labels than random weights (docs/few-labels.md).
    """
    if not from_scratch:
        return subject
    assert subject.encoder is not None
    return open_subject(
        PIXELS, like=subject.encoder.config, preprocessing=subject.preprocessing, seed=0, cache=subject.cache,
        world=subject.world,
    )  # fmt: skip


def training_images(split: Split, config: FinetuneConfig, labels: PseudoLabels | None) -> tuple[Images, FinetuneConfig]:
    """The images to train on, and the settings, which keep the steps of a training on the labels alone."""
    if labels is None:
        return split.train, config
    return labels.images, same_steps(config, len(split.train), len(labels.images))


def train_subject(
    subject: EvaluatedModel,
    train: Images,
    test: Images,
    config: FinetuneConfig,
    *,
    seed: int,
    from_scratch: bool,
    execution: Execution,
) -> Finetuned:
    """`finetune` of a model under test or, from scratch, `supervised` of its shape.

    Raises:
        UserError: As `finetune`.
    """
    assert subject.encoder is not None
    preset = subject.preprocessing
    if from_scratch:
        shape = read_for(subject.encoder, subject.head).config
        return supervised(shape, train, test, config, seed=seed, preset=preset, execution=execution)
    return finetune(subject.encoder, subject.head, train, test, config, seed=seed, preset=preset, execution=execution)


def _by_sgd(protocol: Protocol, subject: EvaluatedModel, split: Split, settings: Settings) -> bool:
    """Whether the protocol is SGD on crops and flips under a frozen encoder, as in the papers (SimCLR B.6).

    Every epoch passes all images through the encoder. With few images the exact optimum on features of the central crop
    takes seconds instead, and needs no learning rate. Batch norm is in inference mode, which the paper intends and the
    authors' TF2 code does not reach (docs/fidelity.md).
    """
    by_sgd = len(split.train) > MAX_ROWS_FOR_OPTIMUM if settings.linear == "auto" else settings.linear == "sgd"
    return protocol == "linear" and by_sgd and subject.encoder is not None


def _classifier_layer(subject: EvaluatedModel) -> int:
    """Layers of the projection head under a linear classifier that is trained by SGD.

    Raises:
        UserError: The features are those of a stage.
    """
    if subject.layer is not None and subject.layer.startswith("stage"):
        raise UserError(
            f"--layer was {subject.layer}, and a linear classifier by SGD stands on h or on the projection head; give "
            "--linear optimum."
        )
    return subject.head_layer


def _training(
    protocol: Protocol, subject: EvaluatedModel, split: Split, settings: Settings
) -> tuple[FinetuneConfig | None, list[str]]:
    """Settings of the training of a protocol, None where it trains no network; and what to tell of them."""
    num_images = len(split.train)
    if _by_sgd(protocol, subject, split, settings):
        name = _linear_recipe(subject.size, num_images)
        note = f"Recipe {name} ({num_images:,} labels, images of {subject.size} pixels)."
        config = replace(FINETUNE_RECIPES[name], head_layer=_classifier_layer(subject))
        return _flipped(config, settings.flip), [note]
    if protocol == SUPERVISED:
        assert subject.encoder is not None
        return supervised_recipe(subject.encoder, num_images, settings.flip), []
    if protocol != "finetune":
        return None, []
    return choose_finetune_config(subject, split, settings)


def choose_finetune_config(
    subject: EvaluatedModel, split: Split, settings: Settings
) -> tuple[FinetuneConfig, list[str]]:
    """Settings of a fine-tuning, those that a user gives on top of a recipe; and sentences about the choice.

    The recipe is the one that `settings` name, else the one for these weights and this share of labels.
    """
    num_images = len(split.train)
    if settings.recipe is not None:
        config, notes = find_finetune_recipe(settings.recipe), []
    else:
        name, why = _recipe_for(subject, split)
        config = FINETUNE_RECIPES[name]
        notes = [f"Recipe {name} ({why}); --finetune-recipe chooses another."]
        if num_images < config.batch_size and not config.min_steps:
            notes.append(
                f"Its batches have {config.batch_size:,} images, and there are {num_images:,} labels: it makes few "
                "updates; --finetune-recipe small is made for few images."
            )
    config = _flipped(config, settings.flip).with_overrides(settings.overrides)
    if config.optimizer == "sgd" and config.tune_from != "none" and _is_imported_v2(subject):
        notes.append(
            "The encoder seems to be an imported one of SimCLR v2, whose kernels are some 17 times smaller than those "
            "of v1 (README of google-research/simclr, known issues), so that rates of SGD do not transfer to it; LARS "
            "does not depend on their size: --finetune-recipe v2-1%, v2-10% or v2-100%, with smaller batches for few "
            "images."
        )
    return config, notes


def _recipe_for(subject: EvaluatedModel, split: Split) -> tuple[str, str]:
    """Name of the recipe for these weights and labels, and why."""
    assert subject.encoder is not None
    num_images = len(split.train)
    if subject.name == RANDOM:
        return _supervised_recipe_name(subject.encoder, num_images), f"from scratch, {num_images:,} labels"
    shape = subject.encoder.config
    return choose_finetune_recipe(
        head_layers=0 if subject.head is None else len(subject.head.layers),
        is_wide=shape.sk or shape.width > 1,
        num_labels=num_images,
        num_labelled=split.num_labelled,
    )


def _is_imported_v2(subject: EvaluatedModel) -> bool:
    """Whether the weights are a checkpoint of SimCLR v2: its head or its kernels, and no record of a training here."""
    if subject.encoder is None or subject.encoder.config.is_external or subject.progress is not None:
        return False
    return subject.encoder.config.sk or (subject.head is not None and len(subject.head.layers) > 2)


def supervised_recipe(network: nn.Module, num_images: int, flip: float | None) -> FinetuneConfig:
    """The recipe by which a network of this kind is trained from scratch on this number of labelled images.

    SGD with a rate of 0.1 is made for networks with batch norm; others learn by AdamW. (AlexNet by SGD
    stays at chance for hundreds of steps, and sometimes for good.)

    Args:
        flip: Probability of a left-right flip; None: the recipe's.
    """
    return _flipped(FINETUNE_RECIPES[_supervised_recipe_name(network, num_images)], flip)


def _supervised_recipe_name(network: nn.Module, num_images: int) -> str:
    batch_norm = any(isinstance(part, _BatchNorm) for part in network.modules())
    return ("small-supervised" if num_images <= SMALL else "supervised") + ("" if batch_norm else "-adamw")


def _linear_recipe(size: int, num_images: int) -> str:
    """Name of the recipe of a linear classifier on this number of images of `size` pixels, trained by SGD on crops.

    Up to 20,000 images it is ours; else that of the authors' README for CIFAR-10 (32 pixels) or the paper's for
    ImageNet.
    """
    if num_images <= SMALL:
        return "small-linear"
    return "cifar-linear" if size <= CIFAR_STEM_UP_TO else "linear"


def _flipped(config: FinetuneConfig, flip: float | None) -> FinetuneConfig:
    return config if flip is None else replace(config, flip=flip)
