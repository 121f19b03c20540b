"""Whether pretraining paid: intervals held to scipy's paired t-test, and sentences that claim nothing within chance."""

import numpy as np
import pytest
from scipy import stats

from helpers import known
from simclr.evaluation.results import Result
from simclr.reports.evaluation import accuracy_rows
from simclr.reports.verdict import comparisons, verdict_summary, verdict_text


def results(values: dict[str, dict[str, list[float]]], *, num_test: int = 10_000) -> list[Result]:
    """Results of {subject: {protocol: accuracies, one per seed}}."""
    return [
        Result(
            protocol=protocol, version={}, model={}, data={}, settings={}, seed=seed, metrics={"top1": value},
            subject=subject, num_test=num_test,
        )
        for subject, by_protocol in values.items()
        for protocol, accuracies in by_protocol.items()
        for seed, value in enumerate(accuracies)
    ]  # fmt: skip


def test_the_strongest_baseline_of_each_column_is_compared_with():
    measured = results(
        {
            "encoder": {"knn": [0.90], "linear": [0.86], "finetune": [0.80]},
            "pixels": {"knn": [0.84], "linear": [0.85]},
            "hog": {"knn": [0.87], "linear": [0.89]},
            "timm/x": {"knn": [0.60], "linear": [0.895]},
            "runs/other": {"knn": [0.99], "linear": [0.99]},
            "supervised": {"supervised": [0.795]},
        }
    )
    knn, linear, trained = comparisons(measured, labels_drawn=False)
    assert (knn.baseline, linear.baseline, trained.baseline) == ("hog", "timm/x", "supervised")
    assert [one.outcome for one in (knn, linear, trained)] == ["better", "worse", "equal"]
    text = verdict_text([knn, linear, trained])
    assert text == (
        "Against the strongest baseline of each column, pretraining paid in kNN (+3.0 ± 0.9 points against hog); made "
        "no difference beyond chance in fine-tuned (+0.5 ± 1.1 points against supervised); and did worse in linear "
        "(-3.5 ± 0.9 points against timm/x) (95 % intervals, from one seed and 10,000 test images)."
    )
    assert verdict_summary([knn])[0]["outcome"] == "better"


def test_the_interval_is_that_of_the_paired_t_test_when_test_images_abound():
    ours, theirs = [0.81, 0.83, 0.80, 0.82], [0.80, 0.80, 0.79, 0.805]
    measured = results({"encoder": {"linear": ours}, "hog": {"linear": theirs}}, num_test=10**12)
    (one,) = comparisons(measured, labels_drawn=True)
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (one.difference - known(one.margin), one.difference + known(one.margin)) == pytest.approx(
        tuple(interval), abs=1e-5
    )
    assert one.num_seeds == 4


def test_test_images_alone_give_the_binomial_interval():
    """Share of differences within the margin, of two equally good models on images drawn at random: 95 %."""
    random = np.random.default_rng(0)
    draws = random.binomial(500, 0.8, (4_000, 2)) / 500
    (one,) = comparisons(results({"encoder": {"knn": [0.8]}, "hog": {"knn": [0.8]}}, num_test=500), labels_drawn=False)
    assert np.mean(np.abs(draws[:, 0] - draws[:, 1]) <= one.margin) == pytest.approx(0.95, abs=0.02)
    assert one.outcome == "equal"


def test_one_draw_of_few_labels_claims_nothing():
    measured = results({"encoder": {"knn": [0.9]}, "hog": {"knn": [0.7]}})
    text = verdict_text(comparisons(measured, labels_drawn=True))
    assert text == (
        "Whether pretraining paid cannot be told from one draw of the labels (kNN +20.0 points against hog): give "
        "--seeds 3."
    )


def test_nothing_is_said_without_a_baseline_or_without_pretraining():
    assert verdict_text(comparisons(results({"encoder": {"knn": [0.9]}}), labels_drawn=False)) == ""
    assert comparisons(results({"hog": {"knn": [0.9]}, "pixels": {"knn": [0.8]}}), labels_drawn=False) == []


def test_seeds_that_only_one_side_has_are_left_out():
    measured = results({"encoder": {"knn": [0.9, 0.9, 0.9]}, "hog": {"knn": [0.8, 0.8]}})
    (one,) = comparisons(measured, labels_drawn=True)
    assert one.num_seeds == 2 and one.difference == pytest.approx(0.1)


def test_rows_have_the_strongest_baseline_first():
    measured = results(
        {
            "encoder": {"knn": [0.5], "linear": [0.5]},
            "random": {"knn": [0.6], "linear": [0.6]},
            "supervised": {"supervised": [0.9]},
            "hog": {"knn": [0.8], "linear": [0.9]},
            "runs/other": {"knn": [0.1], "linear": [0.1]},
            "pixels": {"knn": [0.85], "linear": [0.7]},
        }
    )
    names = [row.name for row in accuracy_rows(measured)]
    assert names == ["encoder", "runs/other", "hog", "pixels", "random", "supervised"]
