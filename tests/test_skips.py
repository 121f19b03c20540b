"""The control of skipped tests (skips.py), in a run of pytest of its own."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from skips import NEEDS_GPU, ROOT, violations


def test_reasons_are_bounded(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not list(violations(Counter({NEEDS_GPU: 16})))
    assert list(violations(Counter({NEEDS_GPU: 17}))) == [f"skipped 17, at most 16 are allowed: {NEEDS_GPU}"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "does not hold here" in next(violations(Counter({NEEDS_GPU: 1})))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "does not hold here" in next(violations(Counter({ROOT: 1})))


def test_ci_fails_where_a_skip_is_not_allowed(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): pytest.importorskip('no_such_package')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", tmp_path]
    for ci, workers, code in (("", "0", 0), ("true", "1", 1)):
        done = subprocess.run(
            [*command, "-n", workers],
            cwd=Path(__file__).parent,
            env=environment | {"CI": ci},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "skipped 1: could not import 'no_such_package'" in done.stdout
        assert ("not allowed" in done.stdout) == (ci == "true")
