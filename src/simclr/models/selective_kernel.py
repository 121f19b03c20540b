"""Selective kernels (Li et al. 2019, arXiv:1903.06586) and the ResNet-D shortcut, as SimCLR v2 has them.

google-research/simclr, tf2/resnet.py (SK_Conv2D, ResidualBlock, BottleneckBlock). Unlike Li et al.'s, both branches are
plain 3x3 convolutions, and the layer that weighs them has no batch norm after it. The shortcut is He et al.'s 2018
(arXiv:1812.01187): average, then project, so that a stride drops no position.

Shapes: B images, C channels, H x W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.models.convolution import Conv2d, ConvNorm

RATIO = 0.0625  # of the squeezed channels to the output's; the authors' --sk_ratio
LEAST_SQUEEZED = 32


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions of the same input, mixed channel by channel by weights that the image itself decides.

    Args:
        in_channels: Of the input.
        out_channels: C of each branch, and of the output.
        stride: Of both convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        squeezed = max(int(out_channels * RATIO), LEAST_SQUEEZED)
        self.branches = ConvNorm(in_channels, 2 * out_channels, 3, stride)
        self.squeeze = ConvNorm(out_channels, squeezed, 1)
        self.weigh = Conv2d(squeezed, 2 * out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
        both = self.branches(x)  # (B, 2 C, H', W')
        mean_one, mean_other = both.mean((2, 3), keepdim=True).chunk(2, dim=1)  # (B, C, 1, 1) each
        for_one, for_other = self.weigh(self.squeeze(mean_one + mean_other)).chunk(2, dim=1)  # logits, alike
        one, other = both.chunk(2, dim=1)
        # Softmax over two is the sigmoid of their difference, and the weighted sum lies on the line between them:
        # one pass over the pixels, in their own precision under autocast.
        return torch.lerp(other, one, torch.sigmoid(for_one - for_other))


class AveragePool(nn.Module):
    """2x2 means for the ResNet-D shortcut: (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).

    What a window lacks at the right and bottom is left out of its mean at stride 1 (TensorFlow's SAME), and counts as
    zeros at stride 2, where the authors pad first; even sides lack nothing there.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Stride 1 or 2."""
        if self.stride == 1:  # torch pads both ends alike: the first windows, which hang over the other end, go
            return F.avg_pool2d(x, 2, stride=1, padding=1, count_include_pad=False)[..., 1:, 1:]
        return F.avg_pool2d(x, 2, stride=2, ceil_mode=True, divisor_override=4)
