"""Encoder + images -> features: the one source for evaluation, embedding and monitoring."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from simclr.config.encoder import Scaling
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import NotFinite, UserError
from simclr.models.encoder import Encoder, read_as, with_config
from simclr.models.layers import LayerOutput
from simclr.views.policy import AugmentationPreset
from simclr.views.views import eval_images

ALONE = DistributedContext()
FEATURES_VERSION = 1
"""Version of features: raise it when the same weights and pixels give other features by more than rounding, because of
the evaluation preprocessing (crop, resizing), the networks' forward passes or what is taken as the features."""


def extract(
    encoder: Encoder | LayerOutput,
    images: Images,
    *,
    preset: AugmentationPreset = "google",
    crop: float | None = None,
    batch_size: int = 256,
    world: DistributedContext = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features of every image, in the order of the data, with the encoder in inference mode.

    Args:
        encoder: On the device where the work is to be done; its mode is restored afterwards. Or one of its layers.
        preset: Whose evaluation preprocessing: the one that the encoder was trained with.
        crop: Share of the shorter side that is kept; None: the authors' rule (`eval_images`).
        world: The processes that share the work; all must call.
        progress: Called with (done, total) images.

    Returns:
        (n, F) float32.

    Raises:
        UserError: The images' channels are not the encoder's, or it gives NaN or infinite numbers.
    """
    config = encoder.config
    require_channels(config.channels, images)
    return outputs(
        encoder, images, encoder.num_features,
        size=config.size, preset=preset, crop=crop, batch_size=batch_size, world=world, progress=progress,
    )  # fmt: skip


SCALING_ROWS = 5000
"""Training images, evenly spaced, by which features are standardised or whitened."""


def scaled(
    encoder: Encoder, scaling: Scaling, images: Images, *, preset: AugmentationPreset = "google",
    world: DistributedContext = ALONE,
) -> Encoder:  # fmt: skip
    """The encoder with its features scaled (`EncoderConfig.scaling`) by training images, none of whose labels is read.

    Args:
        encoder: On the device where the work is to be done; it stays as it is. A scaling of its own is replaced.
        preset, world: As of `extract`.

    Raises:
        UserError: As of `extract`.
    """
    raw = read_as(encoder, encoder.config.feature)
    rows = np.linspace(0, len(images) - 1, min(len(images), SCALING_ROWS)).astype(np.int64)
    features = extract(raw, images.subset(rows), preset=preset, world=world)
    result = with_config(raw, replace(raw.config, scaling=scaling))
    if result.scaling is not None:
        result.scaling.fit(features)
    return result


def outputs(
    network: nn.Module,
    images: Images | Sequence[np.ndarray],
    width: int,
    *,
    size: int,
    preset: AugmentationPreset = "google",
    crop: float | None = None,
    batch_size: int = 256,
    world: DistributedContext = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """What `network` gives for the evaluation view of each image, in inference mode and in the order of the images.

    Several processes take the batches in turn and exchange what they made, so that each ends with every row; the
    batches are those of one process, and so are the bits.

    Args:
        network: (B, C, size, size) -> (B, width), on the device where the work is to be done.
        images: Of the channels that it takes; arrays are (H, W, C) uint8.
        crop: As in `extract`.
        world: The processes that share the work; all must call.
        progress: Called with (done, total) images.

    Returns:
        (n, width) float32.

    Raises:
        UserError: The network gives NaN or infinite numbers; every process raises it.
    """
    device = device_of(network)
    result = np.empty((len(images), width), dtype=np.float32)
    with inference(network):
        for first in range(0, len(images), batch_size * world.size):
            begin = min(first + world.rank * batch_size, len(images))
            end = min(begin + batch_size, len(images))
            mine = torch.zeros(batch_size, width, device=device)
            if begin < end:
                some = (
                    images.read(np.arange(begin, end), copy=False) if isinstance(images, Images) else images[begin:end]
                )
                pixels = eval_images(some, size, preset, crop=crop, device=device)  # (B, C, size, size)
                mine[: end - begin] = network(pixels)
            end = min(first + world.size * batch_size, len(images))
            result[first:end] = world.all_gather_rows(mine)[: end - first].cpu().numpy()
            require_finite(result[first:end], "network's", first=first)
            if progress is not None:
                progress(end, len(images))
    return result


def pixels_of(
    images: Images,
    *,
    size: int,
    preset: AugmentationPreset = "google",
    crop: float | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """The evaluation pixels themselves as features: the baseline of every table. (n, C*S*S) float32."""
    batches = []
    for begin in range(0, len(images), batch_size):
        rows = np.arange(begin, min(begin + batch_size, len(images)))
        batches.append(
            eval_images(images.read(rows, copy=False), size, preset, crop=crop).flatten(1).numpy()
        )  # (B, C*S*S)
    return np.concatenate(batches)


def device_of(network: nn.Module) -> torch.device:
    """Where it lies; a network that onnxruntime computes has no parameters, only a buffer."""
    return next(chain(network.parameters(), network.buffers())).device


def require_finite(features: np.ndarray, what: str, *, first: int | None = None) -> None:
    """Refuse features with NaN or infinite values.

    Args:
        features: (n, F).
        what: Whose they are, for the sentence: "training", "network's".
        first: Number of the first row, where these are a part of more that have not been made yet.
    """
    rows = np.isfinite(features).all(axis=1)  # (n,)
    if not rows.all():
        bad = f"in {(~rows).sum():,} of {len(features):,} rows"
        if first is not None:
            bad = f"first in row {first + int(rows.argmin()):,}, counted from 0"
        raise NotFinite(
            f"The {what} features contain NaN or infinite numbers, {bad}; the encoder or the file that they come from "
            "is damaged, or its training diverged."
        )


def probabilities_of(logits: Tensor) -> np.ndarray:
    """Softmax of a classifier's logits: (n, K) -> (n, K) float32.

    Raises:
        NotFinite: Logits are NaN or infinite, so that there is no probability.
    """
    if not bool(logits.isfinite().all()):
        raise NotFinite(
            "The classifier gives NaN or infinite scores; its weights are damaged, or its training diverged."
        )
    return logits.float().softmax(dim=1).cpu().numpy()


def require_channels(channels: int, images: Images) -> None:
    """Refuse images that the encoder was not made for."""
    if images.channels != channels:
        raise UserError(
            f"The encoder expects {channels}-channel images and {images.name} has {images.channels}; open the data "
            f"with --channels {channels} to convert it."
        )


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Batch norm in inference mode and no gradients; the module's mode is restored afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(training)
