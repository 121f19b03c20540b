"""Backbones of lightly, solo-learn, MoCo and torchvision itself: ResNets with torchvision's layers, as our encoders.

They become `torchvision/resnetNN` encoders, for our own ResNet is the authors' and differs (max-pool, shortcuts), so
that features are those of the model that was saved. Depth, width and stem follow from names and shapes. What weights do
not tell follows from the library: the padding of a 3x3 stem, whether a max-pool comes after it, how pixels were
normalised. Projection heads are left out: theirs have biases where ours has none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from simclr.config.encoder import TORCHVISION, EncoderConfig
from simclr.errors import UserError
from simclr.models.encoder import Encoder, build_encoder
from simclr.models.external.torchvision_bridge import IMAGENET
from simclr.models.restoring import require_match
from simclr.weights.importers.torch_file import TorchFile

Format = Literal["lightly", "solo-learn", "moco", "torchvision"]
Numbers = tuple[float, float, float]
Shape = tuple[int, ...]

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # what solo-learn normalises CIFAR-10 by
# Where each library's backbone is; solo-learn called it encoder before 2022.
_PLACES: dict[Format, tuple[str, ...]] = {
    "lightly": ("backbone.", ""),
    "solo-learn": ("backbone.", "encoder.", ""),
    "moco": ("encoder_q.",),
    "torchvision": ("", "backbone."),
}
_BLOCKS = {
    (False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34", (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101", (True, (3, 8, 36, 3)): "resnet152",
}  # fmt: skip
_WIDE = {"resnet50": "wide_resnet50_2", "resnet101": "wide_resnet101_2"}
_CLASSIFIERS = ("fc.", "linear.")


@dataclass(frozen=True)
class Backbone:
    """What a checkpoint held."""

    encoder: Encoder
    format: Format
    left_out: tuple[str, ...]
    """Tensors that were not used."""


def import_torch(
    path: Path,
    *,
    format: Format | None = None,
    size: int | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
) -> Backbone:
    """Read a checkpoint's backbone.

    Args:
        path: A file of torch.save or safetensors.
        format: Whose it is; None: found out by the names.
        size: Pixels a side of the encoder's images; None: 32 for a 3x3 stem, 224 for the 7x7 one.
        mean: What was subtracted from pixels in [0, 1], per channel; None: the library's.
        std: What they were then divided by.

    Raises:
        UserError: The file is damaged, or holds another network than a ResNet of torchvision's kind.
    """
    file = TorchFile(path)
    names = {name.removeprefix("module."): name for name in file.shapes}  # which data-parallel training adds
    format = _infer_format(names, file) if format is None else format
    place = _place(names, format, path)
    inside = {name.removeprefix(place): original for name, original in names.items() if name.startswith(place)}
    layers, relu = _torchvision_names(inside)
    shapes = {name: file.shapes[original] for name, original in layers.items()}
    config = _infer(shapes, format, relu, size, mean, std)
    with torch.device("meta"):  # takes no memory until all shapes are known to fit
        wanted = build_encoder(config).backbone.state_dict()
    used = {name: layers[name] for name in wanted if name in layers}
    _require_same({name: tuple(tensor.shape) for name, tensor in wanted.items()}, shapes, place)
    if sum(tensor.nbytes for name, tensor in wanted.items() if name in used) > 4 * file.size:  # halves are half as long
        raise file.error("several of its tensors lie in the same place")
    encoder = build_encoder(config).eval()
    _fill(encoder, used, file)
    taken = set(used.values())
    return Backbone(encoder, format, tuple(name for name in file.shapes if name not in taken))


def _infer_format(names: Mapping[str, str], file: TorchFile) -> Format:
    def have(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    if have(r"encoder_q\."):
        return "moco"
    if have(r"projection_head\.layers\.|backbone\.0\.weight|(backbone\.)?layer1\.0\.shortcut\.|backbone.*\.shortcut\."):
        return "lightly"
    if have(r"projector\.") and have(r"(backbone|encoder)\.conv1\.weight"):
        return "solo-learn"
    if "backbone.conv1.weight" in names and file.shapes[names["backbone.conv1.weight"]][-1:] == (3,):
        raise UserError(
            f"{file.path} may be lightly's or solo-learn's, whose 3x3 stems pad differently; say which by --format."
        )
    if have(r"(backbone\.)?(conv1|0)\.weight"):
        return "torchvision"
    raise UserError(
        f"{file.path} holds no ResNet under a name that lightly, solo-learn, MoCo or torchvision give it; its tensors "
        f"begin with {', '.join(list(names)[:3])}."
    )


def _place(names: Mapping[str, str], format: Format, path: Path) -> str:
    for place in _PLACES[format]:
        if place + "conv1.weight" in names or place + "0.weight" in names:
            return place
    begins = " or ".join(f"{place}conv1.weight" for place in _PLACES[format])
    raise UserError(
        f"{path} is no checkpoint of {format}: it has no {begins}, and begins with {', '.join(list(names)[:3])}."
    )


def _torchvision_names(inside: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    """Torchvision's name of each tensor -> its name in the file, and whether a ReLU follows the stem.

    In `nn.Sequential(*resnet.children())` numbers stand for names. lightly's own ResNet calls the ReLU as a function,
    so that in a Sequential of its children there is none: its groups then begin at 2.
    """
    if "0.weight" not in inside:
        return {name.replace(".shortcut.", ".downsample."): original for name, original in inside.items()}, True
    groups = sorted({int(match[1]) for name in inside if (match := re.match(r"(\d{1,3})\.0\.conv1\.weight$", name))})
    called = {0: "conv1", 1: "bn1"} | {number: f"layer{i + 1}" for i, number in enumerate(groups)}
    result = {}
    for name, original in inside.items():
        number, _, rest = name.partition(".")
        known = called.get(int(number)) if number.isdecimal() and len(number) < 4 else None
        result[f"{known or number}.{rest}".replace(".shortcut.", ".downsample.")] = original
    return result, not groups or groups[0] > 2


def _infer(
    shapes: Mapping[str, Shape],
    format: Format,
    relu: bool,
    size: int | None,
    mean: Numbers | None,
    std: Numbers | None,
) -> EncoderConfig:
    first = shapes.get("conv1.weight", ())
    if len(first) != 4 or first[1:] not in ((3, 3, 3), (3, 7, 7)) or not 0 < first[0] <= 1 << 12:
        raise UserError(
            f"The checkpoint's first convolution has shape {first}; a ResNet that can be imported takes 3 channels "
            "by a kernel of 3x3 or 7x7."
        )
    blocks = tuple(
        sum(re.fullmatch(rf"layer{i}\.\d+\.conv1\.weight", name) is not None for name in shapes) for i in (1, 2, 3, 4)
    )
    bottleneck = "layer1.0.conv3.weight" in shapes
    name = next((name for kind, name in _BLOCKS.items() if kind == (bottleneck, blocks)), None)
    if name is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(
            f"The checkpoint's backbone has {blocks} {kind} blocks; those that can be imported are "
            f"{', '.join(_BLOCKS.values())}."
        )
    small = first[2] == 3
    wide = shapes.get("layer1.0.conv1.weight", (0,))[:1] == (2 * first[0],) and not small and first[0] == 64
    name = _WIDE.get(name, name) if wide else name
    if mean is None:
        mean, std = CIFAR10 if format == "solo-learn" and small else IMAGENET  # pyrefly: ignore
    return EncoderConfig(
        f"{TORCHVISION}{name}",
        channels=3,
        size=(32 if small else 224) if size is None else size,
        width=first[0] / 64,
        stem="cifar" if small else "auto",
        mean=mean,
        std=std,
        stem_padding=2 if small and format == "solo-learn" else 1,
        stem_relu=relu or not small,
    )


def _require_same(wanted: Mapping[str, Shape], shapes: Mapping[str, Shape], place: str) -> None:
    """The checkpoint has all that the network has, in its shapes, and nothing beside it that takes part."""
    missing = [name for name in wanted if name not in shapes and not name.endswith("num_batches_tracked")]
    # Beside a backbone that has a place of its own stands all that is not under it, so what is under it takes part.
    beside = [name for name in shapes if place and name not in wanted and not name.startswith(_CLASSIFIERS)]
    both = {name: (shapes[name], shape) for name, shape in wanted.items() if name in shapes}
    require_match("The checkpoint does not fit the network that it seems to hold:", missing, beside, both)


@torch.no_grad()
def _fill(encoder: Encoder, used: Mapping[str, str], file: TorchFile) -> None:
    tensors = encoder.backbone.state_dict()
    for counter in (tensor for name, tensor in tensors.items() if name not in used):
        counter.zero_()  # of the batches that batch norm has seen
    ours = {original: name for name, original in used.items()}
    for original, value in file.read(ours):
        tensor = tensors[ours[original]]
        if tensor.is_floating_point() != value.is_floating_point():
            raise UserError(f"{original} of the checkpoint has the type {value.dtype}; weights are floats.")
        tensor.copy_(value)
