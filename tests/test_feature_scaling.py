"""Whitened features: the map against a full eigendecomposition, and on its way from run to use."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import simclr
from helpers import as_trained, known, random_inputs, relative_error
from simclr.config.encoder import EncoderConfig
from simclr.models.encoder import build_encoder, read_as, with_config
from simclr.models.feature_scaling import FLOOR, FeatureScaling
from simclr.tasks.export import export
from simclr.tasks.options.using import Export
from simclr.weights.folder import load, save_encoder

SHAPE = EncoderConfig("small", channels=1, size=8, width=0.5, feature="stages3-4", scaling="whitened")
QUICK = ("--recipe", "digits", "--epochs", 1, "--batch-size", 64, "--width", 0.5, "--workers", 0)


def correlated(n: int, width: int) -> np.ndarray:
    """Features of a few strong common causes, of very different scales and means."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, 3)) @ rng.standard_normal((3, width)) + rng.standard_normal((n, width))
    return (rows * np.geomspace(1e-3, 1e3, width) + np.linspace(-50, 50, width)).astype(np.float32)


@pytest.mark.parametrize("n", [5, 400, 5000])
def test_it_is_standardisation_and_a_shrinking_of_the_largest_principal_components(n):

    rows = correlated(n, 12)
    whitening = FeatureScaling(12, whitened=True)
    whitening.fit(rows)
    standard = (rows.astype(np.float64) - rows.mean(0, dtype=np.float64)) / rows.std(0, dtype=np.float64)
    variances, directions = np.linalg.eigh(standard.T @ standard / len(rows))
    gains = np.where(variances >= np.sort(variances)[-3], np.sqrt(FLOOR / (FLOOR + variances)), 1.0)
    expected = standard @ (directions * gains) @ directions.T
    found = whitening(torch.from_numpy(rows)).numpy()
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


def test_standardised_features_have_mean_0_and_deviation_1():
    rows = correlated(400, 12)
    scaling = FeatureScaling(12, whitened=False)
    scaling.fit(rows)
    found = scaling(torch.from_numpy(rows)).double()
    assert found.mean(0).abs().max() < 1e-2 and (found.std(0, correction=0) - 1).abs().max() < 1e-3


def test_features_that_never_change_stay_finite():
    rows = correlated(50, 8)
    rows[:, 2] = 7.0
    for features in (rows, np.full((50, 8), 3.0, np.float32)):
        whitening = FeatureScaling(8, whitened=True)
        whitening.fit(features)
        assert whitening(torch.from_numpy(features)).isfinite().all()
        assert whitening.is_fitted


def test_the_backbone_is_read_alike_with_and_without():
    encoder = as_trained(build_encoder(SHAPE, seed=1)).eval()
    x = random_inputs(SHAPE, 6)
    with torch.no_grad():
        raw = read_as(encoder, "stages3-4")
        assert raw.scaling is None and torch.equal(encoder(x), raw(x))  # not fitted: the identity
        known(encoder.scaling).fit(raw(random_inputs(SHAPE, 200)).numpy())
        assert torch.equal(known(encoder.scaling)(raw(x)), encoder(x)) and not torch.equal(encoder(x), raw(x))
        assert not known(with_config(raw, SHAPE).scaling).is_fitted


def test_folder_and_onnx_file_have_it_and_other_libraries_refuse_it(tmp_path):
    pytest.importorskip("onnxruntime")
    encoder = as_trained(build_encoder(SHAPE, seed=1)).eval()
    x = random_inputs(SHAPE, 3)
    with torch.no_grad():
        known(encoder.scaling).fit(read_as(encoder, "stages3-4")(random_inputs(SHAPE, 200)).numpy())
        save_encoder(encoder, tmp_path / "encoder", preprocessing="google", origin={})
        export(Export(run=tmp_path / "encoder", format="onnx", out=tmp_path / "w.onnx"))
        expected = encoder(x)
        assert torch.equal(load(tmp_path / "encoder").encoder(x), expected)
        assert relative_error(load(tmp_path / "w.onnx").encoder(x), expected) < 1e-5
    save_encoder(build_encoder(replace(SHAPE, feature="h")), tmp_path / "h", preprocessing="google", origin={})
    with pytest.raises(simclr.UserError, match="its features are whitened"):
        export(Export(run=tmp_path / "h", format="torchvision", out=tmp_path / "w.pth"))


def test_a_run_trains_as_without_and_gives_whitened_features(simclr, tmp_path):
    for name, flags in (("raw", ()), ("whitened", ("--scaling", "whitened"))):
        code, _, said = simclr("pretrain", "digits", "--out", tmp_path / name, *QUICK, *flags)
        assert code == 0, said
    raw, whitened = load(tmp_path / "raw"), load(tmp_path / "whitened")
    weights = [model.encoder.backbone.state_dict() for model in (raw, whitened)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert whitened.encoder.config.scaling == "whitened" and known(whitened.head).reads == "h"
    assert known(raw.head).reads is None

    digits = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    features = whitened.embed(digits)
    assert np.abs(features - raw.embed(digits)).max() > 0.1
    code, _, said = simclr(
        "evaluate", tmp_path / "whitened", "digits", "--protocol", "knn", "--compare", "random", "--cache", "off",
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, said
    records = json.loads((tmp_path / "r.json").read_text())["records"]
    assert [record["model"]["network"]["scaling"] for record in records] == ["whitened"] * 2

    for layer in (0, 1):  # training goes on with the features that the head was trained on, as they are
        code, _, said = simclr(
            "finetune", tmp_path / "whitened", "digits", "--out", tmp_path / f"tuned{layer}", "--labels", "50%",
            "--head-layer", layer, "--epochs", 1, "--batch-size", 64, "--workers", 0,
        )  # fmt: skip
        assert code == 0, said
        assert load(tmp_path / f"tuned{layer}").encoder.config.scaling == "none"
