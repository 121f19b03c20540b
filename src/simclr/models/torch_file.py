"""PyTorch's checkpoint files as named tensors, without running the pickle in them.

The pickle is followed by `inert_pickle.py`, and every number that it gives is checked before it is used: nothing larger
than the file is allocated. `torch.load(weights_only=True)` is not used: it refuses Lightning's checkpoints for the
objects that they hold, and trusts what a tensor says of its record's length.

Both of torch.save's formats: the zip archive, and what came before torch 1.6 (MoCo's release): a row of pickles, then
the storages. safetensors files are read as well.
"""

import io
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simclr.errors import UserError
from simclr.models.inert_pickle import Lazy, Storage, follow
from simclr.models.protobuf import Malformed

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before 1.6, as its first pickle
_PICKLES_BEFORE_1_6 = 5  # the magic number, the version, the machine, the object, the storages' keys


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
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(16)
            if start[8:9] == b"{" and not start.startswith(b"PK"):
                self.shapes = self._open_safetensors()
                return
            found = self._open_zip() if start.startswith(b"PK") else self._open_legacy()
            self._tensors = dict(_named_tensors(found))
        except Malformed as error:
            raise self.error(str(error)) from None
        except OSError as error:
            raise UserError(f"The checkpoint {path} cannot be read: {error.strerror or error}.") from None
        except _DAMAGE as error:
            raise self.error(" ".join(str(error).split())[:200] or type(error).__name__) from None
        if not self._tensors:
            raise UserError(f"{path} holds no named tensors; give a checkpoint that was saved from a state_dict.")
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, contiguous, in the file's types.

        Raises:
            UserError: The bytes of one are damaged.
        """
        name = ""
        try:
            with self._open() as file:
                for name in names:
                    yield name, self._read(file, name)
        except Malformed as error:
            raise self.error(f"{name}: {error}") from None
        except OSError as error:
            raise UserError(f"The checkpoint {self.path} cannot be read: {error.strerror or error}.") from None
        except _DAMAGE as error:
            raise self.error(f"{name}: {' '.join(str(error).split())[:200]}") from None

    def error(self, reason: str) -> UserError:
        """The file is damaged; `reason` says how."""
        return UserError(f"{self.path} is no whole checkpoint of PyTorch: {reason}; fetch it again.")

    def _open_safetensors(self) -> dict[str, tuple[int, ...]]:
        with safe_open(self.path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if not shapes:
            raise UserError(f"{self.path} holds no tensors.")
        return shapes

    def _open_zip(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            _require_plain(archive, self.size)
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise Malformed("it is no archive of torch.save (or a TorchScript program)")
            self._folder = pickles[0].removesuffix("data.pkl")
            order = self._folder + "byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise Malformed("it was written on a big-endian machine")
            return follow(io.BytesIO(archive.read(pickles[0])))

    def _open_legacy(self) -> Any:
        with self.path.open("rb") as file:
            magic, *_, found, keys = (follow(file) for _ in range(_PICKLES_BEFORE_1_6))
            storages = _storages(found)
            position = file.tell()
            for key in keys if isinstance(keys, list) else []:
                if key not in storages:  # of something that is no tensor's
                    raise Malformed("its storages do not fit its tensors")
                file.seek(position)
                count = int.from_bytes(file.read(8), "little")
                if count != storages[key].count:
                    raise Malformed("its storages do not fit its tensors")
                size = count * storages[key].dtype.itemsize
                self._places[key] = (position + 8, size)
                position += 8 + size
        if magic != _MAGIC:
            raise Malformed("it does not begin as one")
        if position > self.size:
            raise Malformed("it is cut off")
        return found

    def _open(self) -> Any:
        """What the tensors are read from: a safetensors file, the file before 1.6, or the archive."""
        if not self._tensors:
            return safe_open(self.path, framework="pt")
        return self.path.open("rb") if self._places else zipfile.ZipFile(self.path)

    def _read(self, file: Any, name: str) -> Tensor:
        if not self._tensors:
            return file.get_tensor(name)
        storage, offset, shape, stride = self._tensors[name]
        size = storage.count * storage.dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if math.prod(shape) > storage.count or last >= storage.count or min(shape, default=1) < 1:
            raise Malformed("it lies outside of its storage")
        if self._places:
            begin, there = self._places.get(storage.key, (0, -1))
            if there != size:
                raise Malformed("its storage is missing")
            file.seek(begin)
            raw = file.read(size)
        else:
            record = file.getinfo(f"{self._folder}data/{storage.key}")
            if record.file_size != size:
                raise Malformed(f"its storage has {record.file_size} bytes and should have {size}")
            raw = file.read(record)  # which verifies the checksum
        if len(raw) != size:
            raise Malformed("it is cut off")
        return torch.frombuffer(bytearray(raw), dtype=storage.dtype).as_strided(shape, stride, offset).contiguous()


# What zipfile, pickletools and safetensors raise where bytes make no sense.
_DAMAGE = (zipfile.BadZipFile, ValueError, KeyError, IndexError, EOFError, NotImplementedError, RuntimeError,
           OverflowError, struct.error, SafetensorError, TypeError, AttributeError)  # fmt: skip


def _require_plain(archive: zipfile.ZipFile, size: int) -> None:
    """Nothing is compressed, as torch.save has it: so no record is larger than the file."""
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
            raise Malformed(f"its record {record.filename[:80]!r} is compressed or larger than the file")


def _named_tensors(found: Any) -> Iterator[tuple[str, Lazy]]:
    """The tensors of the dictionary that holds the weights, with their names."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if isinstance(found, dict):
        yield from ((str(name), tensor) for name, tensor in found.items() if isinstance(tensor, Lazy))


def _storages(found: Any) -> dict[str, Storage]:
    """Of every tensor anywhere, by key; a container may hold itself."""
    storages, waiting, seen = {}, [found], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Lazy):
            storages[item.storage.key] = item.storage
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return storages
