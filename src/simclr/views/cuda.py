"""Views on a GPU by fused Triton kernels: the pixels of `reference.py` in at most two launches for a batch.

    triton_kernels.py   what happens to one view
    device_images.py    uint8 images on the device
    here                records for the kernels, and launches

The host draws parameters and sends them in one copy that it does not wait for; nothing here waits for the device.

Where TRITON_INTERPRET=1 was set before Triton was imported, the kernels run on the CPU, slowly, for tests.

Shapes: B images, N views, C channels, S x S pixels.
"""

import os
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from simclr.errors import UserError
from simclr.views.device_images import DeviceImages
from simclr.views.operations import operate
from simclr.views.params import CONTRAST, HUE, SATURATION, ViewParams
from simclr.views.policy import AugmentationPreset, Policy
from simclr.views.reference import blur_kernels
from simclr.views.resize import keys_weights
from simclr.views.triton_kernels import NOTHING, VIEW, blur_kernel, make_kernel

_MOST_PIXELS = 512  # of a tile; two a thread, for which 64 registers do: half of an H100's threads are then at work
_BLUR_FLOATS = 512  # of a tile; one a thread, so that neighbouring threads read neighbouring floats
_one_at_a_time = threading.Lock()  # batches are prepared by several threads; Triton compiles in one


def render(images: DeviceImages, params: Sequence[ViewParams], policy: Policy, dtype: torch.dtype) -> list[Tensor]:
    """Make one view of each image for each element of `params`.

    Args:
        images: B images of `policy.channels` channels.
        params: of B rows each.
        dtype: of the views, float32 or bfloat16.

    Returns:
        (B, C, S, S) in [0, 1] each, on the device of the images, channels-last, side by side in one piece of memory.
    """
    batch = len(images)
    views = np.zeros((len(params), batch), _view_type(policy.size))
    for rows, of_view in zip(views, params, strict=True):
        _place(rows, images, of_view.box)
        rows["resized"] = policy.size
        rows["flip"] = of_view.flip
        _plan_jitter(rows, of_view, policy)
        rows["gray"] = of_view.gray & (policy.channels == 3)
        _plan_blur(rows, of_view, policy.size)
    made_as = torch.float32 if policy.operates else dtype
    out = _make(views.reshape(-1), images, policy.size, policy.preset, policy.brightness_mode == "add", made_as)
    made = [out[k * batch : (k + 1) * batch] for k in range(len(params))]
    if policy.operates:  # rarely used: the definition, on the device
        made = [
            view if of_view.operations is None else operate(view, of_view.operations, policy).to(dtype)
            for view, of_view in zip(made, params, strict=True)
        ]
    return made


def crop_resize(
    images: DeviceImages, boxes: np.ndarray, size: int, preset: AugmentationPreset, *, resized: np.ndarray
) -> Tensor:
    """What `resize.crop_resize` returns, clipped to [0, 1] and channels-last."""
    views = np.zeros(len(images), _view_type(size))
    _place(views, images, boxes)
    views["resized"], views["begin"] = resized, np.rint((resized - size) / 2)
    return _make(views, images, size, preset, False, torch.float32)


def _view_type(size: int) -> np.dtype:
    return np.dtype([*VIEW, ("taps", np.float32, (size // 10 // 2 + 1,))])


def _place(views: np.ndarray, images: DeviceImages, boxes: np.ndarray) -> None:
    """Say where each image and in it the crop lies."""
    widths = images.sizes[:, 1]
    views["offset"] = images.offsets + (boxes[:, 0] * widths + boxes[:, 1]) * images.channels
    views["row_bytes"] = widths * images.channels
    views["length"] = boxes[:, 2:]


def _plan_jitter(views: np.ndarray, params: ViewParams, policy: Policy) -> None:
    """The operations that change something, in their order, and which of them precede contrast."""
    factors = np.column_stack([params.brightness, params.contrast, params.saturation, params.hue])  # (B, 4)
    idle = factors == [0 if policy.brightness_mode == "add" else 1, 1, 1, 0]
    if policy.channels == 1:
        idle[:, [SATURATION, HUE]] = True
    views["factors"] = np.take_along_axis(factors, params.order, axis=1)
    steps = np.where(np.take_along_axis(idle, params.order, axis=1), NOTHING, params.order)
    views["steps"] = steps
    contrast = (steps == CONTRAST) & params.jitter[:, None]
    views["stretch"] = contrast.any(axis=1)
    # without contrast all four steps, or none, come at once
    views["early"] = np.where(views["stretch"], contrast.argmax(axis=1), np.where(params.jitter, 4, 0))


def _plan_blur(views: np.ndarray, params: ViewParams, size: int) -> None:
    """The weights and how far they reach; a blur that reaches no other pixel is none."""
    rows = np.flatnonzero(params.blur)
    taps = blur_kernels(params.sigma[rows], size)
    views["taps"][rows] = taps
    views["reach"][rows] = np.count_nonzero(taps, axis=1) - 1


def _make(
    views: np.ndarray, images: DeviceImages, size: int, preset: AugmentationPreset, add: bool, dtype: torch.dtype
) -> Tensor:
    """(N, C, S, S), channels-last."""
    pixels, channels, google = images.pixels, images.channels, preset == "google"
    _check_device(pixels.device)
    views["scale"] = views["length"].astype(np.float32) / views["resized"].astype(np.float32)
    blurred = np.flatnonzero(views["reach"])
    views["plane"] = -1
    views["plane"][blurred] = np.arange(len(blurred))
    views["blurred"][: len(blurred)] = blurred
    words = torch.from_numpy(views.view(np.int32).reshape(len(views), views.itemsize // 4))
    if pixels.is_cuda:
        words = words.pin_memory()
    records = words.to(pixels.device, non_blocking=True)
    planes = torch.empty(len(blurred), size, size, channels, device=pixels.device)
    out = torch.empty(len(views), size, size, channels, dtype=dtype, device=pixels.device)
    tile = min(_MOST_PIXELS, max(128, triton.next_power_of_2(size * size)))
    launch: dict[str, Any] = {"SIZE": size, "CHANNELS": channels, "GOOGLE": google, "WORDS": words.shape[1]}
    launch |= {"enable_fp_fusion": False, "num_stages": 1}
    make = launch | {"ADD": add, "BLOCK": tile, "num_warps": tile // 64}
    blur = launch | {"BLOCK": _BLUR_FLOATS, "num_warps": _BLUR_FLOATS // 32}
    here = torch.cuda.device(pixels.device) if pixels.is_cuda else nullcontext()  # a thread's own is the first one
    with _one_at_a_time, here:
        if len(views):
            make_kernel[(len(views),)](pixels, records, _keys_table(pixels.device), planes, out, **make)
        if len(blurred):
            blur_kernel[(len(blurred),)](records, planes, out, **blur)
    return out.permute(0, 3, 1, 2)


@cache
def _keys_table(device: torch.device) -> Tensor:
    """(3, 3, 1025, 4) weights of bicubic taps: taps outside the crop before and after it, offset in 1/1024, tap."""
    before, after, offset = np.ogrid[:3, :3, :1025]
    tap = np.arange(4)
    inside = (tap >= before[..., None]) & (tap < 4 - after[..., None])  # (3, 3, 1, 4)
    with np.errstate(invalid="ignore"):  # crops of no pixel do not occur
        table = keys_weights((offset / 1024).astype(np.float32), inside)
    return torch.from_numpy(np.ascontiguousarray(table)).to(device)


def _check_device(device: torch.device) -> None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"the cuda back end was asked for views on {device}: give a GPU, or take backend='auto'.")
