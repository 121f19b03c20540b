"""Checkpoints of any depth, width, stem and number of head layers, by names that share no code with the reader's."""

from pathlib import Path

import pytest
import torch

from bundle_writer import authors_variables, write_bundle
from simclr.models import EncoderConfig, LinearClassifier, ProjectionHead, build_encoder
from simclr.weights.importers.import_tf import import_tf


@pytest.mark.parametrize(
    ("name", "width", "size", "sk", "layers"),
    [
        ("resnet18", 0.137, 32, False, 0), ("resnet34", 0.1, 64, False, 4), ("resnet50", 0.0937, 64, True, 1),
        ("resnet101", 0.1, 32, True, 2), ("resnet10", 0.15, 32, False, 3), ("resnet200", 0.037, 64, False, 2),
    ],
)  # fmt: skip
def test_outputs_are_equal(name: str, width: float, size: int, sk: bool, layers: int, tmp_path: Path) -> None:
    encoder = build_encoder(EncoderConfig(name, channels=3, size=size, width=width, sk=sk))
    kind = "linear" if layers < 2 else "nonlinear"
    head = ProjectionHead(encoder.num_features, kind=kind, layers=max(layers, 2), dim=5)  # pyrefly: ignore
    linear = LinearClassifier(encoder.num_features, 3)
    variables = {key: value for key, value in authors_variables(encoder, head, linear).items() if "Momentum" not in key}
    if layers == 0:
        variables = {key: value for key, value in variables.items() if "contrastive" not in key}
    write_bundle(tmp_path / "model.ckpt-7", variables)
    found = import_tf(tmp_path, size=size)
    assert (found.encoder.config.name, found.encoder.config.sk) == (name, sk) and not found.left_out
    x = torch.rand(1, 3, size, size)
    with torch.no_grad():
        h = encoder.eval()(x)
        assert torch.equal(found.encoder(x), h)
        assert found.classifier is not None and torch.equal(found.classifier(x), linear(h))
        if layers:
            assert found.head is not None and len(found.head.layers) == layers
            assert torch.equal(found.head(h), head.eval()(h))
