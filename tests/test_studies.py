"""Studies: arms that can be trained, and tables of their results."""

from dataclasses import replace

import numpy as np
import pytest

from helpers import known
from simclr.config.overrides import Overrides
from simclr.config.recipes import find_recipe
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.methods import find_method
from simclr.studies import grid
from simclr.studies.grid import Study, run_study, table
from simclr.studies.moco import STUDIES


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_arm_has_settings_that_its_method_takes(study):
    assert len(study.arms) > 1
    seen = []
    for own in study.arms.values():
        settings = dict(study.base) | dict(own)
        config = Overrides({k: v for k, v in settings.items() if k != "recipe"})(find_recipe(settings["recipe"]).config)
        find_method(config.method).check(config, DistributedContext(), 10_000)
        seen.append(config)
    assert len(set(seen)) == len(seen)


def test_a_study_trains_equal_arms_once_and_prints_their_spread(tmp_path, monkeypatch):
    digits = open_data("digits").subset(np.arange(120))
    pixels = np.stack([np.asarray(image) for image in digits.read(np.arange(120))])
    np.savez(tmp_path / "a.npz", x_train=pixels[:80], y_train=known(digits.labels)[:80], x_test=pixels[80:],
             y_test=known(digits.labels)[80:])  # fmt: skip
    trained, real = [], grid.pretrain
    monkeypatch.setattr(grid, "pretrain", lambda *args, **kwargs: trained.append(kwargs) or real(*args, **kwargs))
    study = Study(
        name="small", title="width", source="", claim="", base={"recipe": "digits", "batch_size": 16, "knn_every": 0},
        arms={"half": {"width": 0.5}, "whole": {"width": 1.0}},
    )  # fmt: skip
    twice = replace(study, arms={"half again": {"width": 0.5}})
    results = run_study(
        study, str(tmp_path / "a.npz"), out=tmp_path, seeds=[0, 1], settings={"epochs": 1}, protocol=["knn"]
    )
    assert len(trained) == 4
    again = run_study(
        twice, str(tmp_path / "a.npz"), out=tmp_path, seeds=[0, 1], settings={"epochs": 1}, protocol=["knn"]
    )
    assert len(trained) == 4
    assert [r.metrics for r in again["half again"]] == [r.metrics for r in results["half"]]
    accuracies = [100 * result.value("top1") for result in results["half"]]
    expected = f"| half | {np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f} |"
    assert expected in table(study, results).splitlines()
