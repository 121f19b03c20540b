"""Fine-tuning on labels, and training from scratch on the same labels: SimCLR section 4.1 and B.5, SimCLR v2 section 2.

Training images are cropped and flipped, nothing else; test images are seen once, by their central square. The last
weights are tested, and no test label takes part in anything but the accuracy.

Shapes: n training and m test images, K classes.
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

from simclr.config.encoder import EncoderConfig
from simclr.config.finetune import FinetuneConfig
from simclr.data.images import Images
from simclr.data.labels import require_classes
from simclr.distributed import DistributedContext
from simclr.errors import Diverged, NotFinite, UserError
from simclr.methods.supervised import Classify, share_right
from simclr.models.batchnorm import set_global_batch_norm
from simclr.models.classifier import Classifier, read_for
from simclr.models.encoder import Encoder, build_encoder
from simclr.models.heads import ProjectionHead
from simclr.models.inference import device_of, outputs, require_channels
from simclr.training.batches import Batch, Inputs, make_batches
from simclr.training.device import precision_of
from simclr.training.fit import HERE, Execution, fit, temporary_run
from simclr.training.loop import Task
from simclr.training.optim import build_optimizer
from simclr.training.run import RunFolder, describe_machine
from simclr.views.policy import AugmentationPreset, crop_and_flip
from simclr.views.views import make_view
from simclr.weights.folder import digest_of, save_classifier
from simclr.weights.training_progress import TrainingProgress

TRAINING_VERSION = 1
"""Version of every training on labels: raise it when the same weights, images and settings give another network by more
than rounding (views, order, initial weights, optimisers, schedule, networks, the loop) or other test scores."""


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A network trained on labels, and what it says of the test images."""

    scores: np.ndarray
    """(m, K) float32 logits; column k stands for `labels[k]`."""
    targets: np.ndarray
    """(m,) int64 column of each test image's own label; where it may show several, its `Images.targets`, (m, K)."""
    accuracy: float
    """Top-1 over the test images, in [0, 1]; of several classes an image, share of those told rightly."""
    labels: np.ndarray
    """(K,) the labels that the training images have, ascending."""
    classes: list[str]
    """Their K names."""
    network: Classifier
    """The network, in inference mode; what was handed in is left as it was."""
    steps: int
    """Updates made."""
    config: FinetuneConfig
    seed: int


def finetune(
    encoder: Encoder,
    head: ProjectionHead | None,
    train: Images,
    test: Images,
    config: FinetuneConfig,
    *,
    seed: int,
    preset: AugmentationPreset = "google",
    execution: Execution = HERE,
) -> Finetuned:
    """Train a copy of the network on labelled images, then test it.

    Args:
        encoder: Where training begins.
        head: Its projection head; needed where `config.head_layer` is above 0.
        train: All labelled, of two classes at least; all processes have the same images.
        test: Labelled with classes that `train` has.
        seed: Of the order of the images and of the views. The classifier begins at zero.
        preset: Whose crops and evaluation preprocessing: those that the encoder was trained with.
        execution: Processes, folder and progress.

    Raises:
        UserError: Images, network and settings do not go together, memory or disk are full, or the loss is not
            finite.
        Stopped: A signal asked to stop.
    """
    labels, targets, test_targets = _class_targets(train, test)
    for images in (train, test):
        require_channels(encoder.config.channels, images)
    world = execution.world or DistributedContext(device=device_of(encoder))
    encoder = read_for(encoder, head)
    network = Classifier(deepcopy(encoder), deepcopy(head), len(labels), head_layer=config.head_layer)
    classes = train.label_names(labels)
    inputs = _inputs(network, train, targets, seed, preset)
    world.require_equal("training", inputs | config.result_fields(), "Give every process the same flags and files.")
    network = network.to(world.device).to(memory_format=torch.channels_last)
    task = _build_task(network, train, targets, config, seed, preset, world)
    if execution.run is None:
        config = replace(config, save_every=task.total_steps)
    steps = _fit(task, network, classes, preset, config, inputs, replace(execution, world=world))
    size = network.encoder.config.size
    try:
        scores = outputs(network, test, len(labels), size=size, preset=preset, world=world)  # (m, K)
    except NotFinite as error:
        raise Diverged(f"The trained network gives scores that are not finite; {task.method.remedy}") from error
    return Finetuned(
        scores=scores,
        targets=test_targets,
        accuracy=float(share_right(torch.from_numpy(scores).double(), torch.from_numpy(test_targets))),
        labels=labels,
        classes=classes,
        network=network.eval(),
        steps=steps,
        config=config,
        seed=seed,
    )


def _fit(
    task: Task,
    network: Classifier,
    classes: list[str],
    preset: AugmentationPreset,
    config: FinetuneConfig,
    inputs: dict[str, Any],
    execution: Execution,
) -> int:
    """Train in the folder of the execution, or in a temporary one; the number of updates made."""
    world, run = execution.world, execution.run
    assert world is not None
    progress = execution.progress or (lambda done, total: None)
    if run is None:
        with temporary_run(world) as folder:
            return fit(task, folder, config, world, progress=progress).step
    folder = RunFolder(run, how_to_resume="the same command") if isinstance(run, Path) else run
    record = {"method": "supervised", "inputs": inputs, "machine": describe_machine(), **execution.manifest}
    task = _publishing(task, network, folder, classes, preset)
    return fit(task, folder, config, world, manifest=record, progress=progress).step


def supervised(
    shape: EncoderConfig,
    train: Images,
    test: Images,
    config: FinetuneConfig,
    *,
    seed: int,
    preset: AugmentationPreset = "google",
    execution: Execution = HERE,
) -> Finetuned:
    """Train a network of this shape from scratch on the same labels: the baseline of every table (B.3).

    Args:
        shape: The encoder's; its weights begin as `build_encoder` makes them from `seed`.

    The other arguments and the errors are those of `finetune`.
    """
    execution = replace(execution, world=execution.world or DistributedContext())
    encoder = build_encoder(shape, seed=seed)
    return finetune(encoder, None, train, test, config, seed=seed, preset=preset, execution=execution)


def _class_targets(train: Images, test: Images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The K labels of the training images, and the column of each training (n,) and test image (m,).

    Images of several classes have their targets instead, (n, K) and (m, K), and a column for each class.
    """
    if train.targets is not None and test.targets is not None:
        return np.arange(train.targets.shape[1]), train.targets, test.targets
    for images in (train, test):
        without = len(images) if images.labels is None else int((images.labels < 0).sum())
        if without or not len(images):
            raise UserError(
                f"{images.name} ({images.split}): {without} of {len(images)} images have no label, and learning from "
                "labels needs some, and one for each image; leave the others out."
            )
    assert train.labels is not None and test.labels is not None
    require_classes(train, test)
    labels, targets = np.unique(train.labels, return_inverse=True)
    return labels, targets, np.searchsorted(labels, test.labels)


def _build_task(
    network: Classifier,
    train: Images,
    targets: np.ndarray,
    config: FinetuneConfig,
    seed: int,
    preset: AugmentationPreset,
    world: DistributedContext,
) -> Task:
    method = Classify(network, tune_from=config.tune_from, world=world)
    if world.size > 1:
        set_global_batch_norm(method, world.group)
    if config.batch_norm_decay is not None:
        for layer in method.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.momentum = 1 - config.batch_norm_decay
    return Task(
        method=method,
        batch=_batches(network, train, targets, config, seed, preset, world),
        optimizer=build_optimizer(
            config.optimizer, method, lr=config.peak, weight_decay=config.weight_decay, momentum=config.momentum,
            nesterov=config.nesterov, supervised=method.supervised,
        ),
        learning_rate=config.learning_rate(len(train)),
        total_steps=config.steps(len(train)),
        batch_size=config.batch_size,
        seed=seed,
        precision=precision_of(config.precision, world),
    )  # fmt: skip


def _batches(
    network: Classifier,
    train: Images,
    targets: np.ndarray,
    config: FinetuneConfig,
    seed: int,
    preset: AugmentationPreset,
    world: DistributedContext,
) -> Callable[[int], Inputs]:
    """Step -> this process's views (B, C, S, S) and targets (B,), on its device."""
    policy = crop_and_flip(
        preset, network.encoder.config.size, channels=train.channels, crop_min=config.crop_min, flip=config.flip
    )
    dtype = precision_of(config.precision, world)

    def inputs(batch: Batch) -> Inputs:
        view = make_view(
            batch.pixels, policy, seed=seed, epoch=batch.epochs, indices=batch.indices, device=world.device, dtype=dtype
        )
        return view, torch.from_numpy(targets[train.items_read(batch.indices)]).to(world.device)

    return make_batches(train, inputs, batch_size=config.batch_size, seed=seed, world=world)


def _inputs(
    network: Classifier, train: Images, targets: np.ndarray, seed: int, preset: AugmentationPreset
) -> dict[str, Any]:
    """What a training depends on beside its settings, as JSON can hold it: one that is resumed must have the same."""
    return {
        "version": TRAINING_VERSION,
        "seed": seed,
        "preset": preset,
        "images": train.fingerprint,
        "targets": sha256(targets.astype("<i8").tobytes()).hexdigest(),
        "weights": digest_of(network),
    }


def _publishing(
    task: Task, network: Classifier, folder: RunFolder, classes: list[str], preset: AugmentationPreset
) -> Task:
    origin = {"method": "finetune", "run": str(folder.path)}

    def publish(step: int) -> None:
        save_classifier(
            network, folder.encoder,
            classes=classes, preprocessing=preset, origin=origin, progress=TrainingProgress(step, task.total_steps),
        )  # fmt: skip

    return replace(task, publish=publish)
