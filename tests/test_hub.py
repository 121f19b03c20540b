"""The hub folder: a card that says what the run holds and no more, and one explicit command that uploads it."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import yaml

import simclr
from simclr.cli.main import main
from simclr.errors import UserError
from simclr.models import EncoderConfig, build_encoder
from simclr.tasks.export import export
from simclr.tasks.options.using import Export, Push
from simclr.tasks.push import push
from simclr.weights.folder import save_encoder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["simclr", *map(str, arguments)])
    main()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run on digits, evaluated with kNN."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(
            monkeypatch, "pretrain", "digits", "--out", folder / "my-run", "--epochs", 1, "--encoder", "small",
            "--device", "cpu", "--workers", 1, "--knn-every", 0,
        )  # fmt: skip
        evaluation = ("evaluate", folder / "my-run", "digits", "--protocol", "knn", "--cache", "off", "--device", "cpu")
        call(monkeypatch, *evaluation, "--json", folder / "my-run" / "knn.json")
        call(monkeypatch, *evaluation, "--labels", "10/class", "--seeds", 2)
    return folder / "my-run"


def exported(run: Path, out: Path, licence: str | None = None) -> tuple[dict, str]:
    """Front matter and text of the card."""
    export(Export(run=run, format="hub-folder", out=out, licence=licence))
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def rows(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of every table's row."""
    cells = [line.strip("|").replace("*", "").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in cells}


def test_the_card_says_what_the_run_holds(run: Path, tmp_path: Path) -> None:
    front, text = exported(run, tmp_path / "digits-encoder", licence="cc-by-4.0")
    assert front["license"] == "cc-by-4.0" and front["pipeline_tag"] == "image-feature-extraction"
    assert text.strip().startswith("# digits-encoder")
    config = json.loads((run / "config.json").read_text())
    settings = rows(text)
    for key in ("epochs", "temperature", "batch_size", "optimizer"):
        assert settings[key] == [str(config[key])]
    count = json.loads((run / "run.json").read_text())["data"]["images"]
    assert f"{count:,} unlabelled images, digits" in text
    assert str(run.parent) not in text + (tmp_path / "digits-encoder" / "config.json").read_text()


def test_accuracies_stand_beside_their_baselines(run: Path, tmp_path: Path) -> None:
    _, text = exported(run, tmp_path / "out")
    summary = json.loads((run / "knn.json").read_text())
    accuracy = text.partition("## Accuracy")[2].partition("## Intended")[0]
    whole, few = (rows(part) for part in accuracy.split("Top-1 in %")[1:])
    assert accuracy.strip().startswith("digits: ") and accuracy.count("digits: ") == 2 and "10/class" in accuracy
    for name, title in (("encoder", "encoder"), ("random", "random (baseline)"), ("pixels", "pixels (baseline)")):
        assert whole[title] == [f"{100 * summary[name]['knn']:.1f}"]
        assert "±" in few[title][0]  # two seeds


def test_results_of_other_weights_are_not_claimed(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = simclr.load(run).encoder.config
    shutil.rmtree(tmp_path / "run" / "encoder")
    save_encoder(build_encoder(config, seed=9), tmp_path / "run" / "encoder", preprocessing="google", origin={})
    _, text = exported(tmp_path / "run", tmp_path / "out")
    assert "Not measured for these weights" in text and "encoder (" not in text.partition("## Accuracy")[2]
    assert "results are of other weights" in capsys.readouterr().err


def test_an_encoder_without_a_run_claims_nothing(tmp_path: Path) -> None:
    encoder = build_encoder(EncoderConfig("small", channels=1, size=12))
    origin = {"imported_from": "/home/me/secret/model.ckpt-7", "format": "TensorFlow 1 checkpoint"}
    save_encoder(encoder, tmp_path / "encoder", preprocessing="google", origin=origin)
    front, text = exported(tmp_path / "encoder", tmp_path / "out")
    assert front["license"] == "other" and "has stated none" in text
    assert "Imported from model.ckpt-7" in text and "secret" not in text and "Not measured" in text
    pixels = np.zeros((1, 12, 12), np.uint8)
    assert np.array_equal(simclr.load(tmp_path / "out").embed(pixels), simclr.load(tmp_path / "encoder").embed(pixels))


def test_a_fine_tuned_networks_card_has_what_the_command_measured(run: Path, tmp_path: Path, monkeypatch) -> None:
    flags = ["--labels", "5/class", "--epochs", "0", "--min-steps", "5", "--workers", "0"]
    call(monkeypatch, "finetune", run, "digits", "--out", tmp_path / "tuned", *flags)
    summary = json.loads((tmp_path / "tuned" / "summary.json").read_text())
    _, card = exported(tmp_path / "tuned", tmp_path / "out")
    assert rows(card)["encoder"] == [f"{100 * summary['accuracy']['top-1']:.1f}"]
    assert "kNN on raw pixels" in rows(card) and "50 labels used" in card
    (tmp_path / "tuned" / "evaluation" / "results.jsonl").unlink()  # as earlier versions left it
    _, of_summary = exported(tmp_path / "tuned", tmp_path / "again")
    assert rows(of_summary) == rows(card)
    assert "Made by `simclr finetune`" in card and "Not measured" not in card


class Hub:
    """Stands in for HfApi."""

    calls: ClassVar[list[tuple]] = []
    refuse = False

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        if self.refuse:
            raise ConnectionError("no route\nto the hub")
        self.calls.append(("upload", repo_id, folder_path, allow_patterns, commit_message))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_push_uploads_the_folder_and_nothing_else(tmp_path: Path, monkeypatch, capsys) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    save_encoder(
        build_encoder(EncoderConfig("small", channels=1, size=12)), tmp_path / "e", preprocessing="google", origin={}
    )
    exported(tmp_path / "e", tmp_path / "out")
    assert Hub.calls == []  # exporting uploads nothing
    push(Push(folder=tmp_path / "out", repo_id="me/digits", private=True, message="first"))
    create, upload = Hub.calls
    assert create == ("create", "me/digits", True, True)
    files = ["config.json", "model.safetensors", "preprocessing.json", "README.md"]
    assert upload == ("upload", "me/digits", tmp_path / "out", files, "first")
    assert "https://hub/commit/1" in capsys.readouterr().err

    monkeypatch.setattr(Hub, "refuse", True)
    with pytest.raises(UserError, match=r"Nothing was pushed.*\(no route\).*log in with `hf auth login`"):
        push(Push(folder=tmp_path / "out", repo_id="me/digits"))
    with pytest.raises(UserError, match=r"has no preprocessing\.json, README\.md; make it with `simclr export"):
        push(Push(folder=tmp_path / "e", repo_id="me/digits"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'simclr-torch\[hub\]'"):
        push(Push(folder=tmp_path / "out", repo_id="me/digits"))
