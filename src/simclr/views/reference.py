"""The definition of a view: images and explicit parameters in, pixels out, in batched torch on any device.

    google       tf2/data_util.py of google-research/simclr: contrast about each channel's mean, saturation and
                 hue in HSV, clipping after each operation, blur with zero padding
    torchvision  transforms.v2.functional on float images: contrast and saturation blend with the grayscale
                 image, blur with reflected borders

Each number is reached by elementwise operations in a fixed order (no matrix product, no fused multiply-add, sums
by halving), so a view is the same bit for bit in any batch, at any place in it and on any number of threads.

Shapes: B views, C channels, H x W or S x S pixels; pixels are float32 in [0, 1].
"""

from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from simclr.views.operations import operate
from simclr.views.params import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams
from simclr.views.policy import AugmentationPreset, Policy
from simclr.views.resize import Images, check_images, chunks, crop_resize

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue, in TensorFlow and torchvision alike


def render(images: Images, params: ViewParams, policy: Policy, device: torch.device | str = "cpu") -> Tensor:
    """Make one view of each image: crop and resize, flip, colour jitter, grayscale, blur, further operations.

    Args:
        images: B uint8 images of `policy.channels` channels and any sizes.
        params: B rows.

    Returns:
        (B, C, S, S) float32 in [0, 1] on `device`.

    Raises:
        UserError: images that are not uint8 or not of the policy's channels.
    """
    check_images(images, policy.channels)
    views = torch.empty(len(params), policy.channels, policy.size, policy.size, device=device)
    for rows in chunks(params.box, policy.size, device):
        views[rows] = _render_chunk(images[rows], params[rows], policy, device)
    return views if params.operations is None else operate(views, params.operations, policy)


def _render_chunk(images: Images, params: ViewParams, policy: Policy, device: torch.device | str) -> Tensor:
    preset = policy.preset
    x = crop_resize(images, params.box, policy.size, preset, flip=params.flip, device=device)

    def replace(mask: np.ndarray, operation: Callable[[Tensor, ViewParams], Tensor]) -> None:
        if mask.any():
            rows = np.flatnonzero(mask)
            on_device = torch.from_numpy(rows).to(x.device)
            x.index_copy_(0, on_device, operation(x.index_select(0, on_device), params[rows]))

    replace(
        params.jitter,
        lambda x, p: color_jitter(
            x,
            p.order,
            np.column_stack([p.brightness, p.contrast, p.saturation, p.hue]),
            preset=preset,
            brightness_mode=policy.brightness_mode,
        ),
    )
    replace(params.gray, lambda x, p: grayscale(x).expand_as(x))
    x.clamp_(0, 1)  # bicubic overshoot of views without jitter
    replace(params.blur, lambda x, p: gaussian_blur(x, p.sigma, preset=preset))
    return x.clamp_(0, 1)


def color_jitter(
    x: Tensor,
    order: np.ndarray,
    factors: np.ndarray,
    *,
    preset: AugmentationPreset = "google",
    brightness_mode: str = "multiply",
) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, clipped to [0, 1] after each.

    Args:
        x: (B, C, H, W).
        order: (B, 4) numbers of the operations, first to last.
        factors: (B, 4) float32 of brightness, contrast, saturation and hue. At its neutral value (1; 0 for hue
            and for additive brightness) an operation does nothing but clip.
    """
    operations = {
        BRIGHTNESS: torch.add if brightness_mode == "add" else torch.mul,
        CONTRAST: stretch_contrast if preset == "google" else blend_contrast,
        SATURATION: scale_saturation if preset == "google" else blend_saturation,
        HUE: shift_hue,
    }
    neutral = np.array([0 if brightness_mode == "add" else 1, 1, 1, 0])
    rows = np.arange(len(order))[:, None]
    order = np.where((factors == neutral)[rows, order], -1, order)  # -1 sorts first: only clip
    place = np.arange(len(order))  # where in x each image is
    for step in range(4):
        # images that are due for the same operation stand together, so that it runs once and on those only
        due = np.argsort(order[:, step], kind="stable")
        x = x.index_select(0, torch.from_numpy(place[due]).to(x.device))
        place[due] = np.arange(len(due))
        for operation, adjust in operations.items():
            first, last = np.searchsorted(order[due, step], [operation, operation + 1])
            if first < last:
                factor = torch.from_numpy(factors[due[first:last], operation]).to(x.device)
                x[first:last] = adjust(x[first:last], factor.view(-1, 1, 1, 1))
        x.clamp_(0, 1)
    return x.index_select(0, torch.from_numpy(place).to(x.device))


def stretch_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance to each channel's mean over the image (tf.image.adjust_contrast)."""
    mean = _mean(x)  # (B, C, 1, 1)
    return (x - mean).mul_(factor).add_(mean)


def blend_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the grayscale image (torchvision's adjust_contrast)."""
    return x * factor + _mean(grayscale(x)) * (1 - factor)


def scale_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale S of HSV, at most to 1 (tf.image.adjust_saturation); value and hue stay."""
    high, low = _extremes(x)
    # S = (high - low) / high; scaling S by f moves every channel's distance to `high` by the same f
    limit = high / (high - low).clamp_min_(1e-12)  # the factor at which S becomes 1
    return high - (high - x).mul_(torch.minimum(limit, factor))


def blend_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grayscale image (torchvision's adjust_saturation)."""
    return x * factor + grayscale(x) * (1 - factor)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV; value and saturation stay."""
    red, green, blue = x.split(1, dim=1)  # (B, 1, H, W) each
    high, low = _extremes(x)
    chroma = high - low
    inverse = chroma.clamp_min(1e-12).reciprocal_()
    # hue in sixths of a turn: red 0, green 2, blue 4; chosen by products, as torch.where is 20 times slower on CPUs
    not_red, not_green = (high - red).sign_(), (high - green).sign_()  # 0 where that channel is largest, else 1
    near_red = (green - blue).mul_(inverse).mul_(1 - not_red)
    near_green = (blue - red).mul_(inverse).add_(2).mul_(1 - not_green)
    near_blue = (red - green).mul_(inverse).add_(4).mul_(not_green)
    sector = near_green.add_(near_blue).mul_(not_red).add_(near_red)
    sector.add_(turns * 6)
    sector.sub_((sector * (1 / 6)).floor_().mul_(6))  # into [0, 6)
    shifted = torch.empty_like(x)
    torch.sub((sector - 3).abs_(), 1, out=shifted[:, 0:1])
    torch.sub(2, (sector - 2).abs_(), out=shifted[:, 1:2])
    torch.sub(2, (sector - 4).abs_(), out=shifted[:, 2:3])
    return shifted.clamp_(0, 1).mul_(chroma).add_(low)


def grayscale(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W) luma; images of one channel are their own."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return (red * _GRAY_WEIGHTS[0]).add_(green * _GRAY_WEIGHTS[1]).add_(blue * _GRAY_WEIGHTS[2])


def gaussian_blur(x: Tensor, sigma: np.ndarray, *, preset: AugmentationPreset = "google") -> Tensor:
    """Separable blur over about a tenth of the image: 2 (S // 10 // 2) + 1 taps, so none below 20 pixels.

    Borders are zeros (google; they darken) or reflected (torchvision).

    Args:
        x: (B, C, S, S).
        sigma: (B,) in pixels.
    """
    kernel = torch.from_numpy(blur_kernels(sigma, x.shape[-2])).to(x.device)  # (B, radius + 1)
    radius = kernel.shape[1] - 1
    weight = kernel.view(*kernel.shape, 1, 1, 1)
    mode = "constant" if preset == "google" else "reflect"
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        length = x.shape[dim]
        padded = functional.pad(x, padding, mode=mode)
        x = x * weight[:, 0]
        for k in range(1, radius + 1):
            pair = padded.narrow(dim, radius - k, length) + padded.narrow(dim, radius + k, length)
            x.add_(pair.mul_(weight[:, k]))
    return x


def blur_kernels(sigma: np.ndarray, size: int) -> np.ndarray:
    """(B,) sigmas -> (B, radius + 1) float32: one half of each kernel, its centre first.

    Taps below 1e-8, which float32 pixels cannot see, are 0: that lets a back end skip them.
    """
    distance = np.arange(size // 10 // 2 + 1) / sigma[:, None].astype(np.float64)  # in sigmas
    kernel = np.exp(-0.5 * distance**2)
    kernel /= 2 * kernel.sum(axis=1, keepdims=True) - kernel[:, :1]
    return np.where(kernel < 1e-8, 0, kernel).astype(np.float32)


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest channel of each pixel: two tensors (B, 1, H, W)."""
    planes = x.split(1, dim=1)
    return reduce(torch.maximum, planes), reduce(torch.minimum, planes)


def _mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1) by halving: torch.mean's order of summation varies with shapes and threads."""
    pixels = x.shape[2] * x.shape[3]
    total = x.flatten(2)
    while (length := total.shape[2]) > 1:
        half = length // 2
        folded = total[:, :, :half] + total[:, :, half : 2 * half]
        if length % 2:
            folded[:, :, :1] += total[:, :, -1:]
        total = folded
    return total.unsqueeze(3) * (1 / pixels)
