"""Registration of thumbnails: lay one image over another by a small shift and stretch, and compare fine structure.

Gauss-Newton over shift, stretch, gain and offset. Shapes: n images, P pairs, C channels, S = 32 pixels.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels of a thumbnail's side
LARGEST_WARP = 0.06  # shift and stretch: a twentieth of a side, and a little for whole pixels
STEPS = 5  # of Gauss-Newton
SMOOTHING = 1.0  # pixels, before thumbnails are compared: what JPEG changes most is finest
STRUCTURE = 2.0  # pixels: fine structure is what a blur of this width takes away
LUMA = (0.299, 0.587, 0.114)


def overlay(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Lay the first over the second: correlation of their fine structure where they overlap, and gain, both (P,).

    Args:
        first, second: (P, C, S, S) floats in [0, 1].
    """
    warp = _register(blurred(gray_pixels(first), SMOOTHING), blurred(gray_pixels(second), SMOOTHING))
    x, y = _warped(warp, positions())
    moved = F.grid_sample(first, torch.stack([x, y], 3), mode="bicubic", padding_mode="border", align_corners=False)
    inside = _inside(x, y)[:, None]  # (P, 1, S, S)

    def smooth_within(image: Tensor, sigma: float) -> Tensor:  # over the overlap alone: beyond it the two differ
        return blurred(image * inside, sigma) / blurred(inside, sigma).clamp_min(1e-3)

    fine, gains = [], []
    for image in (moved, second):
        image = smooth_within(image, SMOOTHING)
        fine.append(((image - smooth_within(image, STRUCTURE)) * inside).flatten(1))
        centred = (image - image.mean((1, 2, 3), keepdim=True)) * inside
        gains.append(centred.flatten(1).norm(dim=1))
    alike = (fine[0] * fine[1]).sum(1) / (fine[0].norm(dim=1) * fine[1].norm(dim=1)).clamp_min(1e-9)
    return alike, gains[1] / gains[0].clamp_min(1e-9)


def _register(first: Tensor, second: Tensor) -> Tensor:
    """Shift and stretch (P, 4) that bring the first over the second, (P, S, S) each, up to gain and offset.

    Both are smooth, so every other pixel along each side is enough.
    """
    down, right = torch.gradient(first, spacing=2 / SIDE, dim=(1, 2))
    layers = torch.stack([first, right, down], 1)  # (P, 3, S, S)
    line, target = positions()[::2], second[:, ::2, ::2]
    warp = torch.zeros(len(first), 4)  # shift right and down, stretch right and down; the side is 2
    for _ in range(STEPS):
        x, y = _warped(warp, line)
        sampled = F.grid_sample(layers, torch.stack([x, y], 3), padding_mode="border", align_corners=False)
        moved, right, down = sampled.unbind(1)  # (P, S / 2, S / 2) each
        inside = _inside(x, y)
        terms = (moved, torch.ones_like(moved), right, down, right * line, down * line[:, None], target)
        columns = torch.stack([(term * inside).flatten(1) for term in terms], 1)  # (P, 7, S * S / 4)
        products = columns @ columns.mT  # (P, 7, 7): normal equations, and their right-hand side
        normal = products[:, :6, :6]
        ridge = torch.diag_embed(1e-4 * normal.diagonal(dim1=1, dim2=2) + 1e-6)  # an image may be plain along a side
        solution = torch.linalg.solve(normal + ridge, products[:, :6, 6])  # (P, 6)
        warp = (warp + solution[:, 2:] / solution[:, :1].clamp_min(0.2)).clamp(-LARGEST_WARP, LARGEST_WARP)
    return warp


def _warped(warp: Tensor, line: Tensor) -> tuple[Tensor, Tensor]:
    """Where the pixels at `line` along both sides of the second lie in the first: x and y in [-1, 1]."""
    grid = line.expand(len(line), -1)
    right, down, wider, higher = (column[:, None, None] for column in warp.unbind(1))
    return grid * (1 + wider) + right, grid.T * (1 + higher) + down


def _inside(x: Tensor, y: Tensor) -> Tensor:
    edge = 1 - 0.5 / SIDE  # beyond the centre of the last pixel by a quarter of it
    return ((x.abs() <= edge) & (y.abs() <= edge)).float()


def positions() -> Tensor:
    """Centres of the pixels along a side of length 2."""
    return (torch.arange(SIDE) + 0.5) * (2 / SIDE) - 1


def gray_pixels(thumbnails: Tensor) -> Tensor:
    """(n, C, S, S) -> (n, S, S) float."""
    x = thumbnails.float()
    return x[:, 0] if x.shape[1] == 1 else torch.einsum("nchw,c->nhw", x, torch.tensor(LUMA))


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (..., S, S), the edge pixels repeated; as two matrix products, ten times faster than conv2d."""
    blur = _blur_matrix(sigma)
    return blur @ x @ blur.T


@cache
def _blur_matrix(sigma: float) -> Tensor:
    """(S, S): row i holds what each pixel of a line gives to pixel i of its blurred self."""
    radius = int(3 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    sources = (torch.arange(SIDE)[:, None] + offsets).clamp(0, SIDE - 1)  # (S, taps)
    return torch.zeros(SIDE, SIDE).scatter_add_(1, sources, (taps / taps.sum()).expand(SIDE, -1))
