"""Feature cache: what does not fit is made again, and a folder that cannot be written loses nothing."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.cache import FeatureCache, open_cache

KEY = {"protocol": "features", "model": {"weights": "ab"}}
FEATURES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


class Maker:
    """Counts how often features are made."""

    def __init__(self, features=FEATURES):
        self.features, self.calls = features, 0

    def __call__(self):
        self.calls += 1
        return self.features


def get(folder, make, *, key=KEY, shape=FEATURES.shape):
    return FeatureCache(folder).get(key, shape, make, DistributedContext())


def kept(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_features_are_read_back_bit_for_bit(tmp_path):
    make = Maker()
    assert np.array_equal(get(tmp_path, make), FEATURES) and np.array_equal(get(tmp_path, make), FEATURES)
    assert make.calls == 1
    nothing = Maker(np.empty((0, 3), np.float32))
    assert get(tmp_path, nothing, key={}, shape=(0, 3)).shape == get(tmp_path, nothing, key={}, shape=(0, 3)).shape
    assert nothing.calls == 1


def cut(content):
    return content[:-4]  # a row too few, as of another version


def longer(content):
    return content + b"\0\0\0\0"


def one_bit(content):
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def other_numbers(content):
    header, _, numbers = content.partition(b"\n")
    return header + b"\n" + bytes(reversed(numbers))


def other_key(content):
    return content.replace(b'"ab"', b'"cd"')


def other_shape(content):
    return content.replace(b"[5, 3]", b"[3, 5]")


def array_file(content):
    from io import BytesIO

    file = BytesIO()
    np.save(file, FEATURES)
    return file.getvalue()


def deep(content):
    return b"[" * 60_000 + b"\n"


DAMAGES = [cut, longer, one_bit, other_numbers, other_key, other_shape, array_file, deep, lambda content: b""]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_damaged_counts_as_missing_and_is_replaced(tmp_path, damage):
    get(tmp_path, Maker())
    path = kept(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = Maker()
    assert np.array_equal(get(tmp_path, again), FEATURES) and again.calls == 1
    assert path.read_bytes() == whole and get(tmp_path, again) is not None and again.calls == 1


def test_numbers_that_are_not_finite_are_neither_kept_nor_read(tmp_path):
    bad = FEATURES.copy()
    bad[3, 1] = np.nan
    with pytest.raises(UserError, match="NaN or infinite numbers, in 1 of 5 rows"):
        get(tmp_path, Maker(bad))
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_a_fifo_in_the_place_of_features_is_not_waited_for(tmp_path):
    get(tmp_path, Maker())
    path = kept(tmp_path)
    path.unlink()
    os.mkfifo(path)
    again = Maker()
    assert np.array_equal(get(tmp_path, again), FEATURES) and again.calls == 1


@pytest.mark.parametrize("obstacle", ["a file", "/proc", "full"])
def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_features(tmp_path, obstacle, capsys, monkeypatch):
    folder = tmp_path / "home" / "features"
    if obstacle == "a file":
        folder.parent.write_bytes(b"")
    elif obstacle == "/proc":
        folder = Path("/proc/features")
    else:
        monkeypatch.setattr("simclr.files.os.fsync", full)
    make, cache = Maker(), FeatureCache(folder)
    for key in (KEY, {"other": 1}, KEY):
        assert np.array_equal(cache.get(key, FEATURES.shape, make, DistributedContext()), FEATURES)
    assert make.calls == 2
    assert capsys.readouterr().err.count("Features cannot be kept in") == 1
    if obstacle == "full":
        assert not list(folder.iterdir())


def full(_descriptor):
    raise OSError(28, "No space left on device")


def test_a_user_without_a_home_has_features_in_memory(monkeypatch, capsys):
    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert open_cache("auto").folder is None
    assert "no folder for features" in capsys.readouterr().err


def test_what_killed_processes_left_goes_and_so_does_what_is_oldest(tmp_path, monkeypatch):
    (tmp_path / f".{'0' * 32}.features.99999999-01234567.tmp").write_bytes(b"half")
    get(tmp_path, Maker())
    assert len(list(tmp_path.iterdir())) == 1
    old = kept(tmp_path)
    os.utime(old, (1, 1))
    (tmp_path / "of-an-earlier-version.npy").write_bytes(b"x" * 100)
    os.utime(tmp_path / "of-an-earlier-version.npy", (2, 2))
    monkeypatch.setattr("simclr.evaluation.cache.MAX_BYTES", 100)
    get(tmp_path, Maker(), key={"new": 1})
    assert len(list(tmp_path.iterdir())) == 1 and not old.exists()


def write_many(folder, barrier):
    cache = FeatureCache(folder)
    barrier.wait()
    for i in range(20):
        rows = np.full((100, 50), i, np.float32)
        found = cache.get({"key": i % 3}, rows.shape, lambda rows=rows: rows, DistributedContext())
        assert (found == found[0, 0]).all() and found[0, 0] % 3 == i % 3


def test_two_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=write_many, args=(tmp_path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 3
