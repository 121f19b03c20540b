"""Weights whose training did not reach its end are named as such wherever they are used, and half-written folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import known, parts_of
from simclr import evaluation, load
from simclr.config.encoder import EncoderConfig
from simclr.errors import UserError
from simclr.files import write_atomically
from simclr.models.classifier import Classifier
from simclr.models.encoder import build_encoder
from simclr.tasks import opening, pretrain_images
from simclr.tasks import push as hub
from simclr.training import loop as train
from simclr.weights import folder as weights_folder
from simclr.weights.folder import save_classifier, save_encoder
from simclr.weights.training_progress import TrainingProgress, UnfinishedTraining

STEPS = ["--epochs", 0, "--min-steps", 6, "--batch-size", 4, "--save-every", 2, "--workers", 0]
SENTENCE = "is unfinished: these weights are from step 2 of 5; let it reach its end"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of four small images each, bright and dark."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, low in (("bright", 128), ("dark", 0)):
        (folder / label).mkdir()
        for i in range(4):
            pixels = generator.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A network of two classes, saved after step 2 of 5."""
    return save(tmp_path_factory.mktemp("classifier"), TrainingProgress(2, 5))


def save(folder, progress):
    encoder = build_encoder(EncoderConfig("small", channels=3, size=8, width=0.25), seed=0)
    network = Classifier(encoder, None, 2)
    save_classifier(network, folder, classes=["bright", "dark"], preprocessing="google", origin={}, progress=progress)
    return folder


def test_loading_warns_once_and_says_how_far_it_came(classifier, tmp_path):
    with pytest.warns(UnfinishedTraining, match=SENTENCE) as caught:
        model = load(classifier)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert (known(model.progress).step, known(model.progress).total_steps, model.finished) == (2, 5, False)
    assert load(save(tmp_path / "finished", TrainingProgress(5, 5))).finished is True
    unknown = load(save(tmp_path / "imported", None))  # as of folders of earlier versions; warnings are errors here
    assert unknown.finished is None and unknown.progress is None


@pytest.mark.parametrize("step", [-1, 6, 2.0, True, "2", None])
def test_impossible_counts_are_refused(classifier, tmp_path, step):
    shutil.copytree(classifier, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": step}))
    with pytest.raises(UserError, match="step"):
        load(tmp_path / "copy")


def test_every_command_names_it_once(simclr, classifier, images, tmp_path):
    json_file = tmp_path / "evaluation.json"
    commands = {
        "predict": ["predict", classifier, images, "--out", tmp_path / "classes.csv"],
        "embed": ["embed", classifier, images, "--out", tmp_path / "features.npz"],
        "finetune": ["finetune", classifier, images, "--out", tmp_path / "finetuned", *STEPS],
        "distill": ["distill", classifier, images, "--out", tmp_path / "distilled", *STEPS],
        "evaluate": [
            "evaluate",
            classifier,
            images,
            "--protocol",
            "knn",
            "--cache",
            "off",
            "--compare",
            "--json",
            json_file,
        ],
        "safetensors": ["export", classifier, "--format", "safetensors", "--out", tmp_path / "folder"],
        "hub": ["export", classifier, "--format", "hub-folder", "--out", tmp_path / "hub"],
        "onnx": ["export", classifier, "--format", "onnx", "--out", tmp_path / "file.onnx"],
    }
    printed = {}
    for name, arguments in commands.items():
        code, printed[name], err = simclr(*arguments)
        assert code == 0 and err.count(SENTENCE) == 1, (name, err)
    assert "Unfinished training: encoder, step 2 of 5." in printed["evaluate"]
    assert json.loads(json_file.read_text())["unfinished"] == {"encoder": {"step": 2, "total_steps": 5}}
    assert "is unfinished: they are from step 2 of 5" in (tmp_path / "hub" / "README.md").read_text()
    for exported in (tmp_path / "folder", tmp_path / "hub", tmp_path / "file.onnx"):
        with pytest.warns(UnfinishedTraining, match=SENTENCE):
            assert load(exported).progress == TrainingProgress(2, 5)
    for trained in (tmp_path / "finetuned", tmp_path / "distilled"):
        assert load(trained).finished
    summary = json.loads((tmp_path / "finetuned" / "summary.json").read_text())
    assert summary["encoder_progress"] == {"step": 2, "total_steps": 5}


def test_a_finetuning_killed_after_its_first_checkpoint_is_named(simclr, classifier, images, tmp_path, monkeypatch):
    command = ["finetune", classifier, images, "--out", tmp_path / "out", *STEPS]
    saved = []

    def save_and_die(folder, step, *args, **kwargs):
        saved.append(step)
        if len(saved) == 2:
            raise KeyboardInterrupt
        return save_checkpoint(folder, step, *args, **kwargs)

    save_checkpoint = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    assert simclr(*command)[0] == 130
    monkeypatch.undo()
    total = json.loads((tmp_path / "out" / "encoder" / "config.json").read_text())["total_steps"]
    predict = ["predict", tmp_path / "out", images, "--out", tmp_path / "classes.csv"]
    assert f"from step 2 of {total}" in simclr(*predict)[2]
    assert simclr(*command)[0] == 0
    assert "unfinished" not in simclr(*predict)[2] and load(tmp_path / "out").finished


def test_a_kill_between_the_last_checkpoint_and_its_encoder_is_mended(
    simclr, classifier, images, tmp_path, monkeypatch
):
    command = ["finetune", classifier, images, "--out", tmp_path / "out", *STEPS]

    def save_or_die(*args, progress, **kwargs):
        if progress.finished:
            raise KeyboardInterrupt
        save_classifier(*args, progress=progress, **kwargs)

    monkeypatch.setattr(evaluation.finetune, "save_classifier", save_or_die)
    assert simclr(*command)[0] == 130
    with pytest.warns(UnfinishedTraining):
        stale = load(tmp_path / "out")
    monkeypatch.undo()
    assert simclr(*command)[0] == 0
    mended = load(tmp_path / "out")
    assert mended.finished
    weights = [parts_of(known(model.classifier)).linear.weight for model in (stale, mended)]
    assert not torch.equal(*weights)


def test_a_kill_between_the_last_checkpoint_and_the_summary_loses_no_figure(simclr, images, tmp_path, monkeypatch):
    pretrain = ["pretrain", images, "--recipe", "digits", "--epochs", 2, "--batch-size", 4, "--width", 0.25]
    pretrain += ["--size", 8, "--workers", 0, "--pack", "off", "--out"]
    assert simclr(*pretrain, tmp_path / "whole")[0] == 0

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_images, "_report_end", die)
    assert simclr(*pretrain, tmp_path / "killed")[0] == 130
    monkeypatch.undo()
    assert simclr("resume", tmp_path / "killed")[0] == 0
    whole, killed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    for name in ("steps", "epochs", "images", "final", "warnings"):
        assert killed[name] == whole[name], name
    assert set(whole["final"]) > {"step", "loss"}


@pytest.mark.parametrize("format", ["safetensors", "hub-folder"])
@pytest.mark.parametrize("files", [1, 2, 3])
def test_a_half_written_export_is_mended(simclr, tmp_path, monkeypatch, format, files):
    model = save(tmp_path / "model", TrainingProgress(5, 5))
    command = ["export", model, "--format", format, "--out"]
    assert simclr(*command, tmp_path / "whole")[0] == 0
    written = []

    def write_or_die(path, content):
        if len(written) == files:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    write = write_atomically
    for module in (weights_folder, opening):
        monkeypatch.setattr(module, "write_atomically", write_or_die)
    simclr(*command, tmp_path / "half")
    monkeypatch.undo()
    finished = len(written) == len(list((tmp_path / "whole").iterdir()))
    code, _, err = simclr(*command, tmp_path / "half")
    assert (code == 2 and "holds an encoder" in err) if finished else code == 0
    for file in (tmp_path / "whole").iterdir():
        ours = (tmp_path / "half" / file.name).read_bytes()
        assert ours.replace(b"# half", b"# whole") == file.read_bytes(), file.name


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "preprocessing.json"])
def test_a_file_of_somebody_else_is_not_replaced(simclr, tmp_path, name):
    model = save(tmp_path / "model", TrainingProgress(5, 5))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    code, _, err = simclr("export", model, "--format", "hub-folder", "--out", tmp_path / "out")
    assert code == 2 and f"{name} is there already, and would be replaced" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_an_encoder_that_was_cut_short_is_written_again(tmp_path):
    encoder = build_encoder(EncoderConfig("small", channels=3, size=8, width=0.25), seed=0)
    save_encoder(encoder, tmp_path / "out", preprocessing="google", origin={})
    (tmp_path / "out" / "model.safetensors").unlink()  # earlier versions wrote config.json first
    opening.start_encoder_folder(tmp_path / "out", ours={})
    assert not list((tmp_path / "out").iterdir())
    assert set(hub.FILES) >= {"config.json", "model.safetensors"}
