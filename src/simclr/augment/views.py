"""From uint8 images to batches for the encoder: two random views to train on, one fixed view to evaluate.

>>> import numpy as np
>>> from simclr.augment.policy import Policy
>>> from simclr.augment.views import eval_images, make_views
>>> images = np.random.default_rng(0).integers(0, 256, (8, 40, 32, 3), dtype=np.uint8)
>>> policy = Policy.google(32, strength=0.5)
>>> first, second = make_views(images, policy, seed=0, epoch=3, indices=np.arange(8))
>>> first.shape, second.shape
(torch.Size([8, 3, 32, 32]), torch.Size([8, 3, 32, 32]))
>>> eval_images(images, 32).shape
torch.Size([8, 3, 32, 32])
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from simclr.augment.params import draw
from simclr.augment.policy import Policy, Semantics
from simclr.augment.reference import render
from simclr.augment.resize import Images, check_images, chunks, crop_resize, image_sizes
from simclr.errors import UserError

Backend = Literal["auto", "reference", "cpu"]
"""Who makes the pixels: batched torch on the device (reference.py), or compiled kernels on the CPU (cpu.py), which
are faster there. Both make the same bits. "auto" is "cpu" when the device is the CPU."""


def make_views(
    images: Images,
    policy: Policy,
    *,
    seed: int,
    epoch: int | np.ndarray,
    indices: np.ndarray,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Both views of each image of a batch.

    A view is a pure function of (seed, epoch, index, image): the same bit for bit in any batch, at any place in
    it and on any number of threads.

    Args:
        images: B uint8 images: one array (B, H, W, C) or a list of arrays (H, W, C) of any sizes.
        policy: what a view may look like; `policy.channels` must be the images' C.
        seed: 0 to 2**64 - 1.
        epoch: the epoch, or (B,) one for each image.
        indices: (B,) the images' positions in their data set.
        backend: who makes the pixels; changes none of them.

    Returns:
        Two tensors (B, C, S, S), float32 in [0, 1], on `device`; those of the kernels are channels-last.

    Raises:
        UserError: images that are not uint8 or not of the policy's channels, or indices that do not fit them.
    """
    check_images(images, policy.channels)
    sizes = image_sizes(images)
    params = [draw(policy, sizes, seed=seed, epoch=epoch, indices=indices, view=view) for view in (0, 1)]
    if _by_kernels(backend, device):
        from simclr.augment import cpu  # Numba takes a quarter of a second to import

        first, second = cpu.render(images, params, policy)
        return first.to(device), second.to(device)
    first, second = (render(images, of_view, policy, device) for of_view in params)
    return first, second


def eval_images(
    images: Images,
    size: int,
    semantics: Semantics = "google",
    *,
    crop: float | None = None,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> Tensor:
    """The one fixed view that evaluation uses: a central square, resized.

    google cuts the square and resizes it (bicubic, no antialias; data_util.py, preprocess_for_eval); torchvision
    resizes the shorter side to size / crop and cuts the centre of that (antialiased bilinear).

    Args:
        images: B uint8 images: one array (B, H, W, C) or a list of arrays (H, W, C) of any sizes.
        crop: share of the shorter side that is kept. None is the authors' rule: 0.875 above 32 pixels, and 1 at
            32 and below, where an image that already has that size is used as it is.
        backend: who makes the pixels; changes none of them.

    Returns:
        (B, C, size, size) float32 in [0, 1], on `device`; those of the kernels are channels-last.
    """
    share = (0.875 if size > 32 else 1.0) if crop is None else crop
    if not 0 < share <= 1:
        raise UserError(f"evaluation crop {crop}: a share of the shorter side, above 0 and up to 1; try 0.875.")
    if not len(images):
        raise UserError("no images: evaluation preprocessing needs at least one.")
    channels = images[0].shape[-1]
    check_images(images, channels)
    sizes = image_sizes(images)
    shorter = sizes.min(axis=1, keepdims=True)  # (B, 1)
    if semantics == "google":
        side = np.maximum(np.rint(share * shorter), 1).astype(np.int64)
        boxes = np.column_stack([(sizes - side + 1) // 2, side, side])
        resized = np.full_like(sizes, size)
    else:
        boxes = np.column_stack([np.zeros_like(sizes), sizes])
        resized = np.rint(size / share).astype(np.int64) * sizes // shorter
    if _by_kernels(backend, device):
        from simclr.augment import cpu

        return cpu.crop_resize(images, boxes, size, semantics, resized=resized).to(device)
    batch = torch.empty(len(images), channels, size, size, device=device)
    for rows in chunks(boxes, size, device):
        window = crop_resize(images[rows], boxes[rows], size, semantics, resized=resized[rows], device=device)
        batch[rows] = window.clamp_(0, 1)
    return batch


def _by_kernels(backend: Backend, device: torch.device | str) -> bool:
    return backend == "cpu" or (backend == "auto" and torch.device(device).type == "cpu")
