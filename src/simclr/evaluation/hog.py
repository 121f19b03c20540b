"""Histograms of oriented gradients (Dalal and Triggs 2005, "Histograms of oriented gradients for human detection").

The strongest baseline that takes seconds: on centred pictures of clothes its linear probe beats many encoders. The
variant is scikit-image's (`skimage.feature.hog`, which tests compare with): central differences, unsigned orientations
without interpolation between bins or cells, blocks of 2 x 2 cells that overlap by half, L2-Hys. Of a colour image, the
channel whose gradient is largest counts, pixel by pixel, as in the paper.

Shapes: B images, C channels, S x S pixels, O orientations, N x N cells.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.distributed import DistributedContext
from simclr.errors import UserError

HOG_VERSION = 1
"""Raise it when the same pixels give other features by more than rounding."""
ORIENTATIONS = 8  # of 22.5 degrees each, unsigned
MIN_CELL = 4  # pixels a side
MAX_CELLS = 8  # per side: beyond 32 pixels cells grow, and features are at most 7 * 7 * 4 * 8 = 1,568
BLOCK = 2  # cells a side
MIN_SIZE = BLOCK * MIN_CELL  # of an image, in pixels
CLIP = 0.2  # of a block's components, between its two normalisations (L2-Hys)
EPSILON = 1e-5  # added in quadrature to a block's length


@dataclass(frozen=True)
class HogFeatures:
    """Histograms of oriented gradients of square images, as features of a model under test.

    Raises:
        UserError: The images have fewer than two cells each way.
    """

    size: int
    """Side of the images, in pixels."""

    def __post_init__(self) -> None:
        if self.size < MIN_SIZE:
            raise UserError(
                f"hog needs images of at least {MIN_SIZE} x {MIN_SIZE} pixels, {BLOCK} cells of "
                f"{MIN_CELL} pixels each way, and they are evaluated at {self.size} x {self.size}; leave hog out."
            )

    @property
    def cell(self) -> int:
        """Side of a cell in pixels: 4 up to 32 pixels, then the smallest that leaves at most 8 cells a side."""
        return max(MIN_CELL, math.ceil(self.size / MAX_CELLS))

    @property
    def num_features(self) -> int:
        """Of an image."""
        blocks = self.size // self.cell - BLOCK + 1
        return blocks * blocks * BLOCK * BLOCK * ORIENTATIONS

    @property
    def record(self) -> dict[str, Any]:
        """All that determines the features of given pixels, as JSON can hold it."""
        return {"name": "hog", "version": HOG_VERSION, "orientations": ORIENTATIONS, "cell": self.cell}

    @property
    def description(self) -> str:
        """For the legend of a table."""
        return (
            f"HOG of {self.size} x {self.size} pixels: {ORIENTATIONS} orientations, cells of {self.cell} pixels, "
            f"blocks of {BLOCK} x {BLOCK}, {self.num_features:,} numbers"
        )

    def network(self, world: DistributedContext) -> nn.Module:
        """(B, C, S, S) in [0, 1] -> (B, F), on the CPU."""
        return Hog(self.cell)


class Hog(nn.Module):
    """(B, C, S, S) -> (B, (N - 1)^2 * 4 * O), in scikit-image's order.

    Pixels beyond the last whole cell count in no cell.
    """

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cell = cell
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # the device that the module is on

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        magnitude, degrees = _gradient(x)  # (B, S, S) each
        bins = (degrees * (ORIENTATIONS / 180)).long()  # (B, S, S) 0 .. O - 1
        cells = torch.stack(
            [F.avg_pool2d(magnitude * (bins == o), self.cell) for o in range(ORIENTATIONS)], dim=-1
        )  # (B, N, N, O)
        last = cells.shape[1] - BLOCK + 1
        corners = [cells[:, i : i + last, j : j + last] for i in range(BLOCK) for j in range(BLOCK)]
        blocks = torch.cat(corners, dim=-1)  # (B, N - 1, N - 1, 4 O)
        blocks = _unit(_unit(blocks).clamp(max=CLIP))
        return blocks.flatten(1)


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Length of the gradient and its direction in [0, 180) degrees, of the channel where it is longest: (B, S, S)."""
    rows, columns = torch.zeros_like(x), torch.zeros_like(x)  # 0 at the borders
    rows[:, :, 1:-1] = x[:, :, 2:] - x[:, :, :-2]
    columns[..., 1:-1] = x[..., 2:] - x[..., :-2]
    magnitude, channel = torch.hypot(rows, columns).max(dim=1, keepdim=True)  # (B, 1, S, S)
    row, column = (each.gather(1, channel)[:, 0].double() for each in (rows, columns))
    return magnitude[:, 0], torch.rad2deg(torch.atan2(row, column)) % 180


def _unit(blocks: Tensor) -> Tensor:
    return blocks / (blocks.square().sum(dim=-1, keepdim=True) + EPSILON**2).sqrt()
