"""The run's folder: one process at a time writes it, and one that was killed while making it is no obstacle."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from helpers import in_processes
from simclr.config.pretrain import PretrainConfig
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.files import FileLock
from simclr.training.lock import LOCK, hold
from simclr.training.run import RunFolder, create_run, open_run

ORIGIN = {
    "data": {
        "source": "digits", "options": {}, "name": "digits", "images": 9, "channels": 1, "classes": None,
        "left_out": [], "fingerprint": "0",
    },
    "machine": {"cpu_threads": 1},
}  # fmt: skip


def content_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_folder_is_held_by_one_and_left_as_it_was(tmp_path):
    place = tmp_path / "a" / "b"
    with hold(place, DistributedContext()):
        assert not FileLock(place / LOCK).acquire()
        with hold(place, DistributedContext()):
            pass
        assert not FileLock(place / LOCK).acquire(), "the outer block still holds it"
    assert not (tmp_path / "a").exists(), "nothing was written"
    with pytest.raises(KeyError), hold(place, DistributedContext()):
        (place / "file").write_bytes(b"")
        raise KeyError
    assert os.listdir(place) == ["file"]


def test_a_folder_that_cannot_be_held_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with (
            pytest.raises(UserError, match=f"{place} cannot be written: "),
            hold(RunFolder(place).path, DistributedContext()),
        ):
            raise AssertionError("not reached")


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "digits", "--out", "HELD"],
        ["resume", "HELD"],
        ["finetune", "random", "digits", "--out", "HELD"],
        ["distill", "HELD", "digits", "--out", "HELD"],
        ["import", "weights.pth", "HELD"],
        ["export", "ENCODER", "--format", "safetensors", "--out", "HELD"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_writes_a_folder_leaves_it_to_its_holder(simclr, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    held = tmp_path / "held"
    (tmp_path / "weights.pth").write_bytes(b"")
    if command[0] == "resume":
        create_run(held, PretrainConfig(), ORIGIN)
    if command[0] == "export":
        from simclr.config.encoder import EncoderConfig
        from simclr.models.encoder import build_encoder
        from simclr.weights.folder import save_encoder

        encoder = build_encoder(EncoderConfig("small", channels=1, size=8, width=0.25), seed=0)
        save_encoder(encoder, tmp_path / "encoder", preprocessing="google", origin={})
    held.mkdir(exist_ok=True)
    lock = FileLock(held / LOCK)
    assert lock.acquire()
    before = content_of(held)
    places = {"HELD": "held", "ENCODER": "encoder"}
    code, out, err = simclr(*(places.get(word, word) for word in command))
    assert code == 2 and not out, err
    assert f"held is being written by process {os.getpid()} on " in err and "Traceback" not in err
    assert content_of(held) == before
    lock.release()


def test_every_process_of_a_world_learns_of_a_refusal(tmp_path):
    (tmp_path / "held").mkdir()
    lock = FileLock(tmp_path / "held" / LOCK)
    assert lock.acquire()
    in_processes(2, tmp_path, partial(check_refusal, tmp_path))
    lock.release()


def check_refusal(place, world):
    with pytest.raises(UserError, match="being written by process"), hold(place / "held", world):
        raise AssertionError("not reached")
    with hold(place / "free", world):
        assert world.on_main(lambda: 7) == 7


KILLED_WHILE_MAKING = """
import json, os, signal, sys
from pathlib import Path
from simclr.config.pretrain import PretrainConfig
from simclr.distributed import DistributedContext
from simclr.training.lock import hold
from simclr.training.run import create_run

calls = ["mkdir", "fsync", "replace", "open", "unlink", "rmdir"]
real = {name: getattr(os, name) for name in calls}
place, origin = Path(sys.argv[1]), json.loads(sys.argv[2])
for moment in range(10_000):
    child = os.fork()
    if child == 0:
        left = [moment]
        def killing(name):
            def call(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return real[name](*args, **kwargs)
            return call
        for name in calls:
            setattr(os, name, killing(name))
        with hold(place / str(moment), DistributedContext()):
            create_run(place / str(moment), PretrainConfig(), origin)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_killed_at_any_moment_of_its_making_a_run_starts_again_or_goes_on(tmp_path):
    command = [sys.executable, "-c", KILLED_WHILE_MAKING, str(tmp_path), json.dumps(ORIGIN)]
    subprocess.run(command, check=True)
    folders = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    goes_on = 0
    assert len(folders) > 10
    for folder in folders:
        with hold(folder, DistributedContext()):
            if (folder / "config.json").exists():
                goes_on += 1
                run = open_run(folder)
            else:
                run = create_run(folder, PretrainConfig(epochs=7), ORIGIN)
            run.rewind(0)
            assert run.origin["data"] == ORIGIN["data"] and run.config.epochs in (7, 100)
        assert sorted(os.listdir(folder)) == ["checkpoints", "config.json", "run.json"]
    assert 0 < goes_on < len(folders)


@pytest.mark.parametrize("name", ["run.json", "config.json", "notes.txt"])
def test_the_files_of_others_are_no_leftovers(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"mine": 1}')
    before = content_of(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run|exists and is no run"):
        create_run(tmp_path / "run", PretrainConfig(), ORIGIN)
    assert content_of(tmp_path) == before


def test_a_disk_that_refuses_the_settings_leaves_no_run(tmp_path, monkeypatch):
    real = os.replace

    def full(source, target):
        if str(target).endswith("config.json"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with (
        pytest.raises(UserError, match="cannot be written: no space left on device"),
        hold(tmp_path / "run", DistributedContext()),
    ):
        create_run(tmp_path / "run", PretrainConfig(), ORIGIN)
    assert not (tmp_path / "run").exists()


def test_an_empty_config_of_a_former_version_does_not_bar_a_folder(tmp_path):
    run = create_run(tmp_path / "run", PretrainConfig(), ORIGIN)
    (run.path / "config.json").write_bytes(b"")
    assert create_run(run.path, PretrainConfig(epochs=3), ORIGIN).config.epochs == 3
    shutil.rmtree(run.path)


def test_a_disk_that_refuses_the_encoder_is_said_with_what_to_do(simclr, tmp_path, monkeypatch):
    flags = ["--recipe", "digits", "--epochs", 1, "--batch-size", 512, "--width", 0.25, "--workers", 0]
    out, real = tmp_path / "run", os.replace

    def full(source, target):
        if str(target).endswith("model.safetensors"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    code, _, err = simclr("pretrain", "digits", "--out", out, *flags)
    assert code == 2 and f"{out} cannot be written: no space left on device; what was saved before is kept" in err
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    code, _, err = simclr("resume", out)
    assert code == 2 and f"{out} cannot be written: permission denied" in err and "Traceback" not in err
    monkeypatch.setattr(os, "replace", real)
    assert simclr("resume", out)[0] == 0 and (out / "encoder" / "model.safetensors").is_file()


def test_a_checkpoint_of_another_network_is_a_sentence(simclr, tmp_path):
    flags = ["--recipe", "digits", "--epochs", 1, "--batch-size", 512, "--workers", 0]
    for name, width in (("run", 0.25), ("other", 0.5)):
        assert simclr("pretrain", "digits", "--out", tmp_path / name, *flags, "--width", width)[0] == 0
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", run / "checkpoints")
    code, _, err = simclr("resume", run)
    assert code == 2 and "does not fit the settings" in err and "Traceback" not in err
