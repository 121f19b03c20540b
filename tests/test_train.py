"""The run as a whole: exact resume, kills, signals, processes, broken losses."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers import SMALL_RUN, Killed, assert_same, final_state, known
from processes import run_in_processes
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext, stop
from simclr.errors import Stopped, UserError
from simclr.tasks import pretrain_images as pretraining
from simclr.training.batches import make_batches
from simclr.training.checkpoint import checkpoints, load_newest
from simclr.training.loop import Prefetcher, _over_processes
from simclr.training.run import RunFolder
from simclr.weights.folder import load


@pytest.fixture(scope="module")
def images():
    return open_data("digits").subset(np.arange(150))


def train(images, config, path, world=None):
    manifest = pretraining.manifest_of(images, "digits", {})
    run = RunFolder(path)
    known = (path / "config.json").exists()
    return run, pretraining.pretrain_images(
        images, config, run, world or DistributedContext(), manifest=None if known else manifest
    )


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    run, outcome = train(images, SMALL_RUN, tmp_path_factory.mktemp("runs") / "undisturbed")
    assert outcome.finished and outcome.step == 150 * 5 // 32 + 1  # the authors' step count
    return run


def test_records_and_summary(undisturbed):
    records = undisturbed.read_metrics()
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps)) and steps[-1] == 24
    assert {3, 6, 9} <= set(steps)
    assert all(np.isfinite(value) for record in records for value in record.values())
    assert {
        "loss",
        "lr",
        "contrastive_accuracy",
        "contrastive_entropy",
        "alignment",
        "uniformity",
        "effective_rank",
    } <= set(records[0])
    assert "knn" in records[-1]
    summary = json.loads(undisturbed.summary.read_text())
    assert summary["steps"] == 24 and summary["images"] == 150
    assert len(checkpoints(undisturbed.checkpoints)) == SMALL_RUN.max_checkpoints


def test_the_published_encoder_brings_its_projection_head(undisturbed):
    _, state = known(load_newest(undisturbed.checkpoints, pytest.fail))
    published = known(load(undisturbed.path).head).state_dict()
    assert published.keys() == {name.removeprefix("head.") for name in state["method"] if name.startswith("head.")}
    assert all(torch.equal(tensor, state["method"][f"head.{name}"]) for name, tensor in published.items())


@pytest.mark.parametrize("moments", [(1,), (7,), (11, 13), (5, 6, 23)], ids=str)
def test_resume_is_exact(images, undisturbed, tmp_path, monkeypatch, moments):
    """Cut off in the middle of a step, also twice in one epoch, a run ends bit for bit where the other one ends."""
    real = pretraining.make_views
    for moment in (*moments, None):
        made = iter(range(10_000))
        begin = newest_step(tmp_path / "run")

        def views(*args, begin=begin, made=made, moment=moment, **kwargs):
            if begin + next(made) == moment:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(pretraining, "make_views", views)
        try:
            train(images, SMALL_RUN, tmp_path / "run")
        except Killed:
            continue
    assert_same(final_state(RunFolder(tmp_path / "run")), final_state(undisturbed))


def newest_step(path):
    found = load_newest(path / "checkpoints", pytest.fail)
    return found[0] if found else 0


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_threads_change_nothing(images, undisturbed, tmp_path, workers):
    run, _ = train(images, replace(SMALL_RUN, workers=workers), tmp_path / "run")
    assert_same(final_state(run), final_state(undisturbed))


def test_a_damaged_newest_checkpoint_costs_steps_not_bits(images, undisturbed, tmp_path, monkeypatch, capsys):
    real = pretraining.make_views
    made = iter(range(12))

    def views(*args, **kwargs):
        if next(made, None) is None:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(pretraining, "make_views", views)
    with pytest.raises(Killed):
        train(images, SMALL_RUN, tmp_path / "run")
    monkeypatch.setattr(pretraining, "make_views", real)
    newest = checkpoints(tmp_path / "run" / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    run, _ = train(images, SMALL_RUN, tmp_path / "run")
    said = capsys.readouterr().err
    assert newest.name in said and "Resuming at step 5" in said
    assert_same(final_state(run), final_state(undisturbed))


KILLED_WHILE_SAVING = """
import os, signal, sys
import simclr.training.checkpoint as checkpoint
real, calls = os.replace, []
def replace(*paths):
    calls.append(paths)
    if "step-" in str(paths[1]) and sum("step-" in str(p[1]) for p in calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # the second checkpoint is written, but not yet in its place
    real(*paths)
os.replace = replace
sys.argv[0] = "simclr"
from simclr.cli.main import main
main()
"""


def run_cli(*arguments, code=None):
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *(["-c", code] if code else ["-m", "simclr"]), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_sigkill_while_saving_and_resume_from_the_command_line(simclr, tmp_path):
    flags = ["--recipe", "digits", "--epochs", "3", "--save-every", "3", "--log-every", "2", "--workers", "1"]
    flags += ["--batch-size", "128", "--knn-every", "0"]
    simclr("pretrain", "digits", "--out", tmp_path / "a", *flags)
    killed = run_cli("pretrain", "digits", "--out", tmp_path / "b", *flags, code=KILLED_WHILE_SAVING)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "b" / "checkpoints").glob(".*.tmp")), "the kill came while saving"
    resumed = run_cli("resume", tmp_path / "b")
    assert resumed.returncode == 0 and "Resuming at step 3" in resumed.stderr
    assert_same(final_state(RunFolder(tmp_path / "b")), final_state(RunFolder(tmp_path / "a")))
    assert not list(tmp_path.glob("b/**/.*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_cleanly(images, undisturbed, tmp_path, monkeypatch, capsys, number):
    real = pretraining.make_views
    made = iter(range(10_000))

    def views(*args, **kwargs):
        if next(made) == 8:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(pretraining, "make_views", views)
    path = tmp_path / "run"
    with pytest.raises(Stopped, match=f"Stopped at step 9, saved; `simclr resume {path}` continues") as stopped:
        train(images, SMALL_RUN, path)
    assert stopped.value.signal == number and newest_step(path) == 9
    run, outcome = train(images, SMALL_RUN, tmp_path / "run")
    assert outcome.finished
    assert_same(final_state(run), final_state(undisturbed))


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(images, tmp_path, monkeypatch):
    real = pretraining.make_views
    made = iter(range(10_000))

    def views(*args, **kwargs):
        views_a, views_b = real(*args, **kwargs)
        return (views_a * float("nan"), views_b) if next(made) == 7 else (views_a, views_b)

    monkeypatch.setattr(pretraining, "make_views", views)
    with pytest.raises(UserError, match=r"no longer finite.*last good checkpoint"):
        train(images, SMALL_RUN, tmp_path / "run")
    step, state = known(load_newest(tmp_path / "run" / "checkpoints", pytest.fail))
    assert step == 5
    assert all(torch.isfinite(v).all() for v in state["method"].values())


def test_each_image_is_seen_once_an_epoch_whatever_the_number_of_processes(images, monkeypatch):
    """The batches of 1, 2 and 4 processes hold the same views, bit for bit, in the order of their ranks."""
    seen = []
    real = pretraining.make_views

    def views(pixels, policy, *, epoch, indices, **kwargs):
        seen.append(np.stack([epoch, indices], axis=1))
        return real(pixels, policy, epoch=epoch, indices=indices, **kwargs)

    monkeypatch.setattr(pretraining, "make_views", views)

    def batches_of(world):
        make_inputs = pretraining._make_inputs(images, SMALL_RUN, world, (8, 8))
        return make_batches(images, make_inputs, batch_size=SMALL_RUN.batch_size, seed=SMALL_RUN.seed, world=world)

    one = batches_of(DistributedContext())
    whole = [one(step) for step in range(15)]
    visits = np.concatenate(seen)[: 3 * 150]
    for epoch in range(3):
        assert sorted(visits[epoch * 150 : (epoch + 1) * 150].tolist()) == [[epoch, i] for i in range(150)]
    for size in (2, 4):
        parts = [batches_of(DistributedContext(rank=r, size=size)) for r in range(size)]
        for step in (0, 4, 14):
            for view in (0, 1):
                assert torch.equal(torch.cat([part(step)[view] for part in parts]), whole[step][view])


MANY_VIEWS = {"views_per_image": 3, "small_crops": "2:5"}
PRIOR = {"loss": "generalised", "prior": "normal"}


def gradients_of_a_step(rank, size, store, dtype, result, settings):
    torch.set_num_threads(1)
    world = DistributedContext()
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        world = DistributedContext(rank=rank, size=size, local_rank=rank)
    images = open_data("digits").subset(np.arange(150))
    config = replace(SMALL_RUN, head_layers=3, knn_every=0, temperature=0.5, batch_size=64, **settings)
    task = pretraining.build_task(images, config, RunFolder(Path(store).parent / "none"), world)
    model = task.method.to(dtype)
    if size > 1:
        model = _over_processes(model)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in task.batch(0))
    loss, metrics = model(*inputs, detail=True)
    loss.backward()
    if rank == 0:
        values = {name: p.grad for name, p in task.method.named_parameters()}
        values |= {f"buffer {name}": b for name, b in task.method.named_buffers() if "num_batches" not in name}
        values |= {f"metric {name}": value for name, value in metrics.items()}
        torch.save(values, result)
    stop()  # while the model is alive


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("dtype", "tolerance", "settings"),
    [
        (torch.float64, 1e-10, {}),
        (torch.float32, 1e-5, {}),
        (torch.float64, 1e-10, MANY_VIEWS),
        (torch.float64, 1e-10, PRIOR),
        (torch.float64, 1e-10, {"loss": "supcon"}),
    ],
    ids=["fp64", "fp32", "fp64, many views", "fp64, prior", "fp64, SupCon"],
)
def test_loss_and_every_gradient_are_those_of_one_process(tmp_path, dtype, tolerance, settings):
    """Encoder, head, global batch norm, loss and DDP together: 1, 2 and 4 processes, one global batch."""
    results = {}
    for size in (1, 2, 4):
        result = tmp_path / f"{size}.pt"
        arguments = (size, str(tmp_path / f"store{size}"), dtype, str(result), settings)
        if size == 1:
            gradients_of_a_step(0, *arguments)
        else:
            run_in_processes(size, gradients_of_a_step, *arguments)
        results[size] = torch.load(result)
    for size in (2, 4):
        for name, expected in results[1].items():
            error = (results[size][name] - expected).norm()
            scale = expected.norm().clamp_min(1e-3 if name.startswith("metric") else 1e-6)
            assert error <= tolerance * scale, f"{name} with {size} processes: {error / scale:.1e}"


def test_prefetched_batches_come_in_order_and_errors_come_through():
    for workers in (0, 1, 3):
        with Prefetcher(lambda step: (torch.tensor(step),), 2, 9, workers) as batches:
            assert [(step, int(inputs[0])) for step, inputs in batches] == [(s, s) for s in range(2, 9)]

    def broken(step):
        raise UserError(f"step {step} cannot be read")

    with Prefetcher(broken, 0, 5, 2) as batches, pytest.raises(UserError, match="step 0"):
        next(iter(batches))
