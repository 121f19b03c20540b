"""The views of a pretraining run: settings -> a policy for each view of an image, and which settings go together."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from simclr.config.pretrain import PretrainConfig
from simclr.errors import UserError
from simclr.methods.method import Method
from simclr.models.encoder import Encoder
from simclr.views.policy import Policy


def policy_of(config: PretrainConfig, channels: int) -> Policy:
    """The distribution of views that the settings ask for; of small crops see `policies_of`."""
    make_policy = Policy.google if config.augmentation == "google" else Policy.torchvision
    policy = make_policy(
        config.size,
        strength=config.strength,
        channels=channels,
        crop_area=(config.crop_min, 1.0),
        flip=config.flip,
        jitter=config.jitter,
        gray=config.grayscale if channels == 3 else 0.0,
        blur=config.blur,
    )
    if config.hue is not None and channels == 3:
        policy = replace(policy, hue=config.hue)
    return replace(policy, brightness_mode=config.brightness)


def policies_of(config: PretrainConfig, channels: int, view_sizes: Sequence[int]) -> list[Policy]:
    """The distribution of each view of an image.

    Small crops differ from full views in their size and their share of the image's area alone; but where the settings
    leave the probability of a blur open, it is that of their own size.

    Args:
        view_sizes: Height and width of each view, in pixels; those below `config.size` are small crops.
    """
    crop_area = (config.small_crop_min, config.small_crop_max)
    full, policies = policy_of(config, channels), []
    for size in view_sizes:
        if size == config.size:
            policies.append(full)
        else:
            small = policy_of(replace(config, size=size), channels)
            policies.append(replace(small, crop_area=crop_area, min_covered=0.0))
    return policies


def describe_views(view_sizes: Sequence[int]) -> str:
    """The views of an image in words, from their heights and widths."""
    size, smallest = view_sizes[0], view_sizes[-1]
    if len(view_sizes) <= 2:
        return f"views of {size} pixels"
    number = view_sizes.count(size)
    small = "" if smallest == size else f" and {len(view_sizes) - number} of {smallest}"
    return f"{number} views of {size} pixels{small} per image"


def views_of(config: PretrainConfig, method: type[Method]) -> tuple[int, ...]:
    """Height and width of each view of an image, in pixels, without building the method."""
    return config.view_sizes if method.multi_view else (config.size,) * method.num_views


def check_views(config: PretrainConfig, method: type[Method]) -> None:
    """Refuse views that the method cannot take, and settings of small crops where there are none.

    Raises:
        UserError: One of them was given.
    """
    for name in ("views_per_image", "small_crops"):
        value = getattr(config, name)
        if value != getattr(PretrainConfig, name) and not method.multi_view:
            views = f"{method.num_views} view{'s' * (method.num_views != 1)}"
            raise UserError(
                f"--{name.replace('_', '-')} was {value}, and {method.__name__} takes {views} of each image, of one "
                "size; leave it out, or give --method simclr."
            )
    for name in ("small_crop_min", "small_crop_max"):
        if config.small_crops is None and getattr(config, name) != getattr(PretrainConfig, name):
            raise UserError(
                f"--{name.replace('_', '-')} has no effect without small crops; give --small-crops too, such as "
                "--small-crops 4:16."
            )


def check_small_crops(config: PretrainConfig) -> None:
    """Refuse small crops that are no smaller than the other views, whose size may depend on the images.

    Raises:
        UserError: They are not.
    """
    size = config.view_sizes[-1]
    if config.small_crops is not None and size >= config.size:
        number = len(config.view_sizes) - config.views_per_image
        advice = (
            f"give a smaller size, such as {number}:{max(4, config.size // 2)}"
            if config.size > 4
            else f"leave them out, and give --views-per-image {len(config.view_sizes)}"
        )
        raise UserError(
            f"--small-crops was {config.small_crops}, which is no smaller than views of {config.size} pixels; {advice}."
        )


@torch.no_grad()
def require_small_inputs(encoder: Encoder, config: PretrainConfig) -> None:
    """Refuse small crops for an encoder that takes images of its own size alone, as vision transformers do.

    Raises:
        UserError: It cannot take them.
    """
    size = config.view_sizes[-1]
    if size == config.size or not encoder.config.is_external:  # our ResNets take any size
        return
    training = encoder.training
    try:
        device = next(encoder.parameters()).device
        encoder.eval()(torch.zeros(1, encoder.config.channels, size, size, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise UserError(
            f"--small-crops was {config.small_crops}, and {config.encoder} does not take images of {size} pixels "
            f"({''.join(reason).rstrip('.')}); give a larger size, --views-per-image instead, or another encoder."
        ) from None
    finally:
        encoder.train(training)
