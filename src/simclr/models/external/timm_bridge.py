"""Any model of timm as an encoder, `timm/NAME` -> `timm.create_model(NAME, num_classes=0)`, or with its classifier."""

import difflib
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model_pretrained
from torch import nn

from simclr.errors import UserError, first_line

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


def build_timm(name: str, *, channels: int, size: int, pretrained: bool) -> tuple[nn.Module, int, Normalisation | None]:
    """The model without its classifier, its number of features, and the (mean, std) of pretrained weights.

    Args:
        name: A name of timm's, without the leading `timm/`.
        channels: Of the input; timm adapts pretrained first layers.
        size: Of the input, in pixels; models with a fixed input size are built for it.
        pretrained: Begin from timm's weights, which are downloaded on first use.

    Returns:
        The third value is None without `pretrained`: the pixels in [0, 1] go in as they are.

    Raises:
        UserError: No such model, no or unreachable weights, or the model cannot take images of this size.
    """
    model, described = _create(name, channels=channels, size=size, pretrained=pretrained, num_classes=0)
    width = num_features(model, f"timm/{name}", channels, size)
    if not pretrained or described is None:
        return model, width, None
    mean, std = described.mean, described.std
    if channels != len(mean):  # timm sums or repeats the first layer over channels; the colours' average fits it
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return model, width, (tuple(mean), tuple(std))


def timm_classifier(name: str, *, channels: int, size: int) -> nn.Linear:
    """The linear classifier at the end of a pretrained model, which stands on what `build_timm` gives.

    Raises:
        UserError: As `build_timm`, or the model does not end in one.
    """
    model, _ = _create(name, channels=channels, size=size, pretrained=True)
    find: Any = getattr(model, "get_classifier", lambda: None)
    last = find()
    if not isinstance(last, nn.Linear):
        raise UserError(f"timm/{name} does not end in a linear classifier; take another model, such as timm/resnet18.")
    return last


def _create(name: str, *, channels: int, size: int, pretrained: bool, **classes: Any) -> tuple[nn.Module, Any]:
    """The model, and what timm says of its weights."""
    _check_name(name)
    described = get_pretrained_cfg(name)
    if pretrained and not is_model_pretrained(name):
        raise UserError(f"timm has no pretrained weights for {name}; begin from random weights, or take another model.")
    try:
        model = timm.create_model(name, pretrained=pretrained, **classes, **input_arguments(name, channels, size))
    except Exception as error:  # whatever timm, the download or the model's own checks raise
        what = "its pretrained weights could not be fetched or fitted" if pretrained else "timm could not build it"
        raise UserError(
            f"The encoder timm/{name} with {channels} channels, {size} pixels: {what} ({first_line(error)}); "
            f"try {'random weights, ' if pretrained else ''}another size, or another model."
        ) from error
    return model, described


def input_arguments(name: str, channels: int, size: int) -> dict[str, Any]:
    """What `timm.create_model` is told of the input: channels and, if the model is built for one size, that."""
    described = get_pretrained_cfg(name)
    return {"in_chans": channels} | ({"img_size": size} if described and described.fixed_input_size else {})


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(f'timm/{model}' for model in close)}?" if close else ""
    raise UserError(f"timm has no model {name!r}; {hint or 'timm.list_models() names them all.'}")


@torch.no_grad()
def num_features(model: nn.Module, name: str, channels: int, size: int) -> int:
    """Width of the output, by a trial: what a model says of itself may differ, and some refuse the size."""
    training = model.training
    reference = next(model.parameters())
    try:
        features = model.eval()(torch.zeros(1, channels, size, size, device=reference.device))
    except Exception as error:  # each model checks its input in its own way
        raise UserError(
            f"The encoder {name} cannot take images of {size} pixels ({first_line(error)}); try another size."
        ) from error
    finally:
        model.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise UserError(f"The encoder {name} does not give one row of features per image; take another model.")
    return features.shape[1]
