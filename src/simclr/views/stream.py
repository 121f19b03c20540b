"""Evaluation views of any number of images, batch by batch, in memory that does not grow with their number.

Shapes: B images of a batch, C channels, S x S pixels.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr.data.images import Images
from simclr.data.source import Skipped
from simclr.views.policy import AugmentationPreset
from simclr.views.views import eval_images

MAX_PIXEL_BYTES = 256 << 20
"""Decoded pixels in memory at a time: seven photographs of 12 megapixels, or a batch of smaller images."""


class ViewBatch(NamedTuple):
    """Some images as the encoder is to see them."""

    indices: np.ndarray
    """(B,) which images."""
    views: Tensor
    """(B, C, S, S) float32 in [0, 1]."""


def stream_views(
    images: Images,
    *,
    size: int,
    preset: AugmentationPreset,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    leave_out: Callable[[Skipped], None],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[ViewBatch]:
    """The evaluation views of all images in their order, each decoded once.

    Args:
        batch_size: Images in a batch; those with damaged images, and the last one, have fewer.
        leave_out: Told of each image that cannot be decoded.
        progress: Called with (done, total) images.

    Raises:
        UserError: A file has changed or gone since it was opened.
    """
    for begin in range(0, len(images), batch_size):
        indices, views = [], []
        for part in _parts(images, begin, min(begin + batch_size, len(images))):
            good, pixels, damaged = images.read_readable(part)
            for skipped in damaged:
                leave_out(skipped)
            if len(good):
                indices.append(good)
                views.append(eval_images(pixels, size, preset, device=device))
            if progress is not None:
                progress(int(part[-1]) + 1, len(images))
        if views:
            yield ViewBatch(np.concatenate(indices), views[0] if len(views) == 1 else torch.cat(views))


def _parts(images: Images, begin: int, end: int) -> Iterator[np.ndarray]:
    """Runs of images that take at most MAX_PIXEL_BYTES, or of a single one."""
    ends = np.cumsum(images.sizes[begin:end].prod(axis=1) * images.channels)
    start, taken = 0, 0
    while start < end - begin:
        stop = max(start + 1, int(np.searchsorted(ends, taken + MAX_PIXEL_BYTES, side="right")))
        yield np.arange(begin + start, begin + stop)
        start, taken = stop, int(ends[stop - 1])
