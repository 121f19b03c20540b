"""Features of any layer: held to hooks and to the head's formula in NumPy; no two layers share a stored value."""

import json
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from helpers import as_trained, known, parts_of, random_inputs
from simclr.config.encoder import EncoderConfig
from simclr.config.finetune import FINETUNE_RECIPES
from simclr.data.opening import open_data
from simclr.data.presets import TransferSet
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.finetune import finetune
from simclr.evaluation.keys import accuracy_key, curve_key, features_key, label_free_key, linear_transfer_key
from simclr.evaluation.measure import EvaluationContext, Settings, measure_one
from simclr.evaluation.results import ResultStore
from simclr.evaluation.split import split_data
from simclr.evaluation.subjects import EvaluatedModel, subject_of
from simclr.models.encoder import build_encoder, read_as
from simclr.models.heads import ProjectionHead
from simclr.models.layers import LayerOutput
from simclr.reports.run_results import results_of
from simclr.weights.folder import Model, load, save_encoder

SHAPE = EncoderConfig("small", channels=1, size=8, width=0.5, feature="stages3-4")
LAYERS = ("h", "stage1", "stage2", "stage3", "head.1", "head.2", "z")
QUICK = ("--recipe", "digits", "--epochs", 1, "--batch-size", 64, "--width", 0.5, "--workers", 0)


@pytest.fixture(scope="module")
def digits():
    return open_data("digits").subset(np.arange(120))


@pytest.fixture(scope="module")
def model() -> Model:
    """Features on grids, and a head of three layers above h."""
    encoder = as_trained(build_encoder(SHAPE, seed=1)).eval()
    head = as_trained(ProjectionHead(read_as(encoder, "h").num_features, layers=3, dim=5, reads="h", seed=2)).eval()
    return Model(encoder, "google", head=head)


def subject(model: Model, folder=None) -> EvaluatedModel:
    return subject_of(model, "encoder", cache=FeatureCache(folder), world=DistributedContext())


def head_by_formula(head: ProjectionHead, h: np.ndarray) -> list[np.ndarray]:
    """The outputs of the layers: dense without bias, batch norm by running statistics, ReLU but after the last."""
    outputs = []
    for k, layer in enumerate(head.layers):
        state = {name: value.double().numpy() for name, value in layer.state_dict().items()}
        x = h @ state["dense.weight"].T
        x = (x - state["norm.running_mean"]) / np.sqrt(state["norm.running_var"] + parts_of(layer).norm.eps)
        h = x * state["norm.weight"] + state.get("norm.bias", 0.0)
        h = h if k == len(head.layers) - 1 else np.maximum(h, 0)
        outputs.append(h)
    return outputs


def test_each_layer_is_what_hooks_and_the_heads_formula_give(model):
    maps: list[np.ndarray] = []
    hooks = [
        group.register_forward_hook(lambda _module, _inputs, output: maps.append(output.double().numpy()))
        for group in parts_of(model.encoder).backbone.groups
    ]
    x, head = random_inputs(SHAPE, 3), known(model.head)
    with torch.no_grad():
        model.encoder(x)
        for hook in hooks:
            hook.remove()
        stages = [map_.mean(axis=(2, 3)) for map_ in maps]
        above = head_by_formula(head, stages[3])
        expected = {f"stage{k}": stage for k, stage in enumerate(stages, 1)} | {"h": stages[3], "head.0": stages[3]}
        expected |= {"head.1": above[0], "head.2": above[1], "head.3": above[2], "z": above[2]}
        for layer, values in expected.items():
            reader = LayerOutput(model.encoder, head, layer, who="it").eval()
            assert reader(x).numpy() == pytest.approx(values, rel=1e-4, abs=1e-5), layer
            assert reader.num_features == values.shape[1] and not reader.is_default
            assert reader.name == ("z" if layer == "head.3" else layer)


def test_what_the_encoder_returns_anyway_is_no_other_layer():
    encoder = build_encoder(EncoderConfig("small", channels=1, size=8, width=0.5))
    head = ProjectionHead(encoder.num_features)
    for layer, given in (("h", None), ("h", head), ("head.0", head), ("z", ProjectionHead(4, kind="none"))):
        plain = subject(Model(encoder, "google", head=given))
        assert plain.at_layer(layer) is plain
    pixels = EvaluatedModel(name="pixels", encoder=None, size=8, channels=1)
    assert pixels.at_layer("z") is pixels


def test_no_two_layers_share_features_or_a_result(model, digits, tmp_path):
    layers = {layer: subject(model, tmp_path).at_layer(layer) for layer in LAYERS} | {"": subject(model, tmp_path)}
    kept = {layer: one.features(digits) for layer, one in layers.items()}
    assert len(list(tmp_path.iterdir())) == len(layers)
    for layer, one in layers.items():
        fresh = subject(model).at_layer(layer) if layer else subject(model)
        assert np.array_equal(one.features(digits), kept[layer]) and np.array_equal(fresh.features(digits), kept[layer])
    assert all(a.shape != b.shape or not np.allclose(a, b) for a, b in combinations(kept.values(), 2))

    split = split_data(digits, None, seed=0)
    data = TransferSet(name="digits", train=split.train, validation=None, test=split.test, metric="top-1", how="")

    def keys(one: EvaluatedModel) -> list[dict[str, Any]]:
        return [
            features_key(one, digits, None),
            *(accuracy_key(protocol, one, split, 0) for protocol in ("knn", "linear", "logistic")),
            curve_key(one, split, 2, 0),
            label_free_key(one, digits, None, 0, copies=False),
            linear_transfer_key(one, data, 0, l2_values=[1.0], crop=1.0, version=1),
        ]

    by_layer = {layer: [json.dumps(key, sort_keys=True) for key in keys(one)] for layer, one in layers.items()}
    assert all(len(set(column)) == len(layers) for column in zip(*by_layer.values(), strict=True))
    other = subject(Model(model.encoder, "google", head=ProjectionHead(32, layers=3, dim=5, reads="h", seed=3)))
    assert keys(other.at_layer("head.1"))[0] != keys(layers["head.1"])[0]
    assert keys(other.at_layer("h"))[0] == keys(layers["h"])[0]


def test_a_linear_classifier_by_sgd_stands_on_the_layer(model, digits, monkeypatch):
    quick = replace(FINETUNE_RECIPES["small-linear"], epochs=1, min_steps=0)
    monkeypatch.setitem(FINETUNE_RECIPES, "small-linear", quick)
    split, context = split_data(digits, None, seed=0), EvaluationContext(store=ResultStore(None))
    settings, of_z = Settings(linear="sgd"), subject(model).at_layer("z")
    measured = measure_one("linear", of_z, split, 0, settings, context)
    assert (measured.settings["head_layer"], measured.layer) == (3, "z")
    trained = finetune(model.encoder, model.head, split.train, split.test, replace(quick, head_layer=3), seed=0)
    assert measured.value("top1") == trained.accuracy
    x = random_inputs(SHAPE, 3)
    with torch.no_grad():
        z = LayerOutput(model.encoder, model.head, "z", who="it")(x)
        assert torch.allclose(trained.network.features(x), z, atol=1e-5)
    plain = measure_one("linear", subject(model), split, 0, settings, context)
    assert (plain.settings["head_layer"], plain.layer) == (0, None)
    with pytest.raises(UserError, match=r"--layer was stage2, .* give --linear optimum"):
        measure_one("linear", subject(model).at_layer("stage2"), split, 0, settings, context)


def test_from_pretraining_to_evaluation_and_embedding(simclr, tmp_path):
    run = tmp_path / "run"
    code, _, said = simclr("pretrain", "digits", "--out", run, *QUICK, "--feature", "stages3-4", "--head-reads", "h")
    assert code == 0, said
    flags = ("--compare", "random", "hog", "--cache", tmp_path / "cache", "--json", tmp_path / "r.json")
    tables, records = {}, {}
    for layer in ("z", None, "z"):
        given = () if layer is None else ("--layer", layer)
        code, tables[layer], said = simclr("evaluate", run, "digits", "--protocol", "knn", *flags, *given)
        assert code == 0, said
        records[layer] = json.loads((tmp_path / "r.json").read_text())["records"]
    assert "Taken from" in said
    for layer, found in records.items():
        by_subject = {one["subject"]: one["settings"].get("layer") for one in found}
        assert by_subject == {"encoder": layer, "random": layer, "hog": None}
    assert "Features of encoder, random: layer z." in tables["z"] and "kNN on layer z" in tables["z"]
    assert "layer" not in tables[None].replace("labels per", "")
    assert [one["metrics"] for one in records["z"]] != [one["metrics"] for one in records[None]]

    (table,) = results_of(run, load(run))
    assert [row.name for row in table.rows if row.name.startswith("encoder")] == [
        "encoder, layer z", "encoder",
    ]  # fmt: skip
    assert all(row.baseline for row in table.rows if row.name.startswith("random"))

    loaded = load(run)
    for layer, width in (("z", known(loaded.head).dim), ("stage1", 8)):
        code, _, said = simclr("embed", run, "digits", "--out", tmp_path / "f.npz", "--layer", layer)
        assert code == 0 and f"features of {layer} of width {width}" in said
        features = np.load(tmp_path / "f.npz")["features"]
        expected = subject(loaded).at_layer(layer).features(open_data("digits", split="all"))
        assert features.shape[1] == width and np.allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ("g", "--layer was 'g'; give h, z, head.K"),
        ("stage5", "--layer was 'stage5'; give h, z, head.K"),
        ("z", "has no projection head; give h or stage1 to stage4"),
        ("head.0", "has no projection head; give h or stage1 to stage4"),
    ],
)
def test_a_layer_that_there_is_not(simclr, tmp_path, layer, sentence):
    save_encoder(build_encoder(SHAPE), tmp_path / "encoder", preprocessing="google", origin={})
    for command in (("evaluate",), ("embed", "--out", tmp_path / "f.npz")):
        code, _, said = simclr(command[0], tmp_path / "encoder", "digits", *command[1:], "--layer", layer)
        assert code == 2 and sentence in said and "Traceback" not in said
    assert not (tmp_path / "f.npz").exists()


def test_a_layer_beyond_the_head_or_of_another_library(model):
    with pytest.raises(UserError, match=r"the projection head of it has 3 layers; give head\.0 to head\.3"):
        LayerOutput(model.encoder, model.head, "head.4", who="it")
    other = build_encoder(EncoderConfig("timm/test_resnet", channels=3, size=32))
    assert LayerOutput(other, None, "h", who="it").is_default
    for layer, sentence in (("z", "no projection head; give h"), ("stage1", "of our ResNets, .* give h")):
        with pytest.raises(UserError, match=sentence):
            LayerOutput(other, None, layer, who="it")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("runs/x", "--protocol", "knn,finetune,probe"), "--layer was z, and has no effect on finetune, probe"),
        (("runs/x", "--feature", "h"), "--layer z and --feature h both say which features are read"),
        (("pixels",), "RUN is pixels, which has no layers"),
        (("random",), "random has no projection head"),
    ],
)
def test_flags_that_a_layer_does_not_go_with(simclr, flags, sentence):
    code, _, said = simclr("evaluate", flags[0], "digits", *flags[1:], "--layer", "z", "--cache", "off")
    assert code == 2 and sentence in said
