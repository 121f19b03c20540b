"""Models under test: a run, an encoder's folder, a pretrained model of timm or torchvision, random weights, pixels.

Each is an `EvaluatedModel`: a name, perhaps an encoder with its projection head, and the features of any images,
computed once.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from simclr.config.encoder import TIMM, TORCHVISION, EncoderConfig
from simclr.data.images import Images, fit_channels
from simclr.distributed import DistributedContext
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.keys import features_key
from simclr.evaluation.results import name_of
from simclr.models.encoder import Encoder, build_encoder
from simclr.models.heads import ProjectionHead
from simclr.models.inference import extract, pixels_of
from simclr.training.progress import counting
from simclr.views.policy import AugmentationPreset
from simclr.weights.folder import Model, digest_of, load_quietly
from simclr.weights.training_progress import TrainingProgress

RANDOM, PIXELS = "random", "pixels"
MAX_PIXELS_SIDE = 64  # for `pixels`: larger images cost memory and hardly change the accuracy
EXTERNAL_SIZE = 224  # pixels that nearly every pretrained model expects


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model under test, called subject: something that turns images into features."""

    name: str
    """As the user wrote it."""
    encoder: Encoder | None
    """None: the pixels themselves."""
    head: ProjectionHead | None = None
    preprocessing: AugmentationPreset = "google"
    size: int
    """Side of the images that it sees, in pixels."""
    channels: int
    progress: TrainingProgress | None = None
    """How far its training had come; None where that is unknown."""
    cache: FeatureCache = field(default_factory=lambda: FeatureCache(None))
    world: DistributedContext = field(default_factory=DistributedContext)

    def features(self, images: Images, *, crop: float | None = None) -> np.ndarray:
        """(n, F) float32 in the order of the images, from the cache where they were made before.

        Args:
            crop: Share of the shorter side that is seen; None: the authors' rule (`eval_images`).

        Raises:
            UserError: Colour images for an encoder of gray ones, or features that are not finite.
        """
        images = self.fitted(images)
        if self.encoder is None:
            return pixels_of(images, size=self.size, preset=self.preprocessing, crop=crop)
        encoder = self.encoder

        def make() -> np.ndarray:
            with counting(f"Features of {self.name}", main=self.world.is_main) as progress:
                return extract(
                    encoder, images, preset=self.preprocessing, crop=crop, world=self.world, progress=progress
                )  # (n, F)

        shape = len(images), encoder.num_features
        return self.cache.get(features_key(self, images, crop), shape, make, self.world)

    def fitted(self, images: Images) -> Images:
        """The images with this subject's channels."""
        return fit_channels(images, self.channels, who="The encoder" if self.encoder is None else self.name)

    @cached_property
    def model(self) -> dict[str, Any]:
        """All that determines its features, as JSON can hold it: weights, network, preprocessing, kind of device.

        Read once: the weights of a subject do not change while it lives.
        """
        return {
            "weights": None if self.encoder is None else digest_of(self.encoder),
            "network": None if self.encoder is None else self.encoder.config.to_dict(),
            "preprocessing": self.preprocessing,
            "size": self.size,
            "channels": self.channels,
            "device": self.world.device.type,
        }

    @cached_property
    def head_weights(self) -> str | None:
        """SHA-256 (hexadecimal) of the projection head's weights."""
        return None if self.head is None else digest_of(self.head)

    @cached_property
    def identity(self) -> str:
        """Digest of `model`."""
        return name_of(self.model)


def open_subject(
    name: str, *, like: EncoderConfig, preprocessing: AugmentationPreset, seed: int, cache: FeatureCache,
    world: DistributedContext, size: int = EXTERNAL_SIZE, pretrained: bool = True,
) -> EvaluatedModel:  # fmt: skip
    """The model under test that a user names.

    Args:
        name: random, pixels, timm/NAME, torchvision/NAME, or the folder of a run or an encoder.
        like: The encoder whose shape `random` has, and whose image size `pixels` has.
        preprocessing: Preset of the evaluation preprocessing of these two.
        seed: Of the random weights.
        size: Of the images that a model of timm or torchvision is given, in pixels.
        pretrained: Whether such a model brings its weights; else it has random ones.

    Raises:
        UserError: There is no such model, or its weights cannot be loaded.
    """
    shared = {"cache": cache, "world": world}
    if name == PIXELS:
        return EvaluatedModel(
            name=name,
            encoder=None,
            preprocessing=preprocessing,
            size=min(like.size, MAX_PIXELS_SIDE),
            channels=like.channels,
            **shared,
        )
    if name == RANDOM:
        return _subject(name, random_encoder(like, seed=seed), None, preprocessing, **shared)
    if name.startswith((TIMM, TORCHVISION)):
        config = EncoderConfig(name=name, channels=3, size=size)
        return _subject(name, build_encoder(config, seed=seed, pretrained=pretrained), None, "torchvision", **shared)
    return subject_of(load_quietly(name), name, **shared)


def subject_of(model: Model, name: str, *, cache: FeatureCache, world: DistributedContext) -> EvaluatedModel:
    """A loaded model as subject, under the name that the user gave it."""
    subject = _subject(name, model.encoder, model.head, model.preprocessing, cache=cache, world=world)
    return replace(subject, progress=model.progress)


def random_encoder(config: EncoderConfig, *, seed: int) -> Encoder:
    """The baseline of the same shape: random weights, with every residual branch on.

    Training begins with every residual branch switched off (its last gamma is 0), so that a ResNet is a chain of
    strided 1x1 convolutions that see a few pixels: too weak a baseline (17 % kNN on digits, where this one reaches
    84 %).
    """
    encoder = build_encoder(config, seed=seed)
    for module in encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            torch.nn.init.ones_(module.weight)
    return encoder


def _subject(
    name: str, encoder: Encoder, head: ProjectionHead | None, preprocessing: AugmentationPreset, *, cache: FeatureCache,
    world: DistributedContext,
) -> EvaluatedModel:  # fmt: skip
    return EvaluatedModel(
        name=name,
        encoder=encoder.to(world.device).eval(),
        head=head if head is None else head.to(world.device).eval(),
        preprocessing=preprocessing,
        size=encoder.config.size,
        channels=encoder.config.channels,
        cache=cache,
        world=world,
    )
