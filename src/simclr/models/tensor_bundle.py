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
from simclr.models.crc32c import masked_crc32c

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # after each block: its kind and its masked checksum
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # of tensorflow/core/framework/types.proto
_MOST_DIMENSIONS, _LONGEST_NAME = 8, 500
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
        path: PREFIX, one of the checkpoint's files, or a folder that holds one checkpoint.

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
            self.entries, self._num_shards = _read_index(self._index.read_bytes())
            self._check_places()
        except _Malformed as error:
            raise self._error(str(error)) from None
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
        try:
            with self._shard(entry.shard).open("rb") as file:
                file.seek(entry.offset)
                raw = np.fromfile(file, np.uint8, entry.size)
        except OSError as error:
            raise UserError(f"The checkpoint {self.prefix} cannot be read: {error.strerror}.") from None
        if len(raw) != entry.size or masked_crc32c(raw) != entry.checksum:
            raise self._error(f"the bytes of {name} do not have their checksum")
        return raw.view(_DTYPES[entry.dtype]).reshape(entry.shape)

    def _check_places(self) -> None:
        """Every variable lies within its data file, and no two share bytes."""
        by_shard: dict[int, list[Entry]] = {}
        for entry in self.entries.values():
            by_shard.setdefault(entry.shard, []).append(entry)
        for shard, entries in by_shard.items():
            if shard >= self._num_shards:
                raise _Malformed(f"it has {self._num_shards} data files, and a variable lies in number {shard}")
            file = self._shard(shard)
            if not file.is_file():
                raise _Malformed(f"its data file {file.name} is missing")
            entries.sort(key=lambda entry: (entry.offset, entry.size))
            if entries[-1].offset + entries[-1].size > file.stat().st_size:
                raise _Malformed(f"its data file {file.name} is too short")
            if any(left.offset + left.size > right.offset for left, right in pairwise(entries)):
                raise _Malformed("two variables lie in the same place")

    def _shard(self, number: int) -> Path:
        return _with_ending(self.prefix, f".data-{number:05d}-of-{self._num_shards:05d}")

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self._index} is no whole TensorFlow checkpoint: {reason}; fetch its files again.")


class _Malformed(Exception):
    """What is wrong, as a part of a sentence."""


def _find_prefix(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            names = ", ".join(file.stem for file in found[:5]) or "none"
            raise UserError(
                f"The folder {path} should hold one TensorFlow checkpoint (a file that ends in .index), and holds "
                f"{len(found)}: {names}; name one."
            )
        return found[0].with_suffix("")
    prefix = path.with_suffix("") if path.suffix == ".index" or path.suffix.startswith(".data-") else path
    if not _with_ending(prefix, ".index").is_file():
        raise UserError(
            f"There is no TensorFlow checkpoint {prefix}: {prefix.name}.index is missing; give what its files' names "
            "begin with, such as FOLDER/model.ckpt-250228."
        )
    return prefix


def _with_ending(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)  # the prefix may have a dot of its own: model.ckpt-100


def _read_index(data: bytes) -> tuple[dict[str, Entry], int]:
    """The variables and the number of data files."""
    table = _table(data)
    key, header = next(table, (None, b""))
    if key != b"":
        raise _Malformed("its header is missing")
    num_shards = 1
    for field, value in _fields(header):  # BundleHeaderProto: 1 num_shards, 2 endianness
        if field == 1:
            num_shards = _number(value)
        elif field == 2 and value != 0:
            raise _Malformed("it was written on a big-endian machine")
    entries: dict[str, Entry] = {}
    for key, value in table:
        if key[0] == 0:
            raise _Malformed("a variable was saved in slices, as parameter servers do")
        name = key.decode(errors="replace")
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise _Malformed("the name of a variable is too long or no text")
        entries[name] = _entry(name, value)
    return entries, num_shards


def _entry(name: str, message: bytes) -> Entry:
    """BundleEntryProto: 1 dtype, 2 shape, 3 shard, 4 offset, 5 size, 6 checksum, 7 slices."""
    numbers = dict.fromkeys((1, 3, 4, 5, 6), 0)
    shape: tuple[int, ...] = ()
    for field, value in _fields(message):
        if field == 2:
            shape = _shape(_bytes(value))
        elif field == 7:
            raise _Malformed(f"the variable {name} was saved in slices, as parameter servers do")
        elif field in numbers:
            numbers[field] = _number(value)
    dtype, shard, offset, size, checksum = numbers.values()
    elements = math.prod(shape)
    fits = size == elements * np.dtype(_DTYPES[dtype]).itemsize if dtype in _DTYPES else size >= elements
    if not fits or max(shape, default=0) > size:
        raise _Malformed(f"the variable {name} has shape {shape} and {size} bytes")
    return Entry(dtype, shape, shard, offset, size, checksum)


def _shape(message: bytes) -> tuple[int, ...]:
    """TensorShapeProto: field 2, repeated, is a dimension whose field 1 is its size."""
    sizes = []
    for field, value in _fields(message):
        if field == 2:
            sizes.append(sum(_number(size) for number, size in _fields(_bytes(value)) if number == 1))
        if len(sizes) > _MOST_DIMENSIONS:
            raise _Malformed(f"a variable has more than {_MOST_DIMENSIONS} dimensions")
    return tuple(sizes)


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All keys, strictly increasing, with their values."""
    footer = data[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise _Malformed("its index does not end as one")
    position = 0
    handles = []  # offset and size of the block of meta data, which bundles leave empty, and of the index block
    for _ in range(4):
        number, position = _varint(footer, position)
        handles.append(number)
    last, end = None, 0
    for _, handle in _block(data, handles[2], handles[3]):
        offset, position = _varint(handle, 0)
        size, _ = _varint(handle, position)
        if offset < end:  # each byte is read once, whatever the file says
            raise _Malformed("the blocks of its index overlap")
        end = offset + size
        for key, value in _block(data, offset, size):
            if last is not None and key <= last:
                raise _Malformed("its index is not in order")
            last = key
            yield key, value


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; a key repeats the first `shared` bytes of the key before."""
    if offset + size + _TRAILER_BYTES > len(data) - _FOOTER_BYTES or size < 4:
        raise _Malformed("a block of its index lies outside of it")
    block = data[offset : offset + size]
    kind = data[offset + size]
    checksum = int.from_bytes(data[offset + size + 1 : offset + size + _TRAILER_BYTES], "little")
    if masked_crc32c(memoryview(data)[offset : offset + size + 1]) != checksum:
        raise _Malformed("its index does not have its checksum")
    if kind != 0:
        raise _Malformed("its index is compressed, which TensorFlow itself does not do")
    end = size - 4 * (int.from_bytes(block[-4:], "little") + 1)  # the positions of whole keys follow
    if end < 0:
        raise _Malformed("a block of its index is too short")
    position, key, allowance = 0, b"", _KEY_BYTES_PER_BYTE * size
    while position < end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        if shared > len(key) or position + unshared + length > end:
            raise _Malformed("a block of its index is too short")
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        allowance -= len(key)
        if allowance < 0:
            raise _Malformed("the names of its variables are too long")
        yield key, block[position : position + length]
        position += length


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message in the order of the file, numbers unsigned."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _Malformed("an entry of its index is no message")
        raw = message[position : position + length]
        if len(raw) < length:
            raise _Malformed("an entry of its index is cut off")
        position += length
        yield tag >> 3, raw if wire == 2 else int.from_bytes(raw, "little")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Seven bits a byte, lowest first; the top bit says that more follow. Returns the number and what is next."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        number |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return number, position
    raise _Malformed("a number in its index does not end")


def _number(value: int | bytes) -> int:
    """A number that must not be negative; protobuf writes negative ones as 64 bits with the top one set."""
    if isinstance(value, bytes) or value >= 1 << 63:
        raise _Malformed("an entry of its index has an impossible number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _Malformed("an entry of its index is no message")
    return value
