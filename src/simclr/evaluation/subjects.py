"""Models under test: a run, an encoder's folder, a pretrained model of timm or torchvision, or a baseline.

Each is an `EvaluatedModel`: a name, perhaps an encoder with its projection head, and the features of any images,
computed once. The baselines without an encoder are raw pixels, and hand-made features: HOG and k-means patches.
"""

import difflib
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from simclr.config.encoder import TIMM, TORCHVISION, EncoderConfig, Feature
from simclr.data.images import Images, fit_channels
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.hog import HogFeatures
from simclr.evaluation.keys import features_key
from simclr.evaluation.patches import MAX_PATCHES_SIDE, PatchFeatures
from simclr.evaluation.results import name_of
from simclr.models.classifier import read_for
from simclr.models.encoder import Encoder, build_encoder, read_as
from simclr.models.heads import ProjectionHead
from simclr.models.inference import extract, outputs, pixels_of, scaled
from simclr.models.layers import LayerOutput, reads_head
from simclr.training.progress import counting
from simclr.views.policy import AugmentationPreset
from simclr.weights.folder import Model, digest_of, load_quietly
from simclr.weights.training_progress import TrainingProgress

RANDOM, PIXELS, HOG, PATCHES = "random", "pixels", "hog", "patches"
WITHOUT_NETWORK = (PIXELS, HOG, PATCHES)
"""Names of models under test that have no network to train."""
BASELINE_NAMES = (RANDOM, *WITHOUT_NETWORK)
"""Names that stand for a model of which no weights are stored."""
INIT = "init"
"""Name that stands for the weights that the model under test was pretrained from (`simclr pretrain --init`)."""
MAX_SIDES = {PIXELS: 64, PATCHES: MAX_PATCHES_SIDE}
"""Pixels a side that a baseline sees at most: larger images cost memory or time, and hardly change the accuracy."""
EXTERNAL_SIZE = 224  # pixels that nearly every pretrained model expects


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model under test, called subject: something that turns images into features."""

    name: str
    """As the user wrote it."""
    encoder: Encoder | None
    """None: hand-made features, or the pixels themselves."""
    hand_made: HogFeatures | PatchFeatures | None = None
    """Features that take the place of the encoder's; None: there is an encoder, or pixels are the features."""
    head: ProjectionHead | None = None
    layer: str | None = None
    """Layer whose output is taken as features (`LayerOutput`); None: what the encoder returns."""
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
        source = self._reader or self.hand_made
        if source is None:
            return pixels_of(images, size=self.size, preset=self.preprocessing, crop=crop)

        def make() -> np.ndarray:
            with counting(f"Features of {self.name}", main=self.world.is_main) as progress:
                options: dict[str, Any] = {
                    "preset": self.preprocessing, "crop": crop, "world": self.world, "progress": progress,
                }  # fmt: skip
                if self._reader is not None:
                    return extract(self._reader, images, **options)  # (n, F)
                assert self._hand_made_network is not None
                return outputs(self._hand_made_network, images, source.num_features, size=self.size, **options)

        return self.cache.get(features_key(self, images, crop), (len(images), source.num_features), make, self.world)

    def learnt_from(self, images: Images, *, seed: int) -> "EvaluatedModel":
        """The model whose features are learnt from these training images, where they are learnt at all.

        Patches are learnt when they are first needed, and the scaling of an encoder that came without it, `random`
        for instance, at once; both without labels.
        """
        encoder = self.encoder
        if encoder is not None and encoder.scaling is not None and not encoder.scaling.is_fitted:
            images = self.fitted(images)
            encoder = scaled(encoder, encoder.config.scaling, images, preset=self.preprocessing, world=self.world)
            return replace(self, encoder=encoder)
        if self.name != PATCHES:
            return self
        features = PatchFeatures(size=self.size, preset=self.preprocessing, images=self.fitted(images), seed=seed)
        return replace(self, hand_made=features)

    @cached_property
    def _hand_made_network(self) -> nn.Module | None:
        """On the device where the work is to be done."""
        return None if self.hand_made is None else self.hand_made.network(self.world).to(self.world.device)

    def read_as(self, feature: Feature) -> "EvaluatedModel":
        """The same weights with these features, not scaled; without the head, which reads what it was trained on.

        Raises:
            UserError: The encoder has h alone.
        """
        assert self.encoder is not None
        if feature == self.encoder.config.feature and self.encoder.scaling is None:
            return self
        return replace(self, encoder=read_as(self.encoder, feature), head=None)

    def at_layer(self, layer: str) -> "EvaluatedModel":
        """The same weights with the output of this layer as features; itself where it has those, or no network.

        Raises:
            UserError: There is no such layer, or the network does not have it.
        """
        if self.encoder is None:
            return self
        reader = LayerOutput(self.encoder, self.head, layer, who=self.name)
        if reader.is_default:
            return self
        head = self.head if reads_head(reader.name) else None
        return replace(self, encoder=reader.encoder, head=head, layer=reader.name)

    def with_random_head(self, like: ProjectionHead, *, seed: int) -> "EvaluatedModel":
        """The same with a projection head of this shape, of random weights."""
        assert self.encoder is not None
        head = ProjectionHead(read_for(self.encoder, like).num_features, **like.to_dict(), seed=seed)
        return replace(self, head=head.to(self.world.device).eval())

    @cached_property
    def _reader(self) -> Encoder | LayerOutput | None:
        """What gives the features; None: there is no network."""
        if self.encoder is None or self.layer is None:
            return self.encoder
        return LayerOutput(self.encoder, self.head, self.layer, who=self.name)

    @property
    def head_layer(self) -> int:
        """Layers of the projection head that the features have passed."""
        return self._reader.head_layer if isinstance(self._reader, LayerOutput) else 0

    @property
    def description(self) -> str:
        """What takes the place of an encoder, in words; empty where there is one."""
        if self.hand_made is not None:
            return self.hand_made.description
        return f"{self.size} x {self.size} pixels" if self.encoder is None else ""

    def fitted(self, images: Images) -> Images:
        """The images with this subject's channels."""
        return fit_channels(images, self.channels, who="The encoder" if self.encoder is None else self.name)

    @cached_property
    def model(self) -> dict[str, Any]:
        """All that determines its features, as JSON can hold it: weights, network, preprocessing, kind of device.

        Read once: the weights of a subject do not change while it lives.
        """
        hand_made = {} if self.hand_made is None else {"features": self.hand_made.record}
        head = {"head": self.head_weights} if self.head_layer else {}
        return {
            **hand_made,
            **head,
            "weights": None if self.encoder is None else digest_of(self.encoder),
            "network": None if self.encoder is None else self.encoder.config.to_dict(),
            "preprocessing": self.preprocessing,
            "size": self.size,
            "channels": self.channels,
            "device": self.world.device.type,
        }

    @cached_property
    def head_weights(self) -> str | None:
        """Digest of the projection head: of its weights, and of what it reads where that is not what is returned."""
        if self.head is None:
            return None
        weights = digest_of(self.head)
        return weights if self.head.reads is None else name_of({"weights": weights, "reads": self.head.reads})

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
        name: random, pixels, hog, patches, timm/NAME, torchvision/NAME, or the folder of a run or an encoder.
        like: The encoder whose shape `random` has, and whose image size `pixels`, `hog` and `patches` have, up to
            MAX_SIDES.
        preprocessing: Preset of the evaluation preprocessing of these four.
        seed: Of the random weights.
        size: Of the images that a model of timm or torchvision is given, in pixels.
        pretrained: Whether such a model brings its weights; else it has random ones.

    Raises:
        UserError: There is no such model, its weights cannot be loaded, or the images are too small for its features.
    """
    shared = {"cache": cache, "world": world}
    if name in WITHOUT_NETWORK:
        size = min(like.size, MAX_SIDES.get(name, like.size))
        return EvaluatedModel(
            name=name,
            encoder=None,
            hand_made=HogFeatures(size) if name == HOG else None,
            preprocessing=preprocessing,
            size=size,
            channels=like.channels,
            **shared,
        )
    if name == RANDOM:
        return _subject(name, random_encoder(like, seed=seed), None, preprocessing, **shared)
    if name.startswith((TIMM, TORCHVISION)):
        config = EncoderConfig(name=name, channels=3, size=size)
        return _subject(name, build_encoder(config, seed=seed, pretrained=pretrained), None, "torchvision", **shared)
    require_model(name)
    return subject_of(load_quietly(name), name, **shared)


def require_model(name: str) -> None:
    """Reject a misspelt name of a model under test; what looks like a path is left to the function that opens it.

    Raises:
        UserError: The sentence names what has one.
    """
    if name in BASELINE_NAMES or name == INIT or os.sep in name or "/" in name or os.path.lexists(name):
        return
    close = difflib.get_close_matches(name.lower(), BASELINE_NAMES, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(
        f"There is no model {name!r}{hint}; give {', '.join(BASELINE_NAMES)}, {TIMM}NAME, {TORCHVISION}NAME, or the "
        "folder of a run or an encoder."
    )


def initial_subject_name(weights: str) -> str:
    """Name in tables of the weights that a run began from.

    Args:
        weights: What they are called.
    """
    return f"{INIT} ({weights})"


def is_initial(name: str) -> bool:
    """Whether a name in tables is one of `initial_subject_name`."""
    return name.startswith(f"{INIT} (")


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
