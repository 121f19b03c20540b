"""Encoder and heads against checkpoints that the authors' graph wrote, and what it computed with them."""

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr.models import Encoder, EncoderConfig, LinearClassifier, ProjectionHead, build_encoder
from tf_checkpoint import authors_names, load, read_checkpoint

TOLERANCE = {"eval": 1e-4, "train": 1e-3}  # relative L2; batch statistics amplify rounding
GRADIENT_TOLERANCE = 1e-3
FP32_ROUNDING = {"r18_cifar": 2.0**-21, "r50_sk0": 2.0**-21, "r50_sk1": 2.0**-20}
"""Moves h a little farther than the authors' fp32 did."""

# As the fixture `reference`, but needed to name the tests.
REFERENCE = Path(os.environ.get("SIMCLR_REFERENCE", Path(__file__).parent / "reference"))
FOLDERS = sorted(path.parent for path in REFERENCE.glob("tf_checkpoints/*/outputs.npz"))


@dataclass
class Authors:
    """Our modules with the authors' weights, and what the authors' graph computed."""

    encoder: Encoder
    head: ProjectionHead
    classifier: LinearClassifier
    names: dict[str, Tensor]
    vectors: str
    outputs: dict[str, np.ndarray]

    def x(self) -> Tensor:
        """(B, C, S, S)"""
        return torch.from_numpy(self.outputs["x"]).permute(0, 3, 1, 2)


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def authors(request: pytest.FixtureRequest) -> Iterator[Authors]:
    with np.load(request.param / "outputs.npz") as file:
        outputs = dict(file)
    config = json.loads(str(outputs["config"]))
    encoder = build_encoder(
        EncoderConfig(
            f"resnet{config['depth']}",
            channels=outputs["x"].shape[-1],
            size=config["image_size"],
            width=config["width"],
            sk=config["sk_ratio"] > 0,
        )
    )
    features = encoder.num_features
    head = ProjectionHead(features, layers=config["proj_layers"], dim=config["proj_dim"])
    classifier = LinearClassifier(features, config["num_classes"])
    names = authors_names(encoder, head, classifier)
    load(names, read_checkpoint(request.param))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers of four channels: threads would only wait for each other
    yield Authors(encoder, head, classifier, names, request.param.name, outputs)
    torch.set_num_threads(threads)


def relative_error(ours: Tensor, theirs: np.ndarray) -> float:
    difference = ours.detach().numpy() - theirs
    return float(np.linalg.norm(difference) / np.linalg.norm(theirs))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_outputs(authors: Authors, mode: str) -> None:
    """Against all that the graph computed.

    With selective kernels and batch statistics over four images fp32 leaves z uncertain by 3e-3 to 8e-3: our fp32, our
    fp64 and the authors' fp32 are so far apart, though h is known to 2e-4. There z is taken from the authors' own h.
    """
    for module in (authors.encoder, authors.head):
        module.train(mode == "train")
    expected = {key: authors.outputs[f"{key}_{mode}"] for key in ("h", "z", "head_input", "logits")}

    h = authors.encoder(authors.x())
    hiddens = authors.head.hiddens(h)
    candidates = [hidden for hidden in hiddens if hidden.shape == expected["head_input"].shape]
    head_input = min(candidates, key=lambda hidden: relative_error(hidden, expected["head_input"]))
    uncertain = (authors.vectors, mode) == ("r50_sk1", "train")
    z = authors.head(torch.from_numpy(expected["h"])) if uncertain else hiddens[-1]
    ours = {"h": h, "z": z, "head_input": head_input, "logits": authors.classifier(head_input)}

    errors = {key: relative_error(ours[key], expected[key]) for key in expected}
    assert max(errors.values()) < TOLERANCE[mode], errors


def test_gradient_norms(authors: Authors) -> None:
    """d(sum h^2)/dvariable in train mode.

    Where a ReLU's input is within rounding of 0 the gradient jumps, by 10 % in some variables of the ResNet-50
    vectors, and the authors' graph ran in fp32. So ours is taken in fp64, and a variable whose gradient strays
    when the weights move by fp32 rounding may differ as much.
    """
    names = [str(name) for name in authors.outputs["grad_names"]]
    trainable = {name for name, tensor in authors.names.items() if tensor.requires_grad}
    assert set(names) == {name for name in trainable if name.startswith("base_model/")}

    theirs = authors.outputs["grad_norms"]
    ours = gradient_norms(authors, names, rounding=0.0, seed=0)
    strayed = [gradient_norms(authors, names, rounding=FP32_ROUNDING[authors.vectors], seed=seed) for seed in range(16)]
    stray = np.max([np.abs(norms / ours - 1) for norms in strayed], axis=0)
    errors = np.abs(theirs / ours - 1)
    assert np.median(errors) < GRADIENT_TOLERANCE + np.median(stray)
    beyond = {name: error for name, error, own in zip(names, errors, stray, strict=True) if error > own}
    assert max(beyond.values(), default=0) < GRADIENT_TOLERANCE, beyond


def gradient_norms(authors: Authors, names: list[str], *, rounding: float, seed: int) -> np.ndarray:
    """In fp64, with every weight moved by N(0, rounding) of itself."""
    encoder = copy.deepcopy(authors.encoder).double().train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.mul_(1 + rounding * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    encoder(authors.x().double()).square().sum().backward()
    tensors = authors_names(encoder, authors.head, authors.classifier)
    return np.array([float(gradient.norm()) for name in names if (gradient := tensors[name].grad) is not None])
