"""The loss benchmark: it sees the matrices that a dense loss holds, and refuses to compare losses that differ."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_extra_memory_is_that_of_the_matrices() -> None:
    import loss
    from common import in_fresh_process

    rows = 3000
    extra = in_fresh_process(1, loss.extra_memory, loss.DENSE, rows, "cpu")
    assert 2 <= extra / (4 * rows**2) <= 1.3 * loss.MATRICES[loss.DENSE]


def test_losses_that_differ_end_the_benchmark() -> None:
    import loss

    views = {name: loss.projections(name, 64, "cpu") for name in (loss.OURS, loss.DENSE)}
    losses = {name: loss.contender(name) for name in views}
    errors = loss.compare(losses, views)
    assert errors[loss.DENSE]["loss"] < 1e-5 and errors[loss.DENSE]["gradient"] < 1e-5
    with pytest.raises(SystemExit, match="differ"):
        loss.compare(losses | {loss.DENSE: lambda za, zb: 1.001 * losses[loss.DENSE](za, zb)}, views)


def test_what_does_not_fit_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import loss

    monkeypatch.setattr(loss, "available_memory", lambda: 1e9)
    fitting, left_out = loss.which_fit(16_384, "cpu")
    assert fitting == [loss.OURS] and "would need 3 GB of the 1 free" in left_out[loss.DENSE]
