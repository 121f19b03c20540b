"""Any classifier of torchvision as an encoder, `torchvision/NAME` -> the model up to its last linear layer, or that."""

import difflib

from torch import nn
from torchvision import models

from simclr.errors import UserError
from simclr.models.timm_bridge import Normalisation, first_line, num_features

CLASSES = 1000  # of ImageNet, for which every one of torchvision's classifiers is made
AUXILIARY = ("googlenet", "inception_v3")  # whose further outputs belong to their own training; timm has them without
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What torchvision's pretrained weights expect (the presets of torchvision.transforms)."""


def build_torchvision(
    name: str, *, channels: int, size: int, pretrained: bool
) -> tuple[nn.Module, int, Normalisation | None]:
    """The model up to its last linear layer, its number of features, and the (mean, std) of pretrained weights.

    Args:
        name: A classifier of torchvision's, without the leading `torchvision/`: alexnet, resnet50, vit_b_16, ...
        channels: Of the input: 3.
        size: Of the input, in pixels.
        pretrained: Begin from torchvision's default weights, which are downloaded on first use.

    Raises:
        UserError: No such model, other channels than 3, unreachable weights, or the model cannot take the size.
    """
    model, last = _create(name, channels=channels, pretrained=pretrained)
    parent, _, child = last.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    width = num_features(model, f"torchvision/{name}", channels, size)
    return model, width, IMAGENET if pretrained else None


def torchvision_classifier(name: str, *, channels: int) -> nn.Linear:
    """The last linear layer of a pretrained model, which stands on what `build_torchvision` gives.

    Raises:
        UserError: As `build_torchvision`.
    """
    model, last = _create(name, channels=channels, pretrained=True)
    layer = model.get_submodule(last)
    assert isinstance(layer, nn.Linear)
    return layer


def _create(name: str, *, channels: int, pretrained: bool) -> tuple[nn.Module, str]:
    """The whole model, and where in it the last linear layer is."""
    known = [model for model in models.list_models(module=models) if model not in AUXILIARY]
    if name not in known:
        close = [f"torchvision/{model}" for model in difflib.get_close_matches(name, known, n=3, cutoff=0.5)]
        hint = f"did you mean {', '.join(close)}?" if close else "torchvision.models.list_models() names them all."
        raise UserError(f"torchvision has no classifier {name!r}; {hint}")
    if channels != 3:
        raise UserError(
            f"torchvision/{name} takes 3 channels and was asked for {channels}; open the data with --channels 3, or "
            "take a model of timm, whose first layer adapts."
        )
    try:
        model = models.get_model(name, weights="DEFAULT" if pretrained else None)
    except Exception as error:  # whatever the download raises
        raise UserError(
            f"torchvision/{name}: its pretrained weights could not be fetched ({first_line(error)}); connect to the "
            "network once, or put the file into torch's cache folder."
        ) from error
    return model, last_linear(model, name, CLASSES)


def last_linear(model: nn.Module, name: str, num_classes: int) -> str:
    """The path of the layer that names so many classes, such as `fc`.

    Raises:
        UserError: The model does not end in one.
    """
    layers = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or model.get_submodule(layers[-1]).out_features != num_classes:  # squeezenet's is a convolution
        raise UserError(f"torchvision/{name} does not end in a linear classifier; take another model, such as alexnet.")
    return layers[-1]
