"""Distillation, put together: teacher, student and images become a task for the loop, a folder keeps what comes of it.

Teacher and student see the same view of an image: the same crop and flip, each at its own size. Both are made as the
teacher's preprocessing makes them, because the teacher cannot adapt to another; the student keeps that preprocessing.

OUT/
  distill.json     what the run depends on (a run that goes on must have the same), and where that came from
  metrics.jsonl, timing.jsonl, checkpoints/   as of any run (run.py)
  encoder/         the student with its classifier: what `simclr.load` reads
  summary.json     written when the run ends
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr.config.distill import DistillConfig
from simclr.config.records import DistillRecord, read_record, versioned
from simclr.data.images import Images
from simclr.data.order import EndlessOrder
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.finetune import Stopped
from simclr.evaluation.metrics import accuracy
from simclr.files import write_atomically, writing
from simclr.methods.distill import Distill
from simclr.models.batchnorm import set_global_batch_norm
from simclr.models.classifier import Classifier
from simclr.models.inference import outputs, require_channels
from simclr.tasks.teacher import teachers_columns
from simclr.training.device import choose_kernels, keep_on_gpu, precision_of, same_threads
from simclr.training.loop import Inputs, Outcome, Task, restore, train
from simclr.training.optim import build_optimizer
from simclr.training.progress import Progress, say
from simclr.training.run import RunFolder, describe_machine, hold
from simclr.views.policy import crop_and_flip
from simclr.views.views import has_kernels, make_view
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


def distill(
    teacher: Model,
    student: Classifier,
    images: Images,
    config: DistillConfig,
    run: Path,
    *,
    seed: int,
    test: Images | None = None,
    world: DistributedContext | None = None,
    origin: dict[str, Any] | None = None,
) -> Distilled:
    """Train a copy of the student until the end or a signal, then test it and its teacher.

    Args:
        teacher: With a classifier; put into inference mode and on the device, else left as it is.
        student: Where training begins; its logits are the teacher's classes.
        images: To learn on. Their labels, -1 for none, only count where `config.alpha` is below 1.
        run: Folder for records, checkpoints and the student; where it holds an unfinished distillation of the same
            images, weights, settings and seed, that goes on bit for bit.
        seed: Of the order of the images and of the views.
        test: Labelled images that both are tested on at the end.
        world: The processes that share each batch; None: this one.
        origin: Free facts for distill.json.

    Raises:
        UserError: Images, networks and settings do not go together, or memory, disk or the loss gave out.
        Stopped: A signal asked to stop; called again with the same folder, the training goes on.
    """
    world = DistributedContext() if world is None else world
    taught_by = teacher.classifier
    assert taught_by is not None, "open_teacher sees to it"
    assert student.linear.out_features == len(teacher.classes), (student.linear, len(teacher.classes))
    for encoder in (teacher.encoder, student.encoder):
        require_channels(encoder.config.channels, images)
    targets = _targets(teacher, images, config)
    test_targets = None if test is None else teachers_columns(teacher, test)
    precision_of(config.precision, world)
    world.local_slice(config.batch_size)

    folder = RunFolder(run, how_to_resume="run the same command again")
    student = deepcopy(student)
    identity = {
        "config": config.result_fields(),
        "seed": seed,
        "images": images.fingerprint,
        "targets": None if targets is None else sha256(targets.astype("<i8").tobytes()).hexdigest(),
        "teacher": digest_of(taught_by),
        "preprocessing": teacher.preprocessing,
        "student": digest_of(student),
    }
    with hold(run, world):
        world.require_equal("distillation", identity, "Give every process the same flags and files.")
        same_threads(world.on_main(partial(_claim, folder, identity, origin or {})), world)
        choose_kernels(world, deterministic=config.deterministic)
        teacher.to(str(world.device))
        taught_by.to(memory_format=torch.channels_last)
        student = student.to(world.device).to(memory_format=torch.channels_last)
        task = build_task(teacher, student, images, targets, config, folder, seed=seed, world=world)
        outcome = _run(task, folder, config, world)
        if outcome.signal is not None:
            say(f"Stopped at step {outcome.step}, saved; the same command goes on.", main=world.is_main)
            raise Stopped(outcome)
        tested: dict[str, float] = {}
        if test is not None and test_targets is not None:
            networks = {"student": (student, student.encoder), "teacher": (taught_by, teacher.encoder)}
            for name, (network, encoder) in networks.items():
                logits = outputs(
                    network, test, len(teacher.classes),
                    size=encoder.config.size, preset=teacher.preprocessing, world=world,
                )  # fmt: skip
                tested[name] = accuracy(logits.argmax(axis=1), test_targets)
        if world.is_main:
            _report_end(folder, outcome, images, config, tested, test)
        return Distilled(student.eval(), outcome.step, tested.get("student"), tested.get("teacher"))


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
            config.optimizer, method, lr=config.peak, weight_decay=config.weight_decay, momentum=config.momentum
        ),
        learning_rate=config.learning_rate(len(images)),
        total_steps=total,
        batch_size=config.batch_size,
        seed=seed,
        precision=precision_of(config.precision, world),
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
    """step -> this process's views for student and teacher, its targets, and the labelled images of the whole batch."""
    size, teachers_size = student.encoder.config.size, teacher.encoder.config.size
    order = EndlessOrder(len(images), seed)
    resident = keep_on_gpu(images, world)[0] if has_kernels(world.device) else None
    dtype = precision_of(config.precision, world)

    def view(pixels: Any, side: int, epochs: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        policy = crop_and_flip(
            teacher.preprocessing, side, channels=images.channels, crop_min=config.crop_min, flip=config.flip
        )  # what is drawn depends on no size
        return make_view(
            pixels, policy, seed=seed, epoch=epochs, indices=indices, device=world.device, dtype=dtype
        )  # (B, C, side, side)

    def batch(step: int) -> Inputs:
        positions = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
        every_epoch, every_index = order.at(positions)  # of all processes
        mine = world.local_slice(config.batch_size)
        epochs, indices = every_epoch[mine], every_index[mine]  # (B,), (B,)
        pixels = images.read(indices, copy=False) if resident is None else resident[indices]
        seen = view(pixels, size, epochs, indices)
        seen_by_teacher = seen if size == teachers_size else view(pixels, teachers_size, epochs, indices)
        if targets is None:
            return seen, seen_by_teacher
        labelled = int((targets[every_index] >= 0).sum())
        return seen, seen_by_teacher, torch.from_numpy(targets[indices]).to(world.device), labelled

    return batch


def _claim(folder: RunFolder, identity: dict[str, Any], origin: dict[str, Any]) -> int:
    """Make the folder of a new run, or see that it holds the same one; how many threads that began with."""
    described = folder.path / "distill.json"
    if described.is_file():
        found = read_record(described, DistillRecord, remedy="restore it, or give another --out")
        threads = found.machine.cpu_threads
        if found.identity != json.loads(json.dumps(identity)):
            raise UserError(
                f"{folder.path} holds a distillation of other images, networks or settings; give another --out."
            )
    else:
        folder.refuse_existing()
        machine = describe_machine()
        content, threads = {"identity": identity, "origin": origin, "machine": machine}, machine["cpu_threads"]
        with writing(folder.path, hint="give another --out"):
            write_atomically(described, versioned(content))
    with writing(folder.path, hint="give another --out"):
        folder.checkpoints.mkdir(exist_ok=True)
    return threads


def _run(task: Task, folder: RunFolder, config: DistillConfig, world: DistributedContext) -> Outcome:
    start = restore(task, folder, world)
    if start:
        say(f"Going on from step {start} of {task.total_steps}.", main=world.is_main)
    with Progress(
        task.total_steps, start, config.batch_size, formats=task.method.metric_formats, main=world.is_main
    ) as progress:
        torch.set_flush_denormal(True)  # gradients of branches that begin at 0 are denormal: steps 9 times as long
        try:
            return train(
                task, folder, world,
                start_step=start, workers=config.workers, log_every=config.log_every, save_every=config.save_every,
                max_checkpoints=config.max_checkpoints, progress=progress,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            raise UserError(
                f"Distilling {config.batch_size} images at a time does not fit the GPU's memory; give a smaller "
                "--batch-size, or more processes."
            ) from None
        finally:
            torch.set_flush_denormal(False)


def _report_end(
    folder: RunFolder, outcome: Outcome, images: Images, config: DistillConfig, tested: dict[str, float],
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
            "test_accuracy": tested,
        }
        with folder.writing():
            write_atomically(folder.summary, versioned(summary))
    say(f"Done: {outcome.step} steps. The student is in {folder.encoder}.")
