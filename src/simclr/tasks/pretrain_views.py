"""The views of a pretraining run: settings -> a policy for each view of an image, and which settings go together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from simclr.config.pretrain import OPERATIONS, PretrainConfig
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
    operations = {name: getattr(config, name) for name in OPERATIONS}
    return replace(policy, brightness_mode=config.brightness, shared_crop=config.shared_crop, **operations)


NAMED: Mapping[str, str] = {"crop": "crop", "flip": "flip", "colour": "jitter", "blur": "blur"} | {
    name.replace("_", "-"): name for name in OPERATIONS
}
"""Operations as --augment and --branch-b name them -> the field of the policy."""


def only(policy: Policy, names: Sequence[str]) -> Policy:
    """The policy with these operations alone; one whose probability was 0 is always applied.

    "colour" is the colour distortion of the paper: jitter, and grayscale as often as it was.
    """
    values: dict[str, Any] = {"crop": "crop" in names, "gray": policy.gray if "colour" in names else 0.0}
    for name, field in NAMED.items():
        if field != "crop":
            values[field] = (getattr(policy, field) or 1.0) if name in names else 0.0
    return replace(policy, **values)


def operations_of(names: str, flag: str) -> list[str]:
    """The operations that a flag names.

    Raises:
        UserError: There is no such operation.
    """
    named = [name.strip() for name in names.split(",")]
    for name in named:
        if name not in NAMED:
            raise UserError(f"{flag} was {names}, and there is no operation {name!r}; there are {', '.join(NAMED)}.")
    return named


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
    if config.augment is not None:
        names = operations_of(config.augment, "--augment")
        policies = [only(policy, names) for policy in policies]
    if config.branch_b != "same":
        names = [] if config.branch_b == "identity" else operations_of(config.branch_b, "--branch-b")
        policies[1] = only(policy_of(config, channels), names)
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
    _check_operations(config, method)
    for name in ("small_crop_min", "small_crop_max"):
        if config.small_crops is None and getattr(config, name) != getattr(PretrainConfig, name):
            raise UserError(
                f"--{name.replace('_', '-')} has no effect without small crops; give --small-crops too, such as "
                "--small-crops 4:16."
            )


def _check_operations(config: PretrainConfig, method: type[Method]) -> None:
    """Refuse wrong names, operations that are on and not named, and a second view where there is not just one."""
    if config.branch_b != "same":
        if len(views_of(config, method)) != 2:
            raise UserError(
                f"--branch-b was {config.branch_b}, and it is the second of two views; {method.__name__} takes "
                f"{len(views_of(config, method))} here, so leave it out."
            )
        if config.branch_b != "identity":
            operations_of(config.branch_b, "--branch-b")
    if config.augment is None:
        return
    named = {NAMED[name] for name in operations_of(config.augment, "--augment")}
    for name in OPERATIONS:
        if getattr(config, name) > 0 and name not in named:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} was {getattr(config, name)}, and --augment does not name {flag}; add it there.")


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
