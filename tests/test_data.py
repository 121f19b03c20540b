"""Data: every kind of source against values worked out by hand or by another reader."""

import csv
import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr.data import label_subset, open_data, split_indices
from simclr.data.images import with_channels
from simclr.data.readers.decode import decode_file, decode_image, to_pixels
from simclr.data.readers.folder import open_folder
from simclr.data.readers.idx import read_idx
from simclr.data.readers.named import DEBIAN_FASHION_MNIST
from simclr.data.readers.store import Reading
from simclr.errors import UserError

RNG = np.random.default_rng(0)
WEBP: dict[str, Any] = {"lossless": True, "exact": True}  # of what Pillow writes
COLOUR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def save(array: np.ndarray, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def decoded(path: Path) -> np.ndarray:
    pixels = decode_file(path)
    assert not isinstance(pixels, str), pixels
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    return pixels


# ---- one file


@pytest.mark.parametrize("ending", ["png", "bmp", "ppm", "tif", "gif", "webp", "jp2"])
def test_lossless_gray_and_colour_come_back_as_they_were(tmp_path: Path, ending: str) -> None:
    options = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}.get(ending, {})
    np.testing.assert_array_equal(decoded(save(COLOUR, tmp_path / f"c.{ending}", **options)), COLOUR)
    gray = decoded(save(GRAY, tmp_path / f"g.{ending}", **options))
    np.testing.assert_array_equal(gray, np.repeat(GRAY[..., None], gray.shape[2], axis=2))
    assert gray.shape[2] == (3 if ending == "webp" else 1)  # WebP knows no gray


def test_two_level_and_palette_images(tmp_path: Path) -> None:
    bits = GRAY > 100
    np.testing.assert_array_equal(decoded(save(bits, tmp_path / "bits.png"))[..., 0], bits * 255)
    few = COLOUR // 128 * 255
    image = Image.fromarray(few).quantize(16)
    image.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(decoded(tmp_path / "palette.png"), few)
    gray_palette = Image.fromarray(GRAY % 4)
    gray_palette.putpalette([0, 0, 0, 90, 90, 90, 200, 200, 200, 255, 255, 255])
    gray_palette.save(tmp_path / "gray_palette.png")
    expected = np.array([0, 90, 200, 255], np.uint8)[GRAY % 4]
    np.testing.assert_array_equal(decoded(tmp_path / "gray_palette.png"), expected[..., None])


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 128], [200, 0, 255, 51]]], np.uint8)
    # By hand: c * a / 255 + 255 - a; 10 * 128 / 255 + 127 = 132.02, 20: 137.04, 30: 142.06;
    # a = 51 is a fifth: 200 / 5 + 204 = 244, 0 + 204 = 204, 51 + 204 = 255.
    expected = [[[10, 20, 30], [255, 255, 255], [132, 137, 142], [244, 204, 255]]]
    for ending in ("png", "tif", "webp"):
        path = tmp_path / f"a.{ending}"
        Image.fromarray(pixels).save(path, **WEBP if ending == "webp" else {})
        np.testing.assert_array_equal(decoded(path), expected)
    everything = np.stack(np.meshgrid(np.arange(256), np.arange(256)), -1).astype(np.uint8)  # gray, alpha
    Image.fromarray(everything).save(tmp_path / "la.png")
    gray, alpha = everything[..., 0].astype(float), everything[..., 1].astype(float)
    np.testing.assert_array_equal(decoded(tmp_path / "la.png")[..., 0], np.rint(gray * alpha / 255 + 255 - alpha))


def test_transparent_colour_keys_and_palettes(tmp_path: Path) -> None:
    Image.fromarray(np.array([[7, 9]], np.uint8)).save(tmp_path / "l.png", transparency=7)
    assert decoded(tmp_path / "l.png").tolist() == [[[255], [9]]]
    save(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert decoded(tmp_path / "rgb.png").tolist() == [[[255, 255, 255], [4, 5, 6]]]
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.gif", transparency=0)
    assert decoded(tmp_path / "p.gif").tolist() == [[[255, 255, 255], [0, 0, 255]]]
    image.save(tmp_path / "p.png", transparency=bytes([51, 255]))  # a fifth of red over white
    assert decoded(tmp_path / "p.png").tolist() == [[[255, 204, 204], [0, 0, 255]]]
    save(np.array([[300, 65535]], np.uint16), tmp_path / "deep.png", transparency=300)
    assert decoded(tmp_path / "deep.png").tolist() == [[[255], [255]]]


def test_sixteen_bits_round_to_eight(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257)[..., None]
    for ending in ("png", "tif", "pgm"):
        np.testing.assert_array_equal(decoded(save(values, tmp_path / f"deep.{ending}")), expected)
    big_endian = Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(to_pixels(big_endian), expected)
    wide = np.array([[-5, 0, 128, 129, 65535, 70000]], np.int32)
    assert decoded(save(wide, tmp_path / "wide.tif"))[..., 0].tolist() == [[0, 0, 0, 1, 255, 255]]


def test_floats_are_read_by_their_range(tmp_path: Path) -> None:
    unit = np.array([[-1.0, 0.0, 0.5, 1.0]], np.float32)
    assert decoded(save(unit, tmp_path / "unit.tif"))[..., 0].tolist() == [[0, 0, 128, 255]]
    bytes_ = np.array([[-1.0, 0.6, 254.4, 300.0]], np.float32)
    assert decoded(save(bytes_, tmp_path / "bytes.tif"))[..., 0].tolist() == [[0, 1, 254, 255]]
    assert "NaN" in str(decode_file(save(np.array([[np.nan]], np.float32), tmp_path / "nan.tif")))


def test_cmyk_jpeg_with_adobe_inversion(tmp_path: Path) -> None:
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    flat.save(tmp_path / "cmyk.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "cmyk.jpg").read_bytes()
    np.testing.assert_allclose(decoded(tmp_path / "cmyk.jpg"), np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=2)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
)
def test_any_mode_of_pillow(mode: str) -> None:
    base = Image.fromarray(COLOUR)
    via = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    pixels = to_pixels((base.convert(via) if via else base).convert(mode))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (6, 9, 1 if mode in ("1", "L", "LA", "La", "I", "F") else 3)
    if mode in ("RGBA", "RGBa", "RGBX"):
        np.testing.assert_array_equal(pixels, COLOUR)
    if mode in ("YCbCr", "LAB", "HSV"):  # 8 bits of another space lose a little
        assert np.abs(pixels.astype(int) - COLOUR).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    # EXIF 2.32, tag 0x0112: which sides of the scene the 0th row and the 0th column show.
    stored_from_scene = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    scene = np.zeros((16, 32, 3), np.uint8)
    scene[:8, :16] = [255, 0, 0]
    scene[8:, 16:] = [0, 0, 255]
    scene[:8, 16:] = [0, 255, 0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(stored_from_scene[orientation](scene))
    for name in ("a.png", "a.tif", "a.webp", "a.jpg"):
        options = {"lossless": True} if name == "a.webp" else {"quality": 100, "subsampling": 0}
        found = decoded(save(stored, tmp_path / name, exif=exif, **({} if name[-3:] in ("png", "tif") else options)))
        assert found.shape == scene.shape
        assert np.abs(found.astype(int) - scene).max() <= (3 if name == "a.jpg" else 0)


def test_damaged_exif_leaves_the_image_as_it_is(tmp_path: Path) -> None:
    save(COLOUR, tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), COLOUR)


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_first_frame_of_an_animation(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = WEBP if ending == "webp" else {}
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
    assert (decoded(tmp_path / f"a.{ending}") == [255, 0, 0]).all()


def test_decode_image_takes_a_path_or_an_image(tmp_path: Path) -> None:
    np.testing.assert_array_equal(decode_image(save(COLOUR, tmp_path / "a.png")), COLOUR)
    np.testing.assert_array_equal(decode_image(Image.fromarray(GRAY)), GRAY[..., None])
    with pytest.raises(UserError, match="no such file"):
        decode_image(tmp_path / "b.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:-40])
    with Image.open(tmp_path / "a.png") as image, pytest.raises(UserError, match="truncated"):
        decode_image(image)


# ---- folders


def class_folder(root: Path) -> Path:
    for i, name in enumerate(("cat", "dog", "emu")):
        for j in range(4):
            save(np.full((5, 7, 3), 40 * i + j, np.uint8), root / name / "deep" / f"{j}.png")
    return root


def test_folder_of_classes(tmp_path: Path) -> None:
    images = open_data(class_folder(tmp_path / "set"))
    assert (images.name, images.split, images.has_own_split, images.channels) == ("set", "all", False, 3)
    assert images.classes == ["cat", "dog", "emu"]
    assert images.labels is not None and images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.keys[0] == "cat/deep/0.png" and list(images.keys) == sorted(images.keys)
    assert images.sizes.tolist() == [[5, 7]] * 12
    batch = images.read([11, 0, 4, 0])
    assert isinstance(batch, np.ndarray) and batch.shape == (4, 5, 7, 3)
    assert batch[:, 0, 0, 0].tolist() == [83, 0, 40, 0]
    batch[:] = 9  # the caller's own
    assert images.read([0])[0].max() == 0
    with pytest.raises(UserError, match="no test part"):
        open_data(tmp_path / "set", split="test")


def test_subset_is_data_of_its_own(tmp_path: Path) -> None:
    images = open_data(class_folder(tmp_path))
    part = images.subset([5, 1])
    assert len(part) == 2 and list(part.keys) == ["dog/deep/1.png", "cat/deep/1.png"]
    assert part.labels is not None and part.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(part.read([1, 0]), images.read([1, 5]))
    np.testing.assert_array_equal(part.subset([1]).read([0]), images.read([1]))
    assert images.labels is not None
    assert len(images.subset(images.labels == 2)) == 4
    assert len(images.subset([])) == 0 and len(images.read([])) == 0
    assert part.fingerprint != images.fingerprint


def test_flat_folder_and_mixed_folder_have_no_labels(tmp_path: Path) -> None:
    save(GRAY, tmp_path / "b.png")
    save(GRAY[:3], tmp_path / "a.png")
    flat = open_data(tmp_path)
    assert flat.labels is None and flat.classes is None and flat.channels == 1
    sizes = [image.shape for image in flat.read([0, 1, 0])]  # not of one size: a list
    assert sizes == [(3, 9, 1), (6, 9, 1), (3, 9, 1)]
    flat.read([0])[0][:] = 9  # the caller's own
    np.testing.assert_array_equal(flat.read([0])[0], GRAY[:3, :, None])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "Thumbs.db").write_text("x")
    save(GRAY, tmp_path / "one" / "c.png")
    save(GRAY, tmp_path / "two" / "d.png")
    save(GRAY, tmp_path / ".thumbnails" / "d.png")
    mixed = open_data(tmp_path)
    assert len(mixed) == 4 and mixed.labels is None
    said = " ".join(mixed.notes)
    assert "no labels" in said and "2 files with other endings" in said and ".thumbnails" in said


def test_single_class_is_no_label(tmp_path: Path) -> None:
    save(GRAY, tmp_path / "images" / "a.png")
    save(GRAY, tmp_path / "images" / "b.png")
    assert open_data(tmp_path).labels is None


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_its_own_split(tmp_path: Path, test_name: str) -> None:
    class_folder(tmp_path / "train")
    save(COLOUR, tmp_path / test_name / "emu" / "x.png")
    save(COLOUR, tmp_path / test_name / "gnu" / "y.png")
    save(COLOUR, tmp_path / "extra" / "z.png")
    train, test, both = (open_data(tmp_path, split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (12, 2, 14)
    assert train.has_own_split and test.split == "test"
    assert train.classes == test.classes == ["cat", "dog", "emu", "gnu"]  # one number, one class
    assert test.labels is not None and test.labels.tolist() == [2, 3]
    assert list(test.keys) == [f"{test_name}/emu/x.png", f"{test_name}/gnu/y.png"]
    assert any("1 images outside" in note for note in train.notes)


def test_channels(tmp_path: Path) -> None:
    save(GRAY, tmp_path / "a.png")
    assert open_data(tmp_path).channels == 1
    three = open_data(tmp_path, channels="3")
    np.testing.assert_array_equal(three.read([0])[0], np.repeat(GRAY[..., None], 3, axis=2))
    assert any("three equal channels" in note for note in three.notes)
    save(COLOUR, tmp_path / "b.png")
    mixed = open_data(tmp_path)
    assert mixed.channels == 3 and any("1 of 2 images are gray" in note for note in mixed.notes)
    np.testing.assert_array_equal(mixed.read([0, 1])[0], three.read([0])[0])
    one = open_data(tmp_path, channels="1")
    assert one.channels == 1 and any("converted to gray" in note for note in one.notes)
    np.testing.assert_array_equal(one.read([1])[0][..., 0], np.asarray(Image.fromarray(COLOUR).convert("L")))


def test_gray_is_pillows_luma() -> None:
    cube = RNG.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(cube).convert("L"))
    np.testing.assert_array_equal(with_channels(cube, 1)[..., 0], expected)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_beyond_the_memory_budget_files_are_decoded_again(tmp_path: Path, workers: int) -> None:
    class_folder(tmp_path)
    save(GRAY, tmp_path / "cat" / "other.png")
    kept = open_folder(tmp_path)
    again = open_folder(tmp_path, reading=Reading(memory_budget=5 * 7 * 3 * 4, workers=workers))
    assert any("decoded again" in note for note in again.notes)
    assert again.fingerprint == kept.fingerprint
    order = [12, 3, 3, 4]
    for first, second in zip(kept.read(order), again.read(order), strict=True):
        np.testing.assert_array_equal(first, second)
    (tmp_path / "cat" / "other.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"other\.png has changed since the data was opened"):
        again.read([4])


def test_order_and_fingerprint_do_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = ["b.png", "a/z.png", "a.png", "B.png", "a-b/c.png", "é.png"]
    for root, order in ((tmp_path / "one", names), (tmp_path / "two", names[::-1])):
        for name in order:
            save(GRAY, root / name)
    one, two = open_data(tmp_path / "one"), open_data(tmp_path / "two", workers=5)
    assert list(one.keys) == list(two.keys) == sorted(names)
    assert one.fingerprint == two.fingerprint
    save(GRAY[:5], tmp_path / "two" / "a.png")
    assert open_data(tmp_path / "two").fingerprint != one.fingerprint


def test_progress_counts_every_file(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    class_folder(tmp_path)
    open_data(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 12) for i in range(12)]


# ---- label files


def write_labels(path: Path, rows: list[tuple[str, str]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_label_file(tmp_path: Path) -> None:
    class_folder(tmp_path)
    keys = list(open_data(tmp_path).keys)
    rows = [(key, "10" if i % 2 else "9") for i, key in enumerate(keys)]
    rows[0] = (f"./{keys[0]}", "")
    rows[1] = (str((tmp_path / keys[1]).resolve()), "10")
    labels = write_labels(tmp_path / "labels.csv", [("path", "label"), *rows])
    images = open_data(tmp_path, labels=labels)
    assert images.classes == ["9", "10"]  # numbers in the order of numbers
    assert images.labels is not None and images.labels.tolist() == [-1] + [1, 0] * 5 + [1]
    assert not any("endings" in note for note in images.notes)  # the label file is not an ignored file


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("cat/deep/0.png", "a")], r"labels 1 of 12 images .* lacks cat/deep/1.png, .* and 6 more"),
        ([("nope.png", "a")], "names 1 files that are not images .*: nope.png"),
        ([("cat/deep/0.png", "a"), ("cat/deep/0.png", "b")], "line 2: .* two labels"),
        ([("cat/deep/0.png", "a", "b")], "line 1: expected 'path,label'"),
    ],
)
def test_label_file_that_does_not_fit(tmp_path: Path, rows: list[tuple[str, str]], sentence: str) -> None:
    class_folder(tmp_path)
    with pytest.raises(UserError, match=sentence):
        open_data(tmp_path, labels=write_labels(tmp_path / "labels.csv", rows))


def test_label_file_that_is_none(tmp_path: Path) -> None:
    class_folder(tmp_path)
    with pytest.raises(UserError, match="no label file"):
        open_data(tmp_path, labels=tmp_path / "nope.csv")
    with pytest.raises(UserError, match="cannot be read as a CSV"):
        open_data(tmp_path, labels=tmp_path / "cat/deep/0.png")
    with pytest.raises(UserError, match="label file goes with a folder"):
        open_data("digits", labels=write_labels(tmp_path / "labels.csv", []))


# ---- arrays


def savez(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, allow_pickle=True, **arrays)
    return path


def test_npz(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (10, 6, 5), dtype=np.uint8)
    y = np.array([3, -1, 0, 7, 7, 0, 3, 3, 0, 7])
    gray = open_data(savez(tmp_path / "gray.npz", x=x, y=y))
    assert (gray.name, gray.channels, gray.split, gray.has_own_split) == ("gray", 1, "all", False)
    assert gray.labels is not None and gray.labels.tolist() == y.tolist() and gray.classes is None
    assert list(gray.keys) == [str(i) for i in range(10)]
    np.testing.assert_array_equal(gray.read([4, 2]), x[[4, 2], :, :, None])
    assert any("without a label" in note for note in gray.notes)
    colour = open_data(savez(tmp_path / "colour.npz", x=np.stack([x] * 3, -1)), channels="1")
    np.testing.assert_array_equal(np.asarray(colour.read(np.arange(10)))[..., 0], x)  # luma of equal channels
    floats = open_data(savez(tmp_path / "floats.npz", x=x.astype(np.float32) / 255, y=y % 3))
    np.testing.assert_array_equal(np.asarray(floats.read(np.arange(10)))[..., 0], x)
    assert any("rounded" in note for note in floats.notes) and floats.classes == ["0", "1", "2"]
    alpha = np.zeros((1, 2, 2, 4), np.uint8)
    assert open_data(savez(tmp_path / "alpha.npz", x=alpha)).read([0])[0].min() == 255


def test_npz_with_its_own_split_and_names(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    path = savez(
        tmp_path / "a.npz", x_train=x[:3], x_test=x[3:], y_train=np.array(["b", "a", ""]), y_test=np.array(["c", "a"])
    )
    train, test, both = (open_data(path, split=split) for split in ("train", "test", "all"))
    assert train.classes == test.classes == both.classes == ["a", "b", "c"]
    assert [images.labels.tolist() for images in (train, test, both) if images.labels is not None] == [
        [1, 0, -1], [2, 0], [1, 0, -1, 2, 0],
    ]  # fmt: skip
    np.testing.assert_array_equal(both.read(np.arange(5)), x)
    assert train.has_own_split and train.fingerprint != test.fingerprint


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": np.zeros((2, 3, 8, 8), np.uint8)}, r"shape \(2, 3, 8, 8\)"),
        ({"x": np.zeros((0, 8, 8), np.uint8)}, "no images"),
        ({"x": np.full((2, 8, 8), np.nan)}, "NaN"),
        ({"x": np.full((2, 8, 8), 1.5)}, "floats from 1.5 to 1.5"),
        ({"x": np.full((2, 8, 8), 256)}, "type int64"),
        ({"x": np.array([None, None])}, "cannot be read"),  # would have to be unpickled
        ({"images": np.zeros((2, 8, 8), np.uint8)}, "holds images: give either x"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.zeros(3, int)}, r"y in .* shape \(3,\)"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.zeros(2)}, "type float64"),
        ({"x": np.zeros((2, 8, 8), np.uint8), "y": np.array([-7, 1])}, "labels from -7"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_data(savez(tmp_path / "a.npz", **arrays))


def test_damaged_npz(tmp_path: Path) -> None:
    whole = savez(tmp_path / "a.npz", x=RNG.integers(0, 256, (10, 8, 8), dtype=np.uint8)).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "a.npz").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"is no \.npz file"):
            open_data(tmp_path / "a.npz")
    for where in range(0, 200, 7):
        (tmp_path / "a.npz").write_bytes(whole[:where] + bytes([whole[where] ^ 0xFF]) + whole[where + 1 :])
        try:
            open_data(tmp_path / "a.npz")
        except UserError:
            continue


# ---- data sets by name


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    train, test, both = (open_data("digits", split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (1438, 359, 1797)
    assert sorted([*train.keys, *test.keys], key=int) == list(both.keys)
    expected = [[round(v * 255 / 16) for v in row] for row in digits.data]
    np.testing.assert_array_equal(np.asarray(both.read(np.arange(1797))).reshape(1797, 64), expected)
    rows = [int(key) for key in test.keys]
    assert test.labels is not None
    np.testing.assert_array_equal(test.labels, digits.target[rows])
    np.testing.assert_array_equal(test.read(np.arange(359)), both.read(rows))


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_what_torchvision_reads(tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in DEBIAN_FASHION_MNIST.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    for split in ("train", "test"):
        theirs = FashionMNIST(str(tmp_path), train=split == "train")
        ours = open_data("fashion-mnist", split=split)
        unpacked = open_data(f"fashion-mnist:{tmp_path}", split=split)
        assert ours.classes == theirs.classes and ours.fingerprint == unpacked.fingerprint
        np.testing.assert_array_equal(np.asarray(ours.read(np.arange(len(ours))))[..., 0], theirs.data.numpy())
        np.testing.assert_array_equal(ours.labels, theirs.targets.numpy())


def idx_folder(root: Path, num_labels: int = 4) -> Path:
    root.mkdir(exist_ok=True)
    for prefix in ("train", "t10k"):
        images = struct.pack(">4I", 0x803, 4, 2, 3) + bytes(range(24))
        (root / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, num_labels) + bytes(range(num_labels))
        )
    return root


def test_hand_made_idx_files(tmp_path: Path) -> None:
    images = open_data(f"fashion-mnist:{idx_folder(tmp_path)}", split="all")
    np.testing.assert_array_equal(np.asarray(images.read(np.arange(4))).ravel(), np.arange(24))
    assert len(images) == 8 and images.labels is not None and images.labels.tolist() == [0, 1, 2, 3] * 2


def test_damaged_idx_files(tmp_path: Path) -> None:
    source = f"fashion-mnist:{idx_folder(tmp_path, num_labels=5)}"
    with pytest.raises(UserError, match="4 train images and 5 labels"):
        open_data(source)
    idx_folder(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 3):
        images.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"damaged|cut short"):
            open_data(source)
    plain = gzip.decompress(whole)
    for changed, sentence in (
        (plain[:-1], "claims 24 bytes and it has 23"),
        (plain + b"x", "it has more"),
        (b"\0\0\x0d\x03" + plain[4:], "magic number is 0xd03"),
        (plain[:4] + b"\xff" * 12 + plain[16:], "its header claims"),
    ):
        images.write_bytes(gzip.compress(changed))
        with pytest.raises(UserError, match=sentence):
            open_data(source)
    images.unlink()
    with pytest.raises(UserError, match="lacks train-images-idx3-ubyte"):
        open_data(source)
    with pytest.raises(UserError, match="lacks"):
        read_idx(tmp_path, "nothing", 1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn"])
def test_torchvision_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    from torchvision import datasets

    pixels = RNG.integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    asked = []

    class Fake:
        classes = ("a", "b")

        def __init__(self, root: str, **options) -> None:
            asked.append((root, options))
            self.data = pixels.transpose(0, 2, 3, 1) if "cifar" in name else pixels
            self.labels = self.targets = [0, 1, 1, -1]

    monkeypatch.setattr(datasets, name.upper(), Fake)
    images = open_data(f"{name}:{tmp_path}")
    np.testing.assert_array_equal(images.read([2, 0]), pixels.transpose(0, 2, 3, 1)[[2, 0]])
    assert images.labels is not None and images.labels.tolist() == [0, 1, 1, -1]
    assert len(open_data(f"{name}:{tmp_path}", split="all")) == 8
    splits = [options.get("split", "train" if options.get("train") else "test") for _, options in asked]
    assert splits == (["train+unlabeled"] * 2 if name == "stl10" else ["train"] * 2) + ["test"]
    assert asked[0][0] == str(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    from torchvision import datasets

    def fail(*args, **options) -> None:
        raise OSError("no network\nlong trace")

    monkeypatch.setattr(datasets, {"cifar10": "CIFAR10", "fashion-mnist": "FashionMNIST"}[name], fail)
    monkeypatch.setattr("simclr.data.readers.named.DEBIAN_FASHION_MNIST", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be downloaded \(no network\)") as caught:
        open_data(name)
    assert name != "fashion-mnist" or "dataset-fashion-mnist" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("fashon-mnist", "did you mean fashion-mnist"),
        ("xyzzy", "the names are digits, fashion-mnist"),
        ("no/such/folder", "no folder or file no/such/folder"),
        ("digits:/tmp", "takes no folder"),
        ("cifar10:/no/such", "no folder /no/such"),
        ("pyproject.toml", "is a file, but no .npz"),
    ],
)
def test_unknown_sources(monkeypatch: pytest.MonkeyPatch, source: str, sentence: str) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(UserError, match=sentence):
        open_data(source)
    with pytest.raises(UserError, match="split is 'tset'"):
        open_data("digits", split="tset")  # type: ignore[arg-type]


# ---- splits


def test_split_is_stratified_and_complete() -> None:
    labels = np.repeat([0, 1, 2, 3, -1], [50, 23, 4, 1, 10])
    for seed in range(20):
        train, test = split_indices(labels, 0.2, seed)
        assert sorted([*train, *test]) == list(range(78))  # the unlabelled are in neither
        assert len(test) == round(0.2 * 78)
        counts = np.bincount(labels[test], minlength=4)
        assert counts[0] == 10 and counts[1] in (4, 5) and counts[2] in (0, 1) and counts[3] == 0
    assert split_indices(labels, 0.2, 1)[1].tolist() != split_indices(labels, 0.2, 2)[1].tolist()
    train, test = split_indices(10, 0.3)
    assert len(test) == 3 and sorted([*train, *test]) == list(range(10))
    assert split_indices(np.arange(5))[1].size == 0
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match="fraction between 0 and 1"):
            split_indices(10, fraction)


def test_label_subsets_are_balanced_and_nested() -> None:
    labels = np.random.default_rng(3).permutation(np.repeat([-1, 0, 1, 2, 3, 4], [100, 300, 300, 300, 300, 20]))
    for seed in range(5):
        previous: set[int] = set()
        for spec in ("1%", "2.5%", "3/class", "7%", "20/class", "10%", "50%", "100%"):
            chosen = label_subset(labels, spec, seed)
            assert list(chosen) == sorted(set(chosen)) and labels[chosen].min() >= 0
            if "%" in spec:
                counts = np.bincount(labels[chosen], minlength=5)
                assert len(chosen) == int(float(spec[:-1]) * 1220 // 100)
                assert counts[:4].max() - counts[:4].min() <= 1
                assert counts[4] >= min(20, counts[:4].min())
                assert previous <= set(chosen)
                previous = set(chosen)
            else:
                assert np.bincount(labels[chosen]).tolist() == [int(spec.split("/")[0])] * 5
    assert label_subset(labels, "1%", 0).tolist() == label_subset(labels, "1%", 0).tolist()
    assert label_subset(labels, "1%", 0).tolist() != label_subset(labels, "1%", 1).tolist()


def test_draws_are_the_same_everywhere() -> None:
    # Raw PCG64 words by the published algorithm (O'Neill 2014, XSL RR 128/64) from NumPy's seeded state.
    state = np.random.PCG64(7).state["state"]
    value, words = state["state"], []
    for _ in range(30):
        value = (value * 0x2360ED051FC65DA44385DF649FCCF645 + state["inc"]) % 2**128
        folded, turn = (value >> 64 ^ value) % 2**64, value >> 122
        words.append((folded >> turn | folded << (64 - turn)) % 2**64)
    first_six = np.argsort(words)[:6]
    assert split_indices(30, 0.2, 7)[1].tolist() == sorted(first_six)


@pytest.mark.parametrize("spec", ["1", "0%", "200%", "all", "-1%", "0/class", "5/klass"])
def test_label_subsets_that_are_none(spec: str) -> None:
    with pytest.raises(UserError, match="no share of the labels"):
        label_subset(np.arange(10), spec)


def test_label_subsets_that_are_too_small_or_large() -> None:
    labels = np.repeat([0, 1, 2], [5, 5, 2])
    with pytest.raises(UserError, match="fewer than one for each of 3 classes"):
        label_subset(labels, "10%")
    with pytest.raises(UserError, match="the smallest class has 2"):
        label_subset(labels, "3/class")


# ---- promises


def test_importing_the_data_does_not_import_torch() -> None:
    code = "import sys, simclr.data; sys.exit(any(m in sys.modules for m in ('torch', 'torchvision', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
