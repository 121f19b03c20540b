"""Several processes (gloo) against one: the same loss, the same gradients, the same figures."""

import os
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers import gloo_threads, in_processes, known
from processes import run_in_processes
from simclr import UserError, distributed
from simclr.data.images import array_images
from simclr.distributed import DistributedContext, joined, start, stop
from simclr.errors import ReportedElsewhere
from simclr.losses import contrastive_accuracy_and_entropy, nt_xent, nt_xent_dense
from simclr.losses.streamed import others_logsumexp
from simclr.models import EncoderConfig, build_encoder
from simclr.models.batchnorm import set_global_batch_norm
from simclr.models.inference import extract

NUM_IMAGES = 24


def test_a_process_on_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = start("cpu")
    x = torch.arange(6.0).view(3, 2)
    assert world == DistributedContext() and world.is_main and world.group is None
    assert not torch.distributed.is_initialized()
    assert torch.equal(world.all_gather_rows(x), x) and torch.equal(world.all_reduce_sum(x), x)
    assert world.any_rank(True) and not world.any_rank(False)
    assert world.broadcast("word") == "word" and world.local_slice(7) == slice(0, 7)
    world.barrier()
    stop()


def test_a_batch_is_shared_evenly_or_refused():
    assert [DistributedContext(rank=rank, size=4).local_slice(8) for rank in (0, 3)] == [slice(0, 2), slice(6, 8)]
    with pytest.raises(UserError, match="--batch-size was 10, which 4 processes cannot share evenly"):
        DistributedContext(size=4).local_slice(10)


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="RANK"):
        start("cpu")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        start("cpu")


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"needs GPU 3, but torch sees 1"):
        start("cuda:3")


def check_features(world: DistributedContext) -> None:
    """Batches of 7 and a rest in turn, two rounds: the rows of one process, to the last bit, in every process."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    images = array_images(pixels, None, name="noise", split="all", has_own_split=False, classes=None, channels="auto")
    encoder = build_encoder(EncoderConfig("small", channels=1, size=8, width=0.5), seed=5)
    alone, told = extract(encoder, images, batch_size=7), []
    shared = extract(encoder, images, batch_size=7, world=world, progress=lambda done, _: told.append(done))
    assert np.array_equal(shared, alone) and told == [14, 24]


@pytest.mark.multiprocess
def test_features_are_those_of_a_single_process(tmp_path):
    in_processes(2, tmp_path, check_features)


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 4])
def test_equals_a_single_process(size, tmp_path):
    in_processes(size, tmp_path, check_everything)


@pytest.mark.multiprocess
def test_a_lost_process_is_an_error_and_not_a_hang(tmp_path):
    in_processes(2, tmp_path, check_lost_process)


def check_everything(world: DistributedContext) -> None:
    check_exchanges(world)
    check_metrics(world)
    check_row_gradients(world)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for temperature, normalize in ((0.1, True), (0.02, True), (2.0, False)):
            check_training_step(world, dtype, tolerance, temperature, normalize)


def check_exchanges(world: DistributedContext) -> None:
    rank, size = world.rank, world.size
    gathered = world.all_gather_rows(torch.full((2, 3), float(rank), requires_grad=True))
    assert gathered.shape == (2 * size, 3) and not gathered.requires_grad
    assert torch.equal(gathered[:, 0], torch.arange(size).repeat_interleave(2).float())
    share = torch.tensor([1.0, rank])
    assert world.all_reduce_sum(share).tolist() == [size, size * (size - 1) / 2]
    assert world.all_reduce_mean(share).tolist() == [1, (size - 1) / 2]
    assert share.tolist() == [1, rank]
    assert world.any_rank(rank == size - 1) and not world.any_rank(False)
    assert world.broadcast({"seed": rank}) == {"seed": 0}
    assert world.is_main == (rank == 0)
    world.barrier()


def check_metrics(world: DistributedContext) -> None:
    za, zb = global_views(torch.float64)[:, :, :5].unbind()
    own = world.local_slice(NUM_IMAGES)
    got = contrastive_accuracy_and_entropy(za[own], zb[own], 0.2, world=world)
    expected = contrastive_accuracy_and_entropy(za, zb, 0.2)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def check_row_gradients(world: DistributedContext) -> None:
    """Tiles that do not divide a process's rows, and a scalar in which each row has its own weight."""
    z = global_views(torch.float64)[0].requires_grad_()  # (24, 10)
    weights = torch.linspace(-1, 2, len(z), dtype=torch.float64)
    expected = others_logsumexp(z, 3.0, bounded=False)
    (expected_grad,) = torch.autograd.grad(expected @ weights, z)
    own = world.local_slice(len(z))
    for bounded in (True, False):
        for tile in (1, 5, 100):
            log_sums = others_logsumexp(z, 3.0, bounded=bounded, world=world, tile=tile)
            torch.testing.assert_close(log_sums, expected)
            (grad,) = torch.autograd.grad(log_sums @ weights, z)
            torch.testing.assert_close(grad[own], expected_grad[own])
            assert not grad[: own.start].any() and not grad[own.stop :].any()


def check_training_step(
    world: DistributedContext, dtype: torch.dtype, tolerance: float, temperature: float, normalize: bool
) -> None:
    """Loss and every gradient of an encoder in DistributedDataParallel, relative to the single process's."""
    views = global_views(dtype)
    alone, shared = encoder(dtype), encoder(dtype)
    za, zb = alone(views)
    expected = nt_xent_dense(za, zb, temperature, normalize)
    expected.backward()

    own = views[:, world.local_slice(NUM_IMAGES)]
    parallel = DistributedDataParallel(shared)  # named, because its hooks die with it
    za, zb = parallel(own)
    loss = nt_xent(za, zb, temperature, normalize, world=world)
    loss.backward()
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
        error = (known(ours.grad) - known(theirs.grad)).norm() / known(theirs.grad).norm()
        assert error <= tolerance, (error, ours.shape, dtype, temperature, normalize)


def check_lost_process(world: DistributedContext) -> None:
    if world.is_main:
        with pytest.raises(RuntimeError):
            world.any_rank(False)


@pytest.mark.multiprocess
def test_nothing_outlives_the_group(tmp_path):
    in_processes(2, tmp_path, check_remains)


REMAINS = []


def check_remains(world: DistributedContext) -> None:
    """A user's model, one that global batch norm was set for, a loss with its graph, the frames of an exception."""
    assert gloo_threads() or not Path("/proc/self/task").is_dir()
    model = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8))
    set_global_batch_norm(model, world.group)
    parallel = DistributedDataParallel(model)
    loss = parallel(global_views(torch.float32)[0]).sum()
    loss.backward()
    try:
        failing_step()
    except ValueError as error:
        REMAINS.extend([model, parallel, loss, error])
    again = deepcopy(model)
    assert again[1].process_group is world.group


def failing_step() -> None:
    parallel = DistributedDataParallel(nn.Linear(10, 8))
    raise ValueError(parallel)


@pytest.mark.multiprocess
def test_an_error_in_one_process_ends_all(tmp_path):
    """Each with its own kind of end, in two processes that meet again and again."""
    run_in_processes(2, check_errors, tmp_path)


def check_errors(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    distributed.REPORT_TIMEOUT = timedelta(milliseconds=1)  # the first to fail does not end, as it would under torchrun

    def fail(name: str, work: Callable[[DistributedContext], object]) -> Exception:
        with (
            pytest.raises(Exception) as caught,
            joined("cpu", timeout=timedelta(seconds=60), init_method=f"file://{folder / name}") as world,
        ):
            work(world)
            world.barrier()
        return caught.value

    error = fail("one", lambda world: None if world.is_main else Path("/nowhere/image.png").read_bytes())
    assert isinstance(error, FileNotFoundError if rank == 1 else ReportedElsewhere)

    def refuse(world: DistributedContext) -> None:
        if world.is_main:
            raise UserError("the folder is in use")

    error = fail("main", refuse)
    assert isinstance(error, ReportedElsewhere) == (rank == 1)

    error = fail("settings", lambda world: world.require_equal("settings", {"lr": 1, "seed": rank}, "Give one seed."))
    assert isinstance(error, ReportedElsewhere) or str(error) == (
        "The processes do not have the same settings: seed is 0 on process 0 and 1 on process 1. Give one seed."
    )
    distributed._versions = lambda: {"torch": f"2.1{rank}"}
    with pytest.raises(UserError, match=r"same software: torch is 2\.10 on process 0 and 2\.11 on process 1\."):
        start("cpu", init_method=f"file://{folder / 'versions'}")
    stop()

    distributed._versions = dict
    error = fail("killed", lambda world: None if world.is_main else os._exit(0))
    assert "Another process of this run ended without a message" in str(error)


def global_views(dtype: torch.dtype) -> torch.Tensor:
    """(2, NUM_IMAGES, 10): the same in every process."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(1, NUM_IMAGES, 10, dtype=torch.float64, generator=draw)
    return (images + 0.5 * torch.randn(2, NUM_IMAGES, 10, dtype=torch.float64, generator=draw)).to(dtype)


def encoder(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 8, bias=False)).to(dtype)


@pytest.mark.multiprocess
def test_what_a_process_raises_is_what_the_test_says():
    with pytest.raises(AssertionError, match="as planned"):
        run_in_processes(2, fail)


def fail(rank):
    raise ValueError(f"as planned, on {rank}")
