"""Weights from strangers: what would hang a reader or take its memory ends in one sentence.

Whatever reads such files, the tests ask the same of it: `import_torch`, `simclr.load` and the command line are all they
know of it.
"""

import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hostile_pickles import FILES
from simclr.errors import UserError
from simclr.models.import_torch import import_torch
from test_import_torch import Narrow, shaken

ALLOWANCE = 200 << 20  # bytes beside four times the file


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A hang fails its test instead of holding up the others."""

    def stop(*_: object) -> None:
        raise TimeoutError("a minute on a file of few bytes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def growth(work: Callable[[], None]) -> int:
    """Bytes by which the process grew at most, as far as it had not been larger before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def one_sentence(error: UserError) -> None:
    assert str(error).isprintable() and len(str(error)) < 1000


@pytest.mark.parametrize("name", FILES)
def test_hostile_pickles(name: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(FILES[name])

    def read() -> None:
        with pytest.raises(UserError) as caught:
            import_torch(file)
        one_sentence(caught.value)

    assert growth(read) < 4 * len(FILES[name]) + ALLOWANCE


def test_hostile_pickles_on_the_command_line(tmp_path: Path, simclr) -> None:
    file = tmp_path / "weights.pt"
    for name in ("zip, a class's name of texts without end", "13 bytes that ask for 256 GB"):
        file.write_bytes(FILES[name])
        code, out, err = simclr("import", file, tmp_path / "out")
        assert code == 2 and not out and err.count("\n") == 1 and err.startswith("simclr: ")
    assert not (tmp_path / "out").exists()


def test_an_archive_with_a_directory_of_a_million_records(tmp_path: Path) -> None:
    """Of 46 bytes each in the file, and ten times as many in memory."""
    record = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    directory = record * 1_000_000
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(directory), 4, 0)
    file = tmp_path / "weights.pt"
    file.write_bytes(b"PK\3\4" + directory + last)

    def read() -> None:
        with pytest.raises(UserError, match="directory"):
            import_torch(file)

    assert growth(read) < ALLOWANCE


@pytest.mark.parametrize("zipped", [True, False])
def test_many_tensors_in_one_large_storage_are_read_once(zipped: bool, tmp_path: Path) -> None:
    """As torch.save writes views: the storage is read once for all of them, not once for each."""
    model = shaken(Narrow())
    state = model.state_dict()
    flat = torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])
    parts = iter(flat.split([value.numel() for value in state.values() if value.is_floating_point()]))
    views = {k: next(parts).view(v.shape) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(views, tmp_path / "views.pt", _use_new_zipfile_serialization=zipped)
    loaded = import_torch(tmp_path / "views.pt").encoder.backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_two_large_storages_in_turn_are_read_once(tmp_path: Path) -> None:
    state = shaken(Narrow()).state_dict()
    storages = [torch.zeros(1 << 16), torch.zeros(1 << 16)]
    views = {}
    for i, (name, value) in enumerate(state.items()):
        views[name] = storages[i % 2][: value.numel()].view(value.shape) if value.is_floating_point() else value
    torch.save(views, tmp_path / "views.pt")
    loaded = import_torch(tmp_path / "views.pt").encoder.backbone.state_dict()
    assert not any(value.any() for value in loaded.values() if value.is_floating_point())


def test_overlapping_records(tmp_path: Path) -> None:
    """Two storages at the same place of an archive."""
    torch.save({"a": torch.zeros(64), "b": torch.ones(64)}, tmp_path / "a.pt")
    raw = bytearray((tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        directory = archive.start_dir
        one, two = (archive.getinfo(name) for name in archive.namelist() if "/data/" in name and name[-1] in "01")
    place = raw.index(two.filename.encode(), directory) - 4  # the offset stands before the name
    raw[place : place + 4] = struct.pack("<L", one.header_offset)
    (tmp_path / "b.pt").write_bytes(raw)
    with pytest.raises(UserError):
        import_torch(tmp_path / "b.pt")
