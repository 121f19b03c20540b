"""Any classifier of torchvision as an encoder: `torchvision/NAME` -> the model up to its last linear layer, or that.

Its ResNets also with the width and the stem that other libraries give them, for weights that were trained so.
"""

import difflib

from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from simclr.config.encoder import RESNETS, TORCHVISION, EncoderConfig
from simclr.errors import UserError, first_line
from simclr.models.external.timm_bridge import Normalisation, num_features

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


def build_adapted(config: EncoderConfig) -> tuple[nn.Module, int, None]:
    """A ResNet of torchvision's with another width or the cifar stem, as `build_torchvision` returns it.

    Raises:
        UserError: Other channels than 3.
    """
    if config.channels != 3:
        raise UserError(f"{config.name} takes 3 channels and was asked for {config.channels}.")
    shape = RESNETS[config.name.removeprefix(TORCHVISION)]
    model = _Adapted(Bottleneck if shape.bottleneck else BasicBlock, list(shape.blocks), round(64 * config.width))
    if config.stem == "cifar":
        padding, base = config.stem_padding, model.conv1.out_channels
        model.conv1 = nn.Conv2d(3, base, kernel_size=3, stride=1, padding=padding, bias=False)
        model.maxpool = nn.Identity()  # pyrefly: ignore
        if not config.stem_relu:  # the blocks have their own
            model.relu = nn.Identity()  # pyrefly: ignore
    return model, num_features(model, config.name, 3, config.size), None


class _Adapted(models.ResNet):
    """torchvision's ResNet whose first group has `base` channels before the expansion, instead of 64."""

    def __init__(self, block: type, blocks: list[int], base: int) -> None:
        self._base = base
        super().__init__(block, blocks)
        self.conv1 = nn.Conv2d(3, base, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.fc = nn.Identity()  # pyrefly: ignore

    def _make_layer(
        self, block: type, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self._base
        return super()._make_layer(block, planes // 64 * self._base, blocks, stride, dilate)


def last_linear(model: nn.Module, name: str, num_classes: int) -> str:
    """The path of the layer that names so many classes, such as `fc`.

    Raises:
        UserError: The model does not end in one.
    """
    layers = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or model.get_submodule(layers[-1]).out_features != num_classes:  # squeezenet's is a convolution
        raise UserError(f"torchvision/{name} does not end in a linear classifier; take another model, such as alexnet.")
    return layers[-1]
