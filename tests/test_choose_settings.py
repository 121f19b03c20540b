"""benchmarks/choose_settings.py: the split of training images, one tiny comparison, and the rule on made-up runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from helpers import known
from simclr.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is importable, here and in processes that it starts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_arms_are_trained_scored_and_not_run_again(tmp_path, monkeypatch, capsys) -> None:
    import choose_settings

    out = tmp_path / "runs.jsonl"
    flags = ["--data", "digits", "--minutes", "0.02", "--cores", "1", "--draws", "1", "--out", str(out)]
    arms = ["--arm", "control", "--arm", "crops", "crop_min=0.5", "width=0.5", "--arm", "hog"]
    monkeypatch.setattr("sys.argv", ["choose_settings.py", *flags, *arms])
    choose_settings.main()
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [run["arm"] for run in runs] == ["control", "crops", "hog"]
    for run in runs:
        assert set(run["scores"]) == set(choose_settings.SCORES) and all(0 <= x <= 1 for x in run["scores"].values())
        assert run["learn"] == 1_150 and run["held_out"] == 288
    control, crops, hog = runs
    assert control["steps"] > 0 and hog["steps"] == 0
    assert crops["config"]["crop_min"] == 0.5 and control["config"] | crops["settings"] == crops["config"]
    before = out.read_bytes()
    choose_settings.main()
    assert out.read_bytes() == before
    assert "crops may not become a default: helps on 0" in capsys.readouterr().out


def test_a_wrong_setting_is_said_before_anything_runs(tmp_path, monkeypatch) -> None:
    import choose_settings

    flags = ["--data", "digits", "--out", str(tmp_path / "x"), "--arm", "a", "crop_mim=0.5"]
    monkeypatch.setattr("sys.argv", ["choose_settings.py", *flags])
    with pytest.raises(UserError, match="no setting 'crop_mim'"):
        choose_settings.main()


def test_no_variant_of_a_held_out_emoji_is_learnt_from() -> None:
    import choose_settings

    people = [f"1F9{i:02X}" for i in range(0x30, 0x60)]
    codes = [code for person in people for code in (person, f"{person}-1F3FB", f"{person}-200D-2640-FE0F")]
    codes += ["1F1F3-1F1F4", "1F1E7-1F1FB", "1F468-200D-1F373", "1F469-200D-1F373"]  # Norway's flag twice, two cooks
    labels = np.zeros(len(codes), np.int64)
    learn, held_out = choose_settings.split_emoji(codes, labels)

    def people_of(rows) -> set[str]:
        return {codes[row].split("-")[0] for row in rows if codes[row].startswith("1F9")}

    assert len(people_of(held_out)) > 5 and not people_of(learn) & people_of(held_out)
    assert not any("1F3FB" in codes[row] for row in held_out)
    for pair in (range(len(codes) - 4, len(codes) - 2), range(len(codes) - 2, len(codes))):
        assert sum(row in learn for row in pair) in (0, 2)


def made_up(data: str, arm: str, scores: list[float]) -> list[dict]:
    return [
        {"data": data, "arm": arm, "seed": seed, "scores": {"knn": score + 0.1, "linear 1%": score - 0.1}}
        for seed, score in enumerate(scores)
    ]


def test_the_rule() -> None:
    import choose_settings

    control = [0.80, 0.81, 0.82]
    better, worse, slightly = ([c + d for c, d in zip(control, ds, strict=True)] for ds in (
        (0.03, 0.031, 0.03), (-0.006, -0.007, -0.006), (-0.004, -0.003, -0.004),
    ))  # fmt: skip
    base = [run for data in "abc" for run in made_up(data, "control", control)]

    def verdict(*by_set: list[float]) -> str:
        arm = [run for data, scores in zip("abc", by_set, strict=False) for run in made_up(data, "arm", scores)]
        return choose_settings.verdict(base + arm, "arm", "control")

    assert "arm may become a default: helps on 2, hurts on none" in verdict(better, better, slightly)
    assert "arm may not become a default: helps on 2, hurts on c" in verdict(better, better, worse)
    assert "arm may not become a default: helps on 1" in verdict(better, slightly, slightly)
    assert "measured on 2 of 3 sets" in verdict(better, better) and "may not" in verdict(better, better)
    assert "helps on 0" in verdict(better[:1], better[:1], better[:1])  # one seed only screens


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    import choose_settings

    differences = [0.01, 0.03, 0.025]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    margin = known(choose_settings.margin_of(differences))
    assert (np.mean(differences) - margin, np.mean(differences) + margin) == pytest.approx(tuple(expected))
