"""The contract of methods: each trains, resumes bit for bit, and is the same on two processes and in any memory."""

import os
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import in_processes
from simclr.config.pretrain import PretrainConfig
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.errors import Stopped, UserError
from simclr.methods import method_name
from simclr.methods.moco import MoCo
from simclr.methods.simclr import SimCLR
from simclr.methods.supervised import Supervised
from simclr.tasks import pretrain_images as pretraining
from simclr.training.batches import Batch
from simclr.training.memory import measure
from simclr.training.run import RunFolder
from simclr.weights.folder import load

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
CONFIG = PretrainConfig(
    size=8, encoder="small", width=0.5, strength=0.5, batch_size=48, epochs=3, warmup_epochs=0, lr=0.1, optimizer="sgd",
    head_dim=16, log_every=3, save_every=4, knn_every=0, workers=0,
)  # fmt: skip


def page_blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def sim_siam():
    """The method of the page, in a module of its own."""
    namespace = {"__name__": "page"}
    exec(compile(page_blocks()[0], str(PAGE), "exec"), namespace)
    return namespace["SimSiam"]


METHODS = {
    "simclr": lambda: SimCLR, "simclr with memory": lambda: SimCLR, "simclr of many views": lambda: SimCLR,
    "simclr with SupCon": lambda: SimCLR, "simclr with a probe": lambda: SimCLR, "moco": lambda: MoCo,
    "supervised": lambda: Supervised, "the page's": sim_siam,
}  # fmt: skip
MANY_VIEWS = replace(CONFIG, views_per_image=3, small_crops="2:5", crop_min=0.4, small_crop_min=0.2, small_crop_max=0.4)
MOMENTUM = replace(CONFIG, queue=80, ema=0.9)  # no multiple of the batch of 48
MOCO = replace(MOMENTUM, ema=0.99, temperature=0.2, loss_scale=1.0, optimizer="adamw", lr=3e-3, lr_scaling="none",
               head_norm=False, bn_splits=4, global_bn=False)  # fmt: skip
SUPCON = replace(MANY_VIEWS, loss="supcon")
SETTINGS = {
    "simclr with memory": MOMENTUM, "simclr of many views": MANY_VIEWS, "simclr with SupCon": SUPCON,
    "simclr with a probe": replace(CONFIG, probe=True), "moco": MOCO,
}  # fmt: skip
"""Name -> settings where they are not `CONFIG`."""


@pytest.fixture(scope="module")
def images():
    return open_data("digits").subset(np.arange(150))


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture
def method(name):
    return METHODS[name]()


@pytest.fixture
def config(name):
    return SETTINGS.get(name, CONFIG)


def train(images, path, method, config, world=None):
    world = world or DistributedContext()
    run = RunFolder(path)
    manifest = None if run.exists else pretraining.manifest_of(images, "digits", {}, method_name(method))
    pretraining.pretrain_images(images, config, run, world, manifest=manifest, method=method)
    return run


def weights(run):
    newest = max((run.path / "checkpoints").glob("*.pt"))
    return torch.load(newest, weights_only=True)["method"]


def test_a_run_stopped_by_a_signal_ends_with_the_same_bits(images, method, config, tmp_path, monkeypatch):
    assert_resume_is_exact(images, method, config, tmp_path, monkeypatch)


def test_what_a_loss_draws_at_each_step_is_drawn_again_on_resume(images, tmp_path, monkeypatch):
    config = replace(CONFIG, loss="generalised", prior="normal")
    assert_resume_is_exact(images, SimCLR, config, tmp_path, monkeypatch)


def assert_resume_is_exact(images, method, config, tmp_path, monkeypatch):
    whole = train(images, tmp_path / "whole", method, config)
    real, calls = pretraining.make_views, []

    def views(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(pretraining, "make_views", views)
        train(images, tmp_path / "parted", method, config)
    parted = train(images, tmp_path / "parted", method, config)
    assert parted.metrics.read_bytes() == whole.metrics.read_bytes()
    ours, theirs = weights(parted), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_learns_and_its_encoder_is_published(images, method, config, tmp_path):
    run = train(images, tmp_path / "run", method, replace(config, epochs=12))
    records = run.read_metrics()
    assert records[-1]["loss"] < records[0]["loss"]
    shown = {
        name for name, text in method.metric_formats.items() if name in records[0] and text.format(records[0][name])
    }
    assert shown and method.metric_formats.keys() - shown <= {"probe_accuracy"}
    assert ("probe_accuracy" in records[0]) == (config.probe and method is SimCLR)
    assert run.method == method_name(method)
    features = load(run.path).embed(images)
    assert features.shape == (150, load(run.path).encoder.num_features) and np.isfinite(features).all()


@pytest.mark.parametrize("strategy", ["checkpointing", "grad-cache"])
def test_each_memory_strategy_is_the_plain_step_or_refused(images, method, config, tmp_path, strategy):
    config = replace(config, epochs=1, memory=strategy, chunk=48 if strategy == "grad-cache" else 0)  # one chunk
    if strategy == "grad-cache" and not method.grad_cache:
        with pytest.raises(UserError, match="cannot be trained with --memory grad-cache"):
            train(images, tmp_path / "refused", method, config)
        return
    plain = weights(train(images, tmp_path / "plain", method, replace(config, epochs=1, memory="plain", chunk=0)))
    other = weights(train(images, tmp_path / "other", method, config))
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_a_method_may_ask_for_any_number_of_views(images):
    world = DistributedContext()
    batch = Batch(images.read(np.arange(9), copy=False), np.full(9, 4), np.arange(9), lambda: np.arange(9))
    two, three = (pretraining._make_inputs(images, CONFIG, world, (8,) * count)(batch) for count in (2, 3))
    assert len(three) == 3 and all(torch.equal(ours, theirs) for ours, theirs in zip(two, three[:2], strict=True))
    assert not torch.equal(three[2], three[0]) and three[2].shape == (9, 1, 8, 8)


def test_memory_is_counted_without_knowing_the_method(images, method, config):
    num_classes = pretraining.num_classes_of(images, method, config)
    built = pretraining.build_method(config, 1, DistributedContext(), method, num_classes=num_classes)
    footprint = measure(built, config, images, torch.float32)
    assert footprint.need("plain", 64) > footprint.need("plain", 16) > 0
    assert (footprint.projections is not None) == method.grad_cache


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(tmp_path, name):
    in_processes(2, tmp_path, partial(check_processes, tmp_path, name))


def check_processes(folder, name, world):
    images, method = open_data("digits").subset(np.arange(150)), METHODS[name]()
    config = SETTINGS.get(name, CONFIG)
    config = replace(config, epochs=1, lr=config.lr / 10)
    run = train(images, folder / "shared", method, config, world)
    world.barrier()  # the main process has written its checkpoint
    shared = weights(run)
    alone = weights(train(images, folder / f"alone-{world.rank}", method, config))
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw", "muon"])
def test_a_probe_changes_no_bit_of_the_rest(images, tmp_path, optimizer):
    config = replace(CONFIG, epochs=2, optimizer=optimizer, lr=0.01)
    without = weights(train(images, tmp_path / "without", SimCLR, config))
    run = train(images, tmp_path / "with", SimCLR, replace(config, probe=True))
    beside = weights(run)
    own = {"probe.weight", "probe.bias"}
    assert beside.keys() - without.keys() == own and all(torch.equal(beside[name], without[name]) for name in without)
    assert beside["probe.bias"].any()
    assert all(0 <= record["probe_accuracy"] <= 1 for record in run.read_metrics())


def test_a_probe_learns_what_a_linear_classifier_can(images, tmp_path):
    config = replace(CONFIG, epochs=40, crop_min=0.7, flip=0.0, probe=True)
    records = train(images, tmp_path / "run", SimCLR, config).read_metrics()
    assert records[-1]["probe_accuracy"] > 0.6 > 0.3 > records[0]["probe_accuracy"]
    with pytest.raises(UserError, match="have no label"):
        train(replace(images, labels=None), tmp_path / "none", SimCLR, config)
    with pytest.raises(UserError, match="--probe is a setting of SimCLR"):
        MoCo.check(replace(MOCO, probe=True), DistributedContext())


def test_supervised_training_sees_each_image_with_its_label(images, tmp_path):
    """One view of each image, distorted as in pretraining; the classifier is kept beside the encoder."""
    config = replace(CONFIG, epochs=40, crop_min=0.7, flip=0.0, optimizer="adamw", lr=1e-2, lr_scaling="none")
    batch = Batch(images.read(np.arange(9), copy=False), np.full(9, 4), np.arange(9), lambda: np.arange(9))
    make = pretraining._make_inputs(images, config, DistributedContext(), (8,), pretraining.class_targets(images)[1])
    (view, labels), (first,) = make(batch), pretraining._make_inputs(images, config, DistributedContext(), (8,))(batch)
    assert torch.equal(view, first)
    np.testing.assert_array_equal(labels, images.labels[:9])
    run = train(images, tmp_path / "run", Supervised, config)
    assert run.read_metrics()[0]["loss"] == pytest.approx(np.log(10), rel=0.2)
    model = load(run.classifier)
    assert model.classes == [str(digit) for digit in range(10)]
    assert np.mean(np.asarray(model.classify(images), int) == images.labels) > 0.9


def test_supervised_training_needs_a_label_of_each_image(images, tmp_path):
    some = replace(images, labels=np.where(np.arange(150) < 5, -1, images.labels))
    with pytest.raises(UserError, match="5 of 150 images have no label"):
        train(some, tmp_path / "some", Supervised, CONFIG)
    with pytest.raises(UserError, match="one class alone"):
        train(replace(images, labels=np.zeros(150, np.int64)), tmp_path / "one", Supervised, CONFIG)
    with pytest.raises(UserError, match="--queue has no effect on --method supervised"):
        Supervised.check(replace(CONFIG, queue=64), DistributedContext())
    assert not list(tmp_path.iterdir())


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    definition, use = page_blocks()
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    exec(compile(definition, str(PAGE), "exec"), namespace)
    exec(compile(use.replace("epochs=20", "epochs=2"), str(PAGE), "exec"), namespace)
    assert "knn" in capsys.readouterr().out and (tmp_path / "runs/simsiam/encoder/model.safetensors").is_file()
    assert len(definition.splitlines()) <= 45
