"""Distillation as a whole: what moves and what does not, exact resume, processes, teachers, the command."""

import json
import os
import re
import signal
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import top_k_accuracy_score
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers import in_processes, known
from simclr import UserError
from simclr.config.distill import DISTILL_RECIPES, DistillConfig, find_distill_recipe
from simclr.config.encoder import EncoderConfig
from simclr.config.schedule import peak_lr, total_steps
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.errors import Stopped
from simclr.evaluation.results import read_results
from simclr.methods.distill import Distill
from simclr.models.batchnorm import set_global_batch_norm
from simclr.models.classifier import Classifier
from simclr.models.encoder import build_encoder
from simclr.models.heads import ProjectionHead
from simclr.tasks import distill as distill_task
from simclr.tasks import distill_images as distilling
from simclr.tasks.distill_images import distill_images
from simclr.tasks.teacher import open_teacher, teachers_columns
from simclr.training.fit import Execution
from simclr.training.run import RunFolder
from simclr.views.policy import crop_and_flip
from simclr.weights.folder import Model, digest_of, load, save_classifier, save_encoder

CONFIG = replace(
    DISTILL_RECIPES["small-distill"], lr=0.05, warmup_epochs=0, epochs=0, min_steps=12, batch_size=32, flip=0.0,
    workers=0, save_every=4, log_every=3, alpha=0.5,
)  # fmt: skip


def classifier(*, seed: int, size: int = 8, width: float = 0.5, head_layer: int = 0) -> Classifier:
    """A network whose residual branches and classifier are switched on."""
    encoder = build_encoder(EncoderConfig("small", channels=1, size=size, width=width), seed=seed)
    head = ProjectionHead(encoder.num_features, layers=3, seed=seed) if head_layer else None
    network = Classifier(encoder, head, 10, head_layer=head_layer)
    draw = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    nn.init.normal_(network.linear.weight, generator=draw)
    return network


def teacher(**shape) -> Model:
    network = classifier(seed=1, **shape).eval()
    return Model(network.encoder, "google", classifier=network, classes=[str(i) for i in range(10)])


def student(**shape) -> Classifier:
    return classifier(seed=2, **shape)


@pytest.fixture(scope="module")
def images():
    """Digits of which every third has a label."""
    found = open_data("digits", split="train").subset(np.arange(300))
    return replace(found, labels=np.where(np.arange(300) % 3 == 0, known(found.labels), -1))


@pytest.fixture(scope="module")
def test():
    return open_data("digits", split="test").subset(np.arange(100))


def state_of(*modules):
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def assert_equal(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def batch(rows: int, *, seed: int = 0, size: int = 8):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 1, size, size, dtype=torch.float64, generator=draw)


def naive(network, taught, x, targets, *, tau, alpha):
    """The paper's two terms, each a mean over its own images."""
    log_p, p_t = (network(x) / tau).log_softmax(1), (taught / tau).softmax(1)
    known = targets >= 0
    unlabelled = -(p_t * log_p).sum() / len(x)
    return alpha * unlabelled + (1 - alpha) * F.cross_entropy(network(x)[known], targets[known])


def test_the_method_is_the_formula_and_only_the_student_moves():
    network, taught = student().double(), classifier(seed=1).double().train()
    x, targets = batch(12), torch.tensor([3, -1, -1, 0, 9, -1, -1, -1, 2, 2, -1, 5])
    before = state_of(taught)
    method = Distill(network, taught, temperature=0.5, alpha=0.3, world=DistributedContext())
    assert not taught.training and not any(p is q for p in method.parameters() for q in taught.parameters())
    assert len(method.state_dict()) == len(network.state_dict())
    loss, metrics = method(x, x, targets, 6, detail=True)
    expected = naive(deepcopy(network), taught(x).detach(), x, targets, tau=0.5, alpha=0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    best, known = network(x).argmax(1), targets >= 0
    assert metrics["accuracy"].item() == pytest.approx((best == targets)[known].double().mean().item())
    assert metrics["agreement"] == (best == taught(x).argmax(1)).double().mean()
    loss.backward()
    assert all(p.grad is None for p in taught.parameters())
    method.train()
    method(x, x)
    assert_equal(state_of(taught), before)
    without, metrics = method(x, x, torch.full((12,), -1), 0, detail=True)
    torch.testing.assert_close(
        without, 0.3 * Distill(network, taught, temperature=0.5, world=DistributedContext())(x, x)[0]
    )
    assert "accuracy" not in metrics


def test_a_student_learns_its_teacher(images, test, tmp_path):
    """Without a label: a teacher that sees 8 pixels and knows the digits teaches a student that sees 12."""
    from simclr.config.finetune import FINETUNE_RECIPES
    from simclr.evaluation.finetune import finetune

    labelled = open_data("digits", split="train")
    recipe = replace(FINETUNE_RECIPES["small"], optimizer="adamw", lr=1e-2, epochs=0, min_steps=100, flip=0.0)
    tuned = finetune(teacher().encoder, None, labelled, test, recipe, seed=0)
    wise = Model(tuned.network.encoder, "google", classifier=tuned.network, classes=tuned.classes)
    before = state_of(tuned.network)
    config = replace(CONFIG, alpha=1.0, temperature=1.0, min_steps=100, batch_size=64)
    begin = student(size=12, head_layer=1)
    at_first = state_of(begin)
    result = distill_images(
        wise,
        begin,
        replace(labelled, labels=None),
        config,
        seed=0,
        test=test,
        execution=Execution(run=tmp_path / "run"),
    )
    assert tuned.accuracy > 0.7 and result.teacher_accuracy == tuned.accuracy
    assert known(result.accuracy) > 0.6 and result.steps == 100
    assert_equal(state_of(tuned.network), before)
    assert_equal(state_of(begin), at_first)
    loaded = load(tmp_path / "run")
    assert np.mean(np.array(loaded.classify(test)) == test.labels.astype(str)) == result.accuracy
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] == {"student": result.accuracy, "teacher": tuned.accuracy}
    records = RunFolder(tmp_path / "run").read_metrics()
    assert set(records[0]) == {"step", "lr", "loss", "agreement"}
    assert records[-1]["agreement"] > records[0]["agreement"]
    begin = student(size=12, head_layer=1)
    unlabelled = replace(labelled, labels=None)
    again = distill_images(
        wise, begin, unlabelled, config, seed=0, test=test, execution=Execution(run=tmp_path / "run")
    )
    assert again.accuracy == result.accuracy and json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_both_see_one_view_each_at_its_own_size(images, tmp_path, monkeypatch):
    """Where the sizes agree it is made once; else the draws are the same, so a larger one shrunk is the smaller one."""
    config, run = replace(CONFIG, alpha=0.5), RunFolder(tmp_path)
    made = []
    real = distilling.make_view
    monkeypatch.setattr(distilling, "make_view", lambda *args, **kwargs: made.append(args) or real(*args, **kwargs))
    one = distilling.build_task(
        teacher(), student(), images, None, config, run, seed=5, world=DistributedContext()
    ).batch(3)
    assert len(made) == 1 and one[0] is one[1]
    targets = images.labels
    two = distilling.build_task(
        teacher(size=32), student(), images, targets, config, run, seed=5, world=DistributedContext()
    ).batch(3)  # fmt: skip
    assert torch.equal(two[0], one[0]) and two[1].shape == (32, 1, 32, 32)
    shrunk = F.interpolate(two[1], size=(8, 8), mode="bilinear", antialias=True)
    assert (shrunk - two[0]).abs().mean() < 0.3 * (shrunk - two[0].roll(1, 0)).abs().mean()
    assert two[3] == int((two[2] >= 0).sum()) > 0
    policy = crop_and_flip("google", 32, channels=1, crop_min=config.crop_min, flip=config.flip)
    assert made[-1][1] == policy


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


def disturb(monkeypatch, at, how):
    """Let something happen when the views of the `at`-th step of this call are made."""
    real, made = distilling.make_view, iter(range(10_000))

    def view(*args, **kwargs):
        if next(made) == at:
            how()
        return real(*args, **kwargs)

    monkeypatch.setattr(distilling, "make_view", view)


def kill():
    raise Killed


def test_resume_is_exact(images, tmp_path, monkeypatch):
    shape = {"head_layer": 1, "width": 0.25}
    undisturbed = distill_images(
        teacher(), student(**shape), images, CONFIG, seed=0, execution=Execution(run=tmp_path / "a")
    )
    with monkeypatch.context() as patch, pytest.raises(Killed):
        disturb(patch, 9, kill)
        distill_images(teacher(), student(**shape), images, CONFIG, seed=0, execution=Execution(run=tmp_path / "b"))
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        disturb(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        distill_images(teacher(), student(**shape), images, CONFIG, seed=0, execution=Execution(run=tmp_path / "b"))
    assert stopped.value.signal == signal.SIGTERM
    resumed = distill_images(
        teacher(), student(**shape), images, replace(CONFIG, workers=1), seed=0, execution=Execution(run=tmp_path / "b")
    )
    assert_equal(state_of(resumed.network), state_of(undisturbed.network))
    assert RunFolder(tmp_path / "a").metrics.read_bytes() == RunFolder(tmp_path / "b").metrics.read_bytes()
    assert RunFolder(tmp_path / "a").read_metrics()[0].keys() >= {"agreement", "accuracy"}


def test_a_folder_of_another_distillation_is_refused(images, tmp_path):
    config = replace(CONFIG, min_steps=1)
    distill_images(teacher(), student(), images, config, seed=0, execution=Execution(run=tmp_path / "run"))
    relabelled = replace(images, labels=np.roll(images.labels, 3))
    for who, what, how, seed in (
        (student(), images, replace(config, temperature=3.0), 0),
        (student(), images, config, 1),
        (classifier(seed=9), images, config, 0),
        (student(), relabelled, config, 0),
        (student(), images.subset(np.arange(99)), config, 0),
    ):
        with pytest.raises(UserError, match=r"of other settings, images or weights; give another folder\.$"):
            distill_images(teacher(), who, what, how, seed=seed, execution=Execution(run=tmp_path / "run"))
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        distill_images(teacher(), student(), images, config, seed=0, execution=Execution(run=tmp_path / "run"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and is no run"):
        distill_images(teacher(), student(), images, config, seed=0, execution=Execution(run=tmp_path / "full"))


def test_a_loss_that_explodes_is_one_sentence(images, tmp_path):
    with pytest.raises(UserError, match=r"no longer finite.*Try a lower --lr"):
        distill_images(
            teacher(),
            student(),
            images,
            replace(CONFIG, lr=1e30, log_every=1),
            seed=0,
            execution=Execution(run=tmp_path / "run"),
        )


def test_two_processes_equal_one(tmp_path):
    in_processes(2, tmp_path, partial(check_processes, tmp_path))
    assert load(tmp_path / "shared").classes == [str(i) for i in range(10)]


def check_processes(folder, world: DistributedContext) -> None:
    check_gradients(world)
    check_training(folder, world)


def check_gradients(world: DistributedContext) -> None:
    """Labelled images lie unevenly, in one case all with the first process; batch norm is over both."""
    x = batch(12, seed=3)
    for targets in ([3, 4, 1, 0, 9, -1, -1, -1, 2, -1, -1, -1], [3, 4, -1, 0, -1, -1, *[-1] * 6]):
        targets, mine = torch.tensor(targets), world.local_slice(12)
        labelled = int((targets >= 0).sum())
        alone, shared, taught = student().double(), student().double(), classifier(seed=1).double()
        expected, all_metrics = Distill(alone, taught, temperature=2.0, alpha=0.4, world=DistributedContext())(
            x, x, targets, labelled, detail=True
        )
        expected.backward()
        method = Distill(shared, taught, temperature=2.0, alpha=0.4, world=world)
        set_global_batch_norm(method, world.group)
        parallel = DistributedDataParallel(method)
        loss, metrics = parallel(x[mine], x[mine], targets[mine], labelled, detail=True)
        loss.backward()
        torch.testing.assert_close(world.all_reduce_mean(loss), expected.detach(), rtol=1e-10, atol=0)
        for name in ("agreement", "accuracy", "loss"):
            torch.testing.assert_close(metrics[name], all_metrics[name], rtol=1e-10, atol=0)
        for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
            assert (known(ours.grad) - known(theirs.grad)).norm() <= 1e-10 * known(theirs.grad).norm() + 1e-14


def check_training(folder, world: DistributedContext) -> None:
    """A whole run: the same views, the same weights up to rounding."""
    found = open_data("digits", split="train").subset(np.arange(200))
    sparse = replace(found, labels=np.where(np.arange(200) % 5 == 0, known(found.labels), -1))
    asked = open_data("digits", split="test").subset(np.arange(33))
    config = replace(CONFIG, min_steps=4, log_every=1)
    alone = distill_images(
        teacher(),
        student(),
        sparse,
        config,
        seed=0,
        test=asked,
        execution=Execution(run=folder / f"alone-{world.rank}"),
    )
    shared = distill_images(
        teacher(),
        student(),
        sparse,
        config,
        seed=0,
        test=asked,
        execution=Execution(run=folder / "shared", world=world),
    )
    for ours, theirs in zip(state_of(shared.network), state_of(alone.network), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert shared.teacher_accuracy == alone.teacher_accuracy


def test_classes_are_matched_by_name(test):
    wise = teacher()
    shuffled = Model(wise.encoder, "google", classifier=wise.classifier, classes=["x", *"9876543210"])
    assert teachers_columns(shuffled, test).tolist() == (10 - test.labels).tolist()
    assert teachers_columns(wise, replace(test, labels=np.array([4, -1, 0]), classes=None)).tolist() == [4, -1, 0]
    with pytest.raises(UserError, match=r"2 of the 10 classes of digits \(0, 9\) are not among the teacher's 8"):
        teachers_columns(Model(wise.encoder, "google", classes=list("12345678")), test)


def filled(model: nn.Module) -> nn.Module:
    """Weights that each parameter's name decides stand in for trained ones."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.05, generator=torch.Generator().manual_seed(crc32(name.encode())))
    return model


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/test_vit", "torchvision/mobilenet_v3_small"])
def test_pretrained_models_teach_with_their_own_classifier(monkeypatch, name):
    """Logits are those of the whole model on normalised pixels."""
    import timm
    from torchvision import models

    create, get = timm.create_model, models.get_model
    monkeypatch.setattr(timm, "create_model", lambda n, pretrained, **more: filled(create(n, **more)))
    monkeypatch.setattr(models, "get_model", lambda n, weights: filled(get(n)))
    size = 160 if name == "timm/test_vit" else 64
    opened = open_teacher(name, size=size)
    assert opened.preprocessing == "torchvision"
    assert opened.classes[:1] == ["n01440764"] and len(opened.classes) == 1000
    library, _, model_name = name.partition("/")
    whole = filled(create(model_name) if library == "timm" else get(model_name)).eval()
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (opened.encoder.config.mean, opened.encoder.config.std))
    with torch.no_grad():
        expected = whole((x - mean) / std)
        torch.testing.assert_close(
            known(opened.classifier)(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )


def test_a_model_that_ends_otherwise_is_one_sentence(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda n, pretrained, **more: create(n, **more))
    with pytest.raises(UserError, match="deit_tiny_distilled_patch16_224 does not end in a linear classifier"):
        open_teacher("timm/deit_tiny_distilled_patch16_224", size=224)


def test_recipes():
    """400 epochs of ImageNet in batches of 4096, the rate and weight decay of SimCLR v2's pretraining."""
    paper = find_distill_recipe("v2-distill")
    assert total_steps(1_281_167, paper.epochs, paper.batch_size) == 125_114
    assert peak_lr(paper.lr, paper.batch_size, paper.lr_scaling) == pytest.approx(6.4)
    assert (paper.optimizer, paper.weight_decay, paper.warmup_epochs / paper.epochs) == ("lars", 1e-4, 0.05)
    with pytest.raises(UserError, match="no recipe 'v3' for distillation"):
        find_distill_recipe("v3")


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 1.5), ("temperature", 0.0), ("lr", float("nan")), ("batch_size", 1), ("flip", -0.1)]
)
def test_settings_that_are_not_allowed(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} was"):
        DistillConfig(**{name: value})


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher's folder, an encoder's with a head, a colour encoder's, and a teacher's of other classes."""
    root = tmp_path_factory.mktemp("networks")
    kept: dict[str, Any] = {"preprocessing": "google", "origin": {}}
    network = classifier(seed=1).eval()
    save_classifier(network, root / "teacher", classes=[str(i) for i in range(10)], **kept)
    save_classifier(network, root / "letters", classes=list("abcdefghij"), **kept)
    head = ProjectionHead(network.encoder.num_features, layers=3, seed=4)
    save_encoder(network.encoder, root / "encoder", head=head, **kept)
    save_encoder(build_encoder(EncoderConfig("small", channels=3, size=8)), root / "colour", **kept)
    return root


FAST = ["--min-steps", "10", "--epochs", "0", "--batch-size", "32", "--workers", "0"]


def test_top_5_is_printed_where_there_are_many_classes(simclr, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(distill_task, "TOP5_ABOVE", 9)
    code, table, said = simclr("distill", folders / "teacher", "digits", "--out", tmp_path / "self", *FAST)
    assert code == 0, said
    test = open_data("digits", split="test")
    student, teacher = (
        top_k_accuracy_score(test.labels, load(folder).probabilities(test), k=5)
        for folder in (tmp_path / "self", folders / "teacher")
    )
    assert f"Top-5 accuracy: teacher {teacher:.1%}, student {student:.1%}." in table


def test_the_command_end_to_end(simclr, folders, tmp_path):
    out = tmp_path / "self"
    code, table, said = simclr("distill", folders / "teacher", "digits", "--out", out, *FAST)
    assert code == 0 and "temperature 0.1" in said and "Recipe small-distill" in said
    lines = table.splitlines()
    assert lines[0].startswith("teacher") and lines[1].startswith("student") and "test images" in lines[2]
    accuracy = json.loads((out / "summary.json").read_text())["test_accuracy"]["student"]
    test = open_data("digits", split="test")
    assert np.mean(np.array(load(out).classify(test)) == known(test.labels).astype(str)) == accuracy
    results = {result.subject: result for result in read_results(out / "evaluation" / "results.jsonl")[0]}
    assert results["student"].value("top1") == accuracy and set(results) == {"student", "teacher"}
    assert results["teacher"].weights == digest_of(known(load(folders / "teacher").classifier))
    code, table, _ = simclr("evaluate", out, "digits", "--protocol", "knn", "--cache", "off", "--compare")
    assert code == 0 and "encoder" in table
    before = (out / "encoder" / "model.safetensors").read_bytes()
    code, again, _ = simclr("distill", folders / "teacher", "digits", "--out", out, *FAST)
    assert code == 0 and again.splitlines()[:2] == lines[:2]
    assert (out / "encoder" / "model.safetensors").read_bytes() == before


def test_other_students(simclr, folders, tmp_path):
    small = ["--encoder", "small", "--width", "0.25", "--stem", "strided", "--size", "16"]
    code, _, said = simclr(
        "distill", folders / "teacher", "digits", "--out", tmp_path / "a", *FAST, *small, "--labels", "5/class",
        "--alpha", "0.5", "--no-test",
    )  # fmt: skip
    assert code == 0 and "temperature 1;" in said and "Labels of 50 images count" in said
    assert 'test_accuracy": {}' in (tmp_path / "a" / "summary.json").read_text()
    assert load(tmp_path / "a").encoder.config.size == 16
    code, _, said = simclr(
        "distill", folders / "teacher", "digits", "--out", tmp_path / "b", *FAST, "--student", folders / "encoder",
        "--head-layer", "1", "--only-labels", "4/class",
    )  # fmt: skip
    assert code == 0 and "on 40 images at temperature 0.1" in said
    described = json.loads((tmp_path / "b" / "encoder" / "config.json").read_text())
    assert described["classifier"]["head_layer"] == 1


@pytest.mark.parametrize(
    ("who", "flags", "sentence"),
    [
        ("encoder", [], "is an encoder without a classifier"),
        ("nowhere", [], "holds no encoder"),
        ("letters", [], r"10 of the 10 classes of digits \(0, 1, 2, 3, 4 and 5 more\) are not among the teacher's 10"),
        ("teacher", ["--student", "colour"], "takes 3-channel images and the teacher"),
        ("teacher", ["--alpha", "0.5"], "none were named; give --labels"),
        ("teacher", ["--labels", "1%"], "would not count"),
        ("teacher", ["--head-layer", "1"], "without a projection head"),
        ("teacher", ["--student", "encoder", "--head-layer", "7"], "the projection head has 3 layers"),
        ("teacher", ["--width", "2"], "--width go with --encoder"),
        ("teacher", ["--student", "encoder", "--encoder", "small"], "names one; give one"),
        ("teacher", ["--recipe", "v3"], "no recipe 'v3'"),
        ("teacher", ["--out", "/proc/x"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(simclr, folders, tmp_path, who, flags, sentence):
    flags = [folders / flag if (folders / flag).is_dir() else flag for flag in flags]
    code, out, said = simclr("distill", folders / who, "digits", "--out", tmp_path / "run", *FAST, *flags)
    assert code == 2 and not out
    assert [line for line in said.splitlines() if line.startswith("simclr: ")] == [said.splitlines()[-1]]
    assert re.search(sentence, said.replace("\n", " "))
    assert not (tmp_path / "run").exists()
