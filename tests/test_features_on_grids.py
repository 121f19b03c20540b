"""Features that keep positions: held to means over cells computed one by one, and h to what it always was."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import simclr
from helpers import as_trained, known, parts_of, random_inputs, relative_error
from simclr.config.encoder import EncoderConfig
from simclr.config.pretrain import PretrainConfig
from simclr.errors import UserError
from simclr.models.classifier import Classifier, read_for
from simclr.models.encoder import build_encoder, encoder_of, read_as
from simclr.models.heads import ProjectionHead
from simclr.tasks.export import export
from simclr.tasks.options.using import Export
from simclr.weights.folder import load, save_encoder

SHAPE = EncoderConfig("small", channels=1, size=28, width=0.5, stem="strided")
QUICK = ("--recipe", "digits", "--epochs", 1, "--batch-size", 64, "--width", 0.5, "--workers", 0)


@pytest.fixture
def run_folder(simclr_command, tmp_path):
    code, _, said = simclr_command("pretrain", "digits", "--out", tmp_path / "run", *QUICK, "--feature", "stages3-4")
    assert code == 0, said
    return tmp_path / "run"


@pytest.fixture
def simclr_command(request):
    return request.getfixturevalue("simclr")


def cells(map_: np.ndarray, side: int) -> np.ndarray:
    """Means of side x side cells of (C, H, W), which overlap where H is no multiple of side."""
    height, width = map_.shape[1:]
    means = np.empty((len(map_), side, side))
    for i in range(side):
        for j in range(side):
            rows = slice(i * height // side, -(-(i + 1) * height // side))
            columns = slice(j * width // side, -(-(j + 1) * width // side))
            means[:, i, j] = map_[:, rows, columns].mean(axis=(1, 2))
    return means


@pytest.mark.parametrize(
    ("feature", "grids"), [("h", ()), ("stage4", (2,)), ("stages3-4", (4, 2)), ("stages1-4", (4, 4, 4, 2))]
)
def test_features_are_means_over_cells_of_the_maps(feature, grids):
    encoder = as_trained(build_encoder(replace(SHAPE, feature=feature), seed=1)).eval()
    maps: list[np.ndarray] = []
    for group in parts_of(encoder).backbone.groups:
        group.register_forward_hook(lambda _module, _inputs, output: maps.append(output.detach().numpy()))
    with torch.no_grad():
        found = encoder(random_inputs(SHAPE, 3)).numpy()
    assert [m.shape[2] for m in maps] == [14, 7, 4, 2] and encoder.config.grids == grids
    if feature == "h":
        expected = maps[-1].mean(axis=(2, 3))
    else:
        read = list(zip(maps[-len(grids) :], grids, strict=True))
        expected = np.stack([np.concatenate([cells(m[row], g).flatten() for m, g in read]) for row in range(3)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape[1] == encoder.num_features


@pytest.mark.parametrize("stem", ["cifar", "strided", "imagenet"])
@pytest.mark.parametrize("size", [8, 30, 64])
def test_their_number_depends_on_the_encoders_size_alone(stem, size):
    encoder = build_encoder(replace(SHAPE, stem=stem, size=size, feature="stages1-4"))
    for side in (size, 40):
        assert encoder(torch.rand(2, 1, side, side)).shape == (2, encoder.num_features)


def test_reading_otherwise_keeps_the_weights():
    encoder = as_trained(build_encoder(SHAPE, seed=1)).eval()
    x = random_inputs(SHAPE, 2)
    other = read_as(encoder, "stages1-4")
    with torch.no_grad():
        assert torch.equal(read_as(other, "h")(x), encoder(x)) and other(x).shape[1] == other.num_features
    assert read_as(encoder, "h") is encoder and not other.training


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        encoder = build_encoder(replace(SHAPE, feature="stages1-4"), seed=1).train()
        parts_of(encoder).backbone.recompute = recompute
        encoder(random_inputs(SHAPE, 4)).square().sum().backward()
        gradients.append([known(parameter.grad).clone() for parameter in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_more_features_than_a_record_may_have_are_refused():
    with pytest.raises(UserError, match="take fewer stages"):
        build_encoder(EncoderConfig("resnet50", channels=3, size=224, width=2, feature="stages1-4"))


def test_an_encoders_folder_and_an_onnx_file_have_the_features(tmp_path):
    pytest.importorskip("onnxruntime")
    config = replace(SHAPE, size=30, feature="stages1-4")  # maps of 15, 8, 4 and 2
    encoder = as_trained(build_encoder(config, seed=1)).eval()
    save_encoder(encoder, tmp_path / "encoder", preprocessing="google", origin={})
    record = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert record["encoder"]["feature"] == "stages1-4" and record["num_features"] == encoder.num_features
    export(Export(run=tmp_path / "encoder", format="onnx", out=tmp_path / "w.onnx"))
    x = random_inputs(config, 3)
    with torch.no_grad():
        expected = encoder(x)
        assert torch.equal(load(tmp_path / "encoder").encoder(x), expected)
        assert relative_error(load(tmp_path / "w.onnx").encoder(x), expected) < 1e-5


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_other_libraries_average_and_are_refused(tmp_path, library):
    config = EncoderConfig("resnet50", channels=3, size=224, width=1, feature="stage4")
    save_encoder(build_encoder(config), tmp_path / "encoder", preprocessing="google", origin={})
    with pytest.raises(UserError, match="its features are those of stage4 on grids"):
        export(Export(run=tmp_path / "encoder", format=library, out=tmp_path / "w.pth"))


def test_a_run_from_pretraining_to_evaluation(simclr_command, run_folder, tmp_path):
    width = encoder_of(PretrainConfig(encoder="small", width=0.5, size=8, feature="stages3-4"), 1)
    features = build_encoder(width).num_features
    assert simclr.load(run_folder).embed(np.zeros((2, 8, 8), np.uint8)).shape == (2, features)
    flags = ("--protocol", "knn", "--cache", "off", "--json", tmp_path / "r.json", "--out", tmp_path / "kept")
    widths = {}
    for feature in ("auto", "h", "stages1-4"):
        code, _, said = simclr_command(
            "evaluate", run_folder, "digits", *flags, "--compare", "random", "--feature", feature
        )
        assert code == 0, said
        found = json.loads((tmp_path / "r.json").read_text())["records"]
        widths[feature] = {one["model"]["network"]["feature"] for one in found}
        assert len(found) == 2
    assert widths == {"auto": {"stages3-4"}, "h": {"h"}, "stages1-4": {"stages1-4"}}
    code, _, said = simclr_command("evaluate", "timm/test_resnet", "digits", *flags, "--feature", "stage4")
    assert code == 2 and "of others h alone" in said


def test_a_head_that_reads_h_trains_as_ever_whatever_is_returned(simclr_command, tmp_path):
    """Same weights, bit for bit, as with --feature h; what is saved returns grids, and its head reads h."""
    for name, flags in (("h", ()), ("grids", ("--feature", "stages1-4", "--head-reads", "h"))):
        code, _, said = simclr_command("pretrain", "digits", "--out", tmp_path / name, *QUICK, *flags)
        assert code == 0, said
    plain, grids = simclr.load(tmp_path / "h"), simclr.load(tmp_path / "grids")
    assert grids.encoder.config.feature == "stages1-4" and known(grids.head).reads == "h"
    for part in ("encoder", "head"):
        expected, found = getattr(plain, part).state_dict(), getattr(grids, part).state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    x = random_inputs(plain.encoder.config, 3)
    with torch.no_grad():
        z = known(plain.head)(plain.encoder(x))
        assert torch.equal(known(grids.head)(read_for(grids.encoder, grids.head)(x)), z)

    code, out, said = simclr_command("evaluate", tmp_path / "grids", "digits", "--protocol", "probe", "--cache", "off")
    assert code == 0 and "z" in out, said
    tune = ("--labels", "50%", "--epochs", 1, "--batch-size", 64, "--workers", 0)
    for layer in (0, 1):
        tuned = tmp_path / f"tuned{layer}"
        code, _, said = simclr_command(
            "finetune", tmp_path / "grids", "digits", "--out", tuned, "--head-layer", layer, *tune
        )
        assert code == 0, said
        model = simclr.load(tuned)
        assert model.encoder.config.feature == "h"
        assert known(model.classifier)(x).shape == (3, 10)
        code, _, said = simclr_command(
            "distill", tuned, "digits", "--out", tmp_path / f"student{layer}", "--epochs", 1, "--batch-size", 64
        )
        assert code == 0, said


def test_a_classifier_on_a_head_that_reads_other_features_is_refused():
    encoder = build_encoder(replace(SHAPE, feature="stages1-4"))
    head = ProjectionHead(read_as(encoder, "h").num_features, reads="h")
    assert Classifier(encoder, head, 3).head is None
    with pytest.raises(UserError, match="reads h, and the encoder returns stages1-4"):
        Classifier(encoder, head, 3, head_layer=1)


def test_features_that_an_encoder_does_not_have_are_refused(simclr_command, tmp_path):
    for flags in (("--feature", "stage4"), ("--head-reads", "stage4")):
        code, _, said = simclr_command(
            "pretrain", "digits", "--out", tmp_path / "run", *QUICK, "--width", 1, "--encoder", "timm/resnet18", *flags
        )
        assert code == 2 and "of others h alone" in said
