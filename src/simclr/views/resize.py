"""Crop and resize of uint8 images of any sizes, by explicit taps.

    google       TensorFlow 2's tf.image.resize "bicubic": Keys' kernel (a = -0.5) at half-pixel centres, no
                 antialias, taps outside the crop dropped and the others renormalised, offset rounded to 1/1024
    torchvision  bilinear with antialias (Pillow's triangle filter, wider where it shrinks)

By hand because torch's interpolate has neither TensorFlow's kernel (its a is -0.75 and its borders clamp) nor a
box for each image.

Shapes: B images, C channels, H x W canvas that holds every crop, S x S result, T taps.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from simclr.errors import UserError
from simclr.views.policy import AugmentationPreset

Images = np.ndarray | Sequence[np.ndarray]
"""uint8 images: one array (B, H, W, C), or a sequence of arrays (H, W, C) of any sizes."""

_CPU_CHUNK_PIXELS = 2**16  # temporaries stay in a core's cache
_GPU_CHUNK_PIXELS = 2**24  # enough work for a launch; temporaries of 200 MB
_OFFSET_STEPS = 1024

_Taps = tuple[np.ndarray, np.ndarray]
"""Source indices int64 and weights float32, both (B, S, T)."""


def crop_resize(
    images: Images,
    boxes: np.ndarray,
    size: int,
    preset: AugmentationPreset,
    *,
    resized: np.ndarray | None = None,
    flip: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Cut each image's box out and resize it.

    Args:
        images: B uint8 images, all with C channels.
        boxes: (B, 4) y, x, height, width in pixels of the image.
        resized: (B, 2) height and width that each crop is resized to, of which the central size x size window
            is returned; by default exactly size x size.
        flip: (B,) bool, which results to mirror left to right.

    Returns:
        (B, C, S, S) float32 on `device`, 1.0 for 255. Bicubic results overshoot [0, 1] a little: not clipped.
    """
    lengths = np.full((len(boxes), 2), size) if resized is None else resized
    windows = np.rint((lengths - size) / 2)[:, :, None] + np.arange(size)  # (B, 2, S) of each side
    if flip is not None:
        windows[flip, 1] = windows[flip, 1, ::-1]
    taps = _bicubic_taps if preset == "google" else _bilinear_taps
    rows = taps(boxes[:, 2], lengths[:, 0], windows[:, 0])
    columns = taps(boxes[:, 3], lengths[:, 1], windows[:, 1])

    canvas = torch.from_numpy(_pack(images, boxes)).to(device)  # (B, H, W, C)
    batch, height, width, channels = canvas.shape
    x = canvas.float().mul_(1 / 255)
    x = _interpolate(x.view(batch, height, width * channels), *rows).view(batch, size, width, channels)
    x = x.permute(0, 2, 3, 1).reshape(batch, width, channels * size)
    x = _interpolate(x, *columns).view(batch, size, channels, size)  # (B, x, C, y)
    return x.permute(0, 2, 3, 1).contiguous()  # (B, C, S, S)


def image_sizes(images: Images) -> np.ndarray:
    """(B, 2) heights and widths."""
    if isinstance(images, np.ndarray):
        return np.tile(images.shape[1:3], (len(images), 1))
    return np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)


def check_images(images: Images, channels: int) -> None:
    """Raise UserError unless all are uint8 (H, W, C) with `channels` channels and at least one pixel."""
    for image in images[:1] if isinstance(images, np.ndarray) else images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or not image.size:
            raise UserError(
                f"an image of shape {image.shape} and type {image.dtype}: expected a uint8 array (height, width, "
                f"{channels}); convert the images, or give the policy their number of channels (1 or 3)."
            )


def chunks(boxes: np.ndarray, size: int, device: torch.device | str) -> Iterator[slice]:
    """Rows to treat in one pass, so that temporaries stay in cache (CPU) or within memory (GPU)."""
    pixels = _CPU_CHUNK_PIXELS if torch.device(device).type == "cpu" else _GPU_CHUNK_PIXELS
    step = max(1, pixels // max(size**2, int(boxes[:, 2].max(initial=1) * boxes[:, 3].max(initial=1))))
    for first in range(0, len(boxes), step):
        yield slice(first, first + step)


def _pack(images: Images, boxes: np.ndarray) -> np.ndarray:
    """The crops, each in the upper left corner of its (H, W, C); what lies beyond a crop is never read."""
    height, width = boxes[:, 2:].max(axis=0)
    canvas = np.empty((len(boxes), height, width, images[0].shape[2]), np.uint8)
    for blank, image, (y, x, h, w) in zip(canvas, images, boxes.tolist(), strict=True):
        blank[:h, :w] = image[y : y + h, x : x + w]
    return canvas


def _interpolate(x: Tensor, index: np.ndarray, weight: np.ndarray) -> Tensor:
    """(B, length, K) -> (B, S, K): weighted sums of whole rows, which are copied at the speed of memory."""
    batch, length, width = x.shape
    flat = x.reshape(batch * length, width)
    starts = np.arange(0, batch * length, length)[:, None, None]
    rows = torch.from_numpy((starts + index).reshape(-1, index.shape[2]).T.copy()).to(x.device)  # (T, B S)
    scales = torch.from_numpy(weight.reshape(-1, weight.shape[2]).T.copy()).to(x.device)[:, :, None]  # (T, B S, 1)
    total = flat.index_select(0, rows[0]).mul_(scales[0])
    for row, scale in zip(rows[1:], scales[1:], strict=True):
        total.add_(flat.index_select(0, row).mul_(scale))
    return total.view(batch, index.shape[1], width)


def _bicubic_taps(length: np.ndarray, resized: np.ndarray, position: np.ndarray) -> _Taps:
    """Four taps for each output position (B, S) when `length` (B,) pixels become `resized` (B,).

    float32 in TensorFlow's order of operations: in float64 some offsets would round to another 1/1024.
    """
    half = np.float32(0.5)
    scale = length.astype(np.float32) / resized.astype(np.float32)
    centre = (position.astype(np.float32) + half) * scale[:, None] - half
    left = np.floor(centre)
    offset = np.rint((centre - left) * _OFFSET_STEPS) / _OFFSET_STEPS
    index = left.astype(np.int64)[:, :, None] + np.arange(-1, 3)
    inside = np.clip(index, 0, length[:, None, None] - 1)
    return inside, keys_weights(offset, inside == index)


def keys_weights(offset: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Float32 weights (..., 4) of the taps around positions `offset` (...) beyond the second of them, 0 to 1.

    Those not `inside` (..., 4) weigh nothing; the others are renormalised.
    """
    distance = np.abs(offset[..., None] - np.arange(-1, 3, dtype=np.float32)).astype(np.float64)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = np.where(distance < 1, near, far) * inside
    return (weight / weight.sum(axis=-1, keepdims=True)).astype(np.float32)


def _bilinear_taps(length: np.ndarray, resized: np.ndarray, position: np.ndarray) -> _Taps:
    """Pillow's triangle filter; where a position needs fewer taps than the widest, the others weigh 0."""
    scale = (length / resized)[:, None]  # (B, 1)
    support = np.maximum(scale, 1)
    centre = (position + 0.5) * scale
    first = np.maximum(np.floor(centre - support + 0.5), 0)
    last = np.minimum(np.floor(centre + support + 0.5), length[:, None])
    index = first[:, :, None] + np.arange(int((last - first).max()))
    weight = 1 - np.abs(index + 0.5 - centre[:, :, None]) / support[:, :, None]
    weight = np.maximum(weight, 0) * (index < last[:, :, None])
    index = np.minimum(index, length[:, None, None] - 1).astype(np.int64)
    total = weight.cumsum(axis=2)[:, :, -1:]  # one by one: np.sum's order depends on T, hence on the batch
    return index, (weight / total).astype(np.float32)
