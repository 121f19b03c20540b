"""`simclr finetune`: what it reports is what the saved classifier does; it goes on after a stop, to the same bits."""

import json
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch import nn

from helpers import known
from simclr import load
from simclr.config.encoder import EncoderConfig
from simclr.config.finetune import FINETUNE_RECIPES
from simclr.data.opening import open_data
from simclr.evaluation import finetune as finetuning
from simclr.evaluation.results import read_results
from simclr.models.encoder import build_encoder
from simclr.weights.folder import digest_of, save_encoder

QUICK = ["--labels", "5/class", "--epochs", 0, "--min-steps", 12, "--workers", 0, "--save-every", 4]

METRICS = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An untrained encoder of 8-pixel gray images, its residual branches switched on."""
    module = build_encoder(EncoderConfig("small", channels=1, size=8, width=0.5), seed=3)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(module, folder, preprocessing="google", origin={})
    return folder


def test_epochs_that_are_asked_for_are_what_is_trained(simclr, encoder, tmp_path):
    """The recipe has at least 500 steps; 50 images twice, 16 at a time, are 7 by the authors' count."""
    flags = ["--labels", "5/class", "--epochs", 2, "--batch-size", 16, "--workers", 0]
    code, _, said = simclr("finetune", encoder, "digits", "--out", tmp_path / "out", *flags)
    assert code == 0 and "7 steps of 16 images" in said
    assert "Recipe small (1,438 labelled images, at most 100,000: a small data set)" in said
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 7


def test_the_figures_are_those_of_the_saved_classifier(simclr, encoder, tmp_path):
    out = tmp_path / "classifier"
    code, table, said = simclr("finetune", encoder, "digits", "--out", out, *QUICK, "--lr", 0.02)
    assert code == 0, said
    summary = json.loads((out / "summary.json").read_text())
    recipe = FINETUNE_RECIPES["small"]
    assert summary["settings"]["lr"] == 0.02, "the flag"
    assert summary["settings"]["crop_min"] == recipe.crop_min != 0.08, "the recipe, where no flag says otherwise"
    assert (summary["images"], summary["test_images"], summary["steps"]) == (50, 359, 12)

    test = open_data("digits", split="test")
    model = load(out)
    probabilities = model.probabilities(test)
    assert model.classes == summary["classes"] == [str(i) for i in range(10)]
    accuracy, beside = summary["accuracy"], summary["baselines"]
    predicted = probabilities.argmax(1)
    assert accuracy["top-1"] == pytest.approx((predicted == test.labels).mean())
    assert accuracy["top-5"] == pytest.approx(top_k_accuracy_score(test.labels, probabilities, k=5))
    assert accuracy["mean per class"] == pytest.approx(balanced_accuracy_score(test.labels, predicted))
    assert summary["by_class"]["7"] == pytest.approx((predicted[test.labels == 7] == 7).mean())
    assert beside["always the commonest class"] == pytest.approx((known(test.labels) == 0).mean()), (
        "five of each: the first"
    )
    assert 0.5 < beside["kNN on raw pixels"] < 1
    assert f"{100 * accuracy['top-1']:.1f}" in table and re.search(r"kNN on raw pixels +\d", table)

    results = {result.protocol: result for result in read_results(out / "evaluation" / "results.jsonl")[0]}
    own = results["classifier"]
    assert own.weights == digest_of(known(model.classifier)) and own.num_train == 50 and own.num_test == 359
    assert own.metrics == {name: accuracy[METRICS[name]] for name in METRICS}
    assert results["majority"].value("top1") == beside["always the commonest class"]
    assert results["knn"].value("top1") == beside["kNN on raw pixels"] and results["knn"].subject == "pixels"

    assert simclr("finetune", encoder, "digits", "--out", out, *QUICK, "--lr", 0.02)[1] == table, "done: told again"
    assert len(read_results(out / "evaluation" / "results.jsonl")[0]) == 3
    code, _, said = simclr("finetune", encoder, "digits", "--out", out, *QUICK, "--lr", 0.03)
    assert code == 2 and "holds a training of another method, or of other settings" in said


def test_it_trains_as_evaluate_does(simclr, encoder, tmp_path, monkeypatch):
    for name, steps in (("small", 6), ("small-supervised", 7)):
        monkeypatch.setitem(FINETUNE_RECIPES, name, replace(FINETUNE_RECIPES[name], epochs=0, min_steps=steps))
    for run, protocol, row in ((encoder, "finetune", "encoder"), ("random", "supervised", "supervised")):
        result, out = tmp_path / f"{protocol}.json", tmp_path / protocol
        shared = ["digits", "--labels", "5/class", "--seed", 1]
        code, _, said = simclr("evaluate", run, *shared, "--protocol", protocol, "--compare", "--json", result)
        assert code == 0, said
        code, _, said = simclr("finetune", run, *shared, "--out", out)
        assert code == 0, said
        summary = json.loads((out / "summary.json").read_text())
        assert summary["accuracy"]["top-1"] == pytest.approx(json.loads(result.read_text())[row][protocol])
        assert summary["steps"] == (6 if protocol == "finetune" else 7), "each by its own recipe"


def test_a_network_from_scratch_can_be_named(simclr, tmp_path, monkeypatch):
    """The same one by `finetune random` as by the supervised protocol of `evaluate random`."""
    recipe = replace(FINETUNE_RECIPES["small-supervised"], epochs=0, min_steps=5)
    monkeypatch.setitem(FINETUNE_RECIPES, "small-supervised", recipe)
    network = ["--encoder", "resnet10", "--width", 0.25, "--stem", "strided", "--size", 12]
    shared = ["random", "digits", "--labels", "5/class", *network]
    code, _, said = simclr("finetune", *shared, "--out", tmp_path / "out")
    assert code == 0 and "A new resnet10 of width 0.25 for images of 12 pixels." in said, said
    config = load(tmp_path / "out").encoder.config
    assert config == EncoderConfig("resnet10", channels=1, size=12, width=0.25, stem="strided")
    result = tmp_path / "result.json"
    code, _, said = simclr("evaluate", *shared, "--protocol", "supervised", "--compare", "--json", result)
    assert code == 0, said
    top1 = json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy"]["top-1"]
    assert top1 == pytest.approx(json.loads(result.read_text())["supervised"]["supervised"])
    code, _, said = simclr("finetune", "random", "digits", "--out", tmp_path / "b", "--labels", "5/class")
    assert code == 0 and load(tmp_path / "b").encoder.config.name == "small", "the recipe's"


def test_ctrl_c_saves_and_the_same_command_goes_on(simclr, encoder, tmp_path, monkeypatch):
    def command(name):
        return "finetune", encoder, "digits", "--out", tmp_path / name, *QUICK

    assert simclr(*command("whole"))[0] == 0
    with monkeypatch.context() as patch:
        real, calls = finetuning.make_view, []

        def view(*args, **kwargs):
            calls.append(0)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args, **kwargs)

        patch.setattr(finetuning, "make_view", view)
        code, out, said = simclr(*command("parted"))
    assert code == 130 and "simclr resume" in said and "continues" in said and not out
    assert simclr(*command("parted"))[0] == 0
    whole, parted = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("whole", "parted"))
    assert whole.keys() == parted.keys()
    assert all(np.array_equal(whole[name], parted[name]) for name in whole)


def test_many_classes_are_told_by_the_worst(simclr, encoder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24 * 5, 8, 8), dtype=np.uint8)
    names = np.array([f"class {i:02}" for i in range(24)]).repeat(5)
    np.savez(tmp_path / "many.npz", x=pixels, y=names)
    code, table, said = simclr(
        "finetune", encoder, tmp_path / "many.npz", "--out", tmp_path / "out", "--epochs", 0, "--min-steps", 1,
        "--workers", 0,
    )  # fmt: skip
    assert code == 0, said
    assert "The worst of 24 classes" in table and len(re.findall(r"class \d\d", table)) == 5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pixels", "digits"], "pixels is no network"),
        (["patches", "digits"], "patches is no network"),
        (["RUN", "digits", "--finetune-recipe", "v9"], "no fine-tuning recipe 'v9'"),
        (["RUN", "digits", "--seed", "-1"], "--seed was -1"),
        (["RUN", "digits", "--lr", "0"], "--lr was 0.0; it must be greater than 0"),
        (["RUN", "UNLABELLED"], "no labels"),
        (["RUN", "digits", "--head-layer", "1"], "came without a projection head"),
        (["RUN", "COLOUR"], "expects 1-channel images"),
        (["/no/such/run", "digits"], "holds no encoder"),
        (["RUN", "digits", "--out", "RUN"], "already holds a run"),
        (["RUN", "digits", "--out", "/proc/none/x"], "/proc/none/x/summary.json cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(simclr, encoder, tmp_path, arguments, expected):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "unlabelled.npz", x=pixels[..., 0])
    np.savez(tmp_path / "colour.npz", x=pixels, y=np.arange(20) % 2)
    places = {"RUN": encoder, "UNLABELLED": tmp_path / "unlabelled.npz", "COLOUR": tmp_path / "colour.npz"}
    given = [places.get(word, word) for word in arguments]
    code, out, said = simclr("finetune", *given, *([] if "--out" in given else ["--out", tmp_path / "out"]))
    assert code == 2 and not out and re.search(expected, said), said
    assert "Traceback" not in said and not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("more", [[], ["--pseudo-labels"]])
def test_resume_goes_on_with_a_fine_tuning_as_it_began(simclr, encoder, tmp_path, monkeypatch, more):
    command = ["finetune", encoder, "digits", *QUICK, *more]
    assert simclr(*command, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        real, calls = finetuning.make_view, []

        def view(*args, **kwargs):
            calls.append(0)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        patch.setattr(finetuning, "make_view", view)
        assert simclr(*command, "--out", tmp_path / "parted")[0] == 128 + signal.SIGTERM
    code, _, said = simclr("resume", tmp_path / "parted", "--lr", 3)
    assert code == 2 and "Changing --lr would change the result" in said
    code, table, said = simclr("resume", tmp_path / "parted", "--workers", 1)
    assert code == 0 and "Test accuracy" in table, said
    whole, parted = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("whole", "parted"))
    assert all(np.array_equal(whole[name], parted[name]) for name in whole)
    code, _, said = simclr("resume", tmp_path / "parted")
    assert code == 0 and "already reached its end" in said


def test_a_classifier_is_not_evaluated_on_images_that_it_was_trained_on(simclr, encoder, tmp_path):
    """The data have no test part of their own, so another seed tests on some of its training images."""
    out, data, digits = tmp_path / "classifier", tmp_path / "a.npz", open_data("digits")
    pixels = np.stack([np.asarray(image) for image in digits.read(np.arange(200))])
    np.savez(data, x=pixels, y=known(digits.labels)[:200])
    code, _, said = simclr("finetune", encoder, data, "--out", out, *QUICK)
    assert code == 0, said
    evaluate = ["evaluate", out, data, "--protocol", "knn", "--compare", "pixels", "--cache", "off"]
    for seeds in (["--seed", 1], ["--seed", 0, "--seeds", 2]):
        code, _, said = simclr(*evaluate, *seeds)
        assert code == 2 and "split by --seed 0" in said
    code, _, said = simclr(*evaluate, "--seed", 0)
    assert code == 0, said
