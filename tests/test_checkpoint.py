"""Checkpoints: written whole or not at all, and never trusted unread."""

import errno
import os

import pytest
import torch

from helpers import known
from simclr.errors import UserError
from simclr.files import write_atomically
from simclr.training.checkpoint import checkpoints, load_newest, save_checkpoint, step_of


def save_some(folder, steps, max_checkpoints=10):
    for step in steps:
        save_checkpoint(folder, step, {"weights": torch.full((50,), float(step))}, max_checkpoints=max_checkpoints)


def test_newest_is_loaded_and_old_ones_go(tmp_path):
    save_some(tmp_path, [3, 12, 7, 100], max_checkpoints=2)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [100, 12]
    step, state = known(load_newest(tmp_path, pytest.fail))
    assert step == 100 and torch.equal(state["weights"], torch.full((50,), 100.0))


def test_a_checkpoint_is_an_ordinary_torch_file(tmp_path):
    path = save_checkpoint(tmp_path, 5, {"step": 5, "name": "x", "list": [1, 2.0]}, max_checkpoints=1)
    assert torch.load(path, weights_only=True) == {"step": 5, "name": "x", "list": [1, 2.0]}


@pytest.mark.parametrize("damage", ["cut", "emptied", "first bit", "middle bit", "last bit"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage):
    save_some(tmp_path, [1, 2])
    newest = checkpoints(tmp_path)[0]
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "emptied":
        content = b""
    else:
        content[{"first bit": 0, "middle bit": len(content) // 2, "last bit": -1}[damage]] ^= 1
    newest.write_bytes(content)
    said = []
    step, _ = known(load_newest(tmp_path, said.append))
    assert step == 1
    assert len(said) == 1 and newest.name in said[0] and "damaged" in said[0]


def test_nothing_good_is_none(tmp_path):
    save_some(tmp_path, [1])
    checkpoints(tmp_path)[0].write_bytes(b"no zip at all")
    assert load_newest(tmp_path, lambda _: None) is None
    assert load_newest(tmp_path / "nowhere", pytest.fail) is None


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    save_some(tmp_path, [1], max_checkpoints=1)

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"step 2 .* could not be written.*no space left on device.*kept"):
        save_some(tmp_path, [2], max_checkpoints=1)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1]
    assert not list(tmp_path.glob(".*.tmp"))
    assert known(load_newest(tmp_path, pytest.fail))[0] == 1


def test_write_atomically_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def refuse(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
