"""Bounded reads, atomic writes, digests, locks and the sentences about disks (files.py)."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import known
from simclr.errors import UserError
from simclr.files import FileLock, file_digest, read_regular, replacing, sweep, write_atomically, writing


def test_reads_a_regular_file_and_its_digest(tmp_path):
    content = os.urandom(100_000)
    (tmp_path / "a").write_bytes(content)
    assert read_regular(tmp_path / "a", 100_000) == content
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_refuses_what_could_be_read_for_ever(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            read_regular(path, 10)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 10)


def test_refuses_a_file_beyond_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(UserError, match="5 bytes"):
        read_regular(tmp_path / "a", 4)


def test_one_process_holds_the_lock_and_its_death_frees_it(tmp_path):
    program = (
        "import sys; from pathlib import Path; from simclr.files import FileLock\n"
        "lock = FileLock(Path(sys.argv[1])); print(lock.acquire(), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert known(other.stdout).readline() == b"True\n"
        ours = FileLock(tmp_path / "lock")
        assert not ours.acquire()
        assert ours.holder().startswith(f"process {other.pid} on ")
        other.kill()
    assert ours.acquire()
    assert not FileLock(tmp_path / "lock").acquire()  # a second object of the same process is another holder
    ours.release()
    again = FileLock(tmp_path / "lock")
    assert again.acquire()
    again.release()


NOBODY = 4_194_305  # Linux gives no process a higher number than 4,194,304


def test_sweep_removes_what_killed_processes_left_and_nothing_else(tmp_path):
    keep = [".step-1.pt.1.tmp", ".name.tmp", "a.1.tmp", ".b.x.tmp"]  # of a process that is alive; of other programs
    for name in [*keep, f".step-1.pt.{NOBODY}.tmp", f".run.json.{NOBODY}-00c0ffee.tmp"]:
        (tmp_path / name).write_bytes(b"half")
    with replacing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"whole")
        sweep(tmp_path)
        assert temporary.exists()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*keep, "file"])


def test_a_temporary_file_that_another_process_holds_is_not_swept(tmp_path):
    """Also where its number means nothing here, as in another container."""
    temporary = tmp_path / f".file.{NOBODY}-00c0ffee.tmp"
    held = FileLock(temporary)
    assert held.acquire()
    sweep(tmp_path)
    assert temporary.exists()
    held.release()
    sweep(tmp_path)
    assert not temporary.exists()


def test_writing_removes_what_a_killed_attempt_at_the_same_file_left(tmp_path):
    for name in ("file", "other"):
        (tmp_path / f".{name}.{NOBODY}-00c0ffee.tmp").write_bytes(b"half")
    write_atomically(tmp_path / "file", b"whole")
    assert sorted(os.listdir(tmp_path)) == [f".other.{NOBODY}-00c0ffee.tmp", "file"]


@pytest.mark.parametrize("name", ["x" * 255, "\N{SNOWMAN}" * 85])
def test_the_longest_name_can_be_written(tmp_path, name):
    write_atomically(tmp_path / name, b"1")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_system_refuses_is_a_sentence(tmp_path, code):
    with pytest.raises(UserError, match=rf"file cannot be written: {os.strerror(code).lower()}; make room\."):  # noqa: SIM117
        with writing(tmp_path / "file", hint="make room"):
            raise OSError(code, os.strerror(code))


def test_a_sentence_names_the_file_that_was_in_the_way(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(UserError, match=r"a/b/c cannot be written: not a directory \(.*/a/b\); give another path"):  # noqa: SIM117
        with writing(tmp_path / "a" / "b" / "c"):
            (tmp_path / "a" / "b").mkdir()
    with pytest.raises(UserError, match="cannot be written: file name too long; "), writing(tmp_path / ("x" * 256)):
        write_atomically(tmp_path / ("x" * 256), b"")


def test_a_disk_without_inodes_is_told_from_one_without_room(tmp_path, monkeypatch):
    blocks = {"f_files": 10, "f_favail": 0, "f_bavail": 5}
    monkeypatch.setattr(os, "statvfs", lambda _: type("Status", (), blocks))
    with pytest.raises(UserError, match="its inodes are used up"), writing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    blocks["f_favail"] = 10
    with pytest.raises(UserError, match="written: no space left on device; give"), writing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be the name of a file"), writing(tmp_path / name):
        raise AssertionError("not reached")
