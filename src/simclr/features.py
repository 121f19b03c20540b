"""Encoder + images -> features: the one source for evaluation, embedding and monitoring."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from simclr.augment.policy import Semantics
from simclr.augment.views import eval_images
from simclr.data.images import Images
from simclr.errors import UserError
from simclr.models.encoder import Encoder


def extract(
    encoder: Encoder,
    images: Images,
    *,
    semantics: Semantics = "google",
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features h of every image, in the order of the data, with the encoder in inference mode.

    Args:
        encoder: On the device where the work is to be done; its mode is restored afterwards.
        semantics: Whose evaluation preprocessing: the one that the encoder was trained with.
        progress: Called with (done, total) images.

    Returns:
        (n, F) float32.

    Raises:
        UserError: The images' channels are not the encoder's.
    """
    config = encoder.config
    require_channels(config.channels, images)
    device = next(encoder.parameters()).device
    features = np.empty((len(images), encoder.num_features), dtype=np.float32)
    with inference(encoder):
        for begin in range(0, len(images), batch_size):
            rows = np.arange(begin, min(begin + batch_size, len(images)))
            pixels = eval_images(images.peek(rows), config.size, semantics, device=device)  # (B, C, S, S)
            features[rows] = encoder(pixels).float().cpu().numpy()
            if progress is not None:
                progress(int(rows[-1]) + 1, len(images))
    return features


def pixels_of(images: Images, *, size: int, semantics: Semantics = "google", batch_size: int = 256) -> np.ndarray:
    """The evaluation pixels themselves as features: the baseline of every table. (n, C*S*S) float32."""
    batches = []
    for begin in range(0, len(images), batch_size):
        rows = np.arange(begin, min(begin + batch_size, len(images)))
        batches.append(eval_images(images.peek(rows), size, semantics).flatten(1).numpy())  # (B, C*S*S)
    return np.concatenate(batches)


def require_finite(features: np.ndarray, what: str) -> None:
    """Refuse features with NaN or infinite values; `what` says whose they are."""
    finite = int(np.isfinite(features).all(axis=1).sum())
    if finite < len(features):
        raise UserError(
            f"The {what} features contain NaN or infinite numbers, in {len(features) - finite:,} of {len(features):,} "
            "rows; the encoder or the file that they come from is damaged, or its training diverged."
        )


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
