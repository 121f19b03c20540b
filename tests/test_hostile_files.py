"""Files from strangers: no crash, no hang, and every one either loaded or counted with a reason."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hostile_images import FORMATS, encoded, make_hostile
from simclr.data import open_data
from simclr.data.readers.decode import decode_file
from simclr.data.readers.folder import open_folder
from simclr.data.readers.store import Reading
from simclr.errors import UserError
from skips import NO_PIPES, ROOT


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    root = tmp_path_factory.mktemp("hostile") / "set"
    return root, make_hostile(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_hundred_hostile_files(hostile: tuple[Path, int], workers: int) -> None:
    root, num_files = hostile
    assert num_files >= 200
    opened = open_data(root, workers=workers)
    images = opened.readable()
    assert set(opened.skipped) < set(images.skipped) and len(opened) > len(images)
    assert len(images) + len(images.skipped) == num_files
    assert set(images.keys).isdisjoint(item.key for item in images.skipped)
    reasons = dict(images.skipped)
    assert "decompression bomb" in reasons["huge.png"] and "decompression bomb" in reasons["bomb.png"]
    assert "decompression bomb" in reasons["huge.gif"] and "decompression bomb" in reasons["huge.ppm"]
    assert all(reasons[f"empty.{ending}"] == "empty file" for ending in FORMATS)
    assert reasons["script.jpg"] == reasons["text.png"] == "not a readable image"  # no Ghostscript
    assert {"png_in.jpg", "gif_in.png", "upper.PNG", "tail.jpg"} <= set(images.keys)
    assert any(f"{len(opened.skipped)} of {num_files} files left out: " in note for note in images.notes)
    assert any(f"{len(opened) - len(images)} of {len(opened)} images are damaged" in note for note in images.notes)
    assert not any("\n" in reason for _, reason in images.skipped)
    for i in range(len(images)):
        (pixels,) = images.read([i])
        assert pixels.dtype == np.uint8 and pixels.shape == (*images.sizes[i], images.channels)


def test_strict_names_the_first_and_counts(hostile: tuple[Path, int]) -> None:
    root, num_files = hostile
    broken = open_data(root).skipped  # those whose header tells, before any is decoded
    said = rf"^{len(broken)} of {num_files} files in .* the first is {broken[0].key} \({broken[0].reason}\)"
    with pytest.raises(UserError, match=said):
        open_data(root, strict=True)


def test_result_is_the_same_for_any_number_of_threads(hostile: tuple[Path, int]) -> None:
    one, many = (open_folder(hostile[0], reading=Reading(workers=workers)) for workers in (1, 7))
    assert one.skipped == many.skipped and one.fingerprint == many.fingerprint
    one, many = one.readable(), many.readable()
    assert one.skipped == many.skipped and one.fingerprint == many.fingerprint


def test_batches_from_many_threads_at_once(hostile: tuple[Path, int]) -> None:
    images = open_folder(hostile[0], reading=Reading(workers=2, memory_budget=0))
    rows = np.flatnonzero((images.sizes == 24).all(axis=1))[:20]
    expected = images.read(rows)
    results: list[bool] = []

    def compare() -> None:
        again = images.read(rows)
        results.append(all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True)))

    threads = [threading.Thread(target=compare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_truncation_is_named(tmp_path: Path) -> None:
    for ending in ("jpg", "png", "bmp", "ppm", "tiff"):
        path = tmp_path / f"a.{ending}"
        whole = encoded(ending)
        path.write_bytes(whole[: len(whole) * 3 // 4])
        assert decode_file(path) == "truncated", ending


def test_huge_files_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.webp", "wb") as file:
        file.write(b"RIFF\0\0\0\0WEBP")
        file.truncate(1 << 40)  # a hole, not a terabyte
    assert "more than" in str(decode_file(tmp_path / "a.webp"))


def test_just_below_the_limit_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (9_999, 10_001)).save(tmp_path / "a.png")  # 99,999,999 pixels: Pillow alone would warn
    images = open_data(tmp_path)
    assert images.sizes.tolist() == [[10_001, 9_999]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason=NO_PIPES)
def test_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    (tmp_path / "a.png").write_bytes(encoded("png"))
    images = open_data(tmp_path)
    assert list(images.keys) == ["a.png"]
    assert images.skipped == [("x.jpg", "not a regular file")]
    assert decode_file(tmp_path / "x.jpg") == "not a regular file"


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(encoded("png"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "2.png").write_bytes(encoded("png", 12))
    (outside / "back").symlink_to(root)
    (root / "loop").symlink_to(root)
    (root / "cat" / "up").symlink_to("..")
    (root / "cat" / "world").symlink_to("/")  # above the folder: a loop too
    (root / "again").symlink_to("dog")  # sorts before dog, but dog is the real one
    (root / "emu").symlink_to(outside)
    (root / "gnu").symlink_to(outside)
    (root / "cat" / "self.png").symlink_to("self.png")
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    (root / "dog" / "3.png").symlink_to(outside / "2.png")
    images = open_data(root)
    assert list(images.keys) == ["cat/1.png", "dog/1.png", "dog/3.png", "emu/2.png"]
    assert images.classes == ["cat", "dog", "emu"]
    assert sorted(item.key for item in images.skipped) == ["cat/gone.png", "cat/self.png"]


def test_odd_names(tmp_path: Path) -> None:
    names = [b"new\nline.png", b"\xff\xfe.png", b"esc\x1b[31m.png", "snow ☃.png".encode()]
    for name in names:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_bytes(b"not an image")
    (tmp_path / os.fsdecode(b"good\xff.png")).write_bytes(encoded("png"))
    images = open_data(tmp_path)
    assert len(images) == 1 and len(images.skipped) == 4
    for text in (*images.keys, *images.notes):
        assert text.encode("utf-8") and text.isprintable()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason=ROOT)
def test_unreadable_files_and_folders_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("png"))
    (tmp_path / "b.png").write_bytes(encoded("png"))
    (tmp_path / "c").mkdir()
    (tmp_path / "b.png").chmod(0)
    (tmp_path / "c").chmod(0)
    images = open_data(tmp_path)
    assert images.skipped == [("b.png", "permission denied"), ("c", "folder: permission denied")]


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images in"):
        open_data(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="no images in"):
        open_data(tmp_path)
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"None of the 1 image files in .* the first is b.jpg \(empty file\)"):
        open_data(tmp_path)
