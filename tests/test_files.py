"""Bounded reads, digests and locks (files.py)."""

import hashlib
import os
import subprocess
import sys

import pytest

from simclr.errors import UserError
from simclr.files import FileLock, file_digest, read_regular


def test_reads_a_regular_file_and_its_digest(tmp_path):
    content = os.urandom(100_000)
    (tmp_path / "a").write_bytes(content)
    assert read_regular(tmp_path / "a", 100_000) == content
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_refuses_what_could_be_read_for_ever(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
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
        assert other.stdout.readline() == b"True\n"
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
