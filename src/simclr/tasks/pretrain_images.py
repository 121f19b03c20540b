"""Pretraining, put together: images and settings become a task, the loop trains it, the run folder keeps it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr.config.pretrain import PretrainConfig
from simclr.config.records import versioned
from simclr.data.fingerprint import SCHEME, first_scheme
from simclr.data.images import Images, require_no_colour
from simclr.data.splits import split_indices
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.knn import knn
from simclr.evaluation.metrics import accuracy
from simclr.files import write_atomically
from simclr.methods import find_method, method_name
from simclr.methods.method import Method
from simclr.models.activation_checkpointing import checkpoint_blocks
from simclr.models.batchnorm import set_global_batch_norm, track_once
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder, build_encoder, encoder_of, read_as, trained_encoder_of
from simclr.models.heads import ProjectionHead
from simclr.models.inference import extract, scaled
from simclr.tasks.initial import InitialWeights
from simclr.tasks.pretrain_views import (
    check_small_crops,
    check_views,
    describe_views,
    policies_of,
    policy_of,
    require_small_inputs,
)
from simclr.training.batches import Batch, Inputs, make_batches
from simclr.training.cuda_graph import obstacle
from simclr.training.device import choose_kernels, precision_of
from simclr.training.fit import fit
from simclr.training.lock import hold
from simclr.training.loop import Task
from simclr.training.memory import out_of_memory, settle
from simclr.training.optim import build_optimizer
from simclr.training.progress import Outcome, say
from simclr.training.run import RunFolder, describe_machine
from simclr.views.views import make_views
from simclr.weights.folder import save_classifier, save_encoder
from simclr.weights.training_progress import TrainingProgress

MONITOR_ROWS = 10_000  # labelled training images that the kNN check during training looks at


def check_settings(config: PretrainConfig, world: DistributedContext, method: type[Method] | None = None) -> None:
    """Fail before any image is read where a setting alone is wrong."""
    for describe in (encoder_of, trained_encoder_of):
        describe(config, channels=3)
    policy_of(config, channels=3)
    precision_of(config.precision, world)
    check_views(config, method or find_method(config.method))
    world.local_slice(config.batch_size)
    share = config.batch_size // world.size
    if config.chunk and share % config.chunk:
        raise UserError(
            f"--chunk was {config.chunk}; it must divide the {share} images of a batch that a process has, or be 0."
        )


def check_images(
    images: Images, config: PretrainConfig, world: DistributedContext, method: type[Method] | None = None,
    initial: InitialWeights | None = None,
) -> None:  # fmt: skip
    """Fail before anything is written where images, settings and method do not fit each other."""
    if len(images) < 2:
        raise UserError(f"{images.name} has {len(images)} image; contrast needs at least two.")
    if initial is not None:
        require_no_colour(images.channels, initial.encoder.config.channels, images.name, who=f"--init {initial.name}")
    if config.batch_size > len(images):
        raise UserError(
            f"--batch-size was {config.batch_size}, more than the {len(images)} images in {images.name}; "
            f"give at most {len(images)}."
        )
    world.local_slice(config.batch_size)
    method = method or find_method(config.method)
    check_views(config, method)
    check_small_crops(config)
    method.check(config, world, len(images))
    if method.takes_labels(config):
        class_targets(images)


def class_targets(images: Images) -> tuple[list[str], np.ndarray]:
    """The names of the K classes that occur, and the class of each image, (n,) int64 from 0 to K - 1.

    Raises:
        UserError: An image has no label, or there is one class alone.
    """
    without = len(images) if images.labels is None else int((images.labels < 0).sum())
    if without:
        raise UserError(
            f"{images.name}: {without:,} of {len(images):,} images have no label, which this method learns from; leave "
            "them out, give --labels-file, or take --method simclr with a --loss other than supcon."
        )
    assert images.labels is not None
    labels, targets = np.unique(images.labels, return_inverse=True)
    if len(labels) < 2:
        raise UserError(f"{images.name} has images of one class alone, and a classifier needs two; take other images.")
    return images.label_names(labels), targets.astype(np.int64)


def pretrain_images(
    images: Images,
    config: PretrainConfig,
    run: RunFolder,
    world: DistributedContext,
    *,
    manifest: dict[str, Any] | None = None,
    memory_budget: int | None = None,
    method: type[Method] | None = None,
    initial: InitialWeights | None = None,
) -> Outcome:
    """Train an encoder, from the newest good checkpoint of the run if it has one, until the end.

    Args:
        images: All processes open the same images.
        run: Only the main process writes to it.
        world: The processes that share each batch.
        manifest: Of a new run (`manifest_of`): its folder is made once all else is known to be good. None: the folder
            exists.
        memory_budget: Bytes that a process of a new run may take; None: nearly all that are free.
        method: What turns batches into a loss; None: what the settings name.
        initial: What training begins from, where the settings name it (`open_initial`, and `kept_weights` of a run that
            has begun); None: random weights.

    Raises:
        Stopped: A signal asked to stop; `simclr resume` continues.
        UserError: Images and settings do not go together, another process writes the run, or memory, disk or the loss
            gave out.
    """
    method = method or find_method(config.method)
    check_images(images, config, world, method, initial)
    assert (config.init is None) == (initial is None), "open_initial goes with the setting"
    with hold(run.path, world):
        config = settle_memory(
            images, config, run, world, method, initial, new=manifest is not None, budget=memory_budget
        )
        world.require_equal("settings", asdict(config), "Give every process the same flags.")
        task = build_task(images, config, run, world, method, initial)
        record = {} if initial is None else {"init": initial.record(task.method)}
        world.require_equal("initial weights", record, "Give every process the same files.")
        if manifest is not None:
            world.on_main(run.refuse_existing)
            manifest = manifest if initial is None else {**manifest, "inputs": record}
            start = "" if initial is None else initial.sentence(task.method)
            where = f"; the run is in {run.path}" if run.lasting else ""
            sizes = task.method.view_sizes
            views = f"at {config.size} pixels" if len(sizes) <= 2 else f"on {describe_views(sizes)}"
            say(
                f"Training {config.encoder} {views} for {config.epochs} epochs{start}{where}.",
                main=world.is_main,
            )
        begun = time.perf_counter()
        outcome = fit(task, run, config, world, manifest=manifest)
        if world.is_main:
            _report_end(outcome, images, run, config, time.perf_counter() - begun, task.views_per_step)
        return outcome


def settle_memory(
    images: Images, config: PretrainConfig, run: RunFolder, world: DistributedContext, method: type[Method],
    initial: InitialWeights | None = None, *, new: bool, budget: int | None,
) -> PretrainConfig:  # fmt: skip
    """The settings with memory strategy and chunk resolved; those of a run that has begun are part of its result."""
    if config.memory == "grad-cache" and not method.grad_cache:
        raise UserError(
            f"{method.__name__} cannot be trained with --memory grad-cache, because it does not split its forward "
            "pass; take plain or checkpointing."
        )
    if not new:
        saved = run.config
        return replace(config, memory="plain" if saved.memory == "auto" else saved.memory, chunk=saved.chunk)
    choose_kernels(world, deterministic=config.deterministic)
    build = partial(
        build_method, config, images.channels, DistributedContext(device=world.device), method, initial,
        num_classes=num_classes_of(images, method, config),
    )  # fmt: skip
    precision = precision_of(config.precision, world)
    config, sentence = settle(config, images, build, world, precision=precision, budget=budget)
    say(sentence, main=world.is_main and bool(sentence))
    return config


def build_task(
    images: Images, config: PretrainConfig, run: RunFolder, world: DistributedContext,
    kind: type[Method] | None = None, initial: InitialWeights | None = None,
) -> Task:  # fmt: skip
    """The task of these settings."""
    kind = kind or find_method(config.method)
    classes, targets = class_targets(images) if kind.takes_labels(config) else ([], None)
    method = build_method(config, images.channels, world, kind, initial, num_classes=len(classes) or None)
    if config.global_bn and world.size > 1:
        set_global_batch_norm(method, world.group)
    if config.memory == "checkpointing":
        checkpoint_blocks(method.encoder.backbone)
    if config.memory in ("checkpointing", "grad-cache"):
        track_once(method)

    unrecorded = obstacle(method, config.memory, world) if config.cuda_graph else ""
    say(unrecorded, main=world.is_main and bool(unrecorded))

    n, batch_size = len(images), config.batch_size
    total_steps = config.steps(n)
    origin = {"method": method_name(kind), "run": str(run.path)}

    def publish(step: int) -> None:
        networks, progress = method.published(), TrainingProgress(step, total_steps)
        for name, head_name, folder in (("encoder", "head", run.encoder), ("key_encoder", "key_head", run.key_encoder)):
            encoder, head = networks.get(name), networks.get(head_name)
            assert head is None or isinstance(head, ProjectionHead)
            if isinstance(encoder, Encoder):
                made = origin if name == "encoder" else origin | {"average": True}
                save_encoder(
                    returned_encoder(encoder, images, config), folder, preprocessing=config.augmentation, origin=made,
                    head=head, progress=progress,
                )  # fmt: skip
        classifier = networks.get("classifier")
        if isinstance(classifier, Classifier):
            save_classifier(
                classifier, run.classifier, classes=classes, preprocessing=config.augmentation, origin=origin,
                progress=progress,
            )  # fmt: skip

    return Task(
        method=method,
        batch=make_batches(
            images, _make_inputs(images, config, world, method.view_sizes, targets),
            batch_size=batch_size, seed=config.seed, world=world,
            chunk=config.chunk if config.memory == "grad-cache" else 0, verbose=True,
        ),
        optimizer=build_optimizer(
            config.optimizer, method, lr=config.peak, weight_decay=config.weight_decay, momentum=config.momentum,
            nesterov=config.nesterov, decay_all=config.decay_all, supervised=method.supervised,
        ),
        learning_rate=config.learning_rate(n),
        total_steps=total_steps,
        batch_size=batch_size,
        seed=config.seed,
        precision=precision_of(config.precision, world),
        grad_cache=config.memory == "grad-cache",
        cuda_graph=config.cuda_graph and not unrecorded,
        out_of_memory=out_of_memory(config),
        evaluate=_knn_monitor(images, method.encoder, config) if world.is_main else None,
        evaluate_every=max(1, round(config.knn_every * n / batch_size)) if config.knn_every else 0,
        publish=publish,
        keep_inputs=None if initial is None else partial(initial.save, run.init, method, config.augmentation),
    )  # fmt: skip


def _make_inputs(
    images: Images, config: PretrainConfig, world: DistributedContext, view_sizes: Sequence[int],
    targets: np.ndarray | None = None,
) -> Callable[[Batch], Inputs]:  # fmt: skip
    """Batch -> its views, (B, C, S, S) each, on the device of this process, and its classes (B,) where there are any.

    Args:
        targets: (n,) int64 class of each image, for a method that takes labels.
    """
    policies = policies_of(config, images.channels, view_sizes)
    dtype = precision_of(config.precision, world)  # autocast would round the views to it anyway

    def views(batch: Batch) -> Inputs:
        made = make_views(
            batch.pixels, policies, seed=config.seed, epoch=batch.epochs, indices=batch.indices,
            views=range(len(policies)), device=world.device, dtype=dtype,
        )  # fmt: skip
        if targets is None:
            return made
        return *made, torch.from_numpy(targets[images.items_read(batch.indices)]).to(world.device)

    return views


def num_classes_of(images: Images, kind: type[Method], config: PretrainConfig) -> int | None:
    """Classes of the images, for a method that takes labels; None for one that takes none."""
    return len(class_targets(images)[0]) if kind.takes_labels(config) else None


def build_method(
    config: PretrainConfig, channels: int, world: DistributedContext, kind: type[Method] | None = None,
    initial: InitialWeights | None = None, *, num_classes: int | None = None,
) -> Method:  # fmt: skip
    """Encoder and loss, on the device of this process.

    Args:
        num_classes: For a method that takes labels.
    """
    kind = kind or find_method(config.method)
    if initial is None:
        encoder = build_encoder(trained_encoder_of(config, channels), seed=config.seed)
    else:
        encoder = initial.new_encoder(config.head_reads or config.feature)
    require_small_inputs(encoder, config)
    with torch.random.fork_rng([]):  # weights that a method draws from torch's generator depend on the seed alone
        torch.manual_seed(config.seed % 2**63)
        labelled = {} if num_classes is None else {"num_classes": num_classes}
        method = kind.build(encoder, config, world, **labelled)
    if initial is not None:
        initial.put_head(method)
    return method.to(world.device).to(memory_format=torch.channels_last)


def returned_encoder(encoder: Encoder, images: Images, config: PretrainConfig) -> Encoder:
    """The encoder in training as it is to be used: with the features that the settings ask for.

    Args:
        images: Training images, by which features are scaled.
    """
    encoder = read_as(encoder, config.feature)
    return encoder if config.scaling == "none" else scaled(encoder, config.scaling, images, preset=config.augmentation)


def _knn_monitor(images: Images, encoder: Encoder, config: PretrainConfig) -> Callable[[], dict[str, float]] | None:
    """KNN accuracy within the training images: a fifth of them asked of the rest. No test image is touched."""
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
        read = returned_encoder(encoder, bank, config)
        features = [extract(read, part, preset=config.augmentation) for part in (bank, queries)]
        known = bank_labels[bank.items_read(np.arange(len(bank)))]
        targets = query_labels[queries.items_read(np.arange(len(queries)))]
        return {"knn": accuracy(knn(features[0], known, features[1]), targets)}

    return monitor


def _report_end(
    outcome: Outcome, images: Images, run: RunFolder, config: PretrainConfig, seconds: float, views_per_step: int
) -> None:
    summary: dict[str, Any] = {
        "steps": outcome.step,
        "epochs": round(outcome.step * config.batch_size / len(images), 3),
        "images": len(images),
        "images_left_out": len(images.skipped),
        "images_replaced": len(images.replaced),
        "seconds_of_this_call": round(seconds, 1),
        "steps_of_this_call": outcome.steps_run,
        "steps_replayed": outcome.steps_replayed,
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


def manifest_of(images: Images, source: str, options: dict[str, Any], method: str = "simclr") -> dict[str, Any]:
    """What run.json states: enough to open the same data again and to see that it is the same.

    Args:
        source: Name or absolute path of the images.
        options: How they were opened (`OptionsRecord`).
        method: The name of the method (`method_name`).
    """
    return {
        "data": data_record(images, source, options),
        "machine": describe_machine(),
        "method": method,
    }


def data_record(images: Images, source: str, options: dict[str, Any]) -> dict[str, Any]:
    """The images of a run, as run.json keeps them."""
    return {
        "source": source,
        "options": options,
        "name": images.name,
        "images": len(images),
        "channels": images.channels,
        "classes": images.classes,
        "left_out": [skipped._asdict() for skipped in images.skipped],
        "fingerprint": images.fingerprint,
    }


def same_data(images: Images, origin: dict[str, Any], run: Path, *, main: bool = True) -> None:
    """Reject other images than those that the run was started with."""
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
