"""torchvision's classifiers as encoders: what they gave their own last layer is what we give."""

import pytest
import torch
from torchvision import models

from helpers import parts_of
from simclr.errors import UserError
from simclr.models import EncoderConfig, build_encoder


@pytest.mark.parametrize(("name", "size", "width"), [("alexnet", 63, 4096), ("mobilenet_v3_small", 32, 1024)])
def test_features_are_what_the_classifier_would_read(name: str, size: int, width: int) -> None:
    encoder = build_encoder(EncoderConfig(f"torchvision/{name}", channels=3, size=size), seed=3).eval()
    whole = models.get_model(name).eval()
    whole.load_state_dict(encoder.backbone.state_dict(), strict=False)  # all but the last layer
    *_, last = [layer for layer in whole.modules() if isinstance(layer, torch.nn.Linear)]
    read: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda _layer, inputs: read.append(inputs[0]))
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        whole(x)
        h = encoder(x)
    assert encoder.num_features == width == h.shape[1]
    assert torch.equal(h, read[0])


def test_the_seed_decides_the_weights() -> None:
    config = EncoderConfig("torchvision/mobilenet_v3_small", channels=3, size=32)
    first, again, other = (
        parts_of(build_encoder(config, seed=seed)).backbone.features[0][0].weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "channels", "size", "sentence"),
    [
        ("alexnt", 3, 64, "did you mean torchvision/alexnet"),
        ("googlenet", 3, 64, "torchvision has no classifier 'googlenet'"),
        ("squeezenet1_0", 3, 64, "does not end in a linear classifier"),
        ("alexnet", 1, 64, "takes 3 channels and was asked for 1"),
        ("alexnet", 3, 28, "cannot take images of 28 pixels"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_sentence(name: str, channels: int, size: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_encoder(EncoderConfig(f"torchvision/{name}", channels=channels, size=size))


def test_width_and_stem_belong_to_resnets() -> None:
    with pytest.raises(UserError, match="leave the width at 1"):
        EncoderConfig("torchvision/alexnet", channels=3, size=64, width=2.0)
