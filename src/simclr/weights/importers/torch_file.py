"""PyTorch's checkpoint files as named tensors, without running the pickle in them.

The pickle is followed by `inert_pickle.py`, and every number that it gives is checked before it is used: nothing larger
than the file is allocated, and no more is read than `_MAX_READ` times the file. `torch.load(weights_only=True)` runs no
code either, but hashes, prints, copies and allocates whatever the file describes, so that files of a few hundred bytes
hang it or end the process; it does not verify checksums; and it refuses dictionaries of other classes, pickles of
protocol 4 and, in the format before 1.6, every object (docs/lab-notes.md, 2026-11-30).

Both of torch.save's formats: the zip archive, and what came before torch 1.6 (MoCo's release): a row of pickles, then
the storages. safetensors files are read as well.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from simclr.errors import UserError, shown
from simclr.files import open_regular, reason_of
from simclr.models.external.protobuf import Malformed
from simclr.models.safetensors_file import open_safetensors
from simclr.weights.importers.inert_pickle import MAX_BYTES, Lazy, Storage, follow

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before 1.6, as its first pickle
_PICKLES_BEFORE_1_6 = 5  # the magic number, the version, the machine, the object, the storages' keys
_MAX_DIRECTORY = 16 << 20  # bytes of an archive's directory: 150,000 records of torch.save, of 600 bytes each in memory
_MAX_READ = 4  # times the file's size: storages may be shared by several tensors, but not by hundreds
_MAX_NAME = 500  # characters of a tensor's name


class TorchFile:
    """An opened file of PyTorch or safetensors; numbers are read when they are asked for.

    Attributes:
        path: Of the file.
        shapes: Name -> shape of every tensor, in the file's order. They are those of the file's dictionary, or of the
            "state_dict" or "model" in it.
        size: Of the file, in bytes.

    Raises:
        UserError: The file is damaged, holds no tensors, or would call functions that weights do not need.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, Lazy] = {}
        self._places: dict[str, tuple[int, int]] = {}  # storage -> where it lies, of the format before 1.6
        with self._damage_named():
            with open_regular(path) as file:
                self.size = os.fstat(file.fileno()).st_size
                start = file.read(16)
                if start[8:9] == b"{" and not start.startswith(b"PK"):
                    self.shapes = self._open_safetensors()
                    return
                file.seek(0)
                contents = self._open_zip(file) if start.startswith(b"PK") else self._open_legacy(file)
            self._tensors = dict(_named_tensors(contents))
        if not self._tensors:
            raise UserError(f"{path} holds no named tensors; give a checkpoint that was saved from a state_dict.")
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, contiguous, in the file's types; in the order of their storages, each read once.

        Raises:
            UserError: The bytes of one are damaged.
        """
        if not self._tensors:
            with self._damage_named(), open_safetensors(self.path) as file:
                for name in names:
                    with self._damage_named(name):
                        tensor = file.get_tensor(name)
                    yield name, tensor
            return
        with self._damage_named(), open_regular(self.path) as file:
            reader = _StorageReader(file, self._places, self._folder, _MAX_READ * self.size)
            for name in sorted(names, key=lambda name: self._tensors[name].storage.key):
                with self._damage_named(name):
                    tensor = self._tensor(reader, name)
                yield name, tensor

    @contextmanager
    def _damage_named(self, tensor: str = "") -> Iterator[None]:
        """What is raised by bytes that make no sense, as one sentence that names the tensor."""
        place = f"{shown(tensor)}: " if tensor else ""
        try:
            yield
        except Malformed as error:
            raise self.error(f"{place}{error}") from None
        except OSError as error:
            raise UserError(f"The checkpoint {self.path} cannot be read: {reason_of(error)}.") from None
        except _DAMAGE as error:
            if isinstance(error, UserError):
                raise
            raise self.error(f"{place}{_reason(error)}") from None

    def error(self, reason: str) -> UserError:
        """The file is damaged; `reason` says how."""
        return UserError(f"{self.path} is no whole checkpoint of PyTorch: {reason}; fetch it again.")

    def _open_safetensors(self) -> dict[str, tuple[int, ...]]:
        with open_safetensors(self.path) as file:
            shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        if not shapes:
            raise UserError(f"{self.path} holds no tensors.")
        return shapes

    def _open_zip(self, file: BinaryIO) -> Any:
        with _open_archive(file, self.size) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in names):
                raise Malformed("it is no archive of torch.save (or a TorchScript program)")
            if archive.getinfo(pickles[0]).file_size > MAX_BYTES:
                raise Malformed(f"its pickle has more than {MAX_BYTES:,} bytes")
            self._folder = pickles[0].removesuffix("data.pkl")
            order = self._folder + "byteorder"
            if order in names and (archive.getinfo(order).file_size > 8 or archive.read(order) != b"little"):
                raise Malformed("it was written on a big-endian machine")
            return follow(io.BytesIO(archive.read(pickles[0])))

    def _open_legacy(self, file: BinaryIO) -> Any:
        self._folder = ""
        reader = io.BytesIO(file.read(min(self.size, MAX_BYTES)))  # pickles in memory: they may claim any length
        magic = follow(reader)
        if type(magic) is not int or magic != _MAGIC:
            raise Malformed("it does not begin as one")
        storages: dict[str, Storage] = {}
        *_, contents, keys = (follow(reader, storages) for _ in range(_PICKLES_BEFORE_1_6 - 1))
        position = reader.tell()
        for key in keys if isinstance(keys, list) else []:
            if not isinstance(key, str) or key not in storages:
                raise Malformed("its storages do not fit its tensors")
            file.seek(position)
            count = int.from_bytes(file.read(8), "little")
            if count != storages[key].count:
                raise Malformed("its storages do not fit its tensors")
            size = count * storages[key].dtype.itemsize
            self._places[key] = (position + 8, size)
            position += 8 + size
            if position > self.size:
                raise Malformed("it is cut off")
        return contents

    def _tensor(self, reader: "_StorageReader", name: str) -> Tensor:
        storage, offset, shape, stride = self._tensors[name]
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if math.prod(shape) > storage.count or last >= storage.count or min(shape, default=1) < 1:
            raise Malformed("it lies outside of its storage")
        raw = reader.read(storage)
        return torch.frombuffer(raw, dtype=storage.dtype).as_strided(shape, stride, offset).clone(
            memory_format=torch.contiguous_format
        )  # fmt: skip


class _StorageReader:
    """Storages of an opened file; the last one is kept, for the tensors in a row that are parts of it."""

    def __init__(self, file: BinaryIO, places: dict[str, tuple[int, int]], folder: str, allowance: int) -> None:
        self._file = file
        self._places = places
        self._folder = folder
        self._allowance = allowance
        self._archive = None if places else zipfile.ZipFile(file)
        self._key: str | None = None
        self._content = bytearray()

    def read(self, storage: Storage) -> bytearray:
        """The bytes of a storage, its checksum verified where the format has one."""
        if storage.key != self._key:
            self._key, self._content = None, bytearray()  # the old one is freed before the next is read
            self._content = self._read(storage)
            self._key = storage.key
        if len(self._content) != storage.count * storage.dtype.itemsize:
            raise Malformed("its storage has two lengths")
        return self._content

    def _read(self, storage: Storage) -> bytearray:
        size = storage.count * storage.dtype.itemsize
        if self._archive is None:
            begin, there = self._places.get(storage.key, (0, -1))
            record = None
        else:
            record = self._archive.getinfo(f"{self._folder}data/{storage.key}")
            begin, there = 0, record.file_size
        if there != size:
            raise Malformed(f"its storage has {max(0, there):,} bytes and should have {size:,}")
        self._allowance -= size
        if self._allowance < 0:
            raise Malformed("several of its tensors lie in the same place")
        content = bytearray(size)  # no more than the file has
        if self._archive is None or record is None:
            self._file.seek(begin)
            read = self._file.readinto(content)  # pyrefly: ignore
        else:
            with self._archive.open(record) as stored:
                read = stored.readinto(content)  # pyrefly: ignore
                stored.read(1)  # at the end the checksum is verified
        if read != size:
            raise Malformed("it is cut off")
        return content


# What zipfile, pickletools and safetensors raise where bytes make no sense.
_DAMAGE = (zipfile.BadZipFile, ValueError, KeyError, IndexError, EOFError, NotImplementedError, RuntimeError,
           OverflowError, struct.error, SafetensorError, TypeError, AttributeError)  # fmt: skip


def _reason(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 200) or type(error).__name__


class _SmallReads:
    """A file that refuses to read many bytes at once: `zipfile` reads an archive's whole directory in one call."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        rest = max(0, self._size - self._file.tell())
        count = rest if count < 0 else min(count, rest)
        if count > _MAX_DIRECTORY:
            raise Malformed(f"its directory has more than {_MAX_DIRECTORY:,} bytes")
        return self._file.read(count)


def _open_archive(file: BinaryIO, size: int) -> zipfile.ZipFile:
    """An archive of torch.save: no record is compressed, so none is larger than the file, and no name comes twice."""
    archive = zipfile.ZipFile(_SmallReads(file, size))  # pyrefly: ignore
    archive.fp = file  # pyrefly: ignore
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
            raise Malformed(f"its record {shown(record.filename)!r} is compressed or larger than the file")
    if len(archive.NameToInfo) != len(archive.infolist()):
        raise Malformed("it has two records of one name")
    return archive


def _named_tensors(contents: Any) -> Iterator[tuple[str, Lazy]]:
    """The tensors of the dictionary that holds the weights, with their names."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(contents, dict) and isinstance(contents.get(key), dict):
            contents = contents[key]
    if isinstance(contents, dict):
        for key, tensor in contents.items():
            if isinstance(tensor, Lazy):
                name = str(key)
                if len(name) > _MAX_NAME or not name.isprintable():
                    raise Malformed("the name of a tensor is too long or no text")
                yield name, tensor
