"""From uint8 images to batches for the encoder: random views to train on, and one fixed view to evaluate.

>>> import numpy as np
>>> from simclr.views.policy import Policy
>>> from simclr.views.views import eval_images, make_views
>>> images = np.random.default_rng(0).integers(0, 256, (8, 40, 32, 3), dtype=np.uint8)
>>> policy = Policy.google(32, strength=0.5)
>>> first, second = make_views(images, policy, seed=0, epoch=3, indices=np.arange(8))
>>> first.shape, second.shape
(torch.Size([8, 3, 32, 32]), torch.Size([8, 3, 32, 32]))
>>> eval_images(images, 32).shape
torch.Size([8, 3, 32, 32])
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from simclr.errors import UserError
from simclr.views.device_images import DeviceImages
from simclr.views.params import ViewParams, draw
from simclr.views.policy import AugmentationPreset, Policy
from simclr.views.reference import render
from simclr.views.resize import Images, check_images, chunks, crop_resize, image_sizes

Backend = Literal["auto", "reference", "cpu", "cuda"]
"""Who makes the pixels: batched torch on the device (reference.py), compiled kernels on the CPU (cpu.py) or Triton's on
a GPU (cuda.py), which are faster there. The first two make the same bits; cuda.py differs in the last bits of the mean
that contrast needs. "auto" is the fastest that the device allows."""


def make_views(
    images: Images | DeviceImages,
    policy: Policy | Sequence[Policy],
    *,
    seed: int,
    epoch: int | np.ndarray,
    indices: np.ndarray,
    views: Sequence[int] = (0, 1),
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """These views of each image of a batch.

    A view is a pure function of (seed, epoch, index, image): the same bit for bit in any batch, at any place in
    it and on any number of threads.

    Args:
        images: B uint8 images: one array (B, H, W, C) or a list of arrays (H, W, C) of any sizes; or those that lie
            on the device already, of which only the cuda back end makes views.
        policy: what a view may look like, or that of each of `views`; `policy.channels` must be the images' C.
        seed: 0 to 2**64 - 1.
        epoch: the epoch, or (B,) one for each image.
        indices: (B,) the images' positions in their data set.
        views: which of an image's views.
        device: where the views are to be; images on a device have theirs there.
        backend: who makes the pixels; changes none of them beyond rounding.
        dtype: of the views: float32, or bfloat16, to which they are rounded at the very end.

    Returns:
        A tensor (B, C, S, S) in [0, 1] for each view, S the size of its policy, on `device`; those of the kernels are
        channels-last.

    Raises:
        UserError: images that are not uint8 or not of the policy's channels, or indices or policies that do not fit.
    """
    policies = [policy] * len(views) if isinstance(policy, Policy) else list(policy)
    if len(policies) != len(views):
        raise UserError(f"{len(policies)} policies and {len(views)} views: give one policy, or one for each view.")
    for channels in dict.fromkeys(of_view.channels for of_view in policies):
        if isinstance(images, DeviceImages):
            backend = _for_resident(images, channels, backend)
        else:
            check_images(images, channels)
    sizes = images.sizes if isinstance(images, DeviceImages) else image_sizes(images)
    if isinstance(images, DeviceImages):
        device = images.pixels.device
    elif _resolve(backend, device) == "cuda" and policies:
        images = DeviceImages.upload(images, policies[0].channels, device)  # once, for the views of all policies
    made: list[Tensor] = []
    for of_views, group in groupby(zip(policies, views, strict=True), key=itemgetter(0)):
        params = [draw(of_views, sizes, seed=seed, epoch=epoch, indices=indices, view=view) for _, view in group]
        made += _render(images, params, of_views, _resolve(backend, device), device, dtype)
    return tuple(made)


def _render(
    images: Images | DeviceImages, params: list[ViewParams], policy: Policy, backend: Backend,
    device: torch.device | str, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """One view of each image for each element of `params`, by this back end."""
    if backend == "cuda":
        from simclr.views import cuda  # Triton takes half a second to import

        assert isinstance(images, DeviceImages)
        return cuda.render(images, params, policy, dtype)
    assert not isinstance(images, DeviceImages)
    if backend == "cpu":
        from simclr.views import cpu  # Numba takes a quarter of a second to import

        made = cpu.render(images, params, policy)
    else:
        made = [render(images, of_view, policy, device) for of_view in params]
    return [batch.to(device, dtype) for batch in made]


def make_view(
    images: Images | DeviceImages,
    policy: Policy,
    *,
    seed: int,
    epoch: int | np.ndarray,
    indices: np.ndarray,
    view: int = 0,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One view of each image of a batch, for training with labels; bit for bit that view of `make_views`.

    Args:
        view: which of an image's views.

    The other arguments, the errors and the tensor (B, C, S, S) are those of `make_views`.
    """
    (only,) = make_views(
        images, policy, seed=seed, epoch=epoch, indices=indices, views=(view,), device=device, backend=backend,
        dtype=dtype,
    )  # fmt: skip
    return only


def eval_images(
    images: Images,
    size: int,
    preset: AugmentationPreset = "google",
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
    share = eval_crop(size) if crop is None else crop
    if not 0 < share <= 1:
        raise UserError(f"evaluation crop {crop}: a share of the shorter side, above 0 and up to 1; try 0.875.")
    if not len(images):
        raise UserError("no images: evaluation preprocessing needs at least one.")
    channels = images[0].shape[-1]
    check_images(images, channels)
    sizes = image_sizes(images)
    shorter = sizes.min(axis=1, keepdims=True)  # (B, 1)
    if preset == "google":
        side = np.maximum(np.rint(share * shorter), 1).astype(np.int64)
        boxes = np.column_stack([(sizes - side + 1) // 2, side, side])
        resized = np.full_like(sizes, size)
    else:
        boxes = np.column_stack([np.zeros_like(sizes), sizes])
        resized = np.rint(size / share).astype(np.int64) * sizes // shorter
    made_by = _resolve(backend, device)
    if made_by == "cuda":
        from simclr.views import cuda

        return cuda.crop_resize(DeviceImages.upload(images, channels, device), boxes, size, preset, resized=resized)
    if made_by == "cpu":
        from simclr.views import cpu

        return cpu.crop_resize(images, boxes, size, preset, resized=resized).to(device)
    batch = torch.empty(len(images), channels, size, size, device=device)
    for rows in chunks(boxes, size, device):
        window = crop_resize(images[rows], boxes[rows], size, preset, resized=resized[rows], device=device)
        batch[rows] = window.clamp_(0, 1)
    return batch


def eval_crop(size: int) -> float:
    """The authors' share of the shorter side that evaluation keeps."""
    return 0.875 if size > 32 else 1.0


def has_kernels(device: torch.device | str) -> bool:
    """Whether views are made on `device` from images that lie there (`DeviceImages`)."""
    return _resolve("auto", device) == "cuda"


def _resolve(backend: Backend, device: torch.device | str) -> Backend:
    if backend != "auto":
        return backend
    if torch.device(device).type == "cpu":
        return "cpu"
    return "cuda" if torch.device(device).type == "cuda" and find_spec("triton") else "reference"


def _for_resident(images: DeviceImages, channels: int, backend: Backend) -> Backend:
    if images.channels != channels:
        raise UserError(
            f"images of {images.channels} channels and a policy of {channels}: give the policy the images' channels."
        )
    if backend not in ("auto", "cuda"):
        raise UserError(f"backend {backend!r} for images that lie on a device: only 'cuda' makes views of those.")
    return "cuda"
