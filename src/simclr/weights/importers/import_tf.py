"""The authors' TensorFlow checkpoints of SimCLR v1 and v2 as our networks (google-research/simclr, resnet.py).

TensorFlow 1's variables are numbered in the order of creation (`base_model/conv2d_7/kernel`), and so are our modules
created: within a group's first block the projection shortcut comes first. Depth and width follow from both; then every
shape is compared before anything is built, and every variable is either used or listed as left out.
TensorFlow 2's get the same names from the objects that they belong to (`object_graph.py`).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simclr.config.encoder import RESNETS, EncoderConfig, Stem
from simclr.errors import UserError
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder, build_encoder
from simclr.models.heads import LinearClassifier, ProjectionHead
from simclr.models.restoring import require_match
from simclr.weights.importers.object_graph import OBJECT_GRAPH, ObjectGraph
from simclr.weights.importers.tensor_bundle import TensorBundle

ENCODER, HEAD, CLASSIFIER = "base_model/", "head_contrastive/", "head_supervised/"
EMA = "ema_model/"  # SimCLR v2's moving average of encoder and head, beside the weights themselves
STEP = "global_step"
# What TensorFlow 2's keys of the model begin with; those that the model's attributes lead to have TF1's names.
_TF2_MODEL = ("model/", "resnet_model/", "trainable_variables_list/")
_LINEAR = f"{CLASSIFIER}linear_layer/dense/"
_AUTHORS = tuple(name for name in RESNETS if name != "small")
_MOST_CHANNELS = 1 << 16
_SIZES: dict[Stem, int] = {"cifar": 32, "imagenet": 224}
# Steps of SimCLR v2's fine-tuning on 1 % and 10 % of ImageNet (60 and 30 epochs at batch 1024), which begins at the
# output of the projection head's first layer.
_STEPS_FROM_LAYER_1 = (751, 3754)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Imported:
    """What a checkpoint held."""

    encoder: Encoder
    head: ProjectionHead | None
    classifier: Classifier | None
    version: int
    """Of TensorFlow: 1 or 2."""
    step: int | None
    """Training steps that the checkpoint counts."""
    slots: tuple[str, ...]
    """Variables of the optimiser, which are never used."""
    left_out: tuple[str, ...]
    """All others that were not used."""


def import_tf(path: Path, *, size: int | None = None, ema: bool = False, head_layer: int | None = None) -> Imported:
    """Read a checkpoint.

    Args:
        path: What the names of the checkpoint's files begin with, or their folder; or the folder of a SavedModel.
        size: Pixels a side of the encoder's images; None: 32 for the small stem, 224 for the other.
        ema: Take encoder and projection head from `ema_model/`.
        head_layer: Layers of the projection head that come before the supervised head; None: the first whose width
            fits, but 1 where the number of steps is that of SimCLR v2's fine-tuning on few labels.

    Raises:
        UserError: The files are damaged, or hold another network than the authors'.
    """
    bundle = TensorBundle(path)
    graph = ObjectGraph(bundle) if OBJECT_GRAPH in bundle.entries else None
    keys = _by_authors_name(bundle, graph)
    shapes = {name: bundle.entries[key].shape for name, key in keys.items()}
    prefix = EMA if ema else ""
    _require_known(shapes, prefix, bundle.prefix)
    step = _step(bundle, keys)
    single = next((name for name in ("nl_0", "l_0") if f"{prefix}{HEAD}{name}/dense/kernel" in shapes), "l_0")
    with torch.device("meta"):  # takes no memory until all shapes are known to fit
        encoder = build_encoder(_infer_encoder(_under(shapes, prefix + ENCODER), size, graph))
        head = _infer_head(_under(shapes, prefix + HEAD), encoder.num_features)
        classifier = None if ema else _infer_classifier(shapes, encoder, head, head_layer, step)
    linear = None if classifier is None else classifier.linear
    _require_same(authors_names(encoder, head, linear, prefix=prefix, single=single), shapes, prefix)
    parts = [part for part in (encoder, head, linear) if part is not None]
    for part in parts:
        part.to_empty(device="cpu").eval()
    names = authors_names(encoder, head, linear, prefix=prefix, single=single)
    _fill(names, bundle, keys)
    for counter in (b for part in parts for name, b in part.named_buffers() if name.endswith("num_batches_tracked")):
        counter.zero_()  # TensorFlow keeps none
    slots = tuple(name for name in shapes if _is_slot(name, shapes))
    taken = {*names, *slots, STEP, OBJECT_GRAPH}
    return Imported(
        encoder,
        head,
        None if classifier is None else classifier.eval(),
        version=1 if graph is None else 2,
        step=step,
        slots=slots,
        left_out=tuple(name for name in shapes if name not in taken),
    )


def _by_authors_name(bundle: TensorBundle, graph: ObjectGraph | None) -> dict[str, str]:
    """The name that a variable has in TensorFlow 1 -> its key in the checkpoint; others keep their key."""
    if graph is None:
        return {key: key for key in bundle.entries}
    used = set(graph.keys.values())
    return graph.keys | {key: key for key in bundle.entries if key not in used}


def authors_names(
    encoder: Encoder,
    head: ProjectionHead | None,
    classifier: LinearClassifier | None,
    *,
    prefix: str = "",
    single: str = "l_0",
) -> dict[str, Tensor]:
    """The authors' name of each of our parameters and running statistics.

    A head of one layer has the name `single`: `nl_0` is their nonlinear head of one layer, which is linear.
    """
    names: dict[str, Tensor] = {}
    convs = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, conv in enumerate(convs):
        names[f"{prefix}{ENCODER}conv2d{_suffix(i)}/kernel"] = conv.weight
    for i, norm in enumerate(norms):
        names |= _norm(f"{prefix}{ENCODER}batch_normalization{_suffix(i)}/", norm)
    if head is not None:
        for j, layer in enumerate(head.layers):
            place = f"{prefix}{HEAD}{single if head.kind == 'linear' else f'nl_{j}'}/"
            dense, norm = layer.get_submodule("dense"), layer.get_submodule("norm")
            assert isinstance(dense, nn.Linear) and isinstance(norm, nn.BatchNorm1d)
            names[f"{place}dense/kernel"] = dense.weight
            names |= _norm(f"{place}batch_normalization/", norm)
    if classifier is not None:
        names |= {f"{_LINEAR}kernel": classifier.weight, f"{_LINEAR}bias": classifier.bias}
    return names


def _require_known(shapes: Mapping[str, Shape], prefix: str, checkpoint: Path) -> None:
    """It is a checkpoint of SimCLR, with what was asked for."""
    if not _under(shapes, prefix + ENCODER):
        if prefix:
            raise UserError(f"{checkpoint} has no moving average ({prefix}{ENCODER}...); leave out --ema.")
        raise UserError(
            f"{checkpoint} is no checkpoint of SimCLR: its encoder's variables begin with {ENCODER} (TensorFlow 2: "
            f"model/resnet_model/), and this one has {', '.join(list(shapes)[:3]) or 'none'}."
        )


def _step(bundle: TensorBundle, keys: Mapping[str, str]) -> int | None:
    if STEP not in keys or bundle.entries[keys[STEP]].shape:
        return None
    step = bundle.read(keys[STEP])
    return int(step) if step.dtype.kind == "i" else None


def _infer_encoder(shapes: Mapping[str, Shape], size: int | None, graph: ObjectGraph | None) -> EncoderConfig:
    """Depth and stem from the number of convolutions and the first one's kernel, width from the last one's channels.

    Basic blocks have no selective kernels that would count; whether they have ResNet-D's shortcuts only TensorFlow 2's
    objects tell. TensorFlow 1's networks of that kind average by mistake and have no counterpart here.
    """
    num_convs = sum(re.fullmatch(r"conv2d(_\d+)?/kernel", name) is not None for name in shapes)
    first, last = (shapes.get(f"conv2d{_suffix(i)}/kernel", ()) for i in (0, num_convs - 1))
    if not all(len(shape) == 4 and min(shape) > 0 and max(shape) <= _MOST_CHANNELS for shape in (first, last)):
        raise UserError("The encoder in the checkpoint is no ResNet: its first or its last convolution is missing.")
    layout = _layouts(graph is not None and graph.averages).get((num_convs, first[0]))
    if layout is None:
        raise UserError(
            f"The encoder in the checkpoint has {num_convs} convolutions, the first with a kernel of {first[0]} x "
            f"{first[1]}, which none of the authors' ResNets has ({', '.join(_AUTHORS)})."
        )
    name, stem, sk = layout
    width = _width(last[3], 2048 if RESNETS[name].bottleneck else 512)
    size = _SIZES[stem] if size is None else size
    return EncoderConfig(name, channels=first[2], size=size, width=width, stem=stem, sk=sk)


def _layouts(averages: bool) -> dict[tuple[int, int], tuple[str, Stem, bool]]:
    """(Number of convolutions, height of the first kernel) -> ResNet, stem, whether with selective kernels."""
    layouts: dict[tuple[int, int], tuple[str, Stem, bool]] = {}
    for name in _AUTHORS:
        shape = RESNETS[name]
        blocks, shortcuts = sum(shape.blocks), len(shape.blocks)
        after_stem = blocks * (3 if shape.bottleneck else 2) + shortcuts
        if shape.bottleneck or not averages:
            layouts[1 + after_stem, 7] = name, "imagenet", False
            layouts[1 + after_stem, 3] = name, "cifar", False
        if shape.bottleneck or averages:  # two more convolutions weigh branches; ResNet-D's stem has three of 3x3
            weighing = 2 * blocks if shape.bottleneck else 0
            layouts[3 + after_stem + weighing, 3] = name, "imagenet", True
            layouts[1 + after_stem + weighing, 3] = name, "cifar", True
    return layouts


def _width(features: int, features_at_1: int) -> float:
    """The roundest multiplier that gives so many features.

    Every other channel count is then right too: each is the features' divided by a power of two and cut, however
    fractional the multiplier.
    """
    if features * 64 % features_at_1 == 0:  # a whole number of channels in the first group
        return features / features_at_1
    rounded = (round((features + 0.5) / features_at_1, digits) for digits in range(5))
    return next(width for width in rounded if int(features_at_1 * width) == features)


def _infer_head(shapes: Mapping[str, Shape], num_features: int) -> ProjectionHead | None:
    """The number of layers from their names, the width of z from the last one's kernel."""
    if not shapes:
        return None
    layers = sorted({name.partition("/")[0] for name in shapes}, key=lambda name: (len(name), name))
    last = shapes.get(f"{layers[-1]}/dense/kernel", ())
    if len(last) != 2 or last[1] < 1:
        raise UserError(f"The projection head in the checkpoint has no dense layer in {HEAD}{layers[-1]}.")
    if layers in (["l_0"], ["nl_0"]):
        return ProjectionHead(num_features, kind="linear", dim=last[1])
    return ProjectionHead(num_features, layers=len(layers), dim=last[1])


def _infer_classifier(
    shapes: Mapping[str, Shape], encoder: Encoder, head: ProjectionHead | None, layer: int | None, step: int | None
) -> Classifier | None:
    """Its classes and its place from the kernel; where the widths leave a choice, from the number of steps."""
    kernel = shapes.get(f"{_LINEAR}kernel", ())
    if not kernel:
        return None
    if len(kernel) != 2 or min(kernel) < 1:
        raise UserError(f"The supervised head in the checkpoint has a kernel of shape {kernel}.")
    widths = [encoder.num_features]
    if head is not None:
        widths += [encoder.num_features] * (len(head.layers) - 1) + [head.dim]
    fitting = [i for i, width in enumerate(widths) if width == kernel[0]]
    if layer is None:
        if not fitting:
            raise UserError(
                f"The supervised head in the checkpoint reads {kernel[0]} features, and neither the encoder's "
                f"{encoder.num_features} nor a layer of a projection head has as many."
            )
        layer = 1 if step in _STEPS_FROM_LAYER_1 and 1 in fitting else fitting[0]
    elif layer in range(len(widths)) and layer not in fitting:
        raise UserError(
            f"--head-layer was {layer}, which has {widths[layer]} features, and the supervised head reads {kernel[0]}."
        )
    return Classifier(encoder, head, kernel[1], head_layer=layer)


def _require_same(names: Mapping[str, Tensor], shapes: Mapping[str, Shape], prefix: str) -> None:
    """The checkpoint has all that our network has, in its shapes, and nothing beside it that takes part."""
    missing = [name for name in names if name not in shapes]
    parts = (prefix + ENCODER, prefix + HEAD, *([] if prefix else [CLASSIFIER, *_TF2_MODEL]))
    beside = [n for n in shapes if n.startswith(parts) and n not in names and not _is_slot(n, shapes)]
    both = {name: (shapes[name], _turned(tensor.shape)) for name, tensor in names.items() if name in shapes}
    require_match("The checkpoint does not fit the network that it seems to hold:", missing, beside, both)


@torch.no_grad()
def _fill(names: Mapping[str, Tensor], bundle: TensorBundle, keys: Mapping[str, str]) -> None:
    """Copy: (height, width, in, out) -> (out, in, height, width), and (in, out) -> (out, in)."""
    for name, tensor in names.items():
        value = bundle.read(keys[name])
        if value.dtype.kind != "f":
            raise UserError(f"The variable {name} of the checkpoint has the type {value.dtype}; weights are floats.")
        tensor.copy_(torch.from_numpy(value.transpose((3, 2, 0, 1)) if value.ndim == 4 else value.T))


def _turned(shape: Shape) -> Shape:
    """The authors' shape of one of our tensors."""
    return tuple(shape[axis] for axis in (2, 3, 1, 0)) if len(shape) == 4 else tuple(shape[::-1])


def _under(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    """The variables of a part, without its name; those of the optimiser are none of them."""
    return {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and not _is_slot(name, shapes)
    }


def _is_slot(name: str, names: Collection[str]) -> bool:
    """Whether the variable belongs to the optimiser: TF1 calls it after the one that it moves, TF2 by its role."""
    return name.rpartition("/")[0] in names or name.startswith("optimizer/") or "/.OPTIMIZER_SLOT/" in name


def _norm(place: str, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> dict[str, Tensor]:
    tensors = {
        "gamma": norm.weight,
        "beta": norm.bias,
        "moving_mean": norm.running_mean,
        "moving_variance": norm.running_var,
    }
    return {place + key: tensor for key, tensor in tensors.items() if tensor is not None}


def _suffix(index: int) -> str:
    return f"_{index}" if index else ""
