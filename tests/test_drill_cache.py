"""Short form of benchmarks/drill_cache.py: what decides a result computes it anew, and nothing else does."""

from pathlib import Path

import pytest

PROTOCOLS = ("knn", "linear", "finetune", "supervised", "curve", "probe", "label-free")
SHORT = ("pixel of a test image", "label", "weight", "weight of the head", "version of kNN", "times of files")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_what_decides_is_computed_anew_and_nothing_else() -> None:
    import drill_cache

    chosen = [scenario for scenario in drill_cache.DECIDING + drill_cache.NEUTRAL if scenario.name in SHORT]
    assert len(chosen) == len(SHORT)
    found = dict(drill_cache.drill(chosen, "images.npz", compare=False, protocols=PROTOCOLS))
    assert {name: finding for name, finding in found.items() if finding} == {} and len(found) == len(SHORT) + 1
