"""Tables over seeds: figures held to the standard library's statistics, layout to what a person would write."""

import statistics

import pytest

from simclr.evaluation.metrics import mean_and_spread
from simclr.reports.table import Row, markdown_table, seeds_note, text_table, with_spread

ROWS = [
    Row("encoder", {"knn": [0.70, 0.72, 0.77], "linear": [0.8]}),
    Row("pixels", {"knn": [0.6, 0.6, 0.6], "linear": [0.9]}, baseline=True),
    Row("a|b", {"knn": [], "probe": [0.125]}),
]


def test_mean_and_spread_are_those_of_the_standard_library():
    values = [0.70, 0.72, 0.77, 0.9]
    assert mean_and_spread(values) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert mean_and_spread([0.3]) == (0.3, None)


def test_cells():
    assert with_spread([0.70, 0.72, 0.77]) == "73.0 ± 3.6"
    assert with_spread([3.0, 4.0], percent=False, digits=2) == "3.50 ± 0.71"
    assert (with_spread([0.5]), with_spread([])) == ("50.0", "-")


def test_text_table_is_aligned_and_marks_baselines():
    assert text_table(ROWS, corner="top-1").split("\n") == [
        "top-1                     knn  linear  probe",
        "encoder            73.0 ± 3.6    80.0      -",
        "pixels (baseline)  60.0 ± 0.0    90.0      -",
        "a|b                         -       -   12.5",
    ]


def test_markdown_table_has_the_best_in_bold_baseline_or_not():
    assert markdown_table(ROWS).split("\n") == [
        "|  | knn | linear | probe |",
        "| --- | ---: | ---: | ---: |",
        "| encoder | **73.0 ± 3.6** | 80.0 | - |",
        "| pixels (baseline) | 60.0 ± 0.0 | **90.0** | - |",
        "| a\\|b | - | - | 12.5 |",
    ]


def test_figures_that_print_alike_are_both_best():
    table = markdown_table([Row("a", {"x": [0.50001]}), Row("b", {"x": [0.5]}), Row("c", {"x": [float("nan")]})])
    assert table.count("**50.0**") == 2


def test_the_note_says_how_many_seeds():
    assert seeds_note(ROWS) == "mean ± sample standard deviation over 1 to 3 seeds"
    assert seeds_note(ROWS[:1] * 2) == seeds_note(ROWS)
    assert seeds_note([Row("a", {"x": [1.0, 2.0]})]) == "mean ± sample standard deviation over 2 seeds"
    assert "no spread" in seeds_note([Row("a", {"x": [1.0]})])
