"""Fine-tuning on labels, and training from scratch on the same labels: SimCLR section 4.1 and B.5, SimCLR v2 section 2.

Training images are cropped and flipped, nothing else; test images are seen once, by their central square. The last
weights are tested, and no test label takes part in anything but the accuracy.

Shapes: n training and m test images, K classes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr.config.encoder import EncoderConfig
from simclr.config.finetune import FinetuneConfig
from simclr.config.records import FinetuneRecord, read_record, versioned
from simclr.data.images import Images
from simclr.data.labels import require_classes
from simclr.data.order import EndlessOrder
from simclr.distributed import DistributedContext
from simclr.errors import Diverged, NotFinite, UserError
from simclr.files import write_atomically, writing
from simclr.methods.supervised import Classify, share_right
from simclr.models.batchnorm import set_global_batch_norm
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder, build_encoder
from simclr.models.heads import ProjectionHead
from simclr.models.inference import device_of, outputs, require_channels
from simclr.training.device import choose_kernels, keep_on_gpu, precision_of
from simclr.training.loop import Outcome, Task, restore
from simclr.training.loop import train as run_loop
from simclr.training.optim import build_optimizer
from simclr.training.run import RunFolder, hold
from simclr.views.policy import AugmentationPreset, crop_and_flip
from simclr.views.views import has_kernels, make_view
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


class Stopped(Exception):
    """A signal asked to stop; called again with the same run folder, the training goes on.

    Attributes:
        signal: Its number.
    """

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(f"stopped at step {outcome.step}")
        self.signal = outcome.signal


def finetune(
    encoder: Encoder,
    head: ProjectionHead | None,
    train: Images,
    test: Images,
    config: FinetuneConfig,
    *,
    seed: int,
    preset: AugmentationPreset = "google",
    world: DistributedContext | None = None,
    run: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Finetuned:
    """Train a copy of the network on labelled images, then test it.

    Args:
        encoder: Where training begins.
        head: Its projection head; needed where `config.head_layer` is above 0.
        train: All labelled, of two classes at least; all processes have the same images.
        test: Labelled with classes that `train` has.
        seed: Of the order of the images and of the views. The classifier begins at zero.
        preset: Whose crops and evaluation preprocessing: those that the encoder was trained with.
        world: The processes that share each batch; None: this process, where the encoder is.
        run: Folder for records, checkpoints and the network (`simclr.load(run).classify`); where it holds an unfinished
            training of the same settings, that goes on bit for bit. None: nothing is kept.
        progress: Called with (done, total) steps.

    Raises:
        UserError: Images, network and settings do not go together, or memory, disk or the loss gave out.
        Stopped: A signal asked to stop.
    """
    labels, targets, test_targets = _class_targets(train, test)
    for images in (train, test):
        require_channels(encoder.config.channels, images)
    if world is None:
        world = DistributedContext(device=device_of(encoder))
    choose_kernels(world, deterministic=config.deterministic)
    network = Classifier(deepcopy(encoder), deepcopy(head), len(labels), head_layer=config.head_layer)
    network = network.to(world.device).to(memory_format=torch.channels_last)
    classes = [str(label) if train.classes is None else train.classes[label] for label in labels]
    task = _build_task(network, train, targets, config, seed, preset, world)
    with _run_folder(run, _identity(network, train, targets, config, seed, preset), world) as folder:
        if run is not None:
            task = _publishing(task, network, folder, classes, preset)
        start = restore(task, folder, world)
        try:
            outcome = run_loop(
                task, folder, world,
                start_step=start, workers=config.workers, log_every=config.log_every,
                save_every=config.save_every if run is not None else task.total_steps,
                max_checkpoints=config.max_checkpoints, progress=_Told(progress, task.total_steps),
            )  # fmt: skip
        except torch.OutOfMemoryError:
            raise UserError(
                f"Training on {config.batch_size} images at a time does not fit the GPU's memory; give a smaller "
                "--batch-size, or more processes."
            ) from None
        if outcome.signal is not None:  # also in the last step: what follows must not begin
            raise Stopped(outcome)
    try:
        scores = outputs(
            network, test, len(labels), size=network.encoder.config.size, preset=preset, world=world
        )  # (m, K)
    except NotFinite as error:
        raise Diverged(f"The trained network gives scores that are not finite; {task.method.remedy}") from error
    return Finetuned(
        scores=scores,
        targets=test_targets,
        accuracy=float(share_right(torch.from_numpy(scores).double(), torch.from_numpy(test_targets))),
        labels=labels,
        classes=classes,
        network=network.eval(),
        steps=outcome.step,
        config=config,
        seed=seed,
    )


def supervised(
    shape: EncoderConfig,
    train: Images,
    test: Images,
    config: FinetuneConfig,
    *,
    seed: int,
    preset: AugmentationPreset = "google",
    world: DistributedContext | None = None,
    run: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Finetuned:
    """Train a network of this shape from scratch on the same labels: the baseline of every table (B.3).

    Args:
        shape: The encoder's; its weights begin as `build_encoder` makes them from `seed`.

    The other arguments and the errors are those of `finetune`.
    """
    world = DistributedContext() if world is None else world
    fresh = build_encoder(shape, seed=seed)
    return finetune(
        fresh, None, train, test, config,
        seed=seed, preset=preset, world=world, run=run, progress=progress,
    )  # fmt: skip


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
            supervised=True,
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
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> this process's views (B, C, S, S) and targets (B,), on its device."""
    policy = crop_and_flip(
        preset,
        network.encoder.config.size,
        channels=train.channels,
        crop_min=config.crop_min,
        flip=config.flip,
    )
    order = EndlessOrder(len(train), seed)
    resident = keep_on_gpu(train, world)[0] if has_kernels(world.device) else None
    view = partial(
        make_view, policy=policy, seed=seed, device=world.device, dtype=precision_of(config.precision, world)
    )

    def batch(step: int) -> tuple[Tensor, Tensor]:
        mine = world.local_slice(config.batch_size)
        positions = np.arange(step * config.batch_size + mine.start, step * config.batch_size + mine.stop)
        epochs, indices = order.at(positions)  # (B,), (B,)
        pixels = train.read(indices, copy=False) if resident is None else resident[indices]
        read = torch.from_numpy(targets[train.items_read(indices)])
        return view(pixels, epoch=epochs, indices=indices), read.to(world.device)

    return batch


def _identity(
    network: Classifier,
    train: Images,
    targets: np.ndarray,
    config: FinetuneConfig,
    seed: int,
    preset: AugmentationPreset,
) -> dict[str, Any]:
    """What a training depends on, as JSON can hold it: one that is resumed must have the same."""
    return {
        "config": config.result_fields(),
        "seed": seed,
        "semantics": preset,
        "images": train.fingerprint,
        "targets": sha256(targets.astype("<i8").tobytes()).hexdigest(),
        "weights": digest_of(network),
    }


@contextmanager
def _run_folder(path: Path | None, identity: dict[str, Any], world: DistributedContext) -> Iterator[RunFolder]:
    """The folder that the loop writes to: a new one, one that holds the same training, or one for the time being."""
    world.require_equal("training", identity, "Give every process the same flags and files.")
    if path is None:
        with TemporaryDirectory(prefix="simclr-") if world.is_main else nullcontext("") as scratch:
            folder = RunFolder(Path(world.broadcast(scratch)))
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            yield folder
        return
    folder = RunFolder(path, how_to_resume="run the same command again")
    with hold(path, world):
        world.on_main(partial(_claim, folder, identity))
        yield folder


def _claim(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Make the folder of a new training, or see that it holds the same one."""
    described = folder.path / "finetune.json"
    if not described.is_file():
        folder.refuse_existing()
    elif _described(described) != json.loads(json.dumps(identity)):
        raise UserError(f"{folder.path} holds a training of other settings, images or weights; give another folder.")
    with writing(folder.path, hint="give another folder"):
        if not described.is_file():
            write_atomically(described, versioned(identity))
        folder.checkpoints.mkdir(exist_ok=True)


def _described(file: Path) -> dict[str, Any]:
    """What an earlier training in the folder depends on."""
    record = read_record(file, FinetuneRecord, remedy="restore it, or give another folder")
    return record.model_dump(exclude={"schema_version"})


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


class _Told:
    """What the loop tells, as calls of (done, total) steps."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress, self._total = progress, total

    def step(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)

    def record(self, record: dict[str, float], outcome: Outcome) -> None:
        self.step(outcome.step)
