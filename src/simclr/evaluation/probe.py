"""Probes: transformations of images read from h, the projection head and the layers of the backbone (SimCLR, table 3).

The paper asks of h and of z = g(h): was the image colour or gray, how was it rotated, was it corrupted, was it
filtered? An MLP reads the answer from frozen features of transformed images. h keeps what the contrastive loss lets z
forget: 67.6 against 25.6 % on rotation. In the paper the last three transformations were part of pretraining too.

Shapes: B images, n of them in all, C channels, S x S pixels, F features of a layer, K classes of a task.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.config.encoder import TIMM
from simclr.data.images import Images
from simclr.data.splits import split_indices
from simclr.errors import UserError
from simclr.models.classifier import read_for
from simclr.models.encoder import Encoder
from simclr.models.heads import ProjectionHead
from simclr.models.inference import device_of, inference, require_channels, require_finite
from simclr.models.init import seeded
from simclr.models.resnet import ResNet
from simclr.random import shuffled, uniforms
from simclr.views.policy import AugmentationPreset
from simclr.views.views import eval_images

if TYPE_CHECKING:
    from simclr.evaluation.subjects import EvaluatedModel

PROBE_VERSION = 1
"""Raise it when the same network, images and settings (`probe_settings`) give other accuracies: transformations,
layers, or the training of the MLP."""
TASKS = {
    "colour": (0.2, 0.8),  # gray, colour: grayscale with the probability that pretraining gives it
    "rotation": (0.25, 0.25, 0.25, 0.25),  # 0, 90, 180, 270 degrees, counter-clockwise
    "corrupted": (0.5, 0.5),  # original, with Gaussian noise
    "sobel": (0.5, 0.5),  # original, Sobel filtered
}
"""Task -> share of images with each answer; the largest share is chance, as in the paper."""

NOISE = 0.1  # standard deviation of the corruption, white is 1; the paper's is not published
LUMA = (0.2989, 0.587, 0.114)  # of the authors' grayscale
TRAIN_ROWS, TEST_ROWS = 20_000, 10_000  # at most; features of all layers are in memory together
HIDDEN = 512  # units of the MLP's one hidden layer
RATE, DECAY, BATCH, EPOCHS, PATIENCE = 1e-3, 1e-4, 256, 60, 6  # AdamW; PATIENCE epochs without a better validation loss
VALIDATION = 0.1  # of the training rows: when to stop


def probe_settings() -> dict[str, Any]:
    """The constants that decide the accuracies, as JSON can hold them."""
    return {
        "tasks": {task: list(shares) for task, shares in TASKS.items()}, "noise": NOISE, "luma": list(LUMA),
        "rows": [TRAIN_ROWS, TEST_ROWS], "hidden": HIDDEN, "rate": RATE, "decay": DECAY, "batch_size": BATCH,
        "epochs": EPOCHS, "patience": PATIENCE, "validation": VALIDATION,
    }  # fmt: skip


@dataclass(frozen=True)
class Probes:
    """Accuracies in [0, 1] by layer and task, on transformed test images."""

    table: dict[str, dict[str, float]]
    chance: dict[str, float]
    num_train: int
    num_test: int
    notes: list[str]
    """What was left out, and why."""

    @property
    def metrics(self) -> dict[str, float | None]:
        """The table as metrics of a `Result`: "LAYER/TASK" -> accuracy."""
        return {f"{layer}/{task}": share for layer, tasks in self.table.items() for task, share in tasks.items()}

    @property
    def details(self) -> dict[str, Any]:
        """Everything else, as JSON can hold it."""
        return {name: value for name, value in asdict(self).items() if name != "table"}


def probe(
    subject: "EvaluatedModel",
    train: Images,
    test: Images,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    layers: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Probes:
    """Train an MLP for each task on each layer's features of `train`, and test it on `test`.

    No label of the data takes part. The features of all layers come out of one pass per task.

    Args:
        subject: A model with a network, on the device where the work is to be done; frozen, its mode is restored. The
            layers of its projection head are probed too, if it has one.
        tasks: Some of TASKS.
        layers: Some of `layers_of(encoder, head)`; None: all.
        seed: Of the transformations, of the rows where there are more than TRAIN_ROWS, and of the probes.
        progress: Called with what is being done.

    Raises:
        UserError: No network, an unknown task or layer, too few images, or images of other channels than the encoder's.
    """
    encoder = subject.encoder
    if encoder is None:
        raise UserError(
            f"The protocol probe looks at the layers of a network; {subject.name} has none, give an encoder."
        )
    encoder = read_for(encoder, subject.head)
    known = layers_of(encoder, subject.head)
    layers = known if layers is None else list(layers)
    _require_known("layer", layers, known)
    _require_known("task", tasks, list(TASKS))
    for part in (train, test):
        require_channels(encoder.config.channels, part)
    train, test = _at_most(train, TRAIN_ROWS, seed), _at_most(test, TEST_ROWS, seed)
    if len(train) < 20 or not len(test):
        raise UserError(
            f"{len(train)} training and {len(test)} test images are too few to probe; give 20 and 1 or more."
        )
    notes = []
    if "colour" in tasks and _is_gray(train):
        notes.append("Colour or gray is left out: the images are gray.")
        tasks = [task for task in tasks if task != "colour"]

    table: dict[str, dict[str, float]] = {layer: {} for layer in layers}
    device = device_of(encoder)
    for task in tasks:
        progress(f"{task}: features")
        learn, answers = _features(subject, train, task, layers, seed)
        queries, truth = _features(subject, test, task, layers, seed)
        for layer in layers:
            progress(f"{task}: probing {layer}")
            predicted = fit_predict(learn[layer], answers, queries[layer], seed=seed, device=device)
            table[layer][task] = float((predicted == truth).mean())
    return Probes(table, {task: max(TASKS[task]) for task in tasks}, len(train), len(test), notes)


def _require_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"There is no {what} {name!r} to probe; give some of {', '.join(known)}.")


def layers_of(encoder: Encoder, head: ProjectionHead | None) -> list[str]:
    """Names of the layers that can be probed, from the pixels upwards: "stem", "group1", ..., "h", "head.0", ..., "z".

    Models of timm have the stages that timm names ("stage0", ...), torchvision's ResNets theirs ("layer1", ...), its
    other models h alone.
    """
    depth = 0 if head is None else len(head.layers)
    return [*_stages(encoder), "h", *(f"head.{k}" for k in range(depth - 1)), *["z"][:depth]]


def transformed(
    images: Images,
    task: str,
    seed: int,
    *,
    size: int,
    preset: AugmentationPreset = "google",
    device: torch.device | str = "cpu",
    chunk: int = 256,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Evaluation pixels, each image changed in one of the task's ways: a pure function of (seed, task, index, image).

    Returns:
        Batches of (B, C, S, S) floats in [0, 1] and (B,) answers, in the order of the data.
    """
    stream = list(TASKS).index(task)
    ends = np.cumsum(TASKS[task])[:-1]
    for begin in range(0, len(images), chunk):
        rows = np.arange(begin, min(begin + chunk, len(images)))
        answers = np.searchsorted(ends, uniforms(seed, 0, rows, stream, 0)[:, 0], side="right")  # (B,)
        pixels = eval_images(images.read(rows, copy=False), size, preset, device=device)  # (B, C, S, S)
        yield _transform(pixels, task, answers, rows, seed), answers


def fit_predict(
    train: np.ndarray, answers: np.ndarray, test: np.ndarray, *, seed: int, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Answers that an MLP of one hidden layer gives for `test` (m, F), after learning from `train` (n, F).

    Features are standardised by the training rows. A tenth of these, stratified, says when to stop; the weights are
    those of the best validation loss. In torch, not scikit-learn's MLPClassifier, to run on the encoder's device.
    """
    learn, validate = split_indices(answers, fraction=VALIDATION, seed=seed)
    mean, std = train[learn].mean(0), train[learn].std(0)
    std[std < 1e-6] = 1.0  # a dead feature

    def ready(features: np.ndarray) -> Tensor:
        return torch.from_numpy(((features - mean) / std).astype(np.float32)).to(device)

    x, y = ready(train), torch.from_numpy(answers.astype(np.int64)).to(device)
    with seeded(seed, "probe"):
        mlp = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, int(answers.max()) + 1))
    mlp.to(device)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=RATE, weight_decay=DECAY)
    best, best_loss, since = mlp.state_dict(), float("inf"), 0
    for epoch in range(EPOCHS):
        order = learn[shuffled(len(learn), seed, epoch)]
        for begin in range(0, len(order), BATCH):
            rows = torch.from_numpy(order[begin : begin + BATCH]).to(device)
            optimizer.zero_grad()
            F.cross_entropy(mlp(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(F.cross_entropy(mlp(x[validate]), y[validate])) if len(validate) else -float(epoch)
        since += 1
        if loss < best_loss:
            best, best_loss, since = {k: v.clone() for k, v in mlp.state_dict().items()}, loss, 0
        if since == PATIENCE:
            break
    mlp.load_state_dict(best)
    with torch.no_grad():
        return mlp(ready(test)).argmax(1).cpu().numpy()


def _features(
    subject: "EvaluatedModel", images: Images, task: str, layers: Sequence[str], seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(n, F) features of each layer, averaged over positions where it has them, and (n,) answers."""
    encoder, head = subject.encoder, subject.head
    assert encoder is not None
    encoder = read_for(encoder, head)
    seen: dict[str, Tensor] = {}

    def keep(name: str, channels: int | None, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen[name] = _pooled(output, channels)

    batches: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    answers = []
    with ExitStack() as stack:
        stack.enter_context(inference(encoder))
        if head is not None:
            stack.enter_context(inference(head))
        for name, (module, channels) in _stages(encoder).items():
            if name in layers:
                stack.callback(module.register_forward_hook(partial(keep, name, channels)).remove)
        for pixels, targets in transformed(
            images, task, seed, size=encoder.config.size, preset=subject.preprocessing, device=device_of(encoder)
        ):
            h = encoder(pixels)
            above = [h] if head is None else head.hiddens(h)
            seen |= dict(zip(layers_of(encoder, head)[-len(above) :], above, strict=True))
            for layer in layers:
                batches[layer].append(seen[layer].float().cpu())
            answers.append(targets)
    features = {layer: torch.cat(parts).numpy() for layer, parts in batches.items()}
    for layer, rows in features.items():
        require_finite(rows, f"{layer} layer's")
    return features, np.concatenate(answers)


def _stages(encoder: Encoder) -> dict[str, tuple[nn.Module, int | None]]:
    """Name -> module, and its number of channels where it may not be the second axis."""
    backbone = encoder.backbone
    if isinstance(backbone, ResNet):
        groups = {f"group{k}": (group, None) for k, group in enumerate(backbone.groups, 1)}
        return {"stem": (backbone.stem, None), **groups}
    if encoder.config.name.startswith(TIMM):
        described: Any = getattr(backbone, "feature_info", [])  # dictionaries, or timm's object that holds them
        stages = getattr(described, "info", described)
        return {f"stage{k}": (backbone.get_submodule(s["module"]), s["num_chs"]) for k, s in enumerate(stages)}
    return {name: (module, None) for name, module in backbone.named_children() if re.fullmatch(r"layer\d", name)}


def _pooled(output: Tensor, channels: int | None) -> Tensor:
    """(B, F, H, W), (B, H, W, F) or (B, tokens, F) -> (B, F)."""
    if output.ndim == 4:
        last = channels is not None and output.shape[1] != channels
        return output.mean((1, 2) if last else (2, 3))
    return output.mean(1) if output.ndim == 3 else output


def _transform(pixels: Tensor, task: str, answers: np.ndarray, rows: np.ndarray, seed: int) -> Tensor:
    if task == "rotation":
        turned = [torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(pixels, answers, strict=True)]
        return torch.stack(turned)
    change = torch.from_numpy(answers == (0 if task == "colour" else 1)).to(pixels.device)
    changed = pixels.clone(memory_format=torch.contiguous_format)
    if task == "colour":
        gray = torch.einsum("bchw,c->bhw", pixels[change], pixels.new_tensor(LUMA))
        changed[change] = gray[:, None].expand_as(changed[change])
    elif task == "corrupted":
        noise = _normals(seed, rows[change.cpu().numpy()], pixels[0].numel())
        noise = torch.from_numpy(noise).to(pixels).view(-1, *pixels.shape[1:])
        changed[change] = (changed[change] + NOISE * noise).clamp_(0, 1)
    else:
        changed[change] = sobel(changed[change])
    return changed


def sobel(pixels: Tensor) -> Tensor:
    """Length of the Sobel gradient of each channel, edges repeated; a step from 0 to 1 gives 1. (B, C, H, W)."""
    kernel = pixels.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 4
    flat = F.pad(pixels.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")  # (B * C, 1, H + 2, W + 2)
    gradient = F.conv2d(flat, torch.stack([kernel, kernel.T])[:, None])  # (B * C, 2, H, W)
    return gradient.norm(dim=1).clamp_(max=1).view(pixels.shape)


def _normals(seed: int, rows: np.ndarray, count: int) -> np.ndarray:
    """(B, count) standard normal numbers by Box and Muller, from counters: an image's do not depend on its batch."""
    blocks = np.arange(1, -(-count // 4) + 1)  # block 0 holds the answer
    u = uniforms(seed, 0, rows[:, None], list(TASKS).index("corrupted"), blocks)  # (B, blocks, 4)
    radius, angle = np.sqrt(-2 * np.log1p(-u[..., :2])), 2 * np.pi * u[..., 2:]
    normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # (B, blocks, 4)
    return normals.reshape(len(rows), -1)[:, :count]


def _at_most(images: Images, rows: int, seed: int) -> Images:
    return images if len(images) <= rows else images.subset(np.sort(shuffled(len(images), seed, 0)[:rows]))


def _is_gray(images: Images) -> bool:
    """Whether there is no colour to tell from gray, by up to a thousand images."""
    if images.channels == 1:
        return True
    looked_at = images.read(np.linspace(0, len(images) - 1, min(1000, len(images))).astype(int), copy=False)
    return all(bool((image == image[..., :1]).all()) for image in looked_at)
