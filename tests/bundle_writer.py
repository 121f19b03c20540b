"""A small writer of TensorFlow 1 checkpoints, so that tests need no file of the authors'.

Written from the formats' documents (LevelDB's table_format.md, protobuf's encoding, tensor_bundle.proto), with a
bitwise CRC-32C of its own; the reader under test shares no line with it.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch

from simclr.models import Encoder, LinearClassifier, ProjectionHead
from tf_checkpoint import authors_names

MAGIC = 0xDB4775248B80FB57
TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}


def write_bundle(
    prefix: Path,
    variables: Mapping[str, np.ndarray | bytes],
    *,
    shards: int = 1,
    block_bytes: int = 512,
    restart: int = 16,
) -> None:
    """Write PREFIX.index and PREFIX.data-*; variables are dealt out to the data files in turn. Bytes are a text."""
    data = [bytearray() for _ in range(shards)]
    header = field(1, shards) + field(3, field(1, 1))
    table = {b"": header}
    for i, name in enumerate(sorted(variables)):
        value, shard = variables[name], i % shards
        if isinstance(value, bytes):  # a text: its length, the length's checksum, itself
            memory = len(value).to_bytes(4, "little")
            checksum = masked(memory).to_bytes(4, "little")
            kind, shape, raw = 7, b"", varint(len(value)) + checksum + value
            sealed = masked(memory + checksum + value)
        else:
            array = np.asarray(value)
            kind, raw = TYPES[array.dtype.name], array.tobytes()
            shape = b"".join(field(2, field(1, size)) for size in array.shape)
            sealed = masked(raw)
        table[name.encode()] = (
            field(1, kind) + field(2, shape) + field(3, shard) + field(4, len(data[shard]))
            + field(5, len(raw)) + bytes([6 << 3 | 5]) + sealed.to_bytes(4, "little")
        )  # fmt: skip
        data[shard] += raw
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table_file(table, block_bytes, restart))
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)


def authors_variables(
    encoder: Encoder, head: ProjectionHead, classifier: LinearClassifier, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """The networks as the authors would have saved them, after giving all their numbers random values.

    Each weight has a slot of the optimiser's beside it.
    """
    generator = torch.Generator().manual_seed(seed)
    variables: dict[str, np.ndarray] = {"global_step": np.array(7)}
    for name, tensor in authors_names(encoder, head, classifier).items():
        with torch.no_grad():
            scale = tensor.shape[1:].numel() ** -0.5 if tensor.ndim > 1 else 0.3
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
            if name.endswith(("gamma", "variance")):
                tensor.abs_().add_(0.5)
        array = tensor.detach().numpy()
        variables[name] = np.ascontiguousarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)
        if tensor.requires_grad:
            variables[f"{name}/Momentum"] = np.full_like(variables[name], 9.0)
    return variables


def table_file(table: Mapping[bytes, bytes], block_bytes: int = 512, restart: int = 16) -> bytes:
    """A string table: blocks of at most about so many bytes, a whole key every `restart` keys."""
    file, index, pending = bytearray(), {}, {}
    items = sorted(table.items())
    for i, (key, value) in enumerate(items):
        pending[key] = value
        if i == len(items) - 1 or sum(len(k) + len(v) for k, v in pending.items()) > block_bytes:
            index[key + b"\0"] = append(file, block(pending, restart))
            pending = {}
    handles = append(file, block({}, 1)) + append(file, block(index, 1))
    return bytes(file) + handles.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def append(file: bytearray, content: bytes) -> bytes:
    """Write a block with its trailer, and return where it is."""
    handle = varint(len(file)) + varint(len(content))
    file += content + b"\0" + masked(content + b"\0").to_bytes(4, "little")
    return handle


def block(items: Mapping[bytes, bytes], restart: int) -> bytes:
    """Keys that leave out what they share with the key before."""
    out, last, restarts = bytearray(), b"", []
    for i, (key, value) in enumerate(items.items()):
        shared = 0
        if i % restart == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return bytes(out) + b"".join(n.to_bytes(4, "little") for n in [*restarts, len(restarts)])


def field(number: int, value: int | bytes) -> bytes:
    """A protobuf field."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def masked(data: bytes) -> int:
    """LevelDB's masked CRC-32C."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """By the definition, a byte at a time."""
    crc, steps = 0xFFFFFFFF, remainders()
    for byte in data:
        crc = crc >> 8 ^ steps[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@cache
def remainders() -> list[int]:
    """Of each byte, by the polynomial 0x1EDC6F41, bits reversed."""
    out = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        out.append(value)
    return out
