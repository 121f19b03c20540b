"""Pretraining, put together: images and settings become a task, the loop trains it, the run folder keeps it."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr.config.encoder import EncoderConfig
from simclr.config.pretrain import PretrainConfig
from simclr.config.records import versioned
from simclr.config.schedule import learning_rate, peak_lr, total_steps, warmup_steps
from simclr.data.fingerprint import SCHEME, first_scheme
from simclr.data.images import Images
from simclr.data.order import EndlessOrder
from simclr.data.splits import split_indices
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.knn import knn
from simclr.evaluation.metrics import accuracy
from simclr.files import write_atomically
from simclr.methods.simclr import SimCLR
from simclr.models.activation_checkpointing import checkpoint_blocks
from simclr.models.batchnorm import set_global_batch_norm, track_once
from simclr.models.encoder import build_encoder
from simclr.models.inference import extract
from simclr.training.device import choose_kernels, keep_on_gpu, precision_of
from simclr.training.loop import Inputs, Outcome, Task, restore, train
from simclr.training.memory import out_of_memory, settle
from simclr.training.optim import build_optimizer
from simclr.training.progress import Progress, say
from simclr.training.run import RunFolder, create_run, hold
from simclr.views.policy import Policy
from simclr.views.views import has_kernels, make_views
from simclr.weights.folder import save_encoder
from simclr.weights.training_progress import TrainingProgress

MONITOR_ROWS = 10_000  # labelled training images that the kNN check during training looks at


def policy_of(config: PretrainConfig, channels: int) -> Policy:
    """The distribution of views that the settings ask for."""
    make_policy = Policy.google if config.augmentation == "google" else Policy.torchvision
    policy = make_policy(
        config.size,
        strength=config.strength,
        channels=channels,
        crop_area=(config.crop_min, 1.0),
        flip=config.flip,
        jitter=config.jitter,
        gray=config.grayscale if channels == 3 else 0.0,
        blur=config.blur,
    )
    return replace(policy, brightness_mode=config.brightness)


def check_settings(config: PretrainConfig, world: DistributedContext) -> None:
    """Fail before any image is read where a setting alone is wrong."""
    EncoderConfig(name=config.encoder, width=config.width, stem=config.stem, sk=config.sk, channels=3, size=config.size)
    policy_of(config, channels=3)
    precision_of(config.precision, world)
    world.local_slice(config.batch_size)
    share = config.batch_size // world.size
    if config.chunk and share % config.chunk:
        raise UserError(
            f"--chunk was {config.chunk}; it must divide the {share} images of a batch that a process has, or be 0."
        )


def check_images(images: Images, config: PretrainConfig, world: DistributedContext) -> None:
    """Fail before anything is written where the images and the settings do not fit each other."""
    if len(images) < 2:
        raise UserError(f"{images.name} has {len(images)} image; contrast needs at least two.")
    if config.batch_size > len(images):
        raise UserError(
            f"--batch-size was {config.batch_size}, more than the {len(images)} images in {images.name}; "
            f"give at most {len(images)}."
        )
    world.local_slice(config.batch_size)


def pretrain(
    images: Images,
    config: PretrainConfig,
    run: RunFolder,
    world: DistributedContext,
    *,
    origin: dict[str, Any] | None = None,
    memory_budget: int | None = None,
) -> Outcome:
    """Train, from the newest good checkpoint of the run if it has one, until the end or a signal.

    The run's folder is held for the time being: no other process can write it.

    Args:
        images: All processes open the same images.
        run: Only the main process writes to it.
        world: The processes that share each batch.
        origin: Of a new run (`origin_of`): its folder is made once all else is known to be good. None: the
            folder exists.
        memory_budget: Bytes that a process of a new run may take; None: nearly all that are free.

    Raises:
        UserError: Images and settings do not go together, another process writes the run, or memory, disk or the loss
            gave out.
    """
    with hold(run.path, world):
        return _pretrain(images, config, run, world, origin, memory_budget)


def _pretrain(
    images: Images,
    config: PretrainConfig,
    run: RunFolder,
    world: DistributedContext,
    origin: dict[str, Any] | None,
    memory_budget: int | None,
) -> Outcome:
    check_images(images, config, world)
    choose_kernels(world, deterministic=config.deterministic)
    if origin is None:  # a chunk is part of the result: a run keeps the strategy that it began on
        saved = run.config
        config = replace(config, memory="plain" if saved.memory == "auto" else saved.memory, chunk=saved.chunk)
    else:
        build = partial(build_method, config, images.channels, DistributedContext(device=world.device))
        precision = precision_of(config.precision, world)
        config, sentence = settle(config, images, build, world, precision=precision, budget=memory_budget)
        say(sentence, main=world.is_main and bool(sentence))
    world.require_equal("settings", asdict(config), "Give every process the same flags.")
    task, steps_per_epoch = build_task(images, config, run, world)
    if origin is not None:
        world.on_main(partial(create_run, run.path, config, origin))
        where = f"; the run is in {run.path}" if run.lasting else ""
        say(f"Training {config.encoder} at {config.size} pixels for {config.epochs} epochs{where}.", main=world.is_main)
    start = restore(task, run, world)
    if start:
        say(f"Going on from step {start} of {task.total_steps}.", main=world.is_main)
    begun = time.perf_counter()
    views_per_step = config.batch_size * 2
    with Progress(
        task.total_steps, start, views_per_step, formats=task.method.metric_formats, main=world.is_main
    ) as progress:
        try:
            outcome = train(
                task, run, world,
                start_step=start, workers=config.workers, log_every=config.log_every, save_every=config.save_every,
                max_checkpoints=config.max_checkpoints, progress=progress,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            raise out_of_memory(config) from None
    if world.is_main:
        _report_end(outcome, images, run, steps_per_epoch, time.perf_counter() - begun, views_per_step)
    return outcome


def build_task(images: Images, config: PretrainConfig, run: RunFolder, world: DistributedContext) -> tuple[Task, float]:
    """The task of these settings, and how many steps an epoch has."""
    method = build_method(config, images.channels, world)
    if config.global_bn and world.size > 1:
        set_global_batch_norm(method, world.group)
    if config.memory == "checkpointing":
        checkpoint_blocks(method.encoder.backbone)
    if config.memory in ("checkpointing", "grad-cache"):
        track_once(method)

    n, batch_size = len(images), config.batch_size
    total = total_steps(n, config.epochs, batch_size)
    warmup = warmup_steps(n, config.warmup_epochs, batch_size)
    peak = peak_lr(config.lr, batch_size, config.lr_scaling)
    optimizer = build_optimizer(
        config.optimizer, method, lr=peak, weight_decay=config.weight_decay, momentum=config.momentum
    )
    task = Task(
        method=method,
        batch=_batches(images, policy_of(config, images.channels), config, world),
        optimizer=optimizer,
        learning_rate=lambda step: learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=total),
        total_steps=total,
        batch_size=batch_size,
        seed=config.seed,
        precision=precision_of(config.precision, world),
        grad_cache=config.memory == "grad-cache",
        evaluate=_knn_monitor(images, method, config) if world.is_main else None,
        evaluate_every=max(1, round(config.knn_every * n / batch_size)) if config.knn_every else 0,
        publish=lambda step: save_encoder(
            method.encoder,
            run.encoder,
            preprocessing=config.augmentation,
            origin={"method": "simclr", "run": str(run.path)},
            head=method.head,
            progress=TrainingProgress(step, total),
        ),
    )
    return task, n / batch_size


def build_method(config: PretrainConfig, channels: int, world: DistributedContext) -> SimCLR:
    """Encoder, head and loss, on the device of this process."""
    encoder_config = EncoderConfig(
        name=config.encoder, width=config.width, stem=config.stem, sk=config.sk, channels=channels, size=config.size,
    )  # fmt: skip
    encoder = build_encoder(encoder_config, seed=config.seed)
    method = SimCLR.build(encoder, config, world)
    return method.to(world.device).to(memory_format=torch.channels_last)


def _batches(
    images: Images, policy: Policy, config: PretrainConfig, world: DistributedContext
) -> Callable[[int], Inputs]:
    """step -> this process's two views, or, to cache gradients, what makes those of each chunk."""
    order = EndlessOrder(len(images), config.seed)
    resident = None
    if has_kernels(world.device):
        resident, sentence = keep_on_gpu(images, world)
        say(sentence, main=world.is_main)
    dtype = precision_of(config.precision, world)  # autocast would round the views to it anyway

    def batch(step: int) -> Inputs:
        mine = world.local_slice(config.batch_size)
        positions = np.arange(step * config.batch_size + mine.start, step * config.batch_size + mine.stop)
        epochs, indices = order.at(positions)  # (B,), (B,)
        pixels = images.read(indices, copy=False) if resident is None else resident[indices]
        views = partial(make_views, policy=policy, seed=config.seed, device=world.device, dtype=dtype)
        if config.memory != "grad-cache":
            return views(pixels, epoch=epochs, indices=indices)
        chunks = [slice(first, first + config.chunk) for first in range(0, len(indices), config.chunk)]
        return tuple(partial(views, pixels[rows], epoch=epochs[rows], indices=indices[rows]) for rows in chunks)

    return batch


def _knn_monitor(images: Images, method: SimCLR, config: PretrainConfig) -> Callable[[], dict[str, float]] | None:
    """kNN accuracy within the training images: a fifth of them asked of the rest. No test image is touched."""
    if images.labels is None or not config.knn_every:
        return None
    labelled = np.flatnonzero(images.labels >= 0)
    if len(labelled) > MONITOR_ROWS:
        labelled = np.sort(np.random.default_rng(config.seed).choice(labelled, MONITOR_ROWS, replace=False))
    if len(labelled) < 10 or len(np.unique(images.labels[labelled])) < 2:
        return None
    learn, ask = split_indices(images.labels[labelled], fraction=0.2, seed=config.seed)
    bank, queries = images.subset(labelled[learn]), images.subset(labelled[ask])
    assert bank.labels is not None and queries.labels is not None
    bank_labels, query_labels = bank.labels, queries.labels

    def monitor() -> dict[str, float]:
        features = [extract(method.encoder, part, preset=config.augmentation) for part in (bank, queries)]
        known = bank_labels[bank.items_read(np.arange(len(bank)))]
        asked = query_labels[queries.items_read(np.arange(len(queries)))]
        return {"knn": accuracy(knn(features[0], known, features[1]), asked)}

    return monitor


def _report_end(
    outcome: Outcome,
    images: Images,
    run: RunFolder,
    steps_per_epoch: float,
    seconds: float,
    views_per_step: int,
) -> None:
    if not outcome.finished:
        saved = f", saved; {run.resuming} goes on" if run.lasting else ""
        say(f"Stopped at step {outcome.step}{saved}.")
        return
    summary: dict[str, Any] = {
        "steps": outcome.step,
        "epochs": round(outcome.step / steps_per_epoch, 3),
        "images": len(images),
        "images_left_out": len(images.skipped),
        "images_replaced": len(images.replaced),
        "seconds_of_this_call": round(seconds, 1),
        "steps_of_this_call": outcome.steps_run,
        "views_per_second": round(outcome.steps_run * views_per_step / max(outcome.seconds, 1e-9), 1),
        "wait_share": round(outcome.wait_seconds / max(outcome.seconds, 1e-9), 4),
        "final": outcome.last,
        "warnings": outcome.warnings,
    }
    with run.writing():
        write_atomically(run.summary, versioned(summary))
    say(
        f"Done: {outcome.step} steps, {summary['views_per_second']:,.0f} views/s, {summary['wait_share']:.0%} of the "
        "time waiting for views." + (f" The encoder is in {run.encoder}." if run.lasting else "")
    )


def origin_of(images: Images, source: str, options: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """What run.json states: enough to open the same data again and to see that it is the same."""
    return {
        "data": {
            "source": source,
            "options": options,
            "name": images.name,
            "images": len(images),
            "channels": images.channels,
            "classes": images.classes,
            "left_out": [skipped._asdict() for skipped in images.skipped],
            "fingerprint": images.fingerprint,
        },
        "machine": machine,
    }


def same_data(images: Images, origin: dict[str, Any], run: Path, *, main: bool = True) -> None:
    """Refuse to go on with other images than the run began with."""
    saved = str(origin["data"]["fingerprint"])
    first = not saved.startswith(SCHEME)
    if first:
        say(
            f"{run} was begun by an earlier version, which did not keep what its images contain: their names, sizes "
            "and labels are compared.",
            main=main,
        )
    if saved != (first_scheme(images) if first else images.fingerprint):
        raise UserError(
            f"{origin['data']['source']} no longer holds the images that {run} began with ({origin['data']['images']} "
            f"then, {len(images)} now, or other contents); restore them, or start a new run."
        )
