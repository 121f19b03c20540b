"""Sources: opened without decoding a pixel, read as if all had been decoded; what is damaged is found and counted."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from hostile_images import make_hostile
from simclr.data import Images, Source, open_data
from simclr.data.images import array_images
from simclr.data.presets import open_transfer_set
from simclr.data.readers import decode, store
from simclr.data.readers.decode import decode_file
from simclr.data.readers.folder import open_folder
from simclr.data.readers.header import read_header
from simclr.data.readers.store import Reading
from simclr.errors import UserError
from simclr.views.device_images import DeviceImages

RNG = np.random.default_rng(0)
MODES = {
    "1": [".png", ".tif", ".bmp"], "L": [".png", ".jpg", ".tif", ".bmp", ".gif", ".webp", ".jp2", ".pgm"],
    "LA": [".png", ".tif"], "P": [".png", ".gif", ".bmp", ".tif"], "RGB": [".png", ".jpg", ".tif", ".bmp", ".webp",
    ".jp2", ".ppm", ".avif"], "RGBA": [".png", ".webp", ".tif", ".jp2"], "CMYK": [".jpg", ".tif"],
    "I;16": [".png", ".tif"], "F": [".tif"], "YCbCr": [".jpg"], "LAB": [".tif"],
}  # fmt: skip


def random_image(mode: str, width: int, height: int, *, gray: bool = False) -> Image.Image:
    if mode in ("I;16", "F"):
        return Image.fromarray(RNG.integers(0, 65536, (height, width)).astype({"I;16": "<u2", "F": "<f4"}[mode]))
    pixels = RNG.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if gray:
        pixels[..., 1] = pixels[..., 2] = pixels[..., 0]
    image = Image.fromarray(pixels)
    if mode == "LAB":
        return Image.frombytes("LAB", image.size, image.convert("RGB").tobytes())
    return image.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "P") else image.convert(mode)


def shape_of(path: Path) -> object:
    decoded = decode_file(path)
    return decoded if isinstance(decoded, str) else decoded.shape


def test_headers_tell_the_shape_of_what_is_decoded(tmp_path: Path) -> None:
    count = 0
    for mode, endings in MODES.items():
        for ending, turn, gray in itertools.product(endings, (None, 1, 3, 6, 8), (False, True)):
            path = tmp_path / f"{mode.replace(';', '')}-{turn}-{gray}{ending}"
            exif = Image.Exif()
            if turn is not None:
                exif[0x0112] = turn
            try:
                random_image(mode, 21, 12, gray=gray).save(path, exif=exif if turn else Image.Exif())
            except (OSError, TypeError):  # this Pillow cannot write it
                path.unlink(missing_ok=True)
                continue
            assert read_header(path) == shape_of(path), path.name
            count += isinstance(shape_of(path), tuple)
    assert count > 200


def test_a_png_may_state_its_turn_behind_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (21, 12)).save(tmp_path / "first.png", exif=exif)
    content = (tmp_path / "first.png").read_bytes()
    begin = content.index(b"eXIf") - 4
    chunk = content[begin : begin + 12 + int.from_bytes(content[begin : begin + 4])]
    end = content.index(b"IEND") - 4
    late = content[:begin] + content[begin + len(chunk) : end] + chunk + content[end:]
    (tmp_path / "late.png").write_bytes(late)
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", "<tiff:Orientation>6</tiff:Orientation>")
    Image.new("RGB", (21, 12)).save(tmp_path / "xmp.png", pnginfo=xmp)
    for name in ("first", "late", "xmp"):
        assert read_header(tmp_path / f"{name}.png") == shape_of(tmp_path / f"{name}.png") == (21, 12, 3)


def test_headers_of_hostile_files_promise_no_other_shape(tmp_path: Path) -> None:
    make_hostile(tmp_path / "set")
    kept = []
    for path in sorted((tmp_path / "set").iterdir()):
        header, decoded = read_header(path), shape_of(path)
        if isinstance(header, str):
            assert isinstance(decoded, str), f"{path.name} is left out for {header!r}, and can be decoded"
        elif isinstance(decoded, tuple):
            kept.append(path.name)
            assert header == decoded, path.name
    assert len(kept) > 50


# ---- the contract


def write_photos(root: Path, count: int = 12) -> Path:
    """Photographs of several sizes in two classes; numbers 3, 4 and 11 are cut short behind their headers."""
    rng = np.random.default_rng(1)
    for i in range(count):
        path = root / ("cat", "dog")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(path)
    for i in (3, 4, 11):
        path = root / ("cat", "dog")[i % 2] / f"{i:02}.png"
        path.write_bytes(path.read_bytes()[:-400])
    (root / "dog" / "note.png").write_text("no image")
    return root


DAMAGED = ["cat/04.png", "dog/03.png", "dog/11.png"]


def test_opening_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = write_photos(tmp_path / "photos")

    def refuse(*_: object) -> None:
        raise AssertionError("an image was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(decode, "to_pixels", refuse)
        images = open_data(photos, pack=str(tmp_path / "packs"))
        opened: Source = images
        assert (opened.kind, opened.name, len(opened)) == ("image", "photos", 12)
        assert opened.keys[:2] == ["cat/00.png", "cat/02.png"] and opened.classes == ["cat", "dog"]
        assert opened.labels is not None and opened.labels.tolist() == [0] * 6 + [1] * 6
        assert opened.fingerprint == open_data(photos).fingerprint
        assert images.skipped == [("dog/note.png", "not a readable image")] and not (tmp_path / "packs").exists()


@pytest.mark.parametrize("pack", [False, True])
def test_the_next_readable_image_takes_the_place_of_a_damaged_one(tmp_path: Path, pack: bool) -> None:
    photos = write_photos(tmp_path / "photos")
    said: list[str] = []
    images = open_data(photos, say=said.append, pack=str(tmp_path / "packs") if pack else "off")
    expected = dict(zip(images.keys, images.keys, strict=True))
    expected |= {"cat/04.png": "cat/06.png", "dog/03.png": "dog/05.png", "dog/11.png": "cat/00.png"}
    order = RNG.permutation(12)
    for rows in (order, order[::-1], [11], [11, 11, 2]):
        for i, pixels, j in zip(rows, images.read(rows), images.items_read(rows), strict=True):
            assert images.keys[j] == expected[images.keys[i]]
            with Image.open(photos / images.keys[j]) as image:
                np.testing.assert_array_equal(pixels, np.asarray(image))
    assert [item.key for item in images.replaced] == DAMAGED
    assert sum("takes its place" in text for text in said) == 1
    part = images.subset([2, 9])  # within a part the next image is one of the part
    assert part.items_read([0, 1]).tolist() == [1, 1] and len(part.read([0, 1])[0]) == len(part.read([1])[0])
    with pytest.raises(UserError, match=r"None of the 2 images of photos can be decoded, the first is dog/11\.png"):
        images.subset([2, 11]).read([1])


def test_damaged_images_are_left_out_of_work_on_labels(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    images = open_data(photos)
    seen: list[tuple[int, int]] = []
    assert [item.key for item in images.check(lambda done, total: seen.append((done, total)))] == DAMAGED
    assert seen == [(i + 1, 12) for i in range(12)]
    left = images.readable(lambda *_: pytest.fail("all are known by now"))
    assert [item.key for item in left.skipped] == sorted([*DAMAGED, "dog/note.png"])
    assert any("3 of 12 images are damaged and left out" in note for note in left.notes)
    for key in DAMAGED:
        (photos / key).unlink()
    same = open_data(photos)
    assert left.fingerprint == same.fingerprint and list(left.keys) == list(same.keys) and not same.check()
    with pytest.raises(UserError, match="None of the 2 images"):
        images.subset([2, 11]).readable()


def test_a_shape_that_the_header_does_not_keep_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (9, 8), (1, 2, 3)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 8), (4, 5, 6)).save(tmp_path / "b.png")
    images = open_data(tmp_path)
    real = decode.to_pixels
    monkeypatch.setattr(decode, "to_pixels", lambda image: real(image)[: 4 if image.getpixel((0, 0))[0] == 1 else 8])
    assert images.check() == [("a.png", "4 x 9 pixels, and 8 x 9 by its header")]


def test_arrays_are_sources_too() -> None:
    pixels = RNG.integers(0, 256, (5, 4, 4), dtype=np.uint8)
    images: Images = array_images(
        pixels, None, name="five", split="all", has_own_split=False, classes=None, channels="auto"
    )
    opened: Source = images
    assert opened.kind == "image" and not images.check() and images.readable() is images and images.prepare() == []
    assert images.items_read([3, -1]).tolist() == [3, 4] and images.replaced == []
    good, read, damaged = images.read_readable(np.array([1, 2]))
    assert good.tolist() == [1, 2] and damaged == [] and np.array_equal(np.asarray(read)[..., 0], pixels[1:3])


def test_one_progress_bar_is_shown_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, shown, active = write_photos(tmp_path / "photos"), [], []

    @contextmanager
    def counting(work: str) -> Iterator[Callable[[int, int], None]]:
        assert not active, f"{work} within {active}"
        active.append(work)
        shown.append(work)
        yield lambda done, total: None
        active.pop()

    reading = Reading(pack=str(tmp_path / "packs"), counting=counting)
    sets = open_transfer_set(str(photos), reading=reading)
    assert len(sets.learn) + len(sets.test) == 9
    assert shown == ["Opening files", "Decoding images", "Checking images"]
    with pytest.raises(UserError, match="cannot be used"):
        open_folder(photos, reading=replace(reading, strict=True))
    (photos / "dog" / "note.png").unlink()
    with pytest.raises(UserError, match="3 of 12 files"):
        open_folder(photos, reading=replace(reading, strict=True))


def test_pixels_stay_in_memory_where_all_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = write_photos(tmp_path / "photos")
    counted: list[Path] = []
    monkeypatch.setattr(store, "decode_found", lambda file, side: counted.append(file.path) or decode_file(file.path))
    images = open_data(photos)
    for _ in range(2):
        images.read(range(12))
    assert len(counted) == 12  # the damaged ones too
    counted.clear()
    images = open_folder(photos, reading=Reading(memory_budget=1000))
    images.read([0]), images.read([0])
    assert len(counted) == 2


def test_images_on_a_device_are_those_that_are_read(tmp_path: Path) -> None:
    images = open_data(write_photos(tmp_path / "photos"))
    resident = DeviceImages.of(images, "cpu")
    for i in range(len(images)):
        (expected,) = images.read([i])
        part = resident.pixels[resident.offsets[i] :][: expected.size].numpy()
        np.testing.assert_array_equal(part.reshape(expected.shape), expected)
        assert tuple(resident.sizes[i]) == expected.shape[:2]


# ---- the command


def test_check_names_each_damaged_file(simclr, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    (photos / "train").mkdir()
    (photos / "train" / "x.png").write_bytes(b"")
    (photos / "test").mkdir()
    Image.new("L", (9, 9)).save(photos / "test" / "y.png")  # beside parts, the others are checked too
    code, out, said = simclr("check", photos)
    assert code == 1 and [line.split(": ")[0] for line in out.splitlines()] == sorted(
        [*DAMAGED, "dog/note.png", "train/x.png"]
    )
    assert "dog/note.png: not a readable image\n" in out and "train/x.png: empty file\n" in out
    assert "5 of 15 files cannot be used" in said
    for line in out.splitlines():
        (photos / line.split(": ")[0]).unlink()
    code, out, said = simclr("check", photos)
    assert (code, out) == (0, "") and "All 10 images can be decoded" in said
    assert simclr("check", "digits")[0] == 0
    assert simclr("check", tmp_path / "nowhere")[0] == 2
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    code, out, said = simclr("check", tmp_path / "bad")
    assert code == 1 and out == "a.png: not a readable image\n" and "1 of 1 files" in said


def test_embed_leaves_damaged_images_out(simclr, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    fast = ["--recipe", "digits", "--epochs", "1", "--batch-size", "4", "--width", "0.25", "--workers", "0"]
    code, _, said = simclr("pretrain", photos, "--out", tmp_path / "run", *fast, "--channels", "3")
    assert code == 0, said
    assert "takes its place" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images"] == 12 and summary["images_left_out"] == 1
    assert summary["images_replaced"] == 3
    code, _, said = simclr("embed", tmp_path / "run", photos, "--out", tmp_path / "damaged.npz")
    assert code == 0 and "3 of 12 files left out" in said and "takes its place" not in said, said
    for key in DAMAGED:
        (photos / key).unlink()
    assert simclr("embed", tmp_path / "run", photos, "--out", tmp_path / "whole.npz")[0] == 0
    with np.load(tmp_path / "damaged.npz") as one, np.load(tmp_path / "whole.npz") as other:
        assert sorted(one) == sorted(other) == ["classes", "features", "keys", "labels"]
        for name in ("classes", "keys", "labels"):
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_allclose(one["features"], other["features"], rtol=1e-4, atol=1e-5)
        assert one["features"].shape[0] == 9 and one["features"].dtype == np.float32
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "run", "damaged.npz", "whole.npz"}


def test_a_run_of_before_goes_on_without_its_damaged_images(simclr, tmp_path: Path) -> None:
    """Earlier versions decoded all images at opening, and left out those that they could not decode."""
    photos = write_photos(tmp_path / "photos")
    fast = ["--recipe", "digits", "--epochs", "1", "--batch-size", "4", "--width", "0.25", "--workers", "0"]
    assert simclr("pretrain", photos, "--out", tmp_path / "run", *fast, "--channels", "3")[0] == 0
    (tmp_path / "run" / "summary.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    left = open_data(photos, channels="3").readable()
    record["data"] |= {"images": len(left), "fingerprint": left.fingerprint}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    code, _, said = simclr("resume", tmp_path / "run")
    assert code == 0 and "3 of 12 images are damaged and left out" in said, said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images"] == 9
