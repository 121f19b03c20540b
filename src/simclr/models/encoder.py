"""An encoder that knows what it expects: images in [0, 1] in, features h out (SimCLR section 2.1, f)."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from simclr.config.encoder import MAX_CHANNELS, RESNETS, TIMM, TORCHVISION, EncoderConfig, Feature
from simclr.config.pretrain import PretrainConfig
from simclr.errors import UserError
from simclr.models.feature_scaling import FeatureScaling
from simclr.models.init import seeded
from simclr.models.resnet import ResNet

if TYPE_CHECKING:
    from simclr.models.external.timm_bridge import Normalisation


class Encoder(nn.Module):
    """A backbone with the description of its input.

    Attributes:
        config: What the encoder is and expects.
        backbone: (B, C, S, S) -> (B, F).
        num_features: F.
        scaling: What stands behind the backbone; None: its output is returned as it is.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, config: EncoderConfig, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.num_features = num_features
        self.scaling = None
        if config.scaling != "none":
            self.scaling = FeatureScaling(num_features, whitened=config.scaling == "whitened")
        for name, values in (("mean", config.mean), ("std", config.std)):
            column = None if values is None else torch.tensor(values, device="cpu").view(-1, 1, 1)  # (C, 1, 1)
            self.register_buffer(name, column, persistent=False)  # the config carries them

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch of images.

        Args:
            x: (B, C, S, S) floats in [0, 1]; other sizes than S if the backbone takes them.

        Returns:
            (B, F) features h.

        Raises:
            UserError: Not a batch, not floating point, or other channels than the encoder's.
        """
        h = self.backbone(self.normalised(x))
        return h if self.scaling is None else self.scaling(h)

    def normalised(self, x: Tensor) -> Tensor:
        """What the backbone is given: the images of `forward`, by mean and standard deviation where it has them.

        Raises:
            UserError: As of `forward`.
        """
        self._check(x)
        return x if self.mean is None or self.std is None else (x - self.mean) / self.std

    def _check(self, x: Tensor) -> None:
        channels = self.config.channels
        if x.ndim != 4:
            raise UserError(
                f"This encoder expects a batch of shape (B, {channels}, height, width) and was given "
                f"{tuple(x.shape)}; if it is one image, add the batch's axis with x[None]."
            )
        if not x.is_floating_point():
            raise UserError(
                f"This encoder expects floats in [0, 1] and was given {x.dtype}; convert bytes by x.float() / 255."
            )
        if x.shape[1] != channels:
            raise UserError(
                f"This encoder expects {channels} channels and was given {x.shape[1]}; convert the images, "
                f"or build an encoder with channels={x.shape[1]}."
            )


def encoder_of(config: PretrainConfig, channels: int) -> EncoderConfig:
    """Description of the encoder that settings of pretraining ask for, with the features that it returns when trained.

    Raises:
        UserError: The settings do not go together.
    """
    return EncoderConfig(
        name=config.encoder, width=config.width, stem=config.stem, sk=config.sk, channels=channels, size=config.size,
        feature=config.feature, scaling=config.scaling,
    )  # fmt: skip


def trained_encoder_of(config: PretrainConfig, channels: int) -> EncoderConfig:
    """The same with the features that the projection head reads, as the network gives them.

    Raises:
        UserError: As of `encoder_of`.
    """
    return replace(encoder_of(config, channels), feature=config.head_reads or config.feature, scaling="none")


def read_as(encoder: Encoder, feature: Feature) -> Encoder:
    """The encoder with the same weights and these features (`EncoderConfig.feature`), not scaled, on its device.

    Raises:
        UserError: It is no ResNet of ours.
    """
    return with_config(encoder, replace(encoder.config, feature=feature, scaling="none"))


def with_config(encoder: Encoder, config: EncoderConfig) -> Encoder:
    """The same backbone in an encoder of another description, such as of another size, on the same device.

    The scaling of its features, if the description has one, is yet to be fitted.

    Raises:
        UserError: `build_encoder` cannot build it.
        RuntimeError: The weights do not fit it.
    """
    if config == encoder.config:
        return encoder
    other = build_encoder(config)
    other.backbone.load_state_dict(encoder.backbone.state_dict())
    return other.to(next(encoder.parameters()).device).train(encoder.training)


def build_encoder(config: EncoderConfig, *, seed: int = 0, pretrained: bool = False) -> Encoder:
    """The encoder of `config`, on the CPU, initialised from `seed` without touching torch's global generator.

    Args:
        pretrained: Begin a model of timm or torchvision from its weights; the encoder's config then has their mean and
            std.

    Raises:
        UserError: The library cannot build the model, or there are no pretrained weights.
    """
    if config.is_external:
        with seeded(seed, "encoder"):
            backbone, num_features, normalisation = _build_foreign(config, pretrained)
        if normalisation is not None:
            config = replace(config, mean=normalisation[0], std=normalisation[1])
        return Encoder(config, backbone, num_features)
    if pretrained:
        raise UserError(f"There are no pretrained weights for {config.name}; take a timm model, such as timm/resnet50.")
    with seeded(seed, "encoder"):
        backbone = ResNet(
            RESNETS[config.name], width=config.width, stem=config.resolved_stem, channels=config.channels, sk=config.sk,
            grids=config.grids,
        )  # fmt: skip
    if backbone.num_features > MAX_CHANNELS:
        raise UserError(
            f"{config.name} of width {config.width:g} has {backbone.num_features:,} features of {config.feature}, more "
            f"than the {MAX_CHANNELS:,} that can be read; take fewer stages."
        )
    return Encoder(config, backbone, backbone.num_features)


def _build_foreign(config: EncoderConfig, pretrained: bool) -> "tuple[nn.Module, int, Normalisation | None]":
    """The model, its number of features, and the (mean, std) of pretrained weights."""
    if config.is_adapted:
        from simclr.models.external.torchvision_bridge import build_adapted

        return build_adapted(config)
    if config.name.startswith(TIMM):
        from simclr.models.external.timm_bridge import build_timm as build  # timm takes a second to import
    else:
        from simclr.models.external.torchvision_bridge import build_torchvision as build
    name = config.name.removeprefix(TIMM).removeprefix(TORCHVISION)
    return build(name, channels=config.channels, size=config.size, pretrained=pretrained)
