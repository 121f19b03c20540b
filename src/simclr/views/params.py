"""The parameters of each view, drawn on the host from (seed, epoch, index, view) and the image's own size.

Every operation reads slots of its own, so that switching one off changes no draw of another:

    block 0   flip, jitter, gray, blur: on or off
    block 1   brightness, contrast, saturation, hue
    block 2   order of the four jitter operations
    block 3   sigma of the blur
    block 4   equalise, solarise, sobel, motion blur: on or off
    block 5   rotation, cutout, noise: on or off; direction of the motion blur
    block 6   turns of the rotation; y and x of the cutout's centre
    block 16+ crop attempts, one block each: aspect, area or height, y, x
    block 65,536+ noise, four pixels each

The crop that all views of an image may share is drawn from a stream of its own.

Crop samplers: TensorFlow's sample_distorted_bounding_box (google) and torchvision's RandomResizedCrop.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from simclr.errors import UserError
from simclr.random import SHARED_CROP_STREAM, uniforms
from simclr.views.policy import Policy

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Numbers of the jitter operations in `ViewParams.order`."""

DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Steps in y and x of the motion blur's lines."""

_FIRST_CROP_BLOCK = 16
_FIRST_NOISE_BLOCK = 2**16
_NOISE_BLOCKS = 2**15  # at a time, or those of one view if it has more: temporaries stay in megabytes


@dataclass(frozen=True)
class OperationParams:
    """What decides the further operations of a batch of views (`policy.OPERATIONS`): one row a view."""

    equalise: np.ndarray
    """(B,) bool."""
    solarise: np.ndarray
    """(B,) bool."""
    sobel: np.ndarray
    """(B,) bool."""
    motion_blur: np.ndarray
    """(B,) bool."""
    direction: np.ndarray
    """(B,) int64: which of `DIRECTIONS`."""
    turns: np.ndarray
    """(B,) int64 quarter turns, anticlockwise; 0 where there is no rotation."""
    cutout: np.ndarray
    """(B,) bool."""
    centre: np.ndarray
    """(B, 2) float32 y and x of the cutout's centre, as shares of the view's side in [0, 1)."""
    noise: np.ndarray
    """(B,) bool."""
    counter: np.ndarray
    """(B, 3) int64 epoch, index and view: what the noise is drawn from, with the seed."""
    seed: int

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> "OperationParams":
        arrays = {field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name != "seed"}
        return OperationParams(**arrays, seed=self.seed)

    def normals(self, rows: np.ndarray, channels: int, size: int) -> np.ndarray:
        """Standard normal numbers of some views, (rows, C, S, S) float32, by Box and Muller's transform."""
        values = channels * size * size
        blocks = _FIRST_NOISE_BLOCK + np.arange(-(-values // 4))
        normals = np.empty((len(rows), values), np.float32)
        step = max(1, _NOISE_BLOCKS // len(blocks))  # views
        for first in range(0, len(rows), step):
            epoch, index, view = (self.counter[rows[first : first + step], k, None] for k in range(3))
            u = uniforms(self.seed, epoch, index, view, blocks)  # (views, blocks, 4)
            radius, angle = np.sqrt(-2 * np.log1p(-u[..., :2])), 2 * np.pi * u[..., 2:]
            pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
            normals[first : first + step] = pairs.reshape(len(u), -1)[:, :values]
        return normals.reshape(-1, channels, size, size)


@dataclass(frozen=True)
class ViewParams:
    """All that decides a batch of views besides the pixels: numpy arrays, one row a view."""

    box: np.ndarray
    """(B, 4) int64 crop: y, x, height, width in pixels of the image."""
    flip: np.ndarray
    """(B,) bool."""
    jitter: np.ndarray
    """(B,) bool: whether the four colour operations apply."""
    order: np.ndarray
    """(B, 4) int64: which operation comes first, second, ... (BRIGHTNESS, CONTRAST, SATURATION, HUE)."""
    brightness: np.ndarray
    """(B,) float32 factor, or shift with brightness_mode "add"."""
    contrast: np.ndarray
    """(B,) float32 factor."""
    saturation: np.ndarray
    """(B,) float32 factor."""
    hue: np.ndarray
    """(B,) float32 shift in turns."""
    gray: np.ndarray
    """(B,) bool."""
    blur: np.ndarray
    """(B,) bool."""
    sigma: np.ndarray
    """(B,) float32, pixels of the view. One an image: the authors draw one for the whole batch of a replica, but
    then a view would depend on its batch."""
    operations: OperationParams | None = None
    """Of the further operations; None: the policy has none."""

    def __len__(self) -> int:
        return len(self.box)

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> "ViewParams":
        arrays = {field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name != "operations"}
        return ViewParams(**arrays, operations=None if self.operations is None else self.operations[rows])


def draw(
    policy: Policy,
    sizes: np.ndarray,
    *,
    seed: int,
    epoch: int | np.ndarray,
    indices: np.ndarray,
    view: int,
) -> ViewParams:
    """Draw the parameters of one view of each image.

    Args:
        sizes: (B, 2) heights and widths of the images, in pixels.
        seed: 0 to 2**64 - 1.
        epoch: the epoch, or (B,) one for each image.
        indices: (B,) the images' positions in their data set, below 2**32; not their positions in the batch.
        view: 0, 1, ...

    Raises:
        UserError: indices that are out of range or not one for each image, or a seed out of range.
    """
    sizes, indices = np.asarray(sizes, np.int64), np.asarray(indices, np.int64)
    epochs = np.broadcast_to(np.asarray(epoch, np.int64), indices.shape)  # (B,)
    if sizes.shape != (*indices.shape, 2):
        raise UserError(f"{len(sizes)} images and {indices.size} indices: give one index for each image.")
    if indices.min(initial=0) < 0 or indices.max(initial=0) >= 2**32:
        raise UserError(f"indices from {indices.min()} to {indices.max()}: an index is from 0 to 2**32 - 1.")
    u = uniforms(seed, epochs[:, None], indices[:, None], view, np.arange(4))  # (B, block, 4)

    def attempts(rows: np.ndarray, first: int, last: int, stream: int = view) -> np.ndarray:
        blocks = np.arange(_FIRST_CROP_BLOCK + first, _FIRST_CROP_BLOCK + last)
        return uniforms(seed, epochs[rows, None], indices[rows, None], stream, blocks)  # (rows, attempts, 4)

    operations = None
    if policy.operates:
        counter = np.stack(np.broadcast_arrays(epochs, indices, view), axis=1)  # (B, 3)
        operations = _draw_operations(policy, seed, counter)
    neutral = 0 if policy.brightness_mode == "add" else 1
    lowest = -policy.brightness if policy.brightness_mode == "add" else max(1 - policy.brightness, 0)
    return ViewParams(
        box=_draw_boxes(policy, sizes, attempts),
        flip=u[:, 0, 0] < policy.flip,
        jitter=u[:, 0, 1] < policy.jitter,
        order=np.argsort(u[:, 2], axis=1, kind="stable"),
        brightness=_between(u[:, 1, 0], lowest, neutral + policy.brightness),
        contrast=_between(u[:, 1, 1], max(1 - policy.contrast, 0), 1 + policy.contrast),
        saturation=_between(u[:, 1, 2], max(1 - policy.saturation, 0), 1 + policy.saturation),
        hue=_between(u[:, 1, 3], -policy.hue, policy.hue),
        gray=u[:, 0, 2] < policy.gray,
        blur=u[:, 0, 3] < policy.blur,
        sigma=_between(u[:, 3, 0], *policy.blur_sigma),
        operations=operations,
    )


def _draw_operations(policy: Policy, seed: int, counter: np.ndarray) -> OperationParams:
    """Parameters of the further operations, from the (B, 3) epochs, indices and views."""
    epoch, index, view = (counter[:, k, None] for k in range(3))
    u = uniforms(seed, epoch, index, view, np.arange(4, 7))  # (B, block, 4)
    return OperationParams(
        equalise=u[:, 0, 0] < policy.equalise,
        solarise=u[:, 0, 1] < policy.solarise,
        sobel=u[:, 0, 2] < policy.sobel,
        motion_blur=u[:, 0, 3] < policy.motion_blur,
        direction=(u[:, 1, 3] * len(DIRECTIONS)).astype(np.int64),
        turns=np.where(u[:, 1, 0] < policy.rotation, 1 + (u[:, 2, 0] * 3).astype(np.int64), 0),
        cutout=u[:, 1, 1] < policy.cutout,
        centre=u[:, 2, 1:3].astype(np.float32),
        noise=u[:, 1, 2] < policy.noise,
        counter=counter,
        seed=seed,
    )


def _draw_boxes(policy: Policy, sizes: np.ndarray, attempts: Callable[..., np.ndarray]) -> np.ndarray:
    """(B, 4) crops: within the whole image, or within the crop that all views share."""
    boxes = _google_boxes if policy.preset == "google" else _torchvision_boxes
    outer = np.column_stack([np.zeros_like(sizes), sizes])  # (B, 4)
    if policy.shared_crop:
        outer = boxes(policy, sizes, partial(attempts, stream=SHARED_CROP_STREAM))
    if not policy.crop:
        return outer
    inner = boxes(policy, outer[:, 2:], attempts)
    return np.column_stack([outer[:, :2] + inner[:, :2], inner[:, 2:]])


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return (low + u * (high - low)).astype(np.float32)


_Attempts = Callable[[np.ndarray, int, int], np.ndarray]
"""(rows, first, last) -> (rows, last - first, 4) uniforms of those crop attempts."""


def _google_boxes(policy: Policy, sizes: np.ndarray, attempts: _Attempts) -> np.ndarray:
    """TensorFlow's sampler: aspect uniform, then height uniform among those that keep the area within bounds.

    So small and wide crops are commoner than torchvision's: mean area 0.43 against 0.49 on 32 x 32.
    After 100 failures, the whole image.
    """
    boxes = np.column_stack([np.zeros_like(sizes), sizes])  # (B, 4)

    def candidates(rows: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        full_h, full_w = sizes[rows, 0, None], sizes[rows, 1, None]  # (rows, 1)
        area = full_h * full_w
        least, most = policy.crop_area[0] * area, policy.crop_area[1] * area
        low, high = policy.crop_aspect
        aspect = low + u[..., 0] * (high - low)  # (rows, attempts)
        h_max = np.rint(np.sqrt(most / aspect))
        # the largest height whose rounded width still fits
        fitting = np.floor((full_w + 0.5 - 1e-7) / aspect)
        fitting -= np.rint(fitting * aspect) > full_w
        h_max = np.minimum(np.where(np.rint(h_max * aspect) > full_w, fitting, h_max), full_h)
        h_min = np.minimum(np.rint(np.sqrt(least / aspect)), h_max)
        h = h_min + np.floor(u[..., 1] * (h_max - h_min + 1))
        # rounding may have left the area just outside its bounds: one pixel of height is allowed to mend it
        h += h * np.rint(h * aspect) < least
        h -= h * np.rint(h * aspect) > most
        w = np.rint(h * aspect)
        legal = (h >= 1) & (w >= 1) & (h <= full_h) & (w <= full_w)
        legal &= (h * w >= least) & (h * w <= most) & (h * w >= policy.min_covered * area)
        # TF draws offsets below the slack, so the last one never comes
        y, x = np.floor(u[..., 2] * (full_h - h)), np.floor(u[..., 3] * (full_w - w))
        return np.stack([y, x, h, w], axis=-1), legal

    _first_legal(boxes, candidates, attempts, until=(1, 4, 16, 100))
    return boxes


def _torchvision_boxes(policy: Policy, sizes: np.ndarray, attempts: _Attempts) -> np.ndarray:
    """RandomResizedCrop: area uniform, aspect log-uniform; after 10 failures, the largest central crop."""
    (least, most), (low, high) = policy.crop_area, policy.crop_aspect
    full_h, full_w = sizes[:, 0], sizes[:, 1]  # (B,)
    central_h = np.where(full_w < low * full_h, np.rint(full_w / low), full_h)
    central_w = np.where(full_w > high * full_h, np.rint(full_h * high), full_w)
    central = [(full_h - central_h) // 2, (full_w - central_w) // 2, central_h, central_w]
    boxes = np.column_stack(central).astype(np.int64)  # (B, 4)

    def candidates(rows: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        full_h, full_w = sizes[rows, 0, None], sizes[rows, 1, None]  # (rows, 1)
        aspect = np.exp(np.log(low) + u[..., 0] * np.log(high / low))  # (rows, attempts)
        area = full_h * full_w * (least + u[..., 1] * (most - least))
        h, w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
        legal = (h >= 1) & (w >= 1) & (h <= full_h) & (w <= full_w)
        y, x = np.floor(u[..., 2] * (full_h - h + 1)), np.floor(u[..., 3] * (full_w - w + 1))
        return np.stack([y, x, h, w], axis=-1), legal

    _first_legal(boxes, candidates, attempts, until=(1, 3, 10))
    return boxes


def _first_legal(
    boxes: np.ndarray,
    candidates: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    attempts: _Attempts,
    until: tuple[int, ...],
) -> None:
    """Put each row's first legal candidate into `boxes`; rows without one keep what they hold.

    Attempts are drawn in growing rounds and only for the rows that are still without a box: most need one.
    """
    rows = np.arange(len(boxes))
    for first, last in zip((0, *until), until, strict=False):
        box, legal = candidates(rows, attempts(rows, first, last))
        has_legal = legal.any(axis=1)
        boxes[rows[has_legal]] = box[has_legal, legal[has_legal].argmax(axis=1)]
        rows = rows[~has_legal]
        if not len(rows):
            return
