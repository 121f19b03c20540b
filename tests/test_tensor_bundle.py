"""TensorFlow's checkpoints without TensorFlow: what was written comes back, and files from strangers do no harm."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from bundle_writer import (
    MAGIC,
    append,
    authors_variables,
    block,
    crc32c,
    field,
    masked,
    table_file,
    varint,
    write_bundle,
)
from helpers import MUTATIONS, mutate_bytes, peak_bytes_of
from simclr.errors import UserError
from simclr.models import EncoderConfig, LinearClassifier, ProjectionHead, build_encoder
from simclr.weights.importers.crc32c import masked_crc32c
from simclr.weights.importers.import_tf import import_tf
from simclr.weights.importers.tensor_bundle import TensorBundle

BYTES_PER_BYTE = 8  # allocated for each byte of the files


def test_checksum_against_the_definition() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C in every catalogue
    rng = np.random.default_rng(0)
    for length in (0, 1, 7, 8, 9, 63, 1000):
        data = rng.bytes(length)
        assert masked_crc32c(data) == masked(data)


@pytest.mark.parametrize(("shards", "block_bytes", "restart"), [(1, 512, 16), (3, 60, 2), (2, 10**6, 1)])
def test_what_was_written_comes_back(tmp_path: Path, shards: int, block_bytes: int, restart: int) -> None:
    rng = np.random.default_rng(1)
    written = {f"scope_{i}/kernel": rng.normal(size=(i, 2, 3)).astype("float32") for i in range(1, 40)}
    written |= {
        "step": np.array(7),
        "scope_1/kernel/Momentum": np.zeros(5, "float64"),
        "é": np.arange(3, dtype="int32"),
    }
    write_bundle(tmp_path / "model.ckpt-7", written, shards=shards, block_bytes=block_bytes, restart=restart)
    for path in (tmp_path, tmp_path / "model.ckpt-7", tmp_path / "model.ckpt-7.index"):
        bundle = TensorBundle(path)
        assert set(bundle.entries) == set(written)
        for name, array in written.items():
            read = bundle.read(name)
            assert read.dtype == array.dtype and np.array_equal(read, array), name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of some hundred variables."""
    prefix = tmp_path_factory.mktemp("small") / "model.ckpt-1"
    encoder = build_encoder(EncoderConfig("resnet10", channels=3, size=32, width=1 / 32))
    head, linear = ProjectionHead(encoder.num_features, dim=8), LinearClassifier(encoder.num_features, 5)
    write_bundle(prefix, authors_variables(encoder, head, linear))
    return prefix


def test_mutated_checkpoints(small: Path, tmp_path: Path) -> None:
    """Each ends in one sentence, or in the network that was written."""
    files = {file.name: file.read_bytes() for file in sorted(small.parent.iterdir())}
    allowed = BYTES_PER_BYTE * sum(map(len, files.values()))
    whole = import_tf(small).encoder.state_dict()
    refused = 0
    for seed in range(MUTATIONS):
        rng = np.random.default_rng(seed)
        name = sorted(files)[int(rng.random() < 0.7)]  # .data..., .index
        content = mutate_bytes(files[name], rng)
        content = sealed(content) if name.endswith(".index") and rng.random() < 0.5 else content
        for file in files:
            (tmp_path / file).write_bytes(content if file == name else files[file])
        assert peak_bytes_of(lambda: read_all(tmp_path / small.name)) < allowed, seed
        try:
            found = import_tf(tmp_path / small.name).encoder.state_dict()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
        else:
            assert all(torch.equal(found[key], value) for key, value in whole.items()), seed
    assert 0.5 * MUTATIONS < refused < MUTATIONS


def read_all(path: Path) -> None:
    """All that can be read; torch allocates only once every shape is known to be that of a variable in the file."""
    with suppress(UserError):
        bundle = TensorBundle(path)
        for name in bundle.entries:
            with suppress(UserError):
                bundle.read(name)


def entry(*, shape: bytes = b"", offset: int = 0, size: int = 4, more: bytes = b"") -> bytes:
    """A BundleEntryProto of fp32."""
    return field(1, 1) + field(2, shape) + field(4, offset) + field(5, size) + more


NEGATIVE = field(2, bytes([8]) + b"\xff" * 9 + b"\1")  # a dimension of size -1
HUGE = field(2, field(1, 1 << 40))


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({b"": field(1, 1) + field(2, 1), b"a": entry()}, "big-endian"),
        ({b"a": entry()}, "header"),
        ({b"": b"", b"a": entry(shape=HUGE)}, "shape"),
        ({b"": b"", b"a": entry(shape=HUGE, size=1 << 42)}, "too short"),
        ({b"": b"", b"a": entry(shape=HUGE + field(2, field(1, 0)), size=0)}, "shape"),
        ({b"": b"", b"a": entry(shape=NEGATIVE)}, "impossible"),
        ({b"": b"", b"a": entry(shape=field(2, field(1, 1)) * 100_000)}, "dimensions"),
        ({b"": b"", b"a": entry(offset=1 << 50)}, "too short"),
        ({b"": b"", b"a": entry(), b"b": entry(offset=2)}, "same place"),
        ({b"": b"", b"a": entry(more=field(3, 1))}, "number 1"),
        ({b"": field(1, 1 << 60), b"a": entry(more=field(3, 5))}, "missing"),
        ({b"": b"", b"a": entry(more=field(7, b""))}, "slices"),
        ({b"": b"", b"a": b"\xff" * 20}, "does not end"),
        ({b"": b"", b"\xff\n": entry()}, "no text"),
        ({b"": b"", b"\0slice": entry()}, "slices"),
        ({b"": b""} | {b"a" * 400 + b"%03d" % i: field(5, 1) for i in range(300)}, "names of its variables"),
    ],
)
def test_what_is_refused(tmp_path: Path, table: dict[bytes, bytes], reason: str) -> None:
    """Files with right checksums that no TensorFlow writes."""
    (tmp_path / "x.index").write_bytes(table_file(table, block_bytes=10**9, restart=10**9))
    (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(UserError, match=reason):
        TensorBundle(tmp_path)


def test_blocks_are_read_once(tmp_path: Path) -> None:
    """An index block that names the same block again and again."""
    file = bytearray()
    handle = append(file, block({b"": b"", b"a": field(5, 1)}, 16))
    handles = append(file, block({}, 1)) + append(file, block({varint(i): handle for i in range(1000)}, 1))
    (tmp_path / "x.index").write_bytes(bytes(file) + handles.ljust(40, b"\0") + MAGIC.to_bytes(8, "little"))
    with pytest.raises(UserError, match="overlap"):
        TensorBundle(tmp_path)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 0"):
        TensorBundle(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        TensorBundle(tmp_path / "model.ckpt-5")


def test_more_variables_than_a_network_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "x", {name: np.zeros(1, "float32") for name in "abcd"})
    assert len(TensorBundle(tmp_path / "x").entries) == 4
    monkeypatch.setattr("simclr.weights.importers.tensor_bundle.MAX_VARIABLES", 3)
    with pytest.raises(UserError, match="more than 3 variables"):
        TensorBundle(tmp_path / "x")
    monkeypatch.setattr("simclr.weights.importers.tensor_bundle.MAX_INDEX_BYTES", 10)
    with pytest.raises(UserError, match="at most 10"):
        TensorBundle(tmp_path / "x")


def sealed(index: bytes) -> bytes:
    """The same file with right checksums under its blocks, as far as they can be found."""
    try:
        raw, position, handles = bytearray(index), 0, []
        for _ in range(4):
            number, position = read_varint(index[-48:], position)
            handles.append(number)
        ends = [handles[2] + handles[3]]
        items = index[handles[2] : ends[0]]
        position = 0
        while position < len(items) - 8:
            _, position = read_varint(items, position)
            unshared, position = read_varint(items, position)
            _, position = read_varint(items, position)
            offset, after = read_varint(items, position + unshared)
            size, position = read_varint(items, after)
            raw[offset + size + 1 : offset + size + 5] = masked(bytes(raw[offset : offset + size + 1])).to_bytes(
                4, "little"
            )
        raw[ends[0] + 1 : ends[0] + 5] = masked(bytes(raw[handles[2] : ends[0] + 1])).to_bytes(4, "little")
        return bytes(raw)
    except (IndexError, OverflowError):
        return index


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (data[position] & 127) << shift
        position, shift = position + 1, shift + 7
        if data[position - 1] < 128:
            return number, position
