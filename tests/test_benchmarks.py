"""The benchmarks that check something: bytes between processes against the formula, the emoji split, the GPU suite."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

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
        sections[name]["right"] for name in ("views-against-reference", "loss-against-dense", "queue-loss", "resume")
    )


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
