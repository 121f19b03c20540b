"""The short form of benchmarks/drill_files.py: some mutations of every kind of file, always the same."""

import contextlib
import io
import warnings
from pathlib import Path

import pytest

from simclr.errors import UserError

ROOT = Path(__file__).parents[1]
KINDS = {
    "torch-zip": 40, "torch-legacy": 60, "safetensors": 40, "tf1": 20, "tf2": 30, "encoder": 60,
    "export-safetensors": 10, "export-pth": 10, "npz": 30, "npz-compressed": 30, "images": 15, "labels": 40,
    "results": 40,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_loads_or_ends_in_a_sentence(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path / "cache"))
    import drill_files as drill

    refused = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        files = drill.whole_files(kind)
        drill.write(files, tmp_path / "x")
        drill.KINDS[kind].open(tmp_path / "x")
        for seed in range(KINDS[kind]):
            drill.write(drill.mutation(kind, files, seed), tmp_path / "x")
            try:
                with warnings.catch_warnings(action="ignore"):
                    drill.KINDS[kind].open(tmp_path / "x")
            except UserError as error:
                assert str(error).isprintable() and len(str(error)) < 3000, seed
                refused += 1
    assert refused or kind in ("images", "results")
