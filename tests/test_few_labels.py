"""benchmarks/few_labels.py: tables and picture of a tiny comparison on held-out training images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import simclr
from simclr.config.finetune import FINETUNE_RECIPES

ROOT = Path(__file__).parents[1]


def test_both_parts_are_measured_once_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("small", "small-supervised"):
        quick = replace(FINETUNE_RECIPES[name], epochs=0, min_steps=2, batch_size=8, workers=0)
        monkeypatch.setitem(FINETUNE_RECIPES, name, quick)
    import few_labels

    run = simclr.pretrain(
        "digits", out=tmp_path / "run", recipe="digits", epochs=1, batch_size=64, width=0.5, workers=0
    )
    out = tmp_path / "out"
    flags = ["--run", run.path, "--rows", 400, "--counts", 10, 20, "--labels", "5/class", "--seeds", 0, "--out", out]
    monkeypatch.setattr("sys.argv", ["few_labels.py", "digits", *map(str, flags)])
    few_labels.main()
    table = capsys.readouterr().out
    for row in ("linear probe, selected", "kNN, k 1, random", "classes met", "finetune, pseudo-labels", "supervised"):
        assert f"| {row}" in table or f"| **{row}" in table, table
    assert "on 80 held-out training images" in table
    assert (out / "selected-labels.png").read_bytes().startswith(b"\x89PNG")
    parts = json.loads((out / "few_labels.json").read_text())
    assert len(parts["select"]) == len(parts["pseudo"]) == 4
    assert {result["num_train"] for result in parts["select"]} == {10, 20}
    lines = (out / "results.jsonl").read_bytes()
    monkeypatch.setattr(few_labels, "accuracies_of", lambda *_: pytest.fail("measured again"))
    few_labels.main()
    assert capsys.readouterr().out == table and (out / "results.jsonl").read_bytes() == lines
