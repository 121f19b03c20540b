"""The definition of the further operations: what may happen to a view that is finished otherwise, in batched torch.

The paper compares these in section 3.2 (cutout, rotation, Sobel, noise) and uses them in appendix B.2 (Sobel, equalise,
solarise, motion blur); the authors released neither code nor parameters, so all parameters are ours:

    equalise     each channel's histogram of 256 values is made flat, as Pillow's ImageOps.equalize does
    solarise     values from 0.5 on are inverted
    sobel        a quarter of the length of the gradient of each channel by Sobel's 3 x 3 filters, borders repeated
    motion blur  mean of a line of pixels (3 of them up to 47 pixels a side, about an eighth beyond) in one of four
                 directions, borders repeated
    rotation     a turn by 90, 180 or 270 degrees
    cutout       a black square of half the view's side around any pixel of the view (DeVries and Taylor 2017)
    noise        Gaussian, of standard deviation 0.1, another number for every value; then clipped

They come in this order. Each number is reached by elementwise operations in a fixed order, so a view is the same bit
for bit in any batch.

Shapes: B views, C channels, S x S pixels; pixels are float32 in [0, 1].
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from simclr.views.params import DIRECTIONS, OperationParams
from simclr.views.policy import Policy


def operate(x: Tensor, params: OperationParams, policy: Policy) -> Tensor:
    """The views (B, C, S, S) with their further operations; in place where possible."""

    def replace(mask: np.ndarray, operation: Callable[[Tensor, np.ndarray], Tensor]) -> None:
        if mask.any():
            rows = np.flatnonzero(mask)
            on_device = torch.from_numpy(rows).to(x.device)
            x.index_copy_(0, on_device, operation(x.index_select(0, on_device), rows))

    replace(params.equalise, lambda x, _: equalise(x))
    replace(params.solarise, lambda x, _: torch.where(x >= 0.5, 1 - x, x))
    replace(params.sobel, lambda x, _: sobel(x))
    for direction, (down, right) in enumerate(DIRECTIONS):
        here = params.motion_blur & (params.direction == direction)
        replace(here, lambda x, _, down=down, right=right: motion_blur(x, down, right))
    for turns in (1, 2, 3):
        replace(params.turns == turns, lambda x, _, turns=turns: torch.rot90(x, turns, (2, 3)))
    replace(params.cutout, lambda x, rows: cut_out(x, params.centre[rows], policy.cutout_side))
    replace(params.noise, lambda x, rows: add_noise(x, noise_of(params, rows, policy)))
    return x


def equalise(x: Tensor) -> Tensor:
    """Flatten the histogram of 256 values of each channel by Pillow's rule."""
    values = (x * 255).round_().long()  # (B, C, S, S)
    planes = values.flatten(2)
    counts = torch.zeros(*planes.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, planes, torch.ones_like(planes))
    present = counts > 0
    last = 255 - present.flip(2).long().argmax(2, keepdim=True)  # the largest value that occurs
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp_min(1)).clamp_max_(255)
    flat = table.gather(2, planes).view_as(values)
    unchanged = (step == 0)[..., None]  # few values: Pillow leaves the channel alone
    return torch.where(unchanged, values, flat).float().mul_(1 / 255)


def sobel(x: Tensor) -> Tensor:
    """A quarter of the gradient's length, at most 1."""
    padded = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    size = x.shape[2]

    def at(down: int, right: int) -> Tensor:
        return padded[:, :, 1 + down : 1 + down + size, 1 + right : 1 + right + size]

    across = (at(-1, 1) - at(-1, -1)) + (at(0, 1) - at(0, -1)) * 2 + (at(1, 1) - at(1, -1))
    along = (at(1, -1) - at(-1, -1)) + (at(1, 0) - at(-1, 0)) * 2 + (at(1, 1) - at(-1, 1))
    length = (across * across + along * along).double().sqrt_().float()  # torch's float32 roots miss last bits
    return length.mul_(0.25).clamp_(0, 1)


def motion_blur(x: Tensor, down: int, right: int) -> Tensor:
    """Mean over the pixels of a line through each pixel."""
    size, reach = x.shape[2], motion_reach(x.shape[2])
    padded = functional.pad(x, (reach,) * 4, mode="replicate")
    total = torch.zeros_like(x)
    for k in range(-reach, reach + 1):
        top, left = reach + k * down, reach + k * right
        total.add_(padded[:, :, top : top + size, left : left + size])
    return total.mul_(1 / (2 * reach + 1)).clamp_(0, 1)


def motion_reach(size: int) -> int:
    """Pixels of the motion blur's line on each side of its centre."""
    return max(1, size // 16 - 1)


def cut_out(x: Tensor, centre: np.ndarray, side: float) -> Tensor:
    """Black squares around centres (B, 2), shares of the side."""
    first, last = cutout_ends(centre, side, x.shape[2])
    pixel = torch.arange(x.shape[2], device=x.device)
    inside = (pixel >= torch.from_numpy(first).to(x.device)[..., None]) & (
        pixel < torch.from_numpy(last).to(x.device)[..., None]
    )  # (B, 2, S)
    return x.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0)


def cutout_ends(centre: np.ndarray, side: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel of each square and the one after its last, (B, 2) int64 of y and x each, within the view."""
    length = max(1, round(side * size))
    first = (centre.astype(np.float64) * size).astype(np.int64) - length // 2
    return np.maximum(first, 0), np.minimum(first + length, size)


def noise_of(params: OperationParams, rows: np.ndarray, policy: Policy) -> np.ndarray:
    """What is added to those views, (rows, C, S, S) float32."""
    return params.normals(rows, policy.channels, policy.size) * np.float32(policy.noise_sigma)


def add_noise(x: Tensor, noise: np.ndarray) -> Tensor:
    """Sum, within [0, 1]."""
    return (x + torch.from_numpy(noise).to(x.device)).clamp_(0, 1)
