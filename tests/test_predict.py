"""`simclr predict`: the rows are those of `probabilities`, every name survives, and memory does not grow."""

import csv
import errno
import re
import sys
import tracemalloc
import weakref
from contextlib import contextmanager
from threading import RLock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simclr import load
from simclr.config.encoder import EncoderConfig
from simclr.data import digests
from simclr.data.opening import open_data, open_whole
from simclr.data.readers.store import Reading
from simclr.models.classifier import Classifier
from simclr.models.encoder import build_encoder
from simclr.tasks import tables
from simclr.tasks.tables import open_table
from simclr.views import stream
from simclr.weights.folder import save_classifier, save_encoder

CLASSES = ['say "cheese", please', "zwei\nZeilen", "retour\rchariot", "猫, é", "plain", " 1.0 "]
NAMES = [*CLASSES[:1], r"zwei\nZeilen", r"retour\rchariot", *CLASSES[3:]]  # as saved: control characters are escaped
KEYS = ['a,"b".png', "cats/1.png", "cats/10.png", "cats/2.png", "test/x.png", "train/é ñ.png", "zwei\nZeilen.png"]
"""In the order of their code points."""


def make_model(folder, *, channels, size=8, classes=CLASSES):
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig("small", channels=channels, size=size, width=0.5), seed=3)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
    network = Classifier(encoder, None, len(classes)).eval()
    with torch.no_grad():  # classes by where an image lies among noise, so that each is somebody's
        h = network.encoder(torch.rand(64, channels, size, size))  # (64, F)
        network.linear.weight.copy_(torch.randn(len(classes), h.shape[1]) / (h.std(0) + 1e-3) / h.shape[1] ** 0.5)
        network.linear.bias.copy_(-network.linear.weight @ h.mean(0))
    save_classifier(network, folder, classes=classes, preprocessing="google", origin={})
    return folder


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("colour"), channels=3)


@pytest.fixture(scope="module")
def gray_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("gray"), channels=1)


@pytest.fixture
def folder(tmp_path):
    """Seven images of many sizes, gray and in colour, in nested folders, and two files that are none."""
    root, generator = tmp_path / "images", np.random.default_rng(0)
    for i, key in enumerate(KEYS):
        shape = (12 + i, 20 - i) if i % 3 == 0 else (12 + i, 20 - i, 3)
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(root / key)
    (root / "cats" / "15.png").write_bytes(b"cut short")
    (root / "train" / "empty.png").write_bytes(b"")
    return root


def read_table(path):
    """Column -> values, by readers that share nothing with the writers."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table as read_parquet

        return read_parquet(path).to_pydict()
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_rows_are_those_of_probabilities(simclr, colour_model, folder, tmp_path, ending):
    out = tmp_path / "new" / f"predicted{ending}"
    code, _, said = simclr(
        "predict", colour_model, folder, "--out", out, "--top", 3, "--probabilities", "--batch-size", 3
    )
    assert code == 0, said
    assert "cats/15.png is left out" in said and "2 of 9 files left out" in said and "empty file" in said
    expected = load(colour_model).probabilities([folder / key for key in KEYS])  # (7, 6)
    assert len(set(expected.argmax(axis=1))) > 2 and (expected.max(axis=1) < 0.999).any(), "there is something to tell"

    found = read_table(out)
    assert found["key"] == KEYS
    assert found["class"] == load(colour_model).classify([folder / key for key in KEYS])
    order = np.argsort(-expected, axis=1)
    for place, suffix in enumerate(["", "_2", "_3"]):
        assert found[f"class{suffix}"] == [NAMES[k] for k in order[:, place]]
        best = np.take_along_axis(expected, order[:, place, None], 1)[:, 0]
        np.testing.assert_allclose(np.array(found[f"probability{suffix}"], np.float32), best, rtol=1e-5)
    columns = np.array([found[f"probability of {name}"] for name in NAMES], np.float32).T
    np.testing.assert_allclose(columns, expected, rtol=1e-4, atol=1e-7)
    assert np.array_equal(np.array(found["probability"], np.float32), columns.max(axis=1)), "no digit is lost"
    assert list(out.parent.iterdir()) == [out]


def test_a_folder_is_read_as_open_data_reads_it_and_shrunk_alike(simclr, colour_model, tmp_path):
    root, generator = tmp_path / "images", np.random.default_rng(1)
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(generator.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)).save(root / part / f"{i}.png")
    for flags, side in (([], None), (["--pack-side", 16], 16)):
        code, _, said = simclr("predict", colour_model, root, "--out", tmp_path / "a.csv", "--probabilities", *flags)
        assert code == 0, said
        images = open_data(root, split="all", side=side)
        found = read_table(tmp_path / "a.csv")
        columns = np.array([found[f"probability of {name}"] for name in NAMES], np.float32).T
        order = np.argsort(images.keys)
        assert found["key"] == [images.keys[i] for i in order]
        np.testing.assert_allclose(columns, load(colour_model).probabilities(images)[order], rtol=1e-4, atol=1e-7)


def test_arrays_and_named_sets_of_every_split(simclr, gray_model, colour_model, tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (11, 9, 9), dtype=np.uint8)
    np.savez(tmp_path / "parts.npz", x_train=pixels[:7], x_test=pixels[7:])
    for model, source in (
        (gray_model, "digits"),
        (gray_model, tmp_path / "parts.npz"),
        (colour_model, tmp_path / "parts.npz"),  # gray images shown in colour
    ):
        code, _, said = simclr("predict", model, source, "--out", tmp_path / "a.csv")
        assert code == 0, said
        images = open_data(str(source), split="all")
        found, expected = (
            read_table(tmp_path / "a.csv"),
            load(model).probabilities(list(images.read(range(len(images))))),
        )
        assert list(found) == ["key", "class", "probability"] and found["key"] == list(images.keys)
        assert found["class"] == [NAMES[k] for k in expected.argmax(axis=1)]
        np.testing.assert_allclose(np.array(found["probability"], np.float32), expected.max(axis=1), rtol=1e-4)


def test_five_hundred_images_need_the_memory_of_fifty(tmp_path, monkeypatch):
    """Counted, not timed: images and views that are alive at a time, and the bytes that Python and NumPy hold."""
    side, workers = 96, 2
    for name, count in (("few", 50), ("many", 500)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (side, side), i % 256).save(tmp_path / name / f"{i}.png")
    alive = {"decode_file": 0, "eval_images": 0}
    most, lock = dict(alive), RLock()
    monkeypatch.setattr(stream, "MAX_PIXEL_BYTES", 5 * side * side)

    def count(name, change):
        with lock:
            alive[name] += change
            most[name] = max(most[name], alive[name])

    def watch(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            count(name, 1)
            weakref.finalize(result, count, name, -1)
            return result

        monkeypatch.setattr(module, name, call)

    watch(digests, "decode_file")
    watch(stream, "eval_images")

    def unwanted(skipped):
        raise AssertionError(skipped)

    def run(name):
        """Most images and views alive at a time, and the peak of bytes."""
        most.update(dict.fromkeys(most, 0))
        tracemalloc.start()
        total = 0
        images = open_whole(tmp_path / name, Reading(workers=workers, memory_budget=0))
        for batch in stream.stream_views(images, size=8, preset="google", batch_size=16, leave_out=unwanted):
            assert batch.views.shape == (len(batch.indices), 1, 8, 8)
            total += len(batch.indices)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return total, dict(most), peak

    run("few")  # compiles the kernels
    few, many = run("few"), run("many")
    assert (few[0], many[0]) == (50, 500)
    for _, counts, _ in (few, many):
        assert 1 <= counts["decode_file"] <= 10, "five images, and the five before them"
        assert 1 <= counts["eval_images"] <= 2 * 4, "the parts of a batch, and of the one before it"
    # of each file its key, path, digest and shape are kept, and Pillow's headers until they are collected
    assert many[2] - few[2] < 450 * side * side / 2, (few, many)


def test_parquet_is_written_in_groups(monkeypatch, tmp_path):
    from pyarrow.parquet import ParquetFile

    monkeypatch.setattr(tables, "ROW_GROUP", 10)
    with tables.open_table(tmp_path / "a.parquet", {"key": str, "p": float}) as add:
        for begin in range(0, 25, 4):
            rows = range(begin, min(begin + 4, 25))
            add([[str(i) for i in rows], [float(i) for i in rows]])
    file = ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [12, 12, 1]
    assert file.read().to_pydict() == {"key": [str(i) for i in range(25)], "p": list(range(25))}


def test_what_fails_in_the_middle_leaves_the_old_file(simclr, gray_model, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.new("L" if i < 4 else "RGB", (9, 9), i).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "out.csv").write_text("old")
    command = "predict", gray_model, tmp_path / "images", "--out", tmp_path / "out.csv", "--batch-size", 2
    code, _, said = simclr(*command)
    assert code == 2 and "expects 1-channel images and images is in colour" in said, said
    (tmp_path / "images" / "4.png").unlink()

    real, ready = tables._csv, []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def asked_to_stop(*_):
        raise KeyboardInterrupt

    for failure, ends in (
        (full, (2, "out.csv cannot be written: no space left")),
        (asked_to_stop, (130, "stopped")),
    ):

        @contextmanager
        def failing(*args, failure=failure):
            with real(*args) as add:
                yield lambda rows: failure() if ready else ready.append(add(rows))

        ready.clear()
        monkeypatch.setattr(tables, "_csv", failing)
        code, _, said = simclr(*command)
        assert code == ends[0] and ends[1] in said, said
        assert ready, "the first rows were written"
    assert (tmp_path / "out.csv").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out.csv"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ENCODER", "digits"], "ENCODER has no classifier; `simclr finetune ENCODER DATA"),
        (["/no/such", "digits"], "holds no encoder"),
        (["MODEL", "/no/such"], "no folder or file /no/such"),
        (["MODEL", "EMPTY"], "There are no images in"),
        (["MODEL", "BAD"], r"None of the 2 image files in .* can be used: a.png \(not a readable image\), b.png"),
        (["MODEL", "COLOUR"], "expects 1-channel images and colour is in colour"),
        (["MODEL", "digits", "--out", "x.json"], r"--out was x.json; its name must end in .csv or .parquet"),
        (["MODEL", "digits", "--out", "/proc/none/x.csv"], "/proc/none/x.csv cannot be written"),
        (["MODEL", "digits", "--out", "FOLDER.csv"], "FOLDER.csv cannot be written"),
        (["MODEL", "digits", "--top", "0"], "--top was 0; it must be between 1 and 6"),
        (["MODEL", "digits", "--top", "7"], "--top was 7"),
        (["MODEL", "digits", "--batch-size", "0"], "--batch-size was 0"),
        (["MODEL", "digits", "--device", "tpu"], "device was .tpu"),
        (["MODEL", "EMPTY", "--pack-side", "3"], "--pack-side was 3; it must be at least 16"),
        (["TWINS", "digits", "--probabilities"], "several are called crane"),
        (["MODEL", "digits", "--out", "x.parquet"], r"needs pyarrow.*pip install 'simclr-torch\[parquet\]'"),
    ],
)
def test_mistakes_are_one_sentence(simclr, gray_model, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    for name in ("EMPTY", "BAD", "FOLDER.csv"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / "BAD" / f"{name}.png").write_bytes(b"no image")
    np.savez("colour.npz", x=np.zeros((3, 9, 9, 3), np.uint8))
    save_encoder(build_encoder(EncoderConfig("small", channels=1, size=8, width=0.5)), tmp_path / "ENCODER",
                 preprocessing="google", origin={})  # fmt: skip
    make_model(tmp_path / "TWINS", channels=1, classes=["crane", "dog", "crane"])
    given = [{"MODEL": gray_model, "COLOUR": "colour.npz"}.get(word, word) for word in arguments]
    before = sorted(tmp_path.rglob("*"))
    code, out, said = simclr("predict", *given, *([] if "--out" in given else ["--out", "out/x.csv"]))
    assert code == 2 and not out and re.search(expected, said), said
    assert "Traceback" not in said and sorted(tmp_path.rglob("*")) == before


def test_several_processes_are_refused(simclr, gray_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = simclr("predict", gray_model, "digits", "--out", "x.csv")
    assert code == 2 and "without torchrun" in said


def test_a_classifier_in_an_onnx_file_predicts_too(simclr, gray_model, tmp_path):
    """Its network has no parameters, only the file as a buffer; labels are those of the model it was exported from."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for command in (
        ["export", gray_model, "--format", "onnx", "--out", tmp_path / "m.onnx"],
        ["predict", tmp_path / "m.onnx", "digits", "--out", tmp_path / "onnx.csv"],
        ["predict", gray_model, "digits", "--out", tmp_path / "ours.csv"],
    ):
        code, _, said = simclr(*command)
        assert code == 0, said
    written = []
    for name in ("onnx.csv", "ours.csv"):
        with (tmp_path / name).open(newline="") as file:
            written.append(list(csv.DictReader(file)))
    assert [row["class"] for row in written[0]] == [row["class"] for row in written[1]]
    assert len(written[0]) == 1797


FORMULAS = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "'quoted", "plain", "a=b", ""]


def test_text_that_a_spreadsheet_would_run_is_neutralised_and_comes_back(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"key": str, "=class": str, "probability": float}
    for name in ("x.csv", "x.parquet"):
        with open_table(tmp_path / name, columns) as add:
            add([FORMULAS, FORMULAS, [-0.5] * len(FORMULAS)])
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["key", "'=class", "probability"]
    assert not any(text.startswith(("=", "+", "-", "@", "\t", "\r")) for line in lines for text in line[:2])
    assert [line[0].removeprefix("'") for line in lines] == FORMULAS == [line[1].removeprefix("'") for line in lines]
    assert lines[0][2] == "-0.5" and lines[7][0] == "plain"
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table["key"].to_pylist() == FORMULAS
