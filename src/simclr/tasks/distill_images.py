"""Distillation, put together: teacher, student and images become a task for the loop, a folder keeps what comes of it.

Teacher and student see the same view of an image: the same crop and flip, each at its own size. Both are made as the
teacher's preprocessing makes them, because the teacher cannot adapt to another; the student keeps that preprocessing.

The folder is that of any run (training/run.py); encoder/ holds the student with its classifier.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from simclr.config.distill import DistillConfig
from simclr.config.records import versioned
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.finetune import TRAINING_VERSION
from simclr.evaluation.keys import classifier_key
from simclr.evaluation.metrics import accuracies
from simclr.evaluation.results import About, Measured, Result, ResultStore
from simclr.files import write_atomically
from simclr.methods.distill import Distill
from simclr.models.batchnorm import set_global_batch_norm
from simclr.models.classifier import Classifier
from simclr.models.inference import outputs, require_channels
from simclr.tasks.teacher import teachers_columns
from simclr.training.batches import Batch, Inputs, make_batches
from simclr.training.device import precision_of
from simclr.training.fit import Execution, fit
from simclr.training.lock import hold
from simclr.training.loop import Task
from simclr.training.optim import build_optimizer
from simclr.training.progress import Outcome, say
from simclr.training.run import RunFolder, describe_machine
from simclr.views.policy import crop_and_flip
from simclr.views.views import make_view
from simclr.weights.folder import Model, digest_of, save_classifier
from simclr.weights.training_progress import TrainingProgress


@dataclass(frozen=True, eq=False)
class Distilled:
    """A student at the end of its training."""

    network: Classifier
    """The student, in inference mode."""
    steps: int
    accuracy: float | None
    """The student's on the test images, in [0, 1]; None where there were none."""
    teacher_accuracy: float | None
    """The teacher's, likewise."""
    top5: float | None = None
    """The student's top-5 accuracy, in [0, 1]; None with five classes or fewer, or no test images."""
    teacher_top5: float | None = None
    """The teacher's, likewise."""


def distill_images(
    teacher: Model,
    student: Classifier,
    images: Images,
    config: DistillConfig,
    *,
    seed: int,
    test: Images | None = None,
    execution: Execution,
) -> Distilled:
    """Train a copy of the student until the end or a signal, then test it and its teacher.

    Args:
        teacher: With a classifier; put into inference mode and on the device, else left as it is.
        student: Where training begins; its logits are the teacher's classes.
        images: To learn on. Their labels, -1 for none, only count where `config.alpha` is below 1.
        seed: Of the order of the images and of the views.
        test: Labelled images that both are tested on at the end.
        execution: Processes and folder, which is required; no progress is called.

    Raises:
        UserError: Images, networks and settings do not go together, memory or disk are full, or the loss is not
            finite.
        Stopped: A signal asked to stop; called again with the same folder, the training continues.
    """
    world, run = execution.world or DistributedContext(), execution.run
    assert run is not None, "the student is published there"
    run = RunFolder(run) if isinstance(run, Path) else run
    taught_by = teacher.classifier
    assert taught_by is not None, "open_teacher sees to it"
    assert student.linear.out_features == len(teacher.classes), (student.linear, len(teacher.classes))
    for encoder in (teacher.encoder, student.encoder):
        require_channels(encoder.config.channels, images)
    targets = _targets(teacher, images, config)
    test_targets = None if test is None else teachers_columns(teacher, test)
    precision_of(config.precision, world)
    world.local_slice(config.batch_size)

    student = deepcopy(student)
    inputs = _inputs(teacher, student, images, targets, seed)
    record = {"method": "distill", "inputs": inputs, "machine": describe_machine(), **execution.manifest}
    with hold(run.path, world):
        everything = inputs | config.result_fields()
        world.require_equal("distillation", everything, "Give every process the same flags and files.")
        teacher.to(str(world.device))
        taught_by.to(memory_format=torch.channels_last)
        student = student.to(world.device).to(memory_format=torch.channels_last)
        task = build_task(teacher, student, images, targets, config, run, seed=seed, world=world)
        outcome = fit(task, run, config, world, manifest=record)
        tested: dict[str, Result] = {}
        if test is not None and test_targets is not None:
            store = ResultStore(run.path / "evaluation" / "results.jsonl", world)
            tested = _test(teacher, student, test, test_targets, seed, store, world)
        if world.is_main:
            _report_end(run, outcome, images, config, tested, test)
        top1, top5 = (
            {name: result.metrics.get(metric) for name, result in tested.items()} for metric in ("top1", "top5")
        )
        return Distilled(
            student.eval(), outcome.step, top1.get("student"), top1.get("teacher"),
            top5=top5.get("student"), teacher_top5=top5.get("teacher"),
        )  # fmt: skip


def _inputs(
    teacher: Model, student: Classifier, images: Images, targets: np.ndarray | None, seed: int
) -> dict[str, Any]:
    """What a distillation depends on beside its settings, as JSON can hold it."""
    assert teacher.classifier is not None
    return {
        "version": TRAINING_VERSION,
        "seed": seed,
        "images": images.fingerprint,
        "targets": None if targets is None else sha256(targets.astype("<i8").tobytes()).hexdigest(),
        "teacher": digest_of(teacher.classifier),
        "preset": teacher.preprocessing,
        "student": digest_of(student),
    }


def _test(
    teacher: Model,
    student: Classifier,
    test: Images,
    targets: np.ndarray,
    seed: int,
    store: ResultStore,
    world: DistributedContext,
) -> dict[str, Result]:
    """Accuracies of "student" and "teacher" on labelled images, kept in the store."""
    assert teacher.classifier is not None
    classes, preset = teacher.classes, teacher.preprocessing
    about = About(data_name=test.name, split=f"{len(test):,} test images", num_test=len(test), num_classes=len(classes))
    tested = {}
    networks = {"student": (student, student.encoder), "teacher": (teacher.classifier, teacher.encoder)}
    for name, (network, encoder) in networks.items():

        def measure(network: nn.Module = network, size: int = encoder.config.size) -> Measured:
            logits = outputs(network, test, len(classes), size=size, preset=preset, world=world)  # (m, K)
            return Measured(metrics=accuracies(logits, np.arange(len(classes)), targets))

        key = classifier_key(network, encoder.config, classes, preset, test, seed, world.device.type)
        tested[name] = store.get(key, measure, replace(about, subject=name))
    return tested


def build_task(
    teacher: Model,
    student: Classifier,
    images: Images,
    targets: np.ndarray | None,
    config: DistillConfig,
    run: RunFolder,
    *,
    seed: int,
    world: DistributedContext,
) -> Task:
    """The task of these settings; networks are on the device of this process.

    Args:
        targets: (n,) int64 columns of the logits, -1 for an image without a label; None: labels do not count.
    """
    assert teacher.classifier is not None
    total = config.steps(len(images))
    method = Distill(student, teacher.classifier, temperature=config.temperature, alpha=config.alpha, world=world)
    if world.size > 1:
        set_global_batch_norm(method, world.group)
    return Task(
        method=method,
        batch=_batches(teacher, student, images, targets, config, seed, world),
        optimizer=build_optimizer(
            config.optimizer, method, lr=config.peak, weight_decay=config.weight_decay, momentum=config.momentum,
            nesterov=config.nesterov,
        ),
        learning_rate=config.learning_rate(len(images)),
        total_steps=total,
        batch_size=config.batch_size,
        seed=seed,
        precision=precision_of(config.precision, world),
        flush_denormal=True,  # gradients of branches that begin at 0 are denormal: steps 9 times as long
        publish=lambda step: save_classifier(
            student, run.encoder,
            classes=teacher.classes, preprocessing=teacher.preprocessing,
            origin={"method": "distill", "run": str(run.path)}, progress=TrainingProgress(step, total),
        ),
    )  # fmt: skip


def _targets(teacher: Model, images: Images, config: DistillConfig) -> np.ndarray | None:
    """The column of each image's label where labels count."""
    if config.alpha == 1:
        return None
    if images.labels is None or not (images.labels >= 0).any():
        raise UserError(
            f"--alpha was {config.alpha}, so that labels count, and no image of {images.name} has one; give --labels, "
            "or leave --alpha at 1."
        )
    return teachers_columns(teacher, images)


def _batches(
    teacher: Model,
    student: Classifier,
    images: Images,
    targets: np.ndarray | None,
    config: DistillConfig,
    seed: int,
    world: DistributedContext,
) -> Callable[[int], Inputs]:
    """Step -> this process's views for student and teacher, its targets, and the labelled images of the whole batch."""
    size, teachers_size = student.encoder.config.size, teacher.encoder.config.size
    dtype = precision_of(config.precision, world)

    def view(pixels: Any, side: int, epochs: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        policy = crop_and_flip(
            teacher.preprocessing, side, channels=images.channels, crop_min=config.crop_min, flip=config.flip
        )  # what is drawn depends on no size
        return make_view(
            pixels, policy, seed=seed, epoch=epochs, indices=indices, device=world.device, dtype=dtype
        )  # (B, C, side, side)

    def inputs(batch: Batch) -> Inputs:
        seen = view(batch.pixels, size, batch.epochs, batch.indices)
        same = size == teachers_size
        seen_by_teacher = seen if same else view(batch.pixels, teachers_size, batch.epochs, batch.indices)
        if targets is None:
            return seen, seen_by_teacher
        labelled = int((targets[images.items_read(batch.global_indices)] >= 0).sum())
        return (
            seen,
            seen_by_teacher,
            torch.from_numpy(targets[images.items_read(batch.indices)]).to(world.device),
            labelled,
        )

    return make_batches(images, inputs, batch_size=config.batch_size, seed=seed, world=world)


def _report_end(
    folder: RunFolder, outcome: Outcome, images: Images, config: DistillConfig, tested: dict[str, Result],
    test: Images | None,
) -> None:  # fmt: skip
    if not folder.summary.exists():
        summary = {
            "steps": outcome.step,
            "epochs": round(outcome.step * config.batch_size / len(images), 3),
            "images": len(images),
            "images_left_out": len(images.skipped),
            "images_replaced": len(images.replaced),
            "seconds_of_this_call": round(outcome.seconds, 1),
            "steps_of_this_call": outcome.steps_run,
            "final": outcome.last,
            "test_images": None if test is None else len(test),
            "test_accuracy": {name: result.value("top1") for name, result in tested.items()},
        }
        with folder.writing():
            write_atomically(folder.summary, versioned(summary))
    say(f"Done: {outcome.step} steps. The student is in {folder.encoder}.")
