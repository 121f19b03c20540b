"""Packs: a folder's images decoded once give the pixels that decoding each time gives, whatever happens to the pack."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr.cli.main import main
from simclr.data import Images, digests, open_data
from simclr.data.pack import pack as packing
from simclr.data.pack import place
from simclr.data.readers.folder import open_folder
from simclr.data.readers.store import Reading
from simclr.errors import UserError

fcntl = pytest.importorskip("fcntl")
NUM_GOOD = 24
NUM_IMAGES = NUM_GOOD + 1  # by their headers


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Small photographs of several sizes, some gray, in two classes; one file is damaged, and one is no image."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for i in range(NUM_GOOD):
        path = root / ("cat", "dog")[i % 2] / f"{i:02}.{('jpg', 'png')[i % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (20 + i, 41 - i) if i % 5 == 0 else (20 + i, 41 - i, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    (root / "cat" / "cut.jpg").write_bytes((root / "dog" / "01.jpg").read_bytes()[:-200])
    (root / "dog" / "text.png").write_text("<html>")
    return root


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded, from here on."""
    names: list[str] = []
    real = digests.decode_file

    def counting(path, *args, **options):
        names.append(path.name)
        return real(path, *args, **options)

    monkeypatch.setattr(digests, "decode_file", counting)
    return names


def open_packed(root: Path, **options: Any) -> Images:
    """As `open_data`, with the pack complete."""
    images = open_data(root, **options)
    images.notes.extend(images.prepare())
    return images


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four or five of our images in each shard."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 10_000)


def same(one: Images, other: Images) -> bool:
    """Whether nothing that training sees differs."""
    assert (one.keys, one.classes, one.channels) == (other.keys, other.classes, other.channels)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.sizes, other.sizes)
    for copy in (True, False):
        order = np.random.default_rng(1).permutation(len(one))
        for a, b in zip(one.read(order, copy=copy), other.read(order, copy=copy), strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
    assert one.replaced == other.replaced
    return one.fingerprint == other.fingerprint and one.skipped == other.skipped


def shards(packs: Path) -> list[Path]:
    return sorted(packs.glob("*/*.shard"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("workers", [0, 3])
def test_pack_gives_the_same_images(photos: Path, tmp_path: Path, workers: int) -> None:
    without = open_data(photos, pack="off")
    for _ in range(2):
        images = open_packed(photos, pack=str(tmp_path / "packs"), workers=workers)
        assert same(images, without)
        assert set(without.notes) < set(images.notes)
        assert any("decoded from the pack" in note and "MiB" in note for note in images.notes)
    assert len(images) == NUM_IMAGES and len(images.skipped) == 1
    assert images.replaced == [("cat/cut.jpg", "truncated")]
    (photos / "dog" / "text.png").unlink()
    with pytest.raises(UserError, match=r"1 of 25 files .*cat/cut\.jpg \(truncated\)"):
        open_packed(photos, pack=str(tmp_path / "packs"), strict=True)


def test_second_opening_decodes_nothing(photos: Path, tmp_path: Path, opened: list[str]) -> None:
    seen: list[tuple[int, int]] = []
    open_packed(photos, pack=str(tmp_path), progress=lambda *now: seen.append(now))
    assert set(opened) == {path.name for path in photos.glob("*/*")} - {"text.png"}
    assert seen == [(i + 1, 26) for i in range(26)] + [(i + 1, 25) for i in range(25)]  # hashed, then decoded
    del opened[:], seen[:]
    images = open_packed(photos, pack=str(tmp_path), progress=lambda *now: seen.append(now))
    images.read(np.arange(len(images)))
    assert opened == [] and len(seen) == 26  # hashed: so few digests are not kept


def test_arrays_of_a_pack_are_views_of_it_and_those_of_a_batch_the_callers(photos: Path, tmp_path: Path) -> None:
    images = open_packed(photos, pack=str(tmp_path))
    first, again = images.read([1], copy=False)[0], images.read([1], copy=False)[0]
    assert np.shares_memory(first, again) and not first.flags.writeable
    expected = first.copy()
    (mine,) = images.read([1])
    mine[:] = 0
    np.testing.assert_array_equal(images.read([1])[0], expected)
    part = images.subset([1])
    del images
    np.testing.assert_array_equal(part.read([0], copy=False)[0], expected)


def test_split_parts_share_a_pack(photos: Path, tmp_path: Path, opened: list[str]) -> None:
    root = tmp_path / "set"
    root.mkdir()
    (photos / "cat").rename(root / "train")
    (photos / "dog").rename(root / "test")
    for split in ("train", "test"):
        open_packed(root, split=split, pack=str(tmp_path / "packs"))
    del opened[:]
    both = open_packed(root, split="all", pack=str(tmp_path / "packs"))
    assert len(both) == NUM_IMAGES and len(both.skipped) == 1 and opened == []
    assert len(list((tmp_path / "packs").iterdir())) == 1


# ---- killed, beside others, damaged


def python(code: str, *arguments: object) -> subprocess.Popen:
    prelude = (
        "import os, signal, sys\nfrom simclr.data import open_data\n"
        "from simclr.data.pack import pack\npack.SHARD_BYTES = 10_000\n"
    )
    command = [sys.executable, "-c", prelude + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_packing_goes_on_where_it_was(photos: Path, tmp_path: Path, opened: list[str]) -> None:
    packs = tmp_path / "packs"
    code = """
def progress(done, total):
    if (done, total) == (15, 25):
        os.kill(os.getpid(), signal.SIGKILL)
open_data(sys.argv[1], pack=sys.argv[2], workers=2, progress=progress).prepare()
"""
    killed = python(code, photos, packs)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    before = shards(packs)
    assert before and len(list(packs.glob("*/*.partial"))) == 1
    del opened[:]
    images = open_packed(photos, pack=str(packs))
    assert 11 <= len(set(opened)) < 25  # what was not done, and the half-written shard
    assert set(before) < set(shards(packs)) and not list(packs.glob("*/*.partial"))
    assert same(images, open_data(photos))


def test_two_processes_at_once_decode_each_image_once(photos: Path, tmp_path: Path) -> None:
    packs = tmp_path / "packs"
    open_packed(photos, pack=str(packs))  # to learn the name
    (made,) = packs.iterdir()
    for path in shards(packs):
        path.unlink()
    code = """
count, real = [], pack.decode_found
pack.decode_found = lambda file, side: count.append(file) or real(file, side)
images = open_data(sys.argv[1], pack=sys.argv[2], say=lambda text: print(text, flush=True))
images.prepare()
print(len(count), images.fingerprint)
"""
    with open(made / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        both = [python(code, photos, packs) for _ in range(2)]
        for process in both:
            assert process.stdout is not None and "Waiting for " in process.stdout.readline()
    results = []
    for process in both:
        out, error = process.communicate()
        assert process.returncode == 0, error
        results.append(out.split("\n")[-2].split())
    assert sorted(int(count) for count, _ in results) == [0, NUM_IMAGES]
    assert {fingerprint for _, fingerprint in results} == {open_data(photos).fingerprint}


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def content_of(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[content.index(b'{"files":') : -56])


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "index": lambda path: flip(path, -100),
    "trailer": lambda path: flip(path, -50),
    "hole": lambda path: path.write_bytes(path.read_bytes()[500:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_alone_is_made_anew(
    photos: Path, tmp_path: Path, opened: list[str], small_shards: None, damage: str
) -> None:
    open_packed(photos, pack=str(tmp_path / "packs"))
    good = shards(tmp_path / "packs")
    assert len(good) > 3
    content, others = content_of(good[1]), good[:1] + good[2:]
    digests = {sha256(path.read_bytes()).hexdigest(): path.name for path in photos.glob("*/*")}
    names = {digests[stamp.split()[-1]] for stamp in [*content["files"], *content["left_out"]]}
    times = [path.stat().st_mtime_ns for path in others]
    DAMAGES[damage](good[1])
    del opened[:]
    said: list[str] = []
    images = open_packed(photos, pack=str(tmp_path / "packs"), say=said.append)
    assert set(opened) == names
    assert sum("is damaged" in text and good[1].name in text for text in said) == 1
    assert [path.stat().st_mtime_ns for path in others] == times
    assert same(images, open_data(photos))


def test_shard_that_cannot_be_read_is_not_removed(
    photos: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_packed(photos, pack=str(tmp_path / "packs"))
    before = shards(tmp_path / "packs")
    said: list[str] = []

    def refuse(path: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(packing, "Shard", refuse)
        patch.setattr(packing.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(0))
        images = open_packed(photos, pack=str(tmp_path / "packs"), say=said.append)
    assert len(said) == len(before) and all("cannot be read (too many open files)" in text for text in said)
    assert same(images, open_data(photos)) and shards(tmp_path / "packs") == before


def test_damaged_pixels_are_noticed_when_they_are_read(
    photos: Path, tmp_path: Path, opened: list[str], small_shards: None
) -> None:
    packs = str(tmp_path / "packs")
    open_packed(photos, pack=packs)
    victim = shards(tmp_path / "packs")[2]
    flip(victim, 100)  # in the pixels of its first image
    said: list[str] = []
    images = open_packed(photos, pack=packs, say=said.append)
    del opened[:]
    assert said == []
    assert same(images, open_data(photos, pack="off"))
    assert len(said) == 2 and "do not match their checksum" in said[0] and "takes its place" in said[1]
    del opened[:]
    mended = open_packed(photos, pack=packs, say=said.append)
    assert 0 < len(set(opened)) < 8 and "had damaged pixels" in said[2]
    del opened[:]
    mended.read(np.arange(len(mended)))
    assert opened == [] and victim in shards(tmp_path / "packs")  # the same bytes have the same name


def test_only_what_has_changed_is_decoded_anew(photos: Path, tmp_path: Path, opened: list[str]) -> None:
    open_packed(photos, pack=str(tmp_path / "packs"))
    Image.new("RGB", (9, 9)).save(photos / "dog" / "03.png")
    Image.new("RGB", (8, 8)).save(photos / "cat" / "new.png")
    (photos / "cat" / "02.jpg").unlink()
    Image.new("RGB", (7, 7)).save(photos / "cat" / "cut.jpg")  # mended
    del opened[:]
    images = open_packed(photos, pack=str(tmp_path / "packs"))
    assert set(opened) == {"03.png", "new.png", "cut.jpg"}
    assert len(images) == NUM_IMAGES and same(images, open_data(photos))
    assert not any("delete it" in note for note in images.notes)
    for path in photos.glob("*/*"):
        os.utime(path, ns=(0, 0))
        path.rename(path.with_stem(path.stem + "-renamed"))
    del opened[:]
    images = open_packed(photos, pack=str(tmp_path / "packs"))
    assert opened == [] and not any("delete it" in note for note in images.notes)
    for path in photos.glob("*/*"):
        with open(path, "ab") as file:
            file.write(b"more")
    images = open_packed(photos, pack=str(tmp_path / "packs"))
    assert any("delete it" in note for note in images.notes) and same(images, open_data(photos))


def test_reasons_of_the_machine_are_not_remembered(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args, **_options):
        raise MemoryError

    images = open_data(photos, pack=str(tmp_path / "packs"))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        with pytest.raises(UserError, match="more memory than there is"):
            images.read([0])
        with pytest.raises(UserError, match="more memory than there is"):
            open_data(photos)
    assert same(open_packed(photos, pack=str(tmp_path / "packs")), open_data(photos))


# ---- where, and whether there is room


def test_auto_packs_what_is_slow_to_decode_in_the_users_cache(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_packed(photos, pack="auto")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(place, "SLOW_SECONDS", 0.0)
    said: list[str] = []
    open_packed(photos, pack="auto", say=said.append)
    (made,) = (tmp_path / "cache" / "simclr" / "packs").iterdir()
    assert made.name.startswith("photos-") and str(made) in said[0] and "MiB" in said[0]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, as the XDG specification says
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_packed(photos, pack="auto")
    assert shards(tmp_path / "home" / ".cache" / "simclr" / "packs")


def test_pack_that_does_not_fit_is_not_begun(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, small = (int(open_data(photos, side=side).sizes.prod(axis=1).sum()) * 3 for side in (None, 16))
    assert small < native / 2
    monkeypatch.setattr(place, "SIDES", (24, 16))
    usage = namedtuple("usage", "free")
    free = place.KEEP_FREE + int(small * 1.3)
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: usage(free))
    images = open_packed(photos, pack=str(tmp_path / "packs"))
    (note,) = [note for note in images.notes if "no room for the pack" in note]
    assert "--pack-side 16 would fit" in note and "1.0 GiB free" in note
    assert same(images, open_data(photos)) and not shards(tmp_path / "packs")
    smaller = open_packed(photos, pack=str(tmp_path / "packs"), side=16)
    assert shards(tmp_path / "packs") and not any("no room" in note for note in smaller.notes)


def test_disk_that_fills_up_leaves_the_rest_to_the_files(photos: Path, tmp_path: Path) -> None:
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({12_500}, {12_500}))
images = open_data(sys.argv[1], pack=sys.argv[2])
print(images.prepare())
print(images.fingerprint, sum(int(image.sum()) for image in images.read(range(len(images)))))
"""
    process = python(code, photos, tmp_path / "packs")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert "The pack is not complete (file too large)" in out
    plain = open_data(photos)
    total = sum(int(image.sum()) for image in plain.read(range(len(plain))))
    assert out.split("\n")[1] == f"{plain.fingerprint} {total}"
    assert not list((tmp_path / "packs").glob("*/*.partial"))


def test_place_that_cannot_be_written_is_said(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    images = open_packed(photos, pack=str(tmp_path / "file" / "packs"))
    assert any("cannot be written (not a directory)" in note for note in images.notes)
    assert same(images, open_data(photos))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pack": "{photos}/packs"}, "would lie inside the images' folder"),
        ({"pack": "{photos}"}, "would lie inside the images' folder"),
        ({"side": 3}, "--pack-side was 3; it must be at least 16"),
    ],
)
def test_settings_that_cannot_be(photos: Path, options: dict, sentence: str) -> None:
    given = {name: value.format(photos=photos) if name == "pack" else value for name, value in options.items()}
    with pytest.raises(UserError, match=sentence):
        open_data(photos, **given)
    with pytest.raises(UserError, match="--pack-side goes with a folder"):
        open_data("digits", side=32)


# ---- smaller images


def test_side_shrinks_the_larger_images_and_no_others(photos: Path, tmp_path: Path) -> None:
    native, small = open_data(photos), open_data(photos, side=24)
    for workers in (0, 2):
        assert same(open_packed(photos, side=24, pack=str(tmp_path / "packs"), workers=workers), small)
    assert same(open_folder(photos, reading=Reading(side=24, memory_budget=0)), small)
    assert small.fingerprint != native.fingerprint
    assert open_data(photos, side=64).fingerprint == native.fingerprint  # none is larger
    shrunk = 0
    for i, key in enumerate(small.keys):
        (pixels,), (before,) = small.read([i]), native.read([i])
        shorter = min(before.shape[:2])
        if shorter <= 24:
            np.testing.assert_array_equal(pixels, before)
            continue
        shrunk += 1
        assert min(pixels.shape[:2]) == 24
        assert np.abs(np.array(pixels.shape[:2]) - np.array(before.shape[:2]) * 24 / shorter).max() <= 0.5, key
        with Image.open(photos / key) as image:
            expected = image.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC).convert("RGB")
        np.testing.assert_array_equal(pixels, np.asarray(expected))
    assert shrunk > 5


# ---- a run


def test_run_from_a_pack_is_the_run_without_one(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def simclr(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["simclr", *map(str, arguments)])
        main()
        return capsys.readouterr().err

    fast = ["--recipe", "digits", "--channels", "3", "--batch-size", "8", "--width", "0.5", "--log-every", "1"]
    packs = tmp_path / "packs"
    common = ["pretrain", photos, *fast, "--epochs", "2", "--pack-side", "32"]
    simclr(*common, "--out", tmp_path / "off", "--pack", "off", "--workers", "0")
    said = simclr(*common, "--out", tmp_path / "on", "--pack", packs, "--workers", "2")
    assert f"into the pack {packs}" in said and "shorter side above 32 pixels" in said
    for name in ("metrics.jsonl", "encoder/model.safetensors"):
        assert (tmp_path / "on" / name).read_bytes() == (tmp_path / "off" / name).read_bytes()
    options = json.loads((tmp_path / "on" / "run.json").read_text())["data"]["options"]
    assert options["side"] == 32 and options["pack"] == str(packs)
    for name, pack in (("on", "off"), ("off", packs)):  # resumed from its beginning, the other way
        (tmp_path / name / "summary.json").unlink()
        for checkpoint in (tmp_path / name / "checkpoints").iterdir():
            checkpoint.unlink()
        before = (tmp_path / name / "metrics.jsonl").read_bytes()
        simclr("resume", tmp_path / name, "--pack", pack)
        assert (tmp_path / name / "metrics.jsonl").read_bytes() == before
    said = simclr("embed", tmp_path / "on", photos, "--out", tmp_path / "a.npz", "--pack", packs)
    assert "shorter side above 32 pixels" in said  # as the run had them
    assert "once for all runs" not in said


def test_a_plan_reads_a_pack_and_writes_none(photos, opened, tmp_path):
    packs = tmp_path / "packs"
    looked_at = open_folder(photos, split="all", reading=Reading(pack=str(packs), completes_pack=False))
    (note,) = [note for note in looked_at.prepare() if "are not in the pack" in note]
    assert note.startswith(f"{NUM_IMAGES} of {NUM_IMAGES} images") and not packs.exists()
    packed = open_folder(photos, split="all", reading=Reading(pack=str(packs)))
    packed.prepare()
    before = {path: path.stat().st_mtime_ns for path in packs.rglob("*")}
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(photos / "cat" / "new.png")
    opened.clear()
    looked_at = open_folder(photos, split="all", reading=Reading(pack=str(packs), completes_pack=False))
    assert any(note.startswith(f"1 of {NUM_IMAGES + 1} images") for note in looked_at.prepare())
    looked_at.read(np.arange(len(looked_at)))
    assert opened == ["new.png"]
    assert {path: path.stat().st_mtime_ns for path in packs.rglob("*")} == before
