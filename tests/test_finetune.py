"""Training on labels as a whole: what is learned, what is left alone, exact resume, processes, bad input."""

import json
import math
import os
import signal
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import simclr
from helpers import in_processes, known, parts_of
from simclr import UserError
from simclr.config.encoder import EncoderConfig
from simclr.config.finetune import FINETUNE_RECIPES, FinetuneConfig, find_finetune_recipe
from simclr.config.schedule import peak_lr, total_steps
from simclr.data.opening import open_data
from simclr.data.splits import label_subset
from simclr.errors import Stopped
from simclr.evaluation import finetune as finetuning
from simclr.evaluation.finetune import finetune, supervised
from simclr.models.encoder import build_encoder
from simclr.models.heads import ProjectionHead
from simclr.training.fit import Execution
from simclr.training.run import RunFolder

SHAPE = EncoderConfig("small", channels=1, size=8, width=0.5)
CONFIG = replace(
    FINETUNE_RECIPES["small"], optimizer="adamw", lr=1e-3, epochs=0, min_steps=12, batch_size=32, flip=0.0,
    workers=0, save_every=4, log_every=3,
)  # fmt: skip


def digits(split, spec):
    images = open_data("digits", split=split)
    return images.subset(label_subset(known(images.labels), spec))


@pytest.fixture(scope="module")
def train():
    return digits("train", "5/class")


@pytest.fixture(scope="module")
def test():
    return digits("test", "10/class")


def network():
    encoder = build_encoder(SHAPE, seed=3)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # residual branches begin switched off
    return encoder, ProjectionHead(encoder.num_features, layers=3, seed=4)


def state_of(*modules):
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def assert_equal(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_fine_tuning_learns_and_leaves_the_given_network_alone(test):
    """80 steps on 200 labels, from random weights: far above the tenth that chance reaches."""
    encoder, head = network()
    encoder.eval()
    before = state_of(encoder, head)
    config = replace(CONFIG, min_steps=80, lr=1e-2)
    told = []
    result = finetune(
        encoder,
        head,
        digits("train", "20/class"),
        test,
        config,
        seed=0,
        execution=Execution(progress=lambda *call: told.append(call)),
    )
    assert result.accuracy > 0.5
    assert result.scores.shape == (100, 10) and result.targets.tolist() == test.labels.tolist()
    assert result.accuracy == (result.scores.argmax(1) == test.labels).mean()
    assert result.classes == [str(i) for i in range(10)] and result.steps == 80 and told[-1] == (80, 80)
    assert_equal(state_of(encoder, head), before)
    assert all(p.requires_grad for p in encoder.parameters()) and not encoder.training


def test_the_linear_probe_moves_the_classifier_alone_and_learns(test):
    encoder, _ = network()
    config = replace(FINETUNE_RECIPES["small-linear"], epochs=0, min_steps=100, lr=10.0, flip=0.0, workers=0)
    result = finetune(encoder, None, digits("train", "20/class"), test, config, seed=0)
    assert_equal(state_of(result.network.encoder), state_of(encoder))
    assert result.network.linear.weight.any()
    assert result.accuracy > 0.3


def test_no_test_label_touches_the_scores(train, test):
    poisoned = replace(test, labels=np.roll(test.labels, 37))
    honest, deceived = (finetune(*network(), train, part, CONFIG, seed=0) for part in (test, poisoned))
    assert np.array_equal(honest.scores, deceived.scores)
    assert_equal(state_of(honest.network), state_of(deceived.network))


def test_training_labels_do(train, test):
    poisoned = replace(train, labels=np.roll(train.labels, 1))
    honest, deceived = (finetune(*network(), part, test, CONFIG, seed=0) for part in (train, poisoned))
    assert not np.allclose(honest.scores, deceived.scores)


def test_a_seed_decides_everything_and_threads_nothing(train, test):
    runs = [
        finetune(*network(), train, test, replace(CONFIG, workers=workers), seed=seed).scores
        for seed, workers in ((0, 0), (0, 2), (1, 0))
    ]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])


def test_labels_with_gaps_and_names(train, test):
    """Labels 10, 13, 16, ... of which only some occur: a column each for those that do."""
    few = [np.flatnonzero(np.isin(images.labels, (2, 5, 6))) for images in (train, test)]
    learn, ask = train.subset(few[0]), test.subset(few[1])
    result = finetune(*network(), learn, ask, CONFIG, seed=0)
    assert result.labels.tolist() == [2, 5, 6] and result.classes == ["2", "5", "6"]
    assert result.labels[result.targets].tolist() == ask.labels.tolist()
    learn, ask = (replace(images, labels=images.labels * 3 + 10, classes=None) for images in (learn, ask))
    again = finetune(*network(), learn, ask, CONFIG, seed=0)
    assert again.labels.tolist() == [16, 25, 28] and again.classes == ["16", "25", "28"]
    assert np.array_equal(again.scores, result.scores)


def test_supervised_is_the_same_training_from_fresh_weights(train, test):
    result = supervised(SHAPE, train, test, CONFIG, seed=5)
    expected = finetune(build_encoder(SHAPE, seed=5), None, train, test, CONFIG, seed=5)
    assert np.array_equal(result.scores, expected.scores)


def test_batch_norm_decay_reaches_the_running_statistics(train, test):
    config = replace(CONFIG, min_steps=1, batch_norm_decay=0.0)
    encoder, head = network()
    network_of_last = finetune(encoder, head, train, test, config, seed=0).network
    default = finetune(encoder, head, train, test, replace(config, batch_norm_decay=None), seed=0)
    last, moved = (parts_of(tuned).encoder.backbone.stem[0].norm for tuned in (network_of_last, default.network))
    torch.testing.assert_close(moved.running_mean, 0.1 * last.running_mean)  # a tenth of the way from 0


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


def disturb(monkeypatch, at, how):
    """Let something happen when the views of the `at`-th step of this call are made."""
    real, made = finetuning.make_view, iter(range(10_000))

    def view(*args, **kwargs):
        if next(made) == at:
            how()
        return real(*args, **kwargs)

    monkeypatch.setattr(finetuning, "make_view", view)


def kill():
    raise Killed


@pytest.mark.parametrize("changes", [{"head_layer": 1, "optimizer": "lars", "lr": 0.1}, {"tune_from": 2}], ids=str)
def test_resume_is_exact(train, test, tmp_path, monkeypatch, changes):
    config = replace(CONFIG, **changes)
    encoder, head = network()
    undisturbed = finetune(encoder, head, train, test, config, seed=0, execution=Execution(run=tmp_path / "a"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        disturb(patch, 9, kill)
        finetune(encoder, head, train, test, config, seed=0, execution=Execution(run=tmp_path / "b"))
    told = []
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        disturb(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        finetune(
            encoder,
            head,
            train,
            test,
            config,
            seed=0,
            execution=Execution(run=tmp_path / "b", progress=lambda *call: told.append(call)),
        )
    assert stopped.value.signal == signal.SIGTERM and told[0] == (9, 12) and told[-1] == (11, 12)
    resumed = finetune(encoder, head, train, test, config, seed=0, execution=Execution(run=tmp_path / "b"))
    assert np.array_equal(resumed.scores, undisturbed.scores)
    assert_equal(state_of(resumed.network), state_of(undisturbed.network))
    assert RunFolder(tmp_path / "a").metrics.read_bytes() == RunFolder(tmp_path / "b").metrics.read_bytes()
    finished = finetune(
        encoder, head, train, test, replace(config, workers=1), seed=0, execution=Execution(run=tmp_path / "b")
    )
    assert np.array_equal(finished.scores, undisturbed.scores)


def test_a_signal_in_the_last_step_stops_what_would_follow(train, test, tmp_path, monkeypatch):
    config = replace(CONFIG, min_steps=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        disturb(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        finetune(*network(), train, test, config, seed=0, execution=Execution(run=tmp_path))
    assert finetune(*network(), train, test, config, seed=0, execution=Execution(run=tmp_path)).steps == 2


def test_a_run_leaves_a_network_that_names_classes(train, test, tmp_path):
    config = replace(CONFIG, head_layer=1)
    result = finetune(*network(), train, test, config, seed=0, execution=Execution(run=tmp_path))
    loaded = simclr.load(tmp_path)
    named = loaded.classify(test)
    assert named == [result.classes[best] for best in result.scores.argmax(1)]
    expected = np.exp(result.scores) / np.exp(result.scores).sum(1, keepdims=True)
    np.testing.assert_allclose(loaded.probabilities(test), expected, rtol=1e-5, atol=1e-7)
    records = RunFolder(tmp_path).read_metrics()
    assert [record["step"] for record in records] == [3, 6, 9, 12]
    assert set(records[0]) == {"step", "lr", "loss", "accuracy"}


def test_the_first_loss_is_that_of_chance(train, test, tmp_path):
    finetune(
        *network(), train, test, replace(CONFIG, min_steps=1, log_every=1), seed=0, execution=Execution(run=tmp_path)
    )
    assert RunFolder(tmp_path).read_metrics()[0]["loss"] == pytest.approx(math.log(10), rel=1e-6)


def test_a_folder_of_another_training_is_refused(train, test, tmp_path):
    encoder, head = network()
    config = replace(CONFIG, min_steps=1)
    finetune(encoder, head, train, test, config, seed=0, execution=Execution(run=tmp_path / "run"))
    other = build_encoder(SHAPE, seed=9)
    cases: tuple[tuple[Any, ...], ...] = (
        (encoder, head, train, test, replace(config, lr=0.5), 0),
        (encoder, head, train, test, config, 1),
        (other, head, train, test, config, 0),
        (encoder, head, train.subset(np.arange(40)), test.subset(test.labels < 4), config, 0),
        (encoder, head, replace(train, labels=np.roll(train.labels, 1)), test, config, 0),
    )
    for *what, seed in cases:
        with pytest.raises(UserError, match="another folder"):
            finetune(*what, seed=seed, execution=Execution(run=tmp_path / "run"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and is no run"):
        finetune(encoder, head, train, test, config, seed=0, execution=Execution(run=tmp_path / "full"))


def test_a_loss_that_explodes_is_one_sentence(train, test, tmp_path):
    config = replace(CONFIG, optimizer="sgd", lr=1e30)
    with pytest.raises(UserError, match=r"no longer finite.*Try a lower --lr\.$"):
        finetune(*network(), train, test, config, seed=0, execution=Execution(run=tmp_path))


def one_class(images):
    return images.subset(np.flatnonzero(images.labels == 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda train, test: (one_class(train), one_class(test)), "a single class"),
        (lambda train, test: (train.subset(train.labels != 7), test), r"test images of 1 classes .* learn from \(7\)"),
        (lambda train, test: (replace(train, labels=None), test), "50 of 50 images have no label"),
        (lambda train, test: (train, replace(test, labels=np.where(test.labels == 2, -1, 0))), "10 of 100 images"),
        (lambda train, test: (train, test.subset([])), "0 of 0 images"),
        (lambda train, test: (replace(train, channels=3), test), "expects 1-channel images and digits has 3"),
    ],
    ids=["one class", "absent class", "no labels", "some labels", "no test images", "channels"],
)
def test_data_that_cannot_be_learned_from_is_one_sentence(train, test, change, message):
    learn, ask = change(train, test)
    with pytest.raises(UserError, match=message):
        finetune(*network(), learn, ask, CONFIG, seed=0)


def test_head_layers_need_a_head(train, test):
    with pytest.raises(UserError, match="without a projection head"):
        finetune(network()[0], None, train, test, replace(CONFIG, head_layer=1), seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.0), ("lr", float("nan")), ("epochs", -1), ("batch_size", 1), ("tune_from", 5), ("flip", 1.5),
     ("crop_min", 0.0), ("batch_norm_decay", 1.0), ("head_layer", -1)],
)  # fmt: skip
def test_settings_that_are_not_allowed(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} was"):
        FinetuneConfig(**{name: value})
    with pytest.raises(UserError, match="greater than 0"):
        FinetuneConfig(epochs=0)


def test_recipes_have_the_papers_steps_and_peaks():
    """Step counts are those in the names of the released checkpoints; peak rates those that the papers state."""
    images = {"1%": 12_811, "10%": 128_116, "100%": 1_281_167}
    steps = {name: total_steps(images[name[3:]], FINETUNE_RECIPES[name].epochs, 1024) for name in ("v2-1%", "v2-10%")}
    assert steps == {"v2-1%": 751, "v2-10%": 3754}
    assert total_steps(images["100%"], FINETUNE_RECIPES["v2-100%"].epochs, 1024) == 37535
    assert total_steps(images["100%"], FINETUNE_RECIPES["supervised"].epochs, 4096) == 28151
    peaks = {name: peak_lr(c.lr, c.batch_size, c.lr_scaling) for name, c in FINETUNE_RECIPES.items()}
    expected = {
        "v1-1%": 0.8,
        "linear": 1.6,
        "cifar-linear": 0.2,
        "supervised": 1.6,
        "v2-10%": 0.16,
        "v2-wide-10%": 0.064,
    }
    assert {name: pytest.approx(peaks[name]) for name in expected} == expected
    for name, config in FINETUNE_RECIPES.items():
        assert config.head_layer == (name in ("v2-1%", "v2-10%", "v2-wide-1%", "v2-wide-10%"))
        assert find_finetune_recipe(name) is config
    cifar = FINETUNE_RECIPES["cifar-linear"]
    assert (cifar.epochs, cifar.batch_size, cifar.weight_decay, cifar.tune_from) == (100, 512, 0.0, "none")
    with pytest.raises(UserError, match="There is no fine-tuning recipe 'v3'"):
        find_finetune_recipe("v3")


def test_settings_are_plain_json():
    assert FinetuneConfig(**json.loads(json.dumps(asdict(CONFIG)))) == CONFIG
    assert {field.name for field in fields(FinetuneConfig)} == set(asdict(CONFIG))


def test_two_processes_equal_one(tmp_path):
    in_processes(2, tmp_path, partial(check_processes, tmp_path / "run"))
    assert len(simclr.load(tmp_path / "run").classes) == 10


def check_processes(run, world):
    """The same views, global batch norm, averaged gradients and shared test images: the same scores up to rounding."""
    train, test = digits("train", "5/class"), digits("test", "10/class").subset(np.arange(33))
    config = replace(CONFIG, head_layer=1, optimizer="sgd", lr=0.5, min_steps=5)
    alone = finetune(*network(), train, replace(test), config, seed=0)
    shared = finetune(*network(), train, test, config, seed=0, execution=Execution(world=world, run=run))
    np.testing.assert_allclose(shared.scores, alone.scores, rtol=2e-3, atol=2e-4)
    assert np.abs(alone.scores).max() > 0.05
