"""`simclr distill TEACHER DATA --out OUT`: name, open and check what takes part, distil, say how good it is."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simclr import distributed
from simclr.config.distill import SELF, SMALL, SMALLER, DistillConfig, find_distill_recipe
from simclr.config.encoder import EncoderConfig
from simclr.config.overrides import Overrides
from simclr.config.pretrain import require_seed
from simclr.data.images import Images, fit_channels
from simclr.data.labels import chosen_by
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.metrics import TOP5_ABOVE
from simclr.models.classifier import Classifier, read_for
from simclr.models.encoder import Encoder, build_encoder
from simclr.models.heads import ProjectionHead
from simclr.reports.table import error_note
from simclr.tasks.distill_images import Distilled, distill_images
from simclr.tasks.opening import DataOptions, lasting, load_model, open_parts
from simclr.tasks.pretrain_images import data_record
from simclr.tasks.resume import task_record
from simclr.tasks.teacher import open_teacher
from simclr.training.fit import Execution
from simclr.training.lock import hold
from simclr.training.progress import say
from simclr.training.run import RunFolder
from simclr.weights.folder import Model

if TYPE_CHECKING:
    from simclr.tasks.options.labels import Distill

SAME = "same"


def distill(options: "Distill", overrides: Overrides) -> None:
    """The command.

    Args:
        overrides: Puts the flags that were given on top of a recipe.
    """
    _check(options, overrides(DistillConfig()))
    with distributed.joined(options.device) as world, hold(options.out, world):
        result, test = _distill(options, overrides, world)
    if world.is_main:
        _print(result, test)


def _distill(options: "Distill", overrides: Overrides, world: DistributedContext) -> tuple[Distilled, Images | None]:
    """The student, and the images that it was tested on."""
    teacher = open_teacher(options.teacher, size=options.teacher_size, main=world.is_main)
    assert teacher.classifier is not None
    student, student_description = open_student(options, teacher, main=world.is_main)
    images, test = _open_images(options, teacher, world)
    config = _settle(options, overrides, images, student, teacher, world)
    manifest = {
        "data": data_record(images, lasting(options.data), asdict(DataOptions.of(options))),
        "task": task_record("distill", options, overrides),
    }
    size = {name: sum(p.numel() for p in n.parameters()) for name, n in (("t", teacher.classifier), ("s", student))}
    say(
        f"The student ({student_description}, {size['s']:,} parameters) learns from {options.teacher} ({size['t']:,}) "
        f"on {len(images):,} images at temperature {config.temperature:g}; the run is in {options.out}.",
        main=world.is_main,
    )
    execution = Execution(world=world, run=RunFolder(options.out), manifest=manifest)
    result = distill_images(teacher, student, images, config, seed=options.seed, test=test, execution=execution)
    return result, test


def open_student(options: "Distill", teacher: Model, *, main: bool = True) -> tuple[Classifier, str]:
    """The network that is to learn, and what it is in words.

    Args:
        main: Whether this process prints messages.

    Raises:
        UserError: It cannot be built or loaded, has no such head layer, or takes other channels than the teacher.
    """
    expected = teacher.encoder.config
    if options.encoder is not None:
        config = EncoderConfig(
            name=options.encoder, width=options.width, stem=options.stem, sk=options.sk, channels=expected.channels,
            size=options.size or expected.size,
        )  # fmt: skip
        encoder, head, description = build_encoder(config, seed=options.seed), None, f"a fresh {options.encoder}"
    elif options.student == SAME:
        encoder, description = build_encoder(expected, seed=options.seed), "fresh weights in the teacher's shape"
        head = _fresh_head(teacher.head, encoder, options.seed)
    else:
        loaded = load_model(options.student, main=main)
        encoder, head, description = loaded.encoder, loaded.head, f"starting from {options.student}"
    if encoder.config.channels != expected.channels:
        raise UserError(
            f"The student {options.student} takes {encoder.config.channels}-channel images and the teacher "
            f"{options.teacher} {expected.channels}-channel ones; take a student of the teacher's channels."
        )
    layer = options.head_layer
    if layer is None:
        alike = options.student == SAME and options.encoder is None
        layer = teacher.classifier.head_layer if alike and isinstance(teacher.classifier, Classifier) else 0
    return Classifier(read_for(encoder, head), head, len(teacher.classes), head_layer=layer), description


def _fresh_head(like: ProjectionHead | None, encoder: Encoder, seed: int) -> ProjectionHead | None:
    return None if like is None else ProjectionHead(read_for(encoder, like).num_features, **like.to_dict(), seed=seed)


def _check(options: "Distill", config: DistillConfig) -> None:
    """Fail before anything is opened where flags do not go together."""
    require_seed(options.seed)
    if options.encoder is None:
        given = {
            "width": options.width != 1,
            "stem": options.stem != "auto",
            "sk": options.sk,
            "size": options.size is not None,
        }
        if any(given.values()):
            names = ", ".join(f"--{name}" for name, is_given in given.items() if is_given)
            raise UserError(
                f"{names} go with --encoder, which builds a fresh student; name one, such as --encoder small."
            )
    elif options.student != SAME:
        raise UserError(
            f"--encoder {options.encoder} builds a fresh student and --student {options.student} names one; give one."
        )
    if options.labels is None and config.alpha < 1:
        raise UserError(
            f"--alpha was {config.alpha:g}, which leaves {1 - config.alpha:g} to labels, and none were named; give "
            "--labels, such as 1%, or leave --alpha at 1."
        )
    if options.labels is not None and config.alpha == 1:
        raise UserError(
            f"--labels {options.labels} would not count, because --alpha is 1; give a lower one, such as 0.5."
        )
    if options.recipe is not None:
        find_distill_recipe(options.recipe)


def _open_images(options: "Distill", teacher: Model, world: DistributedContext) -> tuple[Images, Images | None]:
    """Images to learn on, with the labels that may be used, and labelled ones to test on, if there are any."""
    train, test = open_parts(options.data, world, DataOptions.of(options))
    channels = teacher.encoder.config.channels
    train = fit_channels(train, channels)
    if options.only_labels is not None:
        train = train.subset(_chosen(train, options.only_labels, options.seed))
    if options.labels is not None:
        chosen = _chosen(train, options.labels, options.seed)
        assert train.labels is not None
        labels = np.full(len(train), -1)
        labels[chosen] = train.labels[chosen]
        train = replace(train, labels=labels)
        say(f"Labels of {len(chosen):,} images count beside the teacher.", main=world.is_main)
    if test is None or test.labels is None or not (test.labels >= 0).any():
        say(f"{train.name} has no labelled test images: teacher and student are not tested.", main=world.is_main)
        return train, None
    if not options.test:
        return train, None
    return train, fit_channels(test.subset(np.flatnonzero(test.labels >= 0)), channels)


def _chosen(images: Images, labels: str, seed: int) -> np.ndarray:
    """Indices of the images that a flag names."""
    if images.labels is None and not Path(labels).is_file():
        raise UserError(f"{images.name} has no labels, so {labels} of them cannot be taken; leave the flag out.")
    return chosen_by(labels, images, seed=seed)


def _settle(
    options: "Distill", overrides: Overrides, images: Images, student: Classifier,
    teacher: Model, world: DistributedContext,
) -> DistillConfig:  # fmt: skip
    """The complete settings: recipe, the temperature that suits the student, the flags on top."""
    name = options.recipe or ("small-distill" if len(images) <= SMALL else "v2-distill")
    if options.recipe is None:
        say(f"Recipe {name} ({len(images):,} images); --recipe chooses another.", main=world.is_main)
    itself = student.encoder.config == teacher.encoder.config
    return replace(find_distill_recipe(name), temperature=SELF if itself else SMALLER).with_overrides(overrides)


def _print(result: Distilled, test: Images | None) -> None:
    if test is None or result.accuracy is None or result.teacher_accuracy is None:
        return
    print(f"{'teacher':<9}{result.teacher_accuracy:.1%}\n{'student':<9}{result.accuracy:.1%}")
    if len(result.network.linear.weight) > TOP5_ABOVE:
        print(f"Top-5 accuracy: teacher {result.teacher_top5:.1%}, student {result.top5:.1%}.")
    print(f"Top-1 accuracy on {len(test):,} test images, last checkpoint; {error_note(len(test))}.")
