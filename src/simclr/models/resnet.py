"""The authors' ResNet: He et al. 2015 (arXiv:1512.03385) as in google-research/simclr, resnet.py.

It differs from torchvision's in four ways that matter to weights and results: a projection shortcut in the
first block of every group (also group 1 of ResNet-18 and 34), a max-pool with TensorFlow's SAME padding, the
truncated LeCun initialisation with the last gamma of each block at 0, and the biased running variance of its
batch norm. Modules are created in the authors' order, shortcut first, so parameters line up with their
checkpoints.

With `sk` it is SimCLR v2's (arXiv:2006.10029): selective kernels in place of a bottleneck's 3x3 convolution, and
what the authors switch on with them, ResNet-D's stem of three 3x3 convolutions (only for the imagenet stem) and its
averaging shortcuts. Basic blocks get no selective kernel, as in the authors' TF2 code; their TF1 code pools such a
block's main path by mistake.

Shapes: B images, C channels, H x W pixels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simclr.config.encoder import ResNetShape, Stem
from simclr.models.convolution import ConvNorm
from simclr.models.selective_kernel import AveragePool, SelectiveKernel


class ResNet(nn.Module):
    """Images to features, (B, C, H, W) -> (B, num_features): h by a global average pool, or feature maps on grids.

    Initialised from torch's global generator; `build_encoder` gives it a seed. With `recompute` set, backward has
    only the inputs of stem and blocks to go by and computes the rest again, one block at a time.

    Args:
        shape: Kind and number of blocks; its own width multiplier comes on top of `width`.
        width: Multiplier on every channel count.
        stem: 3x3 convolution (cifar), the same with stride 2 (strided), or 7x7/2 convolution and 3x3/2 max-pool
            (imagenet).
        channels: Of the input.
        sk: Selective kernels and ResNet-D.
        grids: Cells a side that the maps of the last stages are averaged to, the earliest of these stages first
            (`EncoderConfig.grids`); empty: h.

    Attributes:
        num_features: Of what is returned.
        stage_channels: Of the feature map of each stage.
    """

    recompute = False

    def __init__(
        self,
        shape: ResNetShape,
        *,
        width: float = 1.0,
        stem: Stem = "imagenet",
        channels: int = 3,
        sk: bool = False,
        grids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        width = width * shape.width
        self.stem = _stem(stem, channels, int(64 * width), sk=sk)
        self.groups = nn.Sequential()
        in_channels = int(64 * width)
        self.stage_channels: list[int] = []
        for index, num_blocks in enumerate(shape.blocks):
            inner = 64 * 2**index * width  # not yet whole: the authors cut each convolution's own count
            group = nn.Sequential()
            for block in range(num_blocks):
                stride = 2 if block == 0 and index > 0 else 1
                group.append(_block(shape.bottleneck, in_channels, inner, stride=stride, project=block == 0, sk=sk))
                in_channels = int(4 * inner) if shape.bottleneck else int(inner)
            self.groups.append(group)
            self.stage_channels.append(in_channels)
        self.grids = grids
        read = zip(self.stage_channels[-len(grids) :], grids, strict=True) if grids else [(in_channels, 1)]
        self.num_features = sum(channels * side * side for channels, side in read)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_features)."""
        maps = self._last_maps(x)
        if not self.grids:
            return maps[-1].mean((2, 3))  # from (B, num_features, H/32, W/32); H/16 with a strided stem, H/8 cifar
        return torch.cat([_on_grid(map_, side) for map_, side in zip(maps, self.grids, strict=True)], dim=1)

    def stage(self, x: Tensor, count: int) -> Tensor:
        """Feature map of stage `count`, the first is 1: (B, C, H, W) -> (B, stage_channels[count - 1], H', W')."""
        return self.groups[:count](self.stem(x))

    def _last_maps(self, x: Tensor) -> list[Tensor]:
        """Feature maps (B, C', H', W') of the stages that are read, the earliest first."""
        maps: list[Tensor] = []
        again = self.recompute and self.training
        x = checkpoint(self.stem, x, use_reentrant=False) if again else self.stem(x)
        for group in self.groups:
            if again:
                for block in group.children():
                    x = checkpoint(block, x, use_reentrant=False)
            else:
                x = group(x)
            maps = [*maps, x][-max(1, len(self.grids)) :]
        return maps


def _on_grid(x: Tensor, side: int) -> Tensor:
    """Means of side x side cells of a feature map: (B, C, H, W) -> (B, C * side * side)."""
    return (x if x.shape[2:] == (side, side) else F.adaptive_avg_pool2d(x, side)).flatten(1)


class Block(nn.Module):
    """relu(shortcut(x) + residual(x)): any residual branch that ends in a ConvNorm, beside any shortcut."""

    def __init__(self, shortcut: nn.Module, residual: nn.Sequential) -> None:
        super().__init__()
        self.shortcut = shortcut  # before the residual branch: the authors' order of creation
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Post-activation: the sum is rectified, and nothing after it."""
        shortcut = self.shortcut(x)
        *first, last = self.residual
        for layer in first:
            x = layer(x)
        return last(x, add=shortcut)  # which rectifies the sum


class SameMaxPool(nn.Module):
    """3x3 max-pool of stride 2 with TensorFlow's SAME padding: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    An even side is padded by 1 at its end only (bottom, right), an odd one by 1 at both ends. Padding 1
    everywhere, as torchvision has it, shifts every window and moves h by 1.5 %.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Padding at the end is what `ceil_mode` adds; it never wins the maximum."""
        height, width = x.shape[2:]
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=(height % 2, width % 2), ceil_mode=True)


def _stem(kind: Stem, in_channels: int, out_channels: int, *, sk: bool) -> nn.Sequential:
    if kind != "imagenet":
        return nn.Sequential(ConvNorm(in_channels, out_channels, 3, stride=2 if kind == "strided" else 1))
    if not sk:
        return nn.Sequential(ConvNorm(in_channels, out_channels, 7, stride=2), SameMaxPool())
    half = out_channels // 2
    return nn.Sequential(
        ConvNorm(in_channels, half, 3, stride=2),
        ConvNorm(half, half, 3),
        ConvNorm(half, out_channels, 3),
        SameMaxPool(),
    )


def _block(bottleneck: bool, in_channels: int, inner: float, *, stride: int, project: bool, sk: bool) -> Block:
    out_channels = int(4 * inner) if bottleneck else int(inner)
    shortcut = _projection(in_channels, out_channels, stride, sk=sk) if project else nn.Identity()
    if bottleneck:
        middle = SelectiveKernel if sk else partial(ConvNorm, kernel=3)
        residual = nn.Sequential(
            ConvNorm(in_channels, int(inner), 1),
            middle(int(inner), int(inner), stride=stride),
            ConvNorm(int(inner), out_channels, 1, zero_gamma=True),
        )
    else:
        residual = nn.Sequential(
            ConvNorm(in_channels, out_channels, 3, stride),
            ConvNorm(out_channels, out_channels, 3, zero_gamma=True),
        )
    return Block(shortcut, residual)


def _projection(in_channels: int, out_channels: int, stride: int, *, sk: bool) -> nn.Module:
    if not sk:
        return ConvNorm(in_channels, out_channels, 1, stride, relu=False)
    return nn.Sequential(AveragePool(stride), ConvNorm(in_channels, out_channels, 1, relu=False))
