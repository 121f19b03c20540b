"""A small reader of TensorFlow 1 checkpoints (tensor bundles), and the authors' variable names for our modules.

`PREFIX.index` is a sorted string table in LevelDB's format: data blocks of prefix-compressed keys, an index
block that points to them, and a footer that points to the index. Its values are protobuf messages: under the
empty key the bundle's header, under a variable's name where its bytes lie in `PREFIX.data-*-of-*`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr.models.encoder import Encoder
from simclr.models.heads import LinearClassifier, ProjectionHead

TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # of tensorflow/core/framework/types.proto


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Every variable of the one checkpoint in `folder`, by name."""
    (index,) = folder.glob("*.index")
    entries = dict(_table(index.read_bytes()))
    num_shards = _message(entries.pop(b"")).get(1, 1)
    prefix = index.with_suffix("")
    shards = [Path(f"{prefix}.data-{i:05d}-of-{num_shards:05d}").read_bytes() for i in range(num_shards)]
    return {name.decode(): _tensor(_message(value), shards) for name, value in entries.items()}


def authors_names(encoder: Encoder, head: ProjectionHead, classifier: LinearClassifier) -> dict[str, Tensor]:
    """The authors' name of each of our parameters and running statistics.

    Their names number the layers in order of creation, and so do our modules: within a group's first block the
    projection shortcut comes first. Convolutions and batch norms are numbered apart: a selective kernel's last
    convolution has no batch norm.
    """
    names: dict[str, Tensor] = {}
    convs = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, conv in enumerate(convs):
        names[f"base_model/conv2d{_suffix(i)}/kernel"] = conv.weight
    for i, norm in enumerate(norms):
        names |= _norm(f"base_model/batch_normalization{_suffix(i)}", norm)
    layers: Any = head.layers
    for j, layer in enumerate(layers):
        names[f"head_contrastive/nl_{j}/dense/kernel"] = layer.dense.weight
        names |= _norm(f"head_contrastive/nl_{j}/batch_normalization", layer.norm)
    names["head_supervised/linear_layer/dense/kernel"] = classifier.weight
    names["head_supervised/linear_layer/dense/bias"] = classifier.bias
    return names


@torch.no_grad()
def load(names: dict[str, Tensor], variables: dict[str, np.ndarray]) -> None:
    """Copy a checkpoint's variables into the tensors of `authors_names`; all of them, and no other."""
    ignored = {name for name in variables if name == "global_step" or name.endswith("/Momentum")}
    assert set(names) == set(variables) - ignored
    for name, tensor in names.items():
        value = torch.from_numpy(variables[name])
        if value.ndim == 4:
            value = value.permute(3, 2, 0, 1)  # (height, width, in, out) -> (out, in, height, width)
        elif value.ndim == 2:
            value = value.T  # (in, out) -> (out, in)
        assert value.shape == tensor.shape, name
        tensor.copy_(value)


def _norm(name: str, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> dict[str, Tensor]:
    tensors = {
        "gamma": norm.weight,
        "beta": norm.bias,
        "moving_mean": norm.running_mean,
        "moving_variance": norm.running_var,
    }
    return {f"{name}/{key}": tensor for key, tensor in tensors.items() if tensor is not None}


def _suffix(index: int) -> str:
    return f"_{index}" if index else ""


def _tensor(entry: dict[int, Any], shards: list[bytes]) -> np.ndarray:
    """The array that a BundleEntryProto describes: 1 dtype, 2 shape, 3 shard, 4 offset, 5 size."""
    offset, size = entry.get(4, 0), entry.get(5, 0)
    raw = shards[entry.get(3, 0)][offset : offset + size]
    return np.frombuffer(raw, DTYPES[entry[1]]).reshape(_shape(entry.get(2, b""))).copy()


def _shape(message: bytes) -> list[int]:
    """TensorShapeProto: field 2, repeated, is a dimension whose field 1 is its size."""
    return [_message(value).get(1, 0) for field, value in _fields(message) if field == 2]


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    footer = data[-FOOTER_BYTES:]
    assert int.from_bytes(footer[-8:], "little") == TABLE_MAGIC
    position = 0
    handle = []  # offset and size of the meta index block, then of the index block
    for _ in range(4):
        number, position = _varint(footer, position)
        handle.append(number)
    for _, value in _block(data, handle[2], handle[3]):
        offset, position = _varint(value, 0)
        size, _ = _varint(value, position)
        yield from _block(data, offset, size)


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; a key repeats the first `shared` bytes of the key before."""
    assert data[offset + size] == 0, "a compressed block"
    block = data[offset : offset + size]
    num_restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 * (num_restarts + 1)
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def _message(data: bytes) -> dict[int, Any]:
    """A protobuf message without repeated fields: field number -> value."""
    return dict(_fields(data))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
        else:
            length, position = _varint(data, position) if wire == 2 else ({1: 8, 5: 4}[wire], position)
            value, position = data[position : position + length], position + length
        yield field, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Seven bits a byte, lowest first; the top bit says that more follow. Returns the number and what is next."""
    number = shift = 0
    while True:
        byte = data[position]
        number |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return number, position
