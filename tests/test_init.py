"""Pretraining from given weights (--init): step 0 is those weights, runs are exact, and evaluate knows their start."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import simclr
from helpers import Killed, as_trained, assert_same, final_state, in_processes, known
from simclr.config.encoder import EncoderConfig
from simclr.config.overrides import Overrides
from simclr.config.pretrain import PretrainConfig
from simclr.config.training import TrainingConfig
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.methods.method import Method, build_head
from simclr.models.encoder import Encoder, build_encoder
from simclr.tasks import api
from simclr.tasks import initial as initial_weights
from simclr.tasks import pretrain_images as pretraining
from simclr.tasks.initial import open_initial
from simclr.tasks.pretrain_images import build_method
from simclr.training.run import RunFolder
from simclr.weights.folder import load, save_encoder

ENCODER = EncoderConfig("small", width=0.25, channels=1, size=8)
QUICK: dict[str, Any] = {
    "recipe": "digits", "batch_size": 16, "epochs": 2, "warmup_epochs": 0, "head_dim": 8, "memory": "plain",
    "knn_every": 0, "log_every": 1, "save_every": 4, "workers": 0, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 gray images of 8 x 8 pixels in two classes, which differ in brightness."""
    labels = np.arange(64) % 2
    pixels = np.random.default_rng(0).integers(0, 100, (64, 8, 8)) + 100 * labels[:, None, None]
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x=pixels.astype(np.uint8), y=labels)
    return path


@pytest.fixture
def encoder(tmp_path):
    return saved(ENCODER, tmp_path / "given")


def saved(config: EncoderConfig, folder: Path, *, seed: int = 7, **head: Any) -> Path:
    """An encoder's folder, with a projection head where its arguments are given."""
    encoder = as_trained(build_encoder(config, seed=seed))
    settings = PretrainConfig(head_dim=8, seed=99, **head)
    save_encoder(
        encoder, folder, preprocessing="google", origin={}, head=build_head(encoder, settings) if head else None
    )
    return folder


def opened(place: Path | str, **settings: Any):
    values: dict[str, Any] = {"head_dim": 8, "seed": 3, "init": str(place)} | settings
    config = PretrainConfig(**values)
    initial, overrides = open_initial(config, Overrides({"init": str(place), **settings}))
    return known(initial), overrides(config)


def method_from(place: Path | str, **settings: Any) -> Method:
    initial, config = opened(place, **settings)
    return build_method(config, initial.encoder.config.channels, DistributedContext(), initial=initial)


def quick(**settings: Any) -> dict[str, Any]:
    return QUICK | settings


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- step 0


def test_step_0_is_the_given_encoder_and_a_new_head_without_one(encoder):
    method = method_from(encoder)
    assert same(method.encoder, load(encoder).encoder) and method.encoder.training
    assert all(parameter.requires_grad for parameter in method.encoder.parameters())
    expected = build_head(method.encoder, PretrainConfig(head_dim=8, seed=3))
    assert same(known(method.published()["head"]), expected)


def test_a_head_goes_on_where_it_has_the_shape_of_the_settings(tmp_path):
    given = saved(ENCODER, tmp_path / "given", head_layers=2)
    theirs = known(load(given).head)
    for settings, kept in (
        ({}, True),
        ({"head_layers": 3}, False),
        ({"head_dim": 4}, False),
        ({"feature": "stages3-4"}, True),
        ({"scaling": "standardised"}, True),
        ({"feature": "stages3-4", "scaling": "whitened"}, True),
        ({"feature": "stages3-4", "head_reads": "stages3-4"}, False),
    ):
        method = method_from(given, **settings)
        head = known(method.published()["head"])
        assert same(head, theirs) == kept, settings
        if not kept:
            assert same(head, build_head(method.encoder, opened(given, **settings)[1])), settings


def test_a_head_reads_what_it_has_read_whatever_the_encoder_returns(data, tmp_path):
    given = saved(ENCODER, tmp_path / "given", head_layers=2)
    plain = simclr.pretrain(data, out=tmp_path / "plain", init=given, **QUICK)
    more = simclr.pretrain(data, out=tmp_path / "more", init=given, feature="stages3-4", **QUICK)
    assert same(plain.load().encoder, more.load().encoder) and same(known(plain.load().head), known(more.load().head))
    assert more.load().encoder.num_features > plain.load().encoder.num_features
    assert known(load(more.path / "init").head).reads == "h"
    again = simclr.pretrain(data, out=tmp_path / "again", init=more, **QUICK)
    config = RunFolder(again.path).config
    assert (config.feature, config.head_reads) == ("stages3-4", "h")


@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_a_momentum_encoder_begins_from_the_same_weights(tmp_path, method):
    given = saved(ENCODER, tmp_path / "given", head_norm=False)
    model = load(given)
    networks = method_from(given, method=method, queue=16, head_norm=False, batch_size=16).published()
    for name, network in {"encoder": model.encoder, "head": known(model.head)}.items():
        assert same(known(networks[name]), network)
        theirs = {"encoder": "key_encoder", "head": "key_head"}[name]
        assert same(known(networks[theirs]), network)


def test_a_run_at_a_rate_of_zero_ends_with_the_given_weights(data, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingConfig, "learning_rate", lambda *_: lambda _step: 0.0)
    run = simclr.pretrain(data, out=tmp_path / "run", init=encoder, **QUICK)
    assert run.metrics()[-1]["step"] == 9
    ours, theirs = run.load().encoder, load(encoder).encoder
    assert same_parameters(ours, theirs)
    assert not same(ours, theirs), "batch norm has seen other images"
    assert same(load(run.path / "init").encoder, theirs)


def same_parameters(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ---- what follows from the encoder


def test_the_architecture_is_the_encoders_whatever_the_recipe_says(data, tmp_path):
    given = saved(replace(ENCODER, stem="strided", width=0.5, mean=(0.4,), std=(0.3,)), tmp_path / "given")
    run = simclr.pretrain(data, out=tmp_path / "run", init=given, **quick(epochs=1))
    config = RunFolder(run.path).config
    assert (config.encoder, config.width, config.stem, config.sk) == ("small", 0.5, "strided", False)
    assert run.load().encoder.config == load(given).encoder.config
    assert config.init == str(given.resolve())


def test_another_size_keeps_weights_and_stem(encoder):
    initial, config = opened(encoder, size=40)
    assert (config.size, config.stem) == (40, "cifar")
    x = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(initial.encoder(x), load(encoder).encoder(x))
    assert opened(encoder)[1].size == 8


def test_size_and_features_are_the_encoders_unless_a_flag_says_otherwise(tmp_path):
    given = saved(replace(ENCODER, feature="stages3-4", size=12), tmp_path / "given")
    config = opened(given)[1]
    assert (config.size, config.feature) == (12, "stages3-4")
    config = opened(given, feature="h", size=16)[1]
    assert (config.size, config.feature) == (16, "h")


def test_settings_of_a_run_begin_it_again(data, encoder, tmp_path):
    first = simclr.pretrain(data, out=tmp_path / "first", init=encoder, **quick(size=6))
    again = {name: value for name, value in QUICK.items() if name in ("workers", "device")}
    second = simclr.pretrain(data, out=tmp_path / "second", recipe=str(first.path / "config.json"), **again)
    assert_same(final_state(RunFolder(second.path)), final_state(RunFolder(first.path)))


def test_gray_images_are_shown_in_colour_and_colour_ones_refused(data, encoder, tmp_path):
    colour = saved(replace(ENCODER, channels=3), tmp_path / "colour")
    run = simclr.pretrain(data, out=tmp_path / "run", init=colour, **quick(epochs=1))
    assert RunFolder(run.path).origin["data"]["channels"] == 3 and run.load().encoder.config.channels == 3
    np.savez(tmp_path / "colour.npz", x=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"init given expects 1-channel images and .* is in colour"):
        simclr.pretrain(tmp_path / "colour.npz", out=tmp_path / "other", init=encoder, **QUICK)
    assert not (tmp_path / "other").exists()
    run = simclr.pretrain(tmp_path / "colour.npz", out=tmp_path / "gray", init=encoder, channels="1", **QUICK)
    assert run.load().encoder.config.channels == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--encoder", "resnet18"), "--encoder was resnet18, and the encoder of --init GIVEN has small"),
        (("--width", "2"), "--width was 2.0, and the encoder of --init GIVEN has 0.25"),
        (("--stem", "imagenet"), "--stem was imagenet, and the encoder of --init GIVEN has cifar"),
        (("--sk",), "--sk was True, and the encoder of --init GIVEN has False"),
        (("--channels", "3"), "--channels was 3, and the encoder of --init GIVEN has 1"),
        (("--init", "resnet18"), "There are no weights 'resnet18' to begin from"),
        (("--init", "DATA"), "was not written by `simclr export`|cannot be read"),
    ],
)  # fmt: skip
def test_what_contradicts_the_weights_is_one_sentence(simclr, data, encoder, tmp_path, flags, sentence):
    flags = [str(data) if word == "DATA" else word for word in flags]
    code, _, said = simclr("pretrain", data, "--out", tmp_path / "run", "--init", encoder, *flags)
    pattern = sentence if "|" in sentence else re.escape(sentence.replace("GIVEN", str(encoder)))
    assert code == 2 and re.search(pattern, said) and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


def test_flags_that_agree_with_the_weights_are_accepted(encoder):
    assert opened(encoder, encoder="small", width=0.25, stem="cifar", sk=False, channels="1")[1].width == 0.25
    assert opened(encoder, stem="auto", channels="auto")[1].stem == "cifar"


def test_what_cannot_be_trained_is_refused(encoder, monkeypatch):
    class Computed(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    model = load(encoder)
    model.encoder = Encoder(ENCODER, Computed(), 1)
    monkeypatch.setattr(initial_weights, "load_model", lambda *_, **__: model)
    with pytest.raises(UserError, match="can only be computed, not trained"):
        opened(encoder)


def test_a_transformer_for_one_size_says_so(tmp_path):
    given = tmp_path / "vit"
    config = EncoderConfig("timm/test_vit", channels=1, size=160)
    save_encoder(build_encoder(config), given, preprocessing="google", origin={})
    with pytest.raises(UserError, match=r"--size was 96, and the weights of .*vit are for images of 160 pixels alone"):
        opened(given, size=96)


# ---- models of timm and torchvision


@pytest.fixture
def library(monkeypatch):
    """Stands for the download of timm's weights: others, with a mean and a standard deviation; the calls are kept."""
    calls: list[tuple[EncoderConfig, bool]] = []

    def build(config: EncoderConfig, *, pretrained: bool) -> Encoder:
        calls.append((config, pretrained))
        if not pretrained:
            return build_encoder(config)
        mean, std = (0.5,) * config.channels, (0.25,) * config.channels
        return as_trained(build_encoder(replace(config, mean=mean, std=std), seed=11))

    monkeypatch.setattr(initial_weights, "build_encoder", build)
    return calls


def test_a_model_of_timm_brings_weights_normalisation_and_size(data, tmp_path, library):
    settings = quick(epochs=1, size=32)
    run = simclr.pretrain(data, out=tmp_path / "run", init="timm/test_resnet", **settings)
    assert [(config.size, config.channels, pretrained) for config, pretrained in library] == [(32, 3, True)]
    start, trained = load(run.path / "init").encoder, run.load().encoder
    assert same(start, as_trained(build_encoder(EncoderConfig("timm/test_resnet", channels=3, size=32), seed=11)))
    assert start.config.mean == (0.5, 0.5, 0.5) and trained.config == start.config
    config = RunFolder(run.path).config
    assert (config.init, config.encoder, config.stem) == ("timm/test_resnet", "timm/test_resnet", "auto")
    opened("timm/test_resnet")
    opened("timm/test_resnet", channels="1")
    assert [(config.size, config.channels) for config, _ in library[1:]] == [(224, 3), (224, 1)]


def test_plan_and_views_fetch_no_weights(simclr, data, tmp_path, library):
    flags = ["--init", "timm/test_resnet", "--size", "32", "--batch-size", "16", "--workers", "0"]
    code, out, said = simclr("plan", data, *flags, "--memory", "plain", "--json", tmp_path / "plan.json")
    assert code == 0 and "the weights it begins from of" in out, said
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["encoder"] == "timm/test_resnet" and plan["initial_bytes"] == plan["encoder_bytes"]
    assert simclr("views", data, *flags, "--out", tmp_path / "views.png")[0] == 0
    assert [pretrained for _, pretrained in library] == [False, False]


# ---- runs are exact


def killed_at(step: int, monkeypatch):
    """Views can be made up to a step, counted from 0; then the process is gone."""
    real, made = pretraining.make_views, iter(range(step))

    def views(*args, **kwargs):
        if next(made, None) is None:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(pretraining, "make_views", views)
    return lambda: monkeypatch.setattr(pretraining, "make_views", real)


@pytest.mark.parametrize("method", [{}, {"method": "moco", "queue": 16, "head_norm": False}], ids=["simclr", "moco"])
@pytest.mark.parametrize("step", [0, 2, 6])
def test_resume_is_exact_without_the_original(data, tmp_path, monkeypatch, step, method):
    """Killed before the first checkpoint, and after it; what was at the place of the weights then is others."""
    given = saved(ENCODER, tmp_path / "given", head_norm=not method)
    settings = QUICK | method
    undisturbed = simclr.pretrain(data, out=tmp_path / "whole", init=given, **settings)
    live_on = killed_at(step, monkeypatch)
    with pytest.raises(Killed):
        simclr.pretrain(data, out=tmp_path / "run", init=given, **settings)
    live_on()
    shutil.rmtree(given)
    if step:
        saved(ENCODER, given, seed=8)
    run = simclr.resume(tmp_path / "run")
    assert_same(final_state(RunFolder(run.path)), final_state(RunFolder(undisturbed.path)))
    assert same(run.load().encoder, undisturbed.load().encoder)


@pytest.mark.parametrize("step", [0, 6])
def test_resume_refuses_other_initial_weights(data, encoder, tmp_path, monkeypatch, step):
    live_on = killed_at(step, monkeypatch)
    with pytest.raises(Killed):
        simclr.pretrain(data, out=tmp_path / "run", init=encoder, **QUICK)
    live_on()
    kept = tmp_path / "run" / "init"
    for change in (
        partial(saved, ENCODER, kept, seed=8),
        partial(saved, replace(ENCODER, size=9), kept),
        partial(shutil.rmtree, kept),
    ):
        change()
        with pytest.raises(UserError, match=f"; restore {kept}, or start a new run.$"):
            simclr.resume(tmp_path / "run")


def test_the_manifest_says_what_the_weights_are_and_no_place(data, encoder, tmp_path):
    run = simclr.pretrain(data, out=tmp_path / "run", init=encoder, **quick(epochs=1))
    record = RunFolder(run.path).origin["inputs"]["init"]
    digest = sha256()
    for name, tensor in load(encoder).encoder.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert record["weights"] == digest.hexdigest()
    assert record["name"] == "given" and record["head"] is None and record["network"]["size"] == 8


def test_a_folder_that_a_killed_process_left_is_begun_again(data, encoder, tmp_path):
    whole = simclr.pretrain(data, out=tmp_path / "whole", init=encoder, **quick(epochs=1))
    left = tmp_path / "left"
    left.mkdir()
    shutil.copy(whole.path / "run.json", left)
    shutil.copytree(whole.path / "init", left / "init")
    run = simclr.pretrain(data, out=left, **quick(epochs=1))
    assert not (left / "init").exists(), "it is no part of a run from random weights"
    assert run.metrics()
    shutil.copytree(encoder, tmp_path / "mine" / "init")
    with pytest.raises(UserError, match="exists and is no run"):
        simclr.pretrain(data, out=tmp_path / "mine", **QUICK)
    assert load(tmp_path / "mine" / "init")


@pytest.mark.multiprocess
def test_two_processes_train_as_one_does(data, tmp_path):
    saved(ENCODER, tmp_path / "given", head_layers=2)
    in_processes(2, tmp_path, partial(check_processes, data, tmp_path))


def check_processes(data, folder, world):
    images = open_data(data)
    settings = {name: value for name, value in QUICK.items() if name != "recipe"} | {"lr": 0.01}
    initial, config = opened(folder / "given", **settings)
    for context, name in ((world, "shared"), (world, "again"), (DistributedContext(), f"alone-{world.rank}")):
        manifest = pretraining.manifest_of(images, "images", {})
        pretraining.pretrain_images(
            images, config, RunFolder(folder / name), context, manifest=manifest, initial=initial
        )
        world.barrier()
    shared, again, alone = (RunFolder(folder / name) for name in ("shared", "again", f"alone-{world.rank}"))
    assert_same(final_state(shared), final_state(again))
    ours, theirs = load(shared.path).encoder.state_dict(), load(alone.path).encoder.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    own = saved(ENCODER, folder / f"own-{world.rank}", seed=world.rank)
    initial, _ = opened(own, **settings)
    with pytest.raises(UserError, match="do not have the same initial weights"):
        pretraining.pretrain_images(
            images, config, RunFolder(folder / "other"), world, initial=replace(initial, name="same"),
            manifest=pretraining.manifest_of(images, "images", {}),
        )  # fmt: skip


def test_the_estimator_trains_the_commands_weights(data, encoder, tmp_path):
    given = {name: value for name, value in QUICK.items() if name not in ("recipe", "batch_size", "epochs", "device")}
    estimator = simclr.SimCLR(
        "digits", batch_size=16, epochs=2, settings=given | {"init": encoder}, random_state=0, device="cpu"
    )
    images = np.load(data)["x"]
    estimator.fit(images)
    run = simclr.pretrain(data, out=tmp_path / "run", init=encoder, **QUICK)
    assert same(estimator.embedder_.encoder, run.load().encoder)
    assert known(estimator.config_).init == str(encoder)
    with pytest.raises(UserError, match=r"^width was 1.0, and the encoder of init"):
        simclr.SimCLR("digits", width=1.0, settings={"init": str(encoder)}).fit(images)


# ---- evaluation


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    given = saved(ENCODER, folder / "imagenet")
    return simclr.pretrain(data, out=folder / "run", init=given, **QUICK)


def test_evaluate_compares_with_the_start_of_the_run(simclr, data, run, tmp_path):
    given = run.path.parent / "imagenet"
    flags = ["--protocol", "knn", "--cache", "off", "--json", tmp_path / "e.json"]
    code, out, said = simclr("evaluate", run.path, data, *flags)
    assert code == 0, said
    assert "\ninit (imagenet)  " in out and "Against its own start, init (imagenet), further pretraining " in out
    summary = json.loads((tmp_path / "e.json").read_text())
    assert [one["baseline"] for one in summary["further_pretraining_paid"]] == ["init (imagenet)"]
    code, out, said = simclr("evaluate", run.path / "encoder", data, *flags, "--compare", given, "init")
    assert code == 0, said
    again = json.loads((tmp_path / "e.json").read_text())
    assert again["init (imagenet)"] == again[str(given)] == summary["init (imagenet)"]
    assert out.count("Against ") == 1, "its own start is the only baseline"


def test_results_of_the_start_are_kept_by_its_weights(data, run):
    first = {result.subject: result for result in run.evaluate(data, protocol="knn", cache="off")}
    weights = first["init (imagenet)"].weights
    assert weights == RunFolder(run.path).origin["inputs"]["init"]["weights"] != first["encoder"].weights


def test_the_card_says_where_training_began(simclr, run, data, tmp_path):
    run.evaluate(data, protocol="knn", cache="off")
    code, _, said = simclr("export", run.path, "--format", "hub-folder", "--out", tmp_path / "hub")
    assert code == 0, said
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "began from the weights of imagenet without a projection head, SHA-256" in card
    assert "| init |" in card and "`init` is what this pretraining began from" in card
    assert str(run.path.parent) not in card


def test_init_of_what_began_from_random_weights_is_one_sentence(simclr, data, encoder, tmp_path):
    fresh = api.pretrain(data, out=tmp_path / "fresh", **quick(epochs=1))
    for model in (fresh.path, encoder, "random"):
        code, _, said = simclr("evaluate", model, data, "--compare", "init", "--protocol", "knn")
        assert code == 2 and f"{model} was not pretrained from given weights" in said and "Traceback" not in said, said
    code, out, said = simclr("evaluate", fresh.path, data, "--protocol", "knn", "--cache", "off")
    assert code == 0 and "init (" not in out and "own start" not in out, said
