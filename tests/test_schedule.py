"""Step counts and rates against figures printed by the authors' code, and properties of any schedule."""

from itertools import pairwise

import pytest

from simclr import UserError
from simclr.config.schedule import learning_rate, peak_lr, total_steps, warmup_steps


def test_step_counts_of_the_authors():
    assert total_steps(50000, 1000, 512) == 97657
    assert warmup_steps(50000, 10, 512) == 976
    assert total_steps(1281167, 100, 4096) == 31279
    assert warmup_steps(1281167, 10, 4096) == 3127
    assert total_steps(1281167, 800, 4096) == 250228
    assert warmup_steps(1281167, 40, 4096) == 12511
    assert isinstance(total_steps(1000, 2.5, 64), int) and isinstance(warmup_steps(1000, 2.5, 64), int)


def test_rates_of_the_authors():
    """CIFAR-10, batch 512, 1,000 epochs, base 1.0 linear; ImageNet, batch 4,096, 100 epochs, base 0.075 sqrt."""
    cifar = {"peak": peak_lr(1.0, 512, "linear"), "warmup_steps": 976, "total_steps": 97657}
    for step, rate in {1: 0.00204918, 100: 0.20491803, 976: 2.0, 50000: 0.97779179, 97000: 0.00022787}.items():
        assert learning_rate(step, **cifar) == pytest.approx(rate, abs=1e-6)
    imagenet = {"peak": peak_lr(0.075, 4096, "sqrt"), "warmup_steps": 3127, "total_steps": 31279}
    for step, rate in {1000: 1.53501773, 3127: 4.8, 10000: 4.12801504, 20000: 1.66299665}.items():
        assert learning_rate(step, **imagenet) == pytest.approx(rate, abs=1e-6)


def test_scalings():
    assert peak_lr(0.3, 4096, "linear") == pytest.approx(4.8)
    assert peak_lr(0.075, 4096, "sqrt") == pytest.approx(4.8)
    assert peak_lr(0.3, 4096, "none") == 0.3
    with pytest.raises(UserError, match="cubic"):
        peak_lr(0.3, 4096, "cubic")  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_shape(warmup):
    rates = [learning_rate(step, peak=2.0, warmup_steps=warmup, total_steps=40) for step in range(45)]
    assert rates[warmup] == max(rates) == 2.0
    assert warmup == 0 or rates[0] == 0
    assert all(earlier < later for earlier, later in pairwise(rates[: warmup + 1]))
    assert all(earlier > later for earlier, later in pairwise(rates[warmup:41]))
    assert rates[40:] == [0.0] * 5


def test_a_warmup_longer_than_the_run_is_all_warmup():
    rates = [learning_rate(step, peak=1.0, warmup_steps=10, total_steps=5) for step in range(5)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
