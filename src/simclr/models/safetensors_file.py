"""safetensors files from strangers: names, shapes and types of all tensors before any of their numbers are read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simclr.errors import UserError, shown
from simclr.files import MAX_RECORD_BYTES, open_regular

_MAX_NAME = 500  # characters of a tensor's name
_MAX_DIMENSIONS = 8
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """What a file says of a tensor."""

    dtype: torch.dtype | None
    """None: a type that no weight of ours has."""
    shape: tuple[int, ...]


class SafetensorsFile:
    """An opened file.

    Attributes:
        tensors: Name -> type and shape, in the file's order.
        metadata: The texts in its header.
    """

    def __init__(self, opened: Any, tensors: dict[str, TensorInfo]) -> None:
        self._opened = opened
        self.tensors = tensors
        self.metadata: dict[str, str] = opened.metadata() or {}

    def get_tensor(self, name: str) -> Tensor:
        """A copy of its numbers: not a part of the file, which may change on disk."""
        return self._opened.get_tensor(name).clone()


@contextmanager
def open_safetensors(path: Path) -> Iterator[SafetensorsFile]:
    """Open a file for reading.

    Raises:
        UserError: It is no regular file, or no whole safetensors file, or has names that are no text.
        OSError: It is not there or may not be read.
    """
    damaged = f"{path} is no whole safetensors file"
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
    if length > min(MAX_RECORD_BYTES, size - 8):  # the largest header of timm's models has 0.3 MB
        raise UserError(f"{damaged}: its header claims {length:,} bytes, and the file has {size:,}.")
    try:
        with safe_open(path, framework="pt") as opened:
            yield SafetensorsFile(opened, {name: _info(opened, name, damaged) for name in opened.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{damaged}: {shown(' '.join(str(error).split()), 200)}.") from None


def _info(opened: Any, name: str, damaged: str) -> TensorInfo:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise UserError(f"{damaged}: the name of a tensor is too long or no text.")
    piece = opened.get_slice(name)
    shape = tuple(piece.get_shape())
    if len(shape) > _MAX_DIMENSIONS:
        raise UserError(f"{damaged}: {shown(name)} has {len(shape)} dimensions.")
    return TensorInfo(_DTYPES.get(piece.get_dtype()), shape)
