"""An encoder as a state dict of torchvision or timm, tried out in their own model before it is written.

What is exported must load with strict=True and give the encoder's features. The one difference that is let through is
the max-pool of the ResNets' stem, which has no weights: theirs pads both ends by one pixel, ours as TensorFlow does. It
is measured, and the lines of code that load the file put it right.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.config.encoder import TIMM, TORCHVISION, EncoderConfig
from simclr.errors import UserError
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder
from simclr.models.external.torchvision_names import export_state, name_in
from simclr.models.inference import inference
from simclr.models.init import seeded

TOLERANCE = 1e-5  # relative L2
POOL = "torch.nn.MaxPool2d(3, 2, ceil_mode=True)"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A state dict that was found to compute what the encoder computes."""

    model: str
    """The library's name for it."""
    state: dict[str, Tensor]
    classifier: str | None
    """The layer of the classifier, such as fc."""
    code: list[str]
    """What builds the model and loads `state` into it; {READ} stands for the expression that reads the file."""
    differs: str | None
    """A sentence on the library's own model, if it does not give the same features as it stands."""


def to_library(library: Literal["torchvision", "timm"], encoder: Encoder, classifier: Classifier | None) -> Exported:
    """Convert, load into the library's model, and compare.

    Args:
        classifier: Goes along; it stands on the encoder itself (head layer 0).

    Raises:
        UserError: The library has no such model, or no place for the classifier, or its model computes something else.
    """
    config = encoder.config
    prefix = TORCHVISION if library == "torchvision" else TIMM
    name, state = name_in(prefix, config), export_state(encoder, prefix)
    num_classes = None if classifier is None else classifier.linear.out_features
    with seeded(0, "export"):
        build = _torchvision if library == "torchvision" else _timm
        model, layer, code = build(name, config, num_classes)
    if classifier is not None:
        state |= {f"{layer}.{key}": tensor for key, tensor in classifier.linear.state_dict().items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        what = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(f"This {library} builds {name} in another way than when the encoder was made: {what}") from None
    network = encoder if classifier is None else classifier
    difference, differs = _difference(network, model, config), None
    if not difference <= TOLERANCE and not config.is_external:  # NaN too
        fixed = _difference(network, _with_our_pool(model), config)
        differs = (
            f"{library}'s max-pool pads every side by 1, the encoder's only the right and the bottom: as it stands, "
            f"{library}'s {name} gives {'features' if classifier is None else 'logits'} that differ by "
            f"{100 * difference:.2g} % (relative L2, 4 smooth random images of {config.size} pixels); with "
            f"model.maxpool = {POOL} they agree."
        )
        code, difference = [*code, f"model.maxpool = {POOL}"], fixed
    if not difference <= TOLERANCE:
        raise UserError(
            f"{library}'s {name} computes something else than this encoder (relative difference {difference:.1e}); "
            "nothing was written. Export it as onnx, safetensors or hub-folder."
        )
    return Exported(model=name, state=state, classifier=layer, code=[*code, "model.eval()"], differs=differs)


def trial_images(config: EncoderConfig, count: int) -> Tensor:
    """(count, C, S, S) in [0, 1]: smooth random fields with a little noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, config.channels, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, size=(config.size, config.size), mode="bilinear")
    return (smooth + 0.1 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)


def relative(computed: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of what is expected."""
    return float((computed - expected).norm() / expected.norm().clamp_min(1e-12))


def _torchvision(name: str, config: EncoderConfig, num_classes: int | None) -> tuple[nn.Module, str | None, list[str]]:
    from torchvision import models

    from simclr.models.external.torchvision_bridge import CLASSES, last_linear

    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    model = models.get_model(name, weights=None, **arguments)
    layer = last_linear(model, name, num_classes or CLASSES)
    code = ["import torch, torchvision", f"model = torchvision.models.get_model({_call(name, arguments)})"]
    if num_classes is None:
        parent, _, child = layer.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
        at = f"[{child}]" if child.isdecimal() else f".{child}"
        code.append(f"model{'.' + parent if parent else ''}{at} = torch.nn.Identity()  # no classifier")
    return model, layer if num_classes else None, [*code, "model.load_state_dict({READ}, strict=True)"]


def _timm(name: str, config: EncoderConfig, num_classes: int | None) -> tuple[nn.Module, str | None, list[str]]:
    import timm

    from simclr.models.external.timm_bridge import input_arguments

    arguments: dict[str, Any] = {"num_classes": num_classes or 0, **input_arguments(name, config.channels, config.size)}
    model: Any = timm.create_model(name, **arguments)
    layer = None
    if num_classes is not None:
        last = model.get_classifier()
        layer = next((path for path, module in model.named_modules() if module is last), None)
        if layer is None or not isinstance(last, nn.Linear):
            raise UserError(f"timm/{name} does not end in one linear layer, so the classifier has no place in it.")
    code = ["import torch, timm", f"model = timm.create_model({_call(name, arguments)})"]
    return model, layer, [*code, "model.load_state_dict({READ}, strict=True)"]


def _call(name: str, arguments: dict[str, Any]) -> str:
    return ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in arguments.items())])


def _difference(network: nn.Module, model: nn.Module, config: EncoderConfig) -> float:
    """Between what the network gives for [0, 1] images and what the library's model gives for normalised ones."""
    x = trial_images(config, 4)
    mean, std = (
        None if values is None else torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std)
    )
    with inference(network), inference(model):
        return relative(model(x if mean is None or std is None else (x - mean) / std), network(x))


def _with_our_pool(model: nn.Module) -> nn.Module:
    """In place; what POOL says, for the side that is even in front of the pool."""
    model.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return model
