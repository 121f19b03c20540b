"""The unit that the authors' ResNets are made of: convolution without bias, batch norm, addition, ReLU.

google-research/simclr, resnet.py (conv2d_fixed_padding, batch_norm_relu). Shapes: B images, C channels, H x W pixels.
"""

from torch import Tensor, nn

from simclr.models.batchnorm import BatchNorm2d
from simclr.models.init import lecun_normal_


class ConvNorm(nn.Module):
    """Convolution, batch norm and, if asked, addition and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        relu: bool = True,
        zero_gamma: bool = False,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel, stride)
        self.norm = BatchNorm2d(out_channels)
        self.relu = relu
        if zero_gamma:
            nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor, *, add: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).

        Args:
            add: Like the output; added before the ReLU.
        """
        return self.norm(self.conv(x), add=add, relu=self.relu)


class Conv2d(nn.Conv2d):
    """Convolution without bias, padded by k // 2 whatever the stride, with the authors' initialisation."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)

    def reset_parameters(self) -> None:
        """Called by torch on creation."""
        lecun_normal_(self.weight)
