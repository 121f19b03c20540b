"""ONNX: onnxruntime gives our numbers at any batch size, and the file serves as an encoder."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import simclr
from helpers import CLASS_NAMES, as_trained, random_inputs, relative_error
from simclr.config.encoder import RESNETS
from simclr.errors import UserError
from simclr.evaluation.subjects import EvaluatedModel
from simclr.models import EncoderConfig, ProjectionHead, build_encoder
from simclr.models.classifier import Classifier
from simclr.models.external.onnx_bridge import OnnxEncoder
from simclr.tasks.export import export
from simclr.tasks.options.using import Export
from simclr.weights.exporters import onnx_file
from simclr.weights.folder import save_classifier, save_encoder

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SMALL = EncoderConfig("small", channels=3, size=40, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def exported(config: EncoderConfig, folder: Path, *, seed: int = 3) -> nn.Module:
    encoder = as_trained(build_encoder(config, seed=seed))
    save_encoder(encoder, folder / "encoder", preprocessing="google", origin={})
    export(Export(run=folder / "encoder", format="onnx", out=folder / "w.onnx"))
    return encoder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple[Classifier, Path]:
    """A network whose classifier stands on a layer of the head, and its file."""
    folder = tmp_path_factory.mktemp("onnx")
    encoder = as_trained(build_encoder(SMALL, seed=3))
    network = Classifier(encoder, ProjectionHead(encoder.num_features), 3, head_layer=1).eval()
    as_trained(network)
    nn.init.normal_(network.linear.weight, generator=torch.Generator().manual_seed(4))
    save_classifier(network, folder / "encoder", classes=CLASS_NAMES, preprocessing="google", origin={})
    export(Export(run=folder / "encoder", format="onnx", out=folder / "w.onnx"))
    return network, folder / "w.onnx"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_features_and_logits_at_any_batch_size(classifier, count: int) -> None:
    network, file = classifier
    session, x = onnxruntime.InferenceSession(file), random_inputs(SMALL, count)
    features, logits = session.run(["features", "logits"], {"images": x.numpy()})
    with torch.no_grad():
        assert relative_error(features, network.encoder(x)) < 1e-5 and relative_error(logits, network(x)) < 1e-5


def test_the_file_says_what_it_expects(classifier) -> None:
    said = onnxruntime.InferenceSession(classifier[1]).get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == CLASS_NAMES
    preprocessing = json.loads(said["preprocessing"])
    assert preprocessing["size"] == [40, 40] and preprocessing["channels"] == 3
    assert preprocessing["normalisation"] == "inside the network" and preprocessing["mean"] == [0.4, 0.5, 0.6]


def test_it_serves_as_an_encoder(classifier) -> None:
    _, file = classifier
    theirs, ours = simclr.load(file), simclr.load(file.parent / "encoder")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 50, 44, 3), dtype=np.uint8)
    np.testing.assert_allclose(theirs.embed(pixels, batch_size=2), ours.embed(pixels), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(theirs.probabilities(pixels), ours.probabilities(pixels), rtol=1e-4, atol=1e-5)
    assert theirs.classify(pixels) == ours.classify(pixels) and theirs.encoder.config == SMALL


def test_it_refuses_what_it_was_not_made_for(classifier) -> None:
    encoder = simclr.load(classifier[1]).encoder
    for x, reason in (
        (torch.zeros(1, 3, 41, 40), r"images of shape \[3, 40, 40\] and was given \[3, 41, 40\]"),
        (torch.zeros(1, 1, 40, 40), "expects 3 channels"),
        (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), "expects floats"),
    ):
        with pytest.raises(UserError, match=reason):
            encoder(x)
    with pytest.raises(UserError, match="cannot be trained"):
        deepcopy(encoder).train()(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig("resnet18", channels=1, size=32, width=1 / 16),
        EncoderConfig("resnet50", channels=3, size=64, width=1 / 16, sk=True),
    ],
    ids=["cifar", "sk"],
)
def test_every_kind_of_block_and_stem(config: EncoderConfig, tmp_path: Path, monkeypatch) -> None:
    """One block a group: the exporter's time is what this costs."""
    monkeypatch.setitem(RESNETS, config.name, RESNETS[config.name]._replace(blocks=(1, 1, 1, 1)))
    encoder, x = exported(config, tmp_path), random_inputs(config, 3)
    with torch.no_grad():
        assert relative_error(simclr.load(tmp_path / "w.onnx").encoder(x), encoder(x)) < 1e-5


def test_two_files_are_two_encoders_to_the_evaluation() -> None:
    """Kept features are found again by weights: those of one file must not answer for another."""
    one, same, other = (
        EvaluatedModel(name="", encoder=OnnxEncoder(SMALL, content, 128), size=40, channels=3).identity
        for content in (b"one", b"one", b"other")
    )
    assert one == same != other


def test_a_file_that_computes_something_else_is_refused(classifier) -> None:
    network, file = classifier
    network = deepcopy(network)
    onnx_file.check(onnx_file._Network(network.encoder, network), file.read_bytes())
    with torch.no_grad():
        network.linear.bias += 1e-3
    with pytest.raises(UserError, match="onnxruntime gives other logits than this encoder for 1 images"):
        onnx_file.check(onnx_file._Network(network.encoder, network), file.read_bytes())


def test_damaged_files_and_missing_packages_end_in_a_sentence(classifier, tmp_path: Path, monkeypatch) -> None:
    content = classifier[1].read_bytes()
    for name, damaged in (("cut", content[:2000]), ("empty", b""), ("foreign", b"no onnx at all")):
        (tmp_path / f"{name}.onnx").write_bytes(damaged)
        with pytest.raises(UserError, match=r"was not run|cannot read|not written by"):
            simclr.load(tmp_path / f"{name}.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'simclr-torch\[onnx\]'"):
        simclr.load(classifier[1])
    monkeypatch.setattr(onnx_file, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"needs the packages onnx, onnxscript, onnxruntime; .*\[onnx\]"):
        exported(EncoderConfig("small", channels=1, size=12), tmp_path)
