"""Our ResNets under the names that torchvision and timm share, and back; models of theirs keep their own.

    ours                               torchvision, timm
    stem.0.conv, stem.0.norm           conv1, bn1
    groups.G.B.residual.N.conv, .norm  layer(G+1).B.conv(N+1), .bn(N+1)
    groups.G.B.shortcut.conv, .norm    layer(G+1).B.downsample.0, .1

The networks are the same but for the max-pool, which has no weights: ours pads as TensorFlow does. Where more differs
than that, nothing is converted: a state dict that loads and computes something else is worse than none.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from simclr.config.encoder import RESNETS, TIMM, TORCHVISION, EncoderConfig
from simclr.errors import UserError
from simclr.models.encoder import Encoder
from simclr.models.restoring import require_same, restore_encoder, sketch_encoder
from simclr.models.safetensors_file import TensorInfo

COUNTERPARTS = {
    TORCHVISION: ("resnet50", "resnet101", "resnet152"),
    TIMM: ("resnet50", "resnet101", "resnet152", "resnet200"),
}
"""Of our ResNets, those that each library builds block by block alike."""

_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"stem\.0\.conv\.", "conv1."),
    (r"stem\.0\.norm\.", "bn1."),
    (r"groups\.(\d+)\.(\d+)\.shortcut\.conv\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.0."),
    (r"groups\.(\d+)\.(\d+)\.shortcut\.norm\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.1."),
    (
        r"groups\.(\d+)\.(\d+)\.residual\.(\d+)\.conv\.",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.conv{int(m[3]) + 1}.",
    ),
    (r"groups\.(\d+)\.(\d+)\.residual\.(\d+)\.norm\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.bn{int(m[3]) + 1}."),
]


def export_state(encoder: Encoder, library: str) -> dict[str, Tensor]:
    """The backbone's state under the names of the library ("torchvision/" or "timm/"), without a classifier.

    Raises:
        UserError: The library has no model of this architecture.
    """
    name_in(library, encoder.config)
    state = encoder.backbone.state_dict()
    return state if encoder.config.is_external else {_theirs(name): tensor for name, tensor in state.items()}


def import_state(state: Mapping[str, Tensor], config: EncoderConfig, library: str) -> Encoder:
    """The encoder of `config`, in inference mode, with weights that `export_state` gave.

    Raises:
        UserError: The library has no model of this architecture, or names, shapes or types are not those of it.
    """
    name_in(library, config)
    encoder = sketch_encoder(config)
    expected = {_name_in_file(name, config): tensor for name, tensor in encoder.state_dict().items()}
    stored = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    require_same(expected, stored, "The file")
    return restore_encoder(encoder, lambda name: state[_name_in_file(name, config)])


def name_in(library: str, config: EncoderConfig) -> str:
    """What the library ("torchvision/" or "timm/") calls the encoder's architecture.

    Raises:
        UserError: It has none that is the same but for the max-pool.
    """
    if config.name.startswith(library):
        return config.name.removeprefix(library)
    title = library.rstrip("/")
    differs = _difference(library, config)
    if differs is not None:
        raise UserError(
            f"{title} has no model like this encoder: {differs}; export it as onnx, safetensors or hub-folder, which "
            "hold every encoder."
        )
    return config.name


def _difference(library: str, config: EncoderConfig) -> str | None:
    """What stands between the encoder and any model of the library; None: nothing but the max-pool."""
    title, same = library.rstrip("/"), COUNTERPARTS[library]
    if config.scaling != "none":
        return f"its features are {config.scaling}, theirs are not"
    if config.is_external:
        return f"it is {config.name}"
    if config.feature != "h":
        return f"its features are those of {config.feature} on grids, theirs the average of the last stage"
    if config.resolved_stem != "imagenet":
        return f"its {config.resolved_stem} stem is one 3x3 convolution, theirs 7x7 and a max-pool"
    if config.sk:
        return "its selective kernels and ResNet-D stem are the SimCLR authors' own"
    if config.name not in same:
        if not RESNETS[config.name].bottleneck:
            return f"the first block of {config.name} has a convolution on its shortcut, as the SimCLR authors have it"
        return f"{title} has {', '.join(same)}, and it is {config.name}"
    if config.width != 1:
        return f"its width is {config.width:g}, theirs 1"
    if library == TORCHVISION and config.channels != 3:
        return f"its images have {config.channels} channel{'s' * (config.channels != 1)}, theirs 3 (timm takes any)"
    return None


def _name_in_file(name: str, config: EncoderConfig) -> str:
    """The library's name of a tensor of an encoder's state."""
    name = name.removeprefix("backbone.")
    return name if config.is_external else _theirs(name)


def _theirs(name: str) -> str:
    for ours, theirs in _NAMES:
        renamed, count = re.subn(rf"^{ours}", theirs, name)
        if count:
            return renamed
    raise AssertionError(f"{name} is not a name of our ResNet")
