"""What an encoder expects of an image, in words and numbers that need no simclr to be followed.

The numbers are those of `simclr.views.views.eval_images`, which `simclr.load(PATH).embed` uses.
"""

import json
from typing import Any, Literal

from simclr.config.encoder import EncoderConfig
from simclr.views.policy import AugmentationPreset
from simclr.views.views import eval_crop


def preprocessing_of(
    config: EncoderConfig, preset: AugmentationPreset, *, normalised: Literal["inside", "before"]
) -> dict[str, Any]:
    """Size, channels, range, crop, interpolation and normalisation, as plain JSON values.

    Args:
        preset: Whose evaluation preprocessing the encoder was trained with.
        normalised: Whether `mean` and `std` are part of the exported network or to be applied before it.
    """
    size, share = config.size, eval_crop(config.size)
    mean, std = config.mean, config.std
    if preset == "google":
        crop = {"rule": "the central square, then resize it", "side": f"round({share:g} x shorter side)"}
        interpolation = {"kernel": "bicubic", "a": -0.5, "antialias": False, "centres": "half-pixel"}
    else:
        crop = {
            "rule": "resize, then the central square",
            "shorter side": round(size / share),
            "side": size,
        }
        interpolation = {"kernel": "bilinear", "antialias": True, "centres": "half-pixel"}
    return {
        "preset": preset,
        "size": [size, size],
        "channels": config.channels,
        "colours": {1: "gray", 3: "RGB"}.get(config.channels, "as trained"),
        "layout": "NCHW",
        "dtype": "float32",
        "range": [0.0, 1.0],
        "crop": crop | {"share of the shorter side": share},
        "interpolation": interpolation,
        "clip to the range": True,
        "mean": [0.0] * config.channels if mean is None else list(mean),
        "std": [1.0] * config.channels if std is None else list(std),
        "normalisation": "none" if mean is None else f"{normalised} the network",
    }


def in_words(preprocessing: dict[str, Any]) -> str:
    """One sentence."""
    size, kind = preprocessing["size"][0], preprocessing["interpolation"]
    first = f"{preprocessing['crop']['rule']} ({size} x {size} pixels, {kind['kernel']}"
    antialias = "antialiased" if kind["antialias"] else "not antialiased"
    sentence = f"{preprocessing['colours']} images: {first}, {antialias}), floats in [0, 1]"
    if preprocessing["normalisation"] == "none":
        return f"{sentence}, not normalised."
    if preprocessing["normalisation"].startswith("inside"):
        return f"{sentence}; the network normalises them itself."
    return f"{sentence}, less the mean {preprocessing['mean']}, divided by {preprocessing['std']}."


def as_json(values: dict[str, Any]) -> bytes:
    """A JSON file's content."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
