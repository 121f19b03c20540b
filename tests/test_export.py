"""`simclr export`: other libraries, told what it printed, compute what the encoder computes; and it comes back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

import simclr
from helpers import CLASS_NAMES, as_trained, known, random_inputs, relative_error
from simclr.config.encoder import TIMM, TORCHVISION
from simclr.errors import UserError
from simclr.models import EncoderConfig, ProjectionHead, build_encoder
from simclr.models.classifier import Classifier
from simclr.models.external.torchvision_names import export_state, import_state, name_in
from simclr.tasks.export import export
from simclr.tasks.options.using import Export
from simclr.weights.folder import save_classifier, save_encoder

NORMAL: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


def normalised(config: EncoderConfig, x: torch.Tensor) -> torch.Tensor:
    if config.mean is None or config.std is None:
        return x
    return (x - torch.tensor(config.mean).view(-1, 1, 1)) / torch.tensor(config.std).view(-1, 1, 1)


def run_lines(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The model that a stranger gets who types what the command printed."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(lines, names)
    return names["model"]


def saved(config: EncoderConfig, folder: Path, *, classifier: bool) -> nn.Module:
    """An encoder's folder, and its network: to features or, with a classifier, to logits."""
    encoder = as_trained(build_encoder(config, seed=3))
    if not classifier:
        save_encoder(encoder, folder, preprocessing="torchvision", origin={})
        return encoder
    network = Classifier(encoder, None, len(CLASS_NAMES)).eval()
    nn.init.normal_(network.linear.weight, generator=torch.Generator().manual_seed(4))
    save_classifier(network, folder, classes=CLASS_NAMES, preprocessing="torchvision", origin={})
    return network


def theirs_to_features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.fc = nn.Identity()
    with torch.no_grad():
        return model.eval()(x)


@torch.no_grad()
def test_names_and_arithmetic_are_theirs() -> None:
    """Where the pool sees an odd side (33), its paddings agree: torchvision's own network is ours."""
    config = EncoderConfig("resnet50", channels=3, size=66)
    whole = as_trained(models.resnet50())
    state = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("fc.")}
    encoder, x = import_state(state, config, TORCHVISION), random_inputs(config, 2)
    assert relative_error(encoder(x), theirs_to_features(whole, x)) < 1e-5
    back = export_state(encoder, TORCHVISION)
    assert list(back) and back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    for name, tensor in import_state(export_state(encoder, TIMM), config, TIMM).state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name])


@pytest.mark.parametrize(
    ("library", "ending", "size", "classifier"),
    [("torchvision", ".pth", 64, True), ("timm", "", 66, False)],
)
def test_a_resnet_in_another_library_and_back(library, ending, size, classifier, tmp_path, monkeypatch, capsys) -> None:
    channels = 1 if library == "timm" else 3  # which torchvision does not take
    config = EncoderConfig(
        "resnet50", channels=channels, size=size, stem="imagenet", **(NORMAL if channels == 3 else {})
    )
    network, x = saved(config, tmp_path / "encoder", classifier=classifier), random_inputs(config, 3)
    export(Export(run=tmp_path / "encoder", format=library, out=tmp_path / f"weights{ending}"))
    printed = capsys.readouterr()
    file = tmp_path / f"weights{ending or '.safetensors'}"
    described = json.loads((tmp_path / f"{file.name}.json").read_text())
    assert described["load"] == printed.out.splitlines()
    theirs = run_lines(printed.out, tmp_path, monkeypatch)
    loaded = simclr.load(file)
    again = known(loaded.classifier) if classifier else loaded.encoder
    with torch.no_grad():
        expected = network(x)
        assert relative_error(theirs(normalised(config, x)), expected) < 1e-5
        assert relative_error(again(x), expected) < 1e-6
        theirs.maxpool = nn.MaxPool2d(3, 2, padding=1)  # as the library has it
        stock = relative_error(theirs(normalised(config, x)), expected)
    if size == 64:
        assert stock > 1e-3 and described["differs"] in printed.err and "pads every side by 1" in printed.err
    else:
        assert stock < 1e-5 and described["differs"] is None
    assert loaded.preprocessing == "torchvision" and loaded.classes == (CLASS_NAMES if classifier else [])
    assert loaded.encoder.config == config
    said = described["preprocessing"]
    assert said["size"] == [size, size] and said["channels"] == channels and said["mean"] == list(config.mean or (0.0,))
    assert said["crop"]["shorter side"] == round(size / 0.875)


@pytest.mark.parametrize(
    ("library", "name", "channels", "size"),
    [
        ("torchvision", "mobilenet_v3_small", 3, 32),
        ("timm", "resnet10t", 1, 32),
        ("timm", "vit_tiny_patch16_224", 3, 32),
    ],
)
@pytest.mark.parametrize("classifier", [False, True], ids=["features", "logits"])
def test_their_own_models_go_home(library, name, channels, size, classifier, tmp_path, monkeypatch, capsys) -> None:
    config = EncoderConfig(f"{library}/{name}", channels=channels, size=size, **(NORMAL if channels == 3 else {}))
    network, x = saved(config, tmp_path / "encoder", classifier=classifier), random_inputs(config, 2)
    export(Export(run=tmp_path / "encoder", format=library, out=tmp_path / "weights"))
    theirs = run_lines(capsys.readouterr().out, tmp_path, monkeypatch)
    loaded = simclr.load(tmp_path / "weights.safetensors")
    again = known(loaded.classifier) if classifier else loaded.encoder
    with torch.no_grad():
        assert relative_error(theirs(normalised(config, x)), network(x)) < 1e-5
        assert relative_error(again(x), network(x)) < 1e-6


@pytest.mark.parametrize(
    ("library", "config", "reason"),
    [
        ("torchvision", EncoderConfig("resnet18", channels=3, size=64), "a convolution on its shortcut"),
        ("timm", EncoderConfig("resnet34", channels=3, size=64), "a convolution on its shortcut"),
        ("torchvision", EncoderConfig("resnet50", channels=3, size=32), "cifar stem is one 3x3"),
        ("timm", EncoderConfig("resnet50", channels=3, size=64, stem="strided"), "strided stem is one 3x3"),
        ("timm", EncoderConfig("resnet50", channels=3, size=64, sk=True), "selective kernels"),
        ("timm", EncoderConfig("resnet50", channels=3, size=64, width=2), "width is 2, theirs 1"),
        ("torchvision", EncoderConfig("resnet50", channels=1, size=64), r"1 channel, theirs 3 \(timm takes any\)"),
        ("torchvision", EncoderConfig("resnet200", channels=3, size=64), "has resnet50, resnet101, resnet152"),
        ("torchvision", EncoderConfig("timm/resnet50", channels=3, size=64), "it is timm/resnet50"),
    ],
    ids=lambda value: value.name if isinstance(value, EncoderConfig) else None,
)  # fmt: skip
def test_what_they_cannot_compute_is_refused(library: str, config: EncoderConfig, reason: str) -> None:
    with pytest.raises(UserError, match=rf"{library} has no model like this encoder: .*{reason}.*onnx"):
        name_in(f"{library}/", config)


def test_a_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    saved(EncoderConfig("small", channels=3, size=40), tmp_path / "encoder", classifier=False)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"format": "torchvision", "out": tmp_path / "w"}, "a convolution on its shortcut"),
        ({"format": "timm", "out": tmp_path / "w.onnx"}, r"writes \.safetensors or \.pth files, and --out was"),
        ({"format": "hub-folder", "out": tmp_path / "encoder"}, "holds an encoder or a run already"),
        ({"format": "safetensors", "out": tmp_path / "w.safetensors"}, "writes a folder"),
        ({"format": "safetensors", "out": tmp_path / "w", "licence": "mit"}, "model card"),
        ({"format": "onnx", "out": Path("/proc/w.onnx")}, "cannot be written"),
    )
    for flags, reason in cases:
        with pytest.raises(UserError, match=reason):
            export(Export(run=tmp_path / "encoder", **flags))
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_a_classifier_on_the_head_stays_behind_with_a_word(tmp_path: Path, capsys) -> None:
    encoder = as_trained(build_encoder(EncoderConfig("timm/resnet10t", channels=1, size=32)))
    network = Classifier(encoder, ProjectionHead(encoder.num_features), 3, head_layer=1).eval()
    save_classifier(network, tmp_path / "encoder", classes=CLASS_NAMES, preprocessing="google", origin={})
    export(Export(run=tmp_path / "encoder", format="timm", out=tmp_path / "w.pth"))
    assert "stands on layer 1 of the projection head" in capsys.readouterr().err
    loaded = simclr.load(tmp_path / "w.pth")
    assert loaded.classifier is None
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in loaded.encoder.state_dict().items())


def test_files_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    saved(EncoderConfig("timm/resnet10t", channels=1, size=32), tmp_path / "encoder", classifier=True)
    for name in ("a.pth", "a.safetensors"):
        export(Export(run=tmp_path / "encoder", format="timm", out=tmp_path / name))
    pth, safe = (tmp_path / "a.pth").read_bytes(), (tmp_path / "a.safetensors").read_bytes()
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    for name, content, reason in (
        ("foreign.pth", (tmp_path / "foreign.pth").read_bytes(), "not written by `simclr export`"),
        ("a.pth", pth[:-9] + b"123456789", "describes another file"),
        ("a.safetensors", safe[:1000], "no whole safetensors file"),
        (
            "a.safetensors",
            safe.replace(b"layer1.0.conv1.weight", b"layer9.0.conv1.weight"),
            "lacks layer1.0.conv1.weight",
        ),
        ("a.safetensors", safe.replace(b"simclr-export-1", b"simclr-export-9"), "another format"),
        ("notes.txt", b"hello", "not written by `simclr export`"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=reason):
            simclr.load(tmp_path / name)


def test_a_file_refuses_images_that_its_encoder_was_not_made_for(tmp_path: Path) -> None:
    saved(EncoderConfig("timm/resnet10t", channels=1, size=32), tmp_path / "encoder", classifier=False)
    export(Export(run=tmp_path / "encoder", format="timm", out=tmp_path / "w.pth"))
    model = simclr.load(tmp_path / "w.pth")
    assert model.embed(np.zeros((2, 50, 40), np.uint8)).shape == (2, 512)  # any size is cut and resized
    with pytest.raises(UserError, match="1-channel images and what was given is in colour"):
        model.embed(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"Pixels lie in \[0, 255\]"):
        model.embed(np.array([[[0.0, 255.0]]]))
    with pytest.raises(UserError, match="expects 1 channels and was given 3"):
        model.encoder(torch.zeros(1, 3, 32, 32))
