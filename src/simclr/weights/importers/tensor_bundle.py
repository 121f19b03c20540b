"""TensorFlow's checkpoints (tensor bundles) without TensorFlow, written for files from strangers.

`PREFIX.index` is a sorted string table in LevelDB's format: data blocks of prefix-compressed keys, an index block that
points to them, and a footer that points to the index block; each block is followed by its kind and its checksum. The
values are protobuf messages: under the empty key the bundle's header, under a variable's name where its bytes lie in
`PREFIX.data-*-of-*` (tensorflow/core/util/tensor_bundle, core/lib/io/table, core/protobuf/tensor_bundle.proto).

Every number in the files is checked before it is used: nothing larger than the files themselves is ever allocated, and
whatever does not fit ends in a `UserError`.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simclr.errors import UserError
from simclr.files import open_regular, read_regular
from simclr.models.external.protobuf import Malformed, bytes_of, fields, number_of, varint
from simclr.weights.importers.crc32c import masked_crc32c

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # after each block: its kind and its masked checksum
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # of tensorflow/core/framework/types.proto
_STRING = 7  # of types.proto too
_MOST_DIMENSIONS, _LONGEST_NAME = 8, 500
MAX_INDEX_BYTES = 32 << 20  # the index of the authors' largest network has 0.3 MB
MAX_VARIABLES = 100_000  # that network has 5,000 with those of its optimiser; each takes a kilobyte in memory
_KEY_BYTES_PER_BYTE = 32  # compressed names may grow so much; real ones grow threefold


class Entry(NamedTuple):
    """Where a variable lies, and what it is."""

    dtype: int
    """A number of types.proto."""
    shape: tuple[int, ...]
    shard: int
    """Which data file."""
    offset: int
    size: int
    """Bytes."""
    checksum: int
    """Masked CRC-32C of the bytes."""


class TensorBundle:
    """An opened checkpoint; a variable's bytes are read when they are asked for.

    Args:
        path: PREFIX, one of the checkpoint's files, a folder that holds one checkpoint, or that of a SavedModel.

    Attributes:
        prefix: Of the checkpoint's files.
        entries: The variables, by name in sorted order.

    Raises:
        UserError: There is no checkpoint, or its files are damaged or do not fit together.
    """

    def __init__(self, path: Path) -> None:
        self.prefix = _find_prefix(path)
        self._index = _with_ending(self.prefix, ".index")
        try:
            self.entries, self._num_shards = _read_index(read_regular(self._index, MAX_INDEX_BYTES))
            self._check_places()
        except Malformed as error:
            raise self.error(str(error)) from None
        except OSError as error:
            raise UserError(f"The checkpoint {self.prefix} cannot be read: {error.strerror}.") from None

    def read(self, name: str) -> np.ndarray:
        """The array of a variable, its checksum verified.

        Raises:
            UserError: Its bytes are damaged, or it has an unusual type.
        """
        entry = self.entries[name]
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"The variable {name} of {self.prefix} has TensorFlow's type number {entry.dtype}; "
                "only float32, float64, int32 and int64 can be imported."
            )
        raw = self._bytes(entry)
        if masked_crc32c(raw) != entry.checksum:
            raise self.error(f"the bytes of {name} do not have their checksum")
        return raw.view(_DTYPES[entry.dtype]).reshape(entry.shape)

    def read_string(self, name: str) -> bytes:
        """The bytes of a string variable without dimensions, their checksums verified.

        Its length comes first, as a varint, then the length's own checksum. The variable's checksum is that of the
        length as it lies in memory (four bytes, or eight), of the length's checksum, and of the bytes.

        Raises:
            UserError: Its bytes are damaged, or it is no such variable.
        """
        entry = self.entries[name]
        if entry.dtype != _STRING or entry.shape:
            raise self.error(f"{name} is no text")
        raw = self._bytes(entry).tobytes()
        try:
            length, position = varint(raw, 0)
        except Malformed:
            length, position = -1, 0
        begin = position + 4
        if length != len(raw) - begin:
            raise self.error(f"{name} does not have its length")
        content = raw[begin:]
        memory = length.to_bytes(4 if length < 1 << 32 else 8, "little")
        sealed = masked_crc32c(memory).to_bytes(4, "little") == raw[position:begin]
        if not sealed or masked_crc32c(memory + raw[position:]) != entry.checksum:
            raise self.error(f"the bytes of {name} do not have their checksum")
        return content

    def _bytes(self, entry: Entry) -> np.ndarray:
        """Of a variable, as they lie in its data file."""
        try:
            with open_regular(self._shard(entry.shard)) as file:
                file.seek(entry.offset)
                raw = np.fromfile(file, np.uint8, entry.size)
        except OSError as error:
            raise UserError(f"The checkpoint {self.prefix} cannot be read: {error.strerror}.") from None
        if len(raw) != entry.size:
            raise self.error("a data file is too short")
        return raw

    def _check_places(self) -> None:
        """Every variable lies within its data file, and no two share bytes."""
        by_shard: dict[int, list[Entry]] = {}
        for entry in self.entries.values():
            by_shard.setdefault(entry.shard, []).append(entry)
        for shard, entries in by_shard.items():
            if shard >= self._num_shards:
                raise Malformed(f"it has {self._num_shards} data files, and a variable lies in number {shard}")
            file = self._shard(shard)
            if not file.is_file():
                raise Malformed(f"its data file {file.name} is missing")
            entries.sort(key=lambda entry: (entry.offset, entry.size))
            if entries[-1].offset + entries[-1].size > file.stat().st_size:
                raise Malformed(f"its data file {file.name} is too short")
            if any(left.offset + left.size > right.offset for left, right in pairwise(entries)):
                raise Malformed("two variables lie in the same place")

    def _shard(self, number: int) -> Path:
        return _with_ending(self.prefix, f".data-{number:05d}-of-{self._num_shards:05d}")

    def error(self, reason: str) -> UserError:
        """The files are damaged; `reason` says how, as a part of a sentence."""
        return UserError(f"{self._index} is no whole TensorFlow checkpoint: {reason}; fetch its files again.")


def _find_prefix(path: Path) -> Path:
    if (path / "variables" / "variables.index").is_file():  # the folder of a SavedModel
        return path / "variables" / "variables"
    if path.is_dir():
        indexes = sorted(path.glob("*.index"))
        if len(indexes) != 1:
            names = ", ".join(file.stem for file in indexes[:5]) or "none"
            raise UserError(
                f"The folder {path} should hold one TensorFlow checkpoint (a file that ends in .index), and holds "
                f"{len(indexes)}: {names}; name one."
            )
        return indexes[0].with_suffix("")
    prefix = path.with_suffix("") if path.suffix == ".index" or path.suffix.startswith(".data-") else path
    if not _with_ending(prefix, ".index").is_file():
        raise UserError(
            f"There is no file {path}, nor a TensorFlow checkpoint: {prefix.name}.index is missing; give what its "
            "files' names begin with, such as FOLDER/model.ckpt-250228."
        )
    return prefix


def _with_ending(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)  # the prefix may have a dot of its own: model.ckpt-100


def _read_index(data: bytes) -> tuple[dict[str, Entry], int]:
    """The variables and the number of data files."""
    table = _table(data)
    key, header = next(table, (None, b""))
    if key != b"":
        raise Malformed("its header is missing")
    num_shards = 1
    for field, value in fields(header):  # BundleHeaderProto: 1 num_shards, 2 endianness
        if field == 1:
            num_shards = number_of(value)
        elif field == 2 and value != 0:
            raise Malformed("it was written on a big-endian machine")
    entries: dict[str, Entry] = {}
    for key, value in table:
        if key[0] == 0:
            raise Malformed("a variable was saved in slices, as parameter servers do")
        name = key.decode(errors="replace")
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise Malformed("the name of a variable is too long or no text")
        entries[name] = _entry(name, value)
        if len(entries) > MAX_VARIABLES:
            raise Malformed(f"it has more than {MAX_VARIABLES:,} variables")
    return entries, num_shards


def _entry(name: str, message: bytes) -> Entry:
    """BundleEntryProto: 1 dtype, 2 shape, 3 shard, 4 offset, 5 size, 6 checksum, 7 slices."""
    numbers = dict.fromkeys((1, 3, 4, 5, 6), 0)
    shape: tuple[int, ...] = ()
    for field, value in fields(message):
        if field == 2:
            shape = _shape(bytes_of(value))
        elif field == 7:
            raise Malformed(f"the variable {name} was saved in slices, as parameter servers do")
        elif field in numbers:
            numbers[field] = number_of(value)
    dtype, shard, offset, size, checksum = numbers.values()
    elements = math.prod(shape)
    fits = size == elements * np.dtype(_DTYPES[dtype]).itemsize if dtype in _DTYPES else size >= elements
    if not fits or max(shape, default=0) > size:
        raise Malformed(f"the variable {name} has shape {shape} and {size} bytes")
    return Entry(dtype, shape, shard, offset, size, checksum)


def _shape(message: bytes) -> tuple[int, ...]:
    """TensorShapeProto: field 2, repeated, is a dimension whose field 1 is its size."""
    sizes = []
    for field, value in fields(message):
        if field == 2:
            sizes.append(sum(number_of(size) for number, size in fields(bytes_of(value)) if number == 1))
        if len(sizes) > _MOST_DIMENSIONS:
            raise Malformed(f"a variable has more than {_MOST_DIMENSIONS} dimensions")
    return tuple(sizes)


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All keys, strictly increasing, with their values."""
    footer = data[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise Malformed("its index does not end as one")
    position = 0
    handles = []  # offset and size of the block of meta data, which bundles leave empty, and of the index block
    for _ in range(4):
        number, position = varint(footer, position)
        handles.append(number)
    last, end = None, 0
    for _, handle in _block(data, handles[2], handles[3]):
        offset, position = varint(handle, 0)
        size, _ = varint(handle, position)
        if offset < end:  # each byte is read once, whatever the file says
            raise Malformed("the blocks of its index overlap")
        end = offset + size
        for key, value in _block(data, offset, size):
            if last is not None and key <= last:
                raise Malformed("its index is not in order")
            last = key
            yield key, value


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; a key repeats the first `shared` bytes of the key before."""
    if offset + size + _TRAILER_BYTES > len(data) - _FOOTER_BYTES or size < 4:
        raise Malformed("a block of its index lies outside of it")
    block = data[offset : offset + size]
    kind = data[offset + size]
    checksum = int.from_bytes(data[offset + size + 1 : offset + size + _TRAILER_BYTES], "little")
    if masked_crc32c(memoryview(data)[offset : offset + size + 1]) != checksum:
        raise Malformed("its index does not have its checksum")
    if kind != 0:
        raise Malformed("its index is compressed, which TensorFlow itself does not do")
    end = size - 4 * (int.from_bytes(block[-4:], "little") + 1)  # the positions of whole keys follow
    if end < 0:
        raise Malformed("a block of its index is too short")
    position, key, allowance = 0, b"", _KEY_BYTES_PER_BYTE * size
    while position < end:
        shared, position = varint(block, position)
        unshared, position = varint(block, position)
        length, position = varint(block, position)
        if shared > len(key) or position + unshared + length > end:
            raise Malformed("a block of its index is too short")
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        allowance -= len(key)
        if allowance < 0:
            raise Malformed("the names of its variables are too long")
        yield key, block[position : position + length]
        position += length
