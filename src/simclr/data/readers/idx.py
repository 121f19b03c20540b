"""The idx files of MNIST and its kin (yann.lecun.com/exdb/mnist): big-endian sizes, then bytes; or gzipped.

torchvision reads them too, but into tensors, and reports damage by assertion.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from simclr.errors import UserError

MAX_BYTES = 1 << 30
"""A header that claims more is damaged; the largest set of this family (EMNIST) has half a gigabyte."""
_PIECE = 1 << 20  # bytes read at a time


def read_idx(folder: Path, name: str, num_dims: int) -> np.ndarray:
    """The uint8 array in `folder/name.gz` or `folder/name`.

    Args:
        num_dims: 3 for images (n, H, W), 1 for labels (n,).

    Raises:
        UserError: no such file, cut short, too long, or not an idx file of bytes with so many dimensions.
    """
    path = find_idx(folder, name)
    if path is None:
        raise UserError(f"{folder} lacks {name}.gz (or {name} without .gz).")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * num_dims)
            if len(header) < 4 + 4 * num_dims:
                raise UserError(f"{path} is cut short: it has {len(header)} bytes; fetch it again.")
            magic, *shape = struct.unpack(f">{1 + num_dims}I", header)
            if magic != 0x800 + num_dims:  # 0x08: unsigned bytes
                raise UserError(
                    f"{path} is not an idx file of bytes with {num_dims} dimensions: its magic number is "
                    f"{magic:#x} and not {0x800 + num_dims:#x}."
                )
            size = int(np.prod(shape, dtype=object))
            if size > MAX_BYTES:
                raise UserError(f"{path} is damaged: its header claims {size:,} bytes.")
            content = np.empty(size, np.uint8)  # memory is taken only as bytes come, whatever the header claims
            place = 0
            while place < size and (count := file.readinto(content[place : place + _PIECE].data)):
                place += count
            too_long = place == size and file.read(1) != b""
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again.") from error
    if place != size or too_long:
        actual = "more" if too_long else f"{place:,}"
        raise UserError(f"{path} is damaged: its header claims {size:,} bytes and it has {actual}; fetch it again.")
    return content.reshape(shape)


def find_idx(folder: Path, name: str) -> Path | None:
    """`folder/name.gz` or `folder/name`, whichever is there."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
