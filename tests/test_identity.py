"""Images are known by their content: a digest of every file, kept for as long as the file is the same."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr.data import digests, open_data
from simclr.data.fingerprint import first_scheme
from simclr.data.forms import open_images
from simclr.data.readers.folder import open_folder
from simclr.data.readers.scan import scan_folder
from simclr.data.readers.store import Reading
from simclr.errors import UserError

NUM_IMAGES = 24


def write_folder(root: Path, seed: int, *, tint: bool = True) -> Path:
    """Uncompressed files, so that those of every seed have the same names and sizes; two classes, apart by colour."""
    rng = np.random.default_rng(seed)
    for i in range(NUM_IMAGES):
        pixels = rng.integers(0, 100, (16, 16, 3))
        pixels[..., i % 2] += 150 if tint else 0
        path = root / ("cat", "dog")[i % 2] / f"{i:02}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def exchange(path: Path, content: bytes) -> None:
    """Another content in place, with the time of change set back."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, in which digests are kept at once and of few files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "RACY_NS", -1_000_000_000)
    monkeypatch.setattr(digests, "MIN_KEPT_FILES", 1)
    monkeypatch.setattr(digests, "_unwritten", {})
    return tmp_path / "cache" / "simclr" / "digests"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed, from here on."""
    names: list[str] = []
    real = digests._hash
    monkeypatch.setattr(digests, "_hash", lambda file: names.append(file.below.rpartition("/")[2]) or real(file))
    return names


def test_other_pixels_under_the_same_names_and_sizes_are_other_data(tmp_path: Path) -> None:
    one, two = (open_data(write_folder(tmp_path / name, seed)) for name, seed in (("one", 0), ("two", 1)))
    assert list(one.keys) == list(two.keys) and first_scheme(one) == first_scheme(two)
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == open_data(write_folder(tmp_path / "again", 0)).fingerprint
    paths = [[str(path) for path in sorted((tmp_path / name).glob("*/*"))] for name in ("one", "two")]
    assert open_images(paths[0]).contents != open_images(paths[1]).contents


def test_resume_refuses_images_that_were_exchanged(simclr, tmp_path: Path) -> None:
    fast = ["--recipe", "digits", "--epochs", "1", "--batch-size", "8", "--width", "0.25", "--workers", "0"]
    photos = write_folder(tmp_path / "photos", 0)
    assert simclr("pretrain", photos, "--out", tmp_path / "run", *fast)[0] == 0
    (tmp_path / "run" / "summary.json").unlink()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    victim = photos / "cat" / "00.bmp"
    exchange(victim, victim.read_bytes()[:-1] + b"\x07")
    code, _, err = simclr("resume", tmp_path / "run")
    assert code == 2 and "no longer holds the images" in err
    record["data"]["fingerprint"] = first_scheme(open_data(photos, channels="auto"))
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))  # as an earlier version wrote it
    code, _, err = simclr("resume", tmp_path / "run")
    assert code == 0 and "names, sizes and labels are compared" in err
    (tmp_path / "run" / "summary.json").unlink()
    Image.new("RGB", (9, 9)).save(victim)
    code, _, err = simclr("resume", tmp_path / "run")
    assert code == 2 and "no longer holds the images" in err


def test_accuracy_is_of_the_images_that_are_there(simclr, tmp_path: Path) -> None:
    fast = ["--recipe", "digits", "--epochs", "1", "--batch-size", "8", "--width", "0.25", "--workers", "0"]
    write_folder(tmp_path / "a" / "photos", 0)
    write_folder(tmp_path / "b" / "photos", 1, tint=False)
    assert simclr("pretrain", tmp_path / "a" / "photos", "--out", tmp_path / "run", *fast)[0] == 0

    def evaluate(name: str, *flags: object, run: Path = tmp_path / "run") -> tuple[list[dict], str]:
        code, _, said = simclr(
            "evaluate", run, tmp_path / name / "photos", "--protocol", "knn", "--compare", "pixels",
            "--json", tmp_path / "r.json", *flags,
        )  # fmt: skip
        assert code == 0
        return json.loads((tmp_path / "r.json").read_text())["results"], said

    cache = ["--cache", tmp_path / "cache"]
    first, said = evaluate("a", *cache)
    assert "saw these test images" in said
    second, said = evaluate("b", *cache)
    assert "saw these test images" not in said
    fresh, _ = evaluate("b", "--cache", "off", "--out", tmp_path / "fresh")
    assert second == fresh != first
    of_the_folder = evaluate("a", *cache, run=tmp_path / "run" / "encoder")[1]
    assert "saw these test images" in of_the_folder


def test_fingerprint_holds_labels_class_names_and_channels(tmp_path: Path) -> None:
    images = open_data(write_folder(tmp_path / "photos", 0))
    assert images.labels is not None
    others = [
        replace(images, labels=1 - images.labels),
        replace(images, labels=None),
        replace(images, labels=None, targets=images.labels[:, None].astype(np.int8)),
        replace(images, classes=["cat", "cow"]),
        replace(images, classes=None),
        replace(images, channels=1),
        replace(images, keys=[f"x{key}" for key in images.keys]),
        images.subset([0, 1]),
        images.subset([1, 0]),
        images.subset([0]).joined(images.subset([1])),
    ]
    fingerprints = {other.fingerprint for other in (images, *others)}
    assert len(fingerprints) == 1 + len(others)
    assert open_data(tmp_path / "photos", channels="1").fingerprint == replace(images, channels=1).fingerprint
    assert replace(images, classes=["\ud800", "\udcff"]).fingerprint  # what an .npz file can hold, and UTF-8 cannot
    array = np.zeros((3, 4, 4, 1), np.uint8)
    other = array.copy()
    other[2, 3, 3] = 1
    assert open_images(array).fingerprint != open_images(other).fingerprint
    assert open_images(list(array)).fingerprint != open_images(list(other)).fingerprint


def test_pack_gives_the_pixels_of_an_exchanged_file(tmp_path: Path) -> None:
    photos, packs = write_folder(tmp_path / "photos", 0), str(tmp_path / "packs")
    open_data(photos, pack=packs)
    other = write_folder(tmp_path / "other", 1)
    exchange(photos / "dog" / "03.bmp", (other / "dog" / "03.bmp").read_bytes())
    images, expected = open_data(photos, pack=packs), open_data(photos)
    np.testing.assert_array_equal(images.read(range(NUM_IMAGES)), expected.read(range(NUM_IMAGES)))
    assert images.fingerprint == expected.fingerprint


def test_file_that_changed_since_opening_is_not_read(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos", 0)
    images = open_folder(photos, reading=Reading(memory_budget=0))
    expected = images.read([0, 1])
    (photos / "cat" / "00.bmp").chmod(0o600)  # which changes a time, and no byte
    os.utime(photos / "cat" / "00.bmp", ns=(0, 0))
    np.testing.assert_array_equal(images.read([0, 1]), expected)
    exchange(photos / "cat" / "00.bmp", (photos / "dog" / "01.bmp").read_bytes())
    with pytest.raises(UserError, match=r"00\.bmp has changed since the data was opened"):
        images.read([0])


# ---- the tables


def test_files_are_hashed_once(tmp_path: Path, tables: Path, hashed: list[str]) -> None:
    photos = write_folder(tmp_path / "photos", 0)
    first = open_data(photos)
    assert len(hashed) == NUM_IMAGES and len(list(tables.iterdir())) == 1
    hashed.clear()
    assert open_data(photos).fingerprint == first.fingerprint and hashed == []
    victim = photos / "dog" / "05.bmp"
    exchange(victim, victim.read_bytes()[:-1] + b"\x07")
    assert open_data(photos).fingerprint != first.fingerprint and hashed == ["05.bmp"]
    hashed.clear()
    link = tmp_path / "link"
    link.symlink_to(photos)
    open_data(link)
    paths = sorted(photos.glob("dog/*"))
    assert hashed == []
    opened = open_images(paths)  # another folder, so another table
    assert len(hashed) == len(paths) and opened.contents == open_images(paths).contents and len(hashed) == len(paths)


def test_digests_are_those_of_the_contents(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = write_folder(tmp_path / "photos", 0)
    expected = {path.name: sha256(path.read_bytes()).digest() for path in photos.glob("*/*")}
    monkeypatch.setattr(digests, "_PIECE_BYTES", 100)
    monkeypatch.setattr(digests, "_CHUNK", 5)
    files = scan_folder(photos).files
    for workers in (0, 3, 3):
        found, notes = digests.identify(photos, files, workers=workers, say=pytest.fail)
        assert {file.path.name: file.digest for file in found} == expected and notes == []


def test_file_that_has_just_changed_is_hashed_again(
    tmp_path: Path, tables: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "RACY_NS", 10**15)
    photos = write_folder(tmp_path / "photos", 0)
    for _ in range(2):
        open_data(photos)
    assert len(hashed) == 2 * NUM_IMAGES and not tables.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_damaged_table_is_not_trusted(tmp_path: Path, tables: Path, hashed: list[str], damage: str) -> None:
    photos = write_folder(tmp_path / "photos", 0)
    expected = open_data(photos).fingerprint
    (table,) = tables.iterdir()
    content = bytearray(table.read_bytes())
    content[-40] ^= 1  # in the last digest
    table.write_bytes({"flip": content, "cut": content[:100], "empty": b"", "other": b"x" * 500}[damage])
    hashed.clear()
    said: list[str] = []
    assert open_data(photos, say=said.append).fingerprint == expected and len(hashed) == NUM_IMAGES
    assert any(f"{table} is damaged" in text for text in said)
    hashed.clear()
    assert open_data(photos).fingerprint == expected and hashed == []


@pytest.mark.parametrize("home", ["file", "none"])
def test_cache_that_cannot_be_written_is_said_once(
    tmp_path: Path, tables: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    if home == "none":
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "cache").write_text("")
    photos = write_folder(tmp_path / "photos", 0)
    first, second = open_data(photos, pack="auto"), open_data(photos, pack="auto")
    assert [sum("cannot be kept" in note for note in images.notes) for images in (first, second)] == [1, 0]
    assert first.fingerprint == second.fingerprint and len(hashed) == NUM_IMAGES


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_tables_are_bounded(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MAX_TABLES", 2)
    monkeypatch.setattr(digests, "SPARE_NAMES", 0)
    for name in "abcd":
        open_data(write_folder(tmp_path / name, 0))
        for path in tables.iterdir():
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
    assert sorted(path.name[0] for path in tables.iterdir()) == ["c", "d"]
    (table,) = tables.glob("d-*")
    size = table.stat().st_size
    for i in range(6):
        for path in (tmp_path / "d").glob("*/*"):
            path.rename(path.with_stem(f"{i}{path.stem[-2:]}"))
        open_data(tmp_path / "d")
        assert table.stat().st_size < 5 * size


def test_processes_at_once(tmp_path: Path, tables: Path) -> None:
    photos = write_folder(tmp_path / "photos", 0)
    code = f"""
import sys
from simclr.data import digests, open_data
digests.RACY_NS, digests.MIN_KEPT_FILES = -10**9, 1
for _ in range(20):
    print(open_data({str(photos)!r}, say=sys.exit).fingerprint)
    for path in digests.user_cache().glob("digests/*.digests"):
        path.unlink(missing_ok=True)
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {line for process in both for line in process.communicate()[0].split()}
    assert [process.returncode for process in both] == [0, 0] and said == {open_data(photos).fingerprint}


def test_parts_of_a_folder_share_a_table(tmp_path: Path, tables: Path, hashed: list[str]) -> None:
    for part in ("train", "test"):
        write_folder(tmp_path / "set" / part, 0)
    train = open_data(tmp_path / "set")
    test = open_data(tmp_path / "set", split="test")
    assert len(hashed) == 2 * NUM_IMAGES and train.contents == test.contents and train.fingerprint != test.fingerprint
    hashed.clear()
    assert open_data(tmp_path / "set").fingerprint == train.fingerprint and hashed == []
