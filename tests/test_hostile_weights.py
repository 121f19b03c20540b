"""Weights from strangers: what would hang a reader or take its memory ends in one sentence.

Whatever reads such files, the tests ask the same of it: `import_torch`, `simclr.load` and the command line are all they
know of it.
"""

import json
import os
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import simclr
from helpers import NarrowResNet, known, with_random_state
from hostile_pickles import FILES
from simclr.config.encoder import EncoderConfig
from simclr.errors import UserError
from simclr.models.classifier import Classifier
from simclr.models.encoder import build_encoder
from simclr.models.heads import ProjectionHead
from simclr.weights.folder import digest_of, save_classifier, save_encoder
from simclr.weights.importers.import_torch import import_torch
from skips import NO_PIPES

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


def test_hostile_pickles_on_the_command_line(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue("simclr")
    file = tmp_path / "weights.pt"
    for name in ("zip, a class's name of texts without end", "13 bytes that ask for 256 GB"):
        file.write_bytes(FILES[name])
        code, out, err = run("import", file, tmp_path / "out")
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
    model = with_random_state(NarrowResNet())
    state = model.state_dict()
    flat = torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])
    parts = iter(flat.split([value.numel() for value in state.values() if value.is_floating_point()]))
    views = {k: next(parts).view(v.shape) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(views, tmp_path / "views.pt", _use_new_zipfile_serialization=zipped)
    loaded = import_torch(tmp_path / "views.pt").encoder.backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_two_large_storages_in_turn_are_read_once(tmp_path: Path) -> None:
    state = with_random_state(NarrowResNet()).state_dict()
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


SMALL = EncoderConfig("small", channels=1, size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with head and classes."""
    path = tmp_path_factory.mktemp("whole") / "encoder"
    encoder = build_encoder(SMALL)
    network = Classifier(encoder, ProjectionHead(encoder.num_features, layers=2, dim=9), 3, head_layer=1)
    save_classifier(network, path, classes=["a", "b", "c"], preprocessing="google", origin={})
    return path


def changed(source: Path, folder: Path, **changes: object) -> Path:
    """The encoder's folder with other fields; a dotted one lies deeper, and `...` removes it.

    The digest of the record is left out of the weights' file: whoever writes hostile records writes that too.
    """
    record = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        place = record
        for name in path:
            place = place[name]
        place[last] = value
        if value is ...:
            del place[last]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record))
    save_file(load_file(source / "model.safetensors"), folder / "model.safetensors")
    return folder


CHANGES = {
    "width 400": {"encoder__width": 400},
    "width 30": {"encoder__width": 30},
    "width 1e300": {"encoder__width": 1e300},
    "width of text": {"encoder__width": "1"},
    "width true": {"encoder__width": True},
    "width of 4,000 digits": {"encoder__width": 10**4000},
    "a width of lists": {"encoder__width": [[[]]]},
    "a billion layers": {"head__layers": 1_000_000_000},
    "a thousand layers": {"head__layers": 1000},
    "layers of text": {"head__layers": "2"},
    "a head of a billion": {"head__dim": 1_000_000_000},
    "a head of another width": {"head__dim": 10},
    "another head": {"head__kind": "deep"},
    "a head with more": {"head__seed": 1},
    "no head": {"head": ...},
    "a billion pixels": {"encoder__size": 1_000_000_000},
    "half a pixel": {"encoder__size": 12.5},
    "a billion channels": {"encoder__channels": 1_000_000_000},
    "an enormous name": {"encoder__name": "resnet" * 100_000},
    "a name of a list": {"encoder__name": ["small"]},
    "a name that colours": {"encoder__name": "timm/\x1b[31m"},
    "an encoder of the hub": {"encoder__name": "timm/hf_hub:someone/model"},
    "an encoder of a folder": {"encoder__name": "timm/local-dir:/etc"},
    "the largest of timm": {"encoder__name": "timm/vit_gigantic_patch14_224", "encoder__size": 224},
    "another encoder": {"encoder__name": "resnet200"},
    "a stem of a list": {"encoder__stem": ["cifar"]},
    "a stem of an object": {"encoder__stem": {"a": 1}},
    "a padding of a billion": {"encoder__stem_padding": 1_000_000_000},
    "a mean of text": {"encoder__mean": ["1"], "encoder__std": [1.0]},
    "a mean of many": {"encoder__mean": [0.5] * 100_000, "encoder__std": [1.0] * 100_000},
    "a std of zero": {"encoder__mean": [0.5], "encoder__std": [0]},
    "a std of one number": {"encoder__mean": [0.5], "encoder__std": 1.0},
    "an unknown field of the encoder": {"encoder__\x1b[31mx": 1},
    "no encoder": {"encoder": ...},
    "an encoder of text": {"encoder": "small"},
    "another preprocessing": {"input__preprocessing": "imagenet"},
    "another layout": {"input__layout": "NHWC"},
    "another range": {"input__range": [0, 255]},
    "no input": {"input": ...},
    "other features": {"num_features": 127},
    "features of text": {"num_features": "128"},
    "no features": {"num_features": None},
    "an unknown field": {"weights_file": "/etc/passwd"},
    "a layer that is not there": {"classifier__head_layer": 7},
    "a layer below zero": {"classifier__head_layer": -1},
    "classes of numbers": {"classifier__classes": [1, 2, 3]},
    "classes of text": {"classifier__classes": "abc"},
    "more classes": {"classifier__classes": ["a", "b", "c", "d"]},
    "200,000 classes": {"classifier__classes": ["x"] * 200_000},
    "a class of 5,000 digits": {"classifier__classes": ["a", "b", "9" * 5000]},
    "a class that colours": {"classifier__classes": ["a", "b", "\x1b[2J\x1b[31mc"]},
    "a class of two lines": {"classifier__classes": ["a", "b", "c\nd"]},
    "another format": {"format": "simclr-encoder-2"},
    "a format of a list": {"format": ["simclr-encoder-1"]},
    "a step beyond the end": {"step": 9, "total_steps": 3},
    "a step of text": {"step": "9", "total_steps": 30},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_hostile_records_of_encoders(name: str, folder: Path, tmp_path: Path) -> None:
    hostile = changed(folder, tmp_path / "encoder", **CHANGES[name])

    def read() -> None:
        with pytest.raises(UserError) as caught:
            simclr.load(hostile)
        one_sentence(caught.value)

    assert growth(read) < ALLOWANCE


def test_the_unchanged_record_loads(folder: Path, tmp_path: Path) -> None:
    assert simclr.load(changed(folder, tmp_path / "encoder")).classes == ["a", "b", "c"]


TEXTS = {
    "nothing": "",
    "no object": "[]",
    "a number": "1",
    "levels without end": "[" * 100_000,
    "levels of objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "not a number": '{"format": "simclr-encoder-1", "num_features": NaN}',
    "infinity": '{"format": "simclr-encoder-1", "num_features": Infinity}',
    "a key twice": '{"format": "simclr-encoder-1", "format": "simclr-encoder-1"}',
    "a number of 5,000 digits": '{"format": "simclr-encoder-1", "num_features": ' + "9" * 5000 + "}",
    "no text": "\x00\ufffd",
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_json(name: str, folder: Path, tmp_path: Path) -> None:
    hostile = changed(folder, tmp_path / "encoder")
    (hostile / "config.json").write_text(TEXTS[name])
    with pytest.raises(UserError) as caught:
        simclr.load(hostile)
    one_sentence(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_weights_of_another_type_are_not_cast(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    hostile = changed(folder, tmp_path / "encoder")
    weights = load_file(hostile / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"].to(dtype)
    save_file(weights, hostile / "model.safetensors")
    with pytest.raises(UserError, match=rf"classifier\.bias has the type {dtype} and should have torch\.float32"):
        simclr.load(hostile)


def test_headers_of_safetensors_that_claim_more_than_the_file(folder: Path, tmp_path: Path) -> None:
    hostile = changed(folder, tmp_path / "encoder")
    whole = (hostile / "model.safetensors").read_bytes()
    for length in (1 << 62, len(whole), 17 << 20):
        (hostile / "model.safetensors").write_bytes(length.to_bytes(8, "little") + whole[8:])
        with pytest.raises(UserError, match="header claims"):
            simclr.load(hostile)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason=NO_PIPES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_and_devices_in_the_place_of_files(name: str, folder: Path, tmp_path: Path) -> None:
    hostile = changed(folder, tmp_path / "encoder")
    (hostile / name).unlink()
    os.mkfifo(hostile / name)
    with pytest.raises(UserError):
        simclr.load(hostile)
    (hostile / name).unlink()
    (hostile / name).symlink_to("/dev/zero")
    with pytest.raises(UserError):
        simclr.load(hostile)
    for file in ("a.pth", "a.onnx", "a.safetensors"):
        os.mkfifo(tmp_path / file)
        with pytest.raises(UserError):
            simclr.load(tmp_path / file)
        with pytest.raises(UserError):
            import_torch(tmp_path / file)


def test_a_network_keeps_its_weights_when_its_file_changes(folder: Path, tmp_path: Path) -> None:
    """The tensors are copies, not a map of the file."""
    copied = changed(folder, tmp_path / "encoder")
    model = simclr.load(copied)
    before = digest_of(known(model.classifier))
    with open(copied / "model.safetensors", "r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    assert digest_of(known(model.classifier)) == before


def test_classes_with_control_characters_are_saved_so_that_they_load(tmp_path: Path) -> None:
    network = Classifier(build_encoder(SMALL), None, 2)
    save_classifier(network, tmp_path, classes=["caf\xe9\xa0noir", "a\x1b[31m"], preprocessing="google", origin={})
    assert simclr.load(tmp_path).classes == ["caf\xe9\xa0noir", "a\\x1b[31m"]


@pytest.mark.parametrize(
    "name", ["timm/vit_tiny_patch16_224", "timm/test_vit_relpos", "torchvision/mobilenet_v3_small"]
)
def test_models_of_others_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """With what they compute when they are built and do not save, such as positions."""
    encoder = build_encoder(EncoderConfig(name, channels=3, size=64), seed=3).eval()
    save_encoder(encoder, tmp_path, preprocessing="google", origin={})
    loaded = simclr.load(tmp_path).encoder
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x), encoder(x))
    for (key, one), (other_key, other) in zip(encoder.named_buffers(), loaded.named_buffers(), strict=True):
        assert key == other_key and torch.equal(one, other)
    assert all(p.requires_grad for p in loaded.parameters())
