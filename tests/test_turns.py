"""Threads that share tiles: the sums of one thread, and no thread that waits for ever."""

from threading import Barrier, Lock

import pytest
import torch

from simclr.losses import streamed
from simclr.losses.streamed import others_logsumexp
from simclr.losses.turns import Turns, in_threads

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def log_sums_and_gradient(threads: int, *, bounded: bool, group: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(330, 16, generator=draw)).requires_grad_()
    log_sums = others_logsumexp(z, 0.1, bounded=bounded, group=group, tile=32)
    log_sums.square().sum().backward()
    assert torch.get_num_threads() == threads
    assert z.grad is not None
    return log_sums.detach(), z.grad


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_give_the_bits_of_one(threads, group, bounded, monkeypatch) -> None:
    monkeypatch.setattr(streamed, "ROWS_PER_THREAD", 1)
    alone = log_sums_and_gradient(1, bounded=bounded, group=group)
    for _ in range(3):  # whichever thread comes first
        shared = log_sums_and_gradient(threads, bounded=bounded, group=group)
        assert torch.equal(shared[0], alone[0]) and torch.equal(shared[1], alone[1])


def test_threads_share_the_loss_in_inference_mode(monkeypatch) -> None:
    monkeypatch.setattr(streamed, "ROWS_PER_THREAD", 1)
    torch.set_num_threads(2)
    with torch.inference_mode():
        z = torch.nn.functional.normalize(torch.randn(100, 8))
        got = others_logsumexp(z, 0.5, bounded=True, tile=10)
    s = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    assert torch.allclose(got, s.logsumexp(1))


def test_each_row_goes_to_one_of_the_threads_and_each_has_one_of_torchs() -> None:
    torch.set_num_threads(3)
    turns, lock, all_here = Turns(40), Lock(), Barrier(3)
    seen: list[tuple[int, int, bool]] = []

    def work() -> None:
        all_here.wait(30)
        for row in turns.rows():
            with lock:
                seen.append((row, torch.get_num_threads(), torch.is_grad_enabled()))

    in_threads(work, turns, 3)
    assert sorted(seen) == [(row, 1, False) for row in range(40)]
    assert torch.get_num_threads() == 3 and torch.is_grad_enabled()


def test_a_row_follows_the_one_above() -> None:
    turns, order, lock = Turns(2), [], Lock()

    def work() -> None:
        for row in turns.rows():
            for tile in range(4 - row):
                if row:
                    turns.wait(row - 1, tile + 2)
                with lock:
                    order.append((row, row + tile))
                turns.added(row)

    in_threads(work, turns, 2)
    for column in (1, 2, 3):
        assert order.index((0, column)) < order.index((1, column))


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_thread_is_raised_and_ends_the_others(failing) -> None:
    turns = Turns(2)

    def work() -> None:
        for row in turns.rows():
            if row == failing:
                raise MemoryError("no room for a tile")
            turns.wait(failing, 1)  # in vain

    with pytest.raises(MemoryError, match="no room"):
        in_threads(work, turns, 2)
