"""The benchmarks that check something: bytes between processes against the formula, the emoji split, the GPU suite."""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts are importable, here and in processes that they start."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_two_processes_move_the_bytes_of_the_formula() -> None:
    import scaling

    measured = scaling.launch(2, argparse.Namespace(batch=8, encoder="small", size=8, steps=2))
    assert measured["counted"] == measured["formula"]
    assert measured["counted"]["projections"] == 8 * 128 * 4  # 4 images, 2 views, 128 numbers of 4 bytes


def test_variants_of_an_emoji_are_on_one_side_and_tests_have_no_skin_tones() -> None:
    import emoji

    def entry(unified: str, category: str = "People & Body", tones: bool = False, **more: str) -> dict:
        file = unified.lower()
        variants = {t: {"image": f"{file}-{t.lower()}.png"} for t in ("1F3FB", "1F3FF")} if tones else {}
        return {"unified": unified, "image": f"{file}.png", "category": category, "skin_variations": variants} | more

    runners = [entry("1F3C3", tones=True), entry("1F3C3-200D-2640-FE0F", tones=True)]
    old = [entry("1F46B"), entry("1F468-200D-1F91D", obsoletes="1F46B")]
    cooks = [entry(f"{adult}-200D-1F373", tones=True) for adult in ("1F468", "1F469", "1F9D1")]
    others = [entry(f"1F4{i:02X}", "Objects") for i in range(100)] + [entry("1F3FB", "Component")]
    people = [entry(f"1F9{i:02X}", tones=True) for i in range(0x30, 0x60)]
    flags = [entry(f"1F1FA-1F1{i:02X}", "Flags") for i in (0xF8, 0xF2, *range(0xD0, 0xF0))]
    tested = set()
    for seed in range(20):
        side = emoji.split([*runners, *old, *cooks, *others, *people, *flags], seed)
        for family in (runners, old, cooks, flags[:2]):  # the United States and their outlying islands
            assert len({side[e["image"]] for e in family}) == 1
            tested |= {e["image"] for e in family if side[e["image"]][0] == "test"}
        assert "1f3fb.png" not in side
        assert not any("-1f3f" in image for image, (part, _) in side.items() if part == "test")
        objects = [part for part, category in side.values() if category == "objects"]
        assert objects.count("test") == 20
    assert len(tested) == 9  # each family was tested under some seed


def test_gpu_suite_runs_and_its_checks_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with the smallest sizes; a section that is cut off or fails must not take the others with it."""
    import gpu_suite

    def broken(_bench: object) -> dict:
        raise ValueError("as planned")

    monkeypatch.setattr(gpu_suite, "SECTIONS", [("broken", broken, 5), *gpu_suite.SECTIONS])
    out = tmp_path / "suite.json"
    monkeypatch.setattr("sys.argv", ["gpu_suite.py", "--device", "cpu", "--tiny", "--out", str(out)])
    with pytest.raises(SystemExit, match="failed: broken; ran, but not right: none"):
        gpu_suite.main()
    sections = json.loads(out.read_text())["sections"]
    assert sections.pop("broken")["error"] == "ValueError: as planned"
    needs_gpu = {"batch-65536", "tests"}
    assert {name for name, found in sections.items() if found["status"] == "skipped"} == needs_gpu
    assert all(found["status"] == "done" for name, found in sections.items() if name not in needs_gpu)
    assert all(
        sections[name]["right"]
        for name in ("views-against-reference", "loss-against-dense", "queue-loss", "cuda-graph", "resume")
    )
    assert "cifar-fast" not in sections  # which takes the time of a whole call


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut off"])
def test_challenge_trains_evaluates_and_counts_its_time(cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrunk: images of 16 pixels whose colour is their class, and 40 updates whatever the speed."""
    import gpu_challenge
    import gpu_suite

    for part, count in (("train", 90), ("test", 30)):
        write_parquet(tmp_path / f"{part}.parquet", count)
    monkeypatch.setattr(gpu_challenge, "MEASURE", 0.01)
    monkeypatch.setattr(gpu_challenge.Speed, "steps", lambda speed, seconds: 40)
    if cut:
        monkeypatch.setattr(gpu_challenge.Clock, "cut_off", 0.0)
    out = tmp_path / "challenge.json"
    command = f"gpu_suite.py --device cpu --tiny --only cifar-fast --data {tmp_path} --minutes 5 --out {out}"
    monkeypatch.setattr("sys.argv", command.split())
    gpu_suite.main()
    (found,) = json.loads(out.read_text())["sections"].values()
    assert found["status"] == "done", found
    assert found["lossless"] and found["images"].startswith("90 and 30 of ")
    schedule, seconds = found["schedule"], found["seconds_of"]
    assert (schedule["complete"], schedule["steps"], schedule["planned_steps"]) == (not cut, 1 if cut else 40, 40)
    assert schedule["epochs"] == pytest.approx(schedule["steps"] * 4 / 90)
    assert sum(seconds.values()) < found["seconds"] + 0.1
    assert found["knn"] >= 0.9 and found["linear"] >= 0.9  # one update leaves a random encoder, which sees colours
    if cut:
        assert found["minutes_to_90_knn"] is None and found["linear_goals_reached"] == []
    else:
        assert found["minutes_to_90_knn"]["training"] == pytest.approx(seconds["training"] / 60)
        assert found["linear_goals_reached"] == [goal for goal in (0.85, 0.90, 0.92) if found["linear"] >= goal]


def write_parquet(path: Path, count: int) -> None:
    """PNG images in three classes, as Hugging Face's `datasets` writes them."""
    from pyarrow import Table, parquet

    generator, rows = np.random.default_rng(count), []
    for i in range(count):
        pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[..., i % 3] += 150
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{i}.png"}, "label": i % 3})
    parquet.write_table(Table.from_pylist(rows), path)


def test_challenge_claims_only_what_a_whole_schedule_reached() -> None:
    from gpu_challenge import minutes_to_goal

    seconds = {"reading": 30.0, "measuring": 30.0, "training": 240.0, "features": 99.0}
    assert minutes_to_goal(0.9, True, seconds) == {"training": 4.0, "with_reading_and_measuring": 5.0}
    assert minutes_to_goal(0.8999, True, seconds) is None
    assert minutes_to_goal(0.95, False, seconds) is None


def test_challenge_schedule_fits_its_time() -> None:
    import gpu_suite
    from gpu_challenge import Clock, Speed

    speed = Speed(start=7.0, step=0.02)
    steps = speed.steps(400.0)
    assert 7.0 + steps * 0.02 < 400.0 and steps > 18_000
    assert speed.steps(1.0) == 1
    clock = Clock(60 * gpu_suite.MINUTES)
    assert clock.end_of_training == 480 - 45 and clock.cut_off == 480 - 22.5
    budgets = {name: budget for name, _, budget in gpu_suite.SECTIONS}
    assert gpu_suite.total_seconds({"cifar-fast": 480}) == 480
    assert gpu_suite.total_seconds(budgets) == gpu_suite.TOTAL < 9 * 60


def test_challenge_knn_is_that_of_scikit_learn() -> None:
    from gpu_challenge import knn_accuracy

    generator = np.random.default_rng(0)
    train, test = (generator.normal(size=(n, 8)).astype(np.float32) for n in (400, 200))
    labels, targets = ((x[:, 0] > 0) + 2 * (x[:, 1] > 0.5) for x in (train, test))
    theirs = KNeighborsClassifier(n_neighbors=10, metric="cosine").fit(train, labels).score(test, targets)
    assert knn_accuracy(train, labels, test, targets, torch.device("cpu")) == pytest.approx(theirs)


def test_the_parts_of_a_step_add_up(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Each part runs once; the encoder's is what the others leave of views and step, by times that are made up."""
    import parts

    seconds = iter((1.0, 2.0, 3.0, 10.0))  # views, loss, optimiser, step

    def timed(work: Callable[[], object], _times: int) -> float:
        work()
        return next(seconds)

    monkeypatch.setattr(parts, "median", timed)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)  # the other tests keep theirs
    monkeypatch.setattr("sys.argv", ["parts.py", "--recipe", "digits", "--batch", "64", "--channels", "1"])
    parts.main()
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert {name.strip(): (float(ms), float(share)) for name, ms, share in rows} == {
        "views": (1000.0, 9.1),
        "loss, forward and backward": (2000.0, 18.2),
        "optimiser": (3000.0, 27.3),
        "encoder and head, forward and backward": (5000.0, 45.5),
    }
