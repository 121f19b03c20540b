"""Files from strangers: no crash, no hang, and every one either loaded or counted with a reason."""

import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr.data import open_data
from simclr.data.readers.decode import decode_file
from simclr.data.readers.folder import open_folder
from simclr.data.readers.store import Reading
from simclr.errors import UserError
from skips import NO_PIPES, ROOT

FORMATS = {
    "jpg": ("JPEG", {}), "png": ("PNG", {}), "gif": ("GIF", {}), "bmp": ("BMP", {}), "webp": ("WEBP", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}), "tiff": ("TIFF", {}), "ppm": ("PPM", {}), "jp2": ("JPEG2000", {}),
}  # fmt: skip


def encoded(ending: str, size: int = 24) -> bytes:
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    name, options = FORMATS[ending]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    """The start of a PNG file that claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def make_hostile(root: Path) -> int:
    """Write files that are damaged in many ways; returns how many have an image's ending."""
    root.mkdir()
    rng = np.random.default_rng(20)
    files: dict[str, bytes] = {}
    for ending in FORMATS:
        whole = encoded(ending)
        for i in range(8):
            files[f"cut{i}.{ending}"] = whole[: int(rng.integers(1, len(whole)))]
        for i in range(12):
            flipped = bytearray(whole)
            # Half of the flips in the first bytes, where the headers are; 1 to 8 of them.
            for where in rng.integers(0, len(whole) if i % 2 else 64, rng.integers(1, 9)):
                flipped[where] ^= 1 << int(rng.integers(8))
            files[f"flip{i}.{ending}"] = bytes(flipped)
        files[f"zeros.{ending}"] = bytes(500)
        files[f"noise.{ending}"] = rng.bytes(500)
        files[f"empty.{ending}"] = b""
        files[f"text.{ending}"] = b"<html>404 not found</html>"
        files[f"upper.{ending.upper()}"] = whole
        files[f"tail.{ending}"] = whole + rng.bytes(100)
    files["png_in.jpg"], files["gif_in.png"] = encoded("png"), encoded("gif")
    files["script.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n"
    end = png_chunk(b"IEND", b"")
    files["huge.png"] = png_header(100_000, 100_000) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + end
    files["wide.png"] = png_header(2**31 - 1, 1) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + end
    files["none.png"] = png_header(0, 5) + png_chunk(b"IDAT", zlib.compress(b"")) + end
    files["header.png"] = png_header(5, 5)
    dense = png_chunk(b"IDAT", zlib.compress(bytes((12_000 // 8 + 1) * 12_000), 9)) + end
    files["bomb.png"] = png_header(12_000, 12_000, bits=1, kind=0) + dense  # 144 million pixels in 18 kB
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))
    files["text_bomb.png"] = encoded("png")[:33] + text + encoded("png")[33:]
    files["huge.gif"] = b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded("gif")[10:]
    files["huge.bmp"] = encoded("bmp")[:18] + struct.pack("<ii", 90_000, 90_000) + encoded("bmp")[26:]
    files["huge.ppm"] = b"P6 99999 99999 255\n" + bytes(100)
    canvas = (16_383).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + canvas + encoded("webp")[12:]
    files["huge.webp"] = b"RIFF" + struct.pack("<I", len(extended) + 4) + b"WEBP" + extended
    for name, content in files.items():
        (root / name).write_bytes(content)
    return len(files)


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
