"""CRC-32C (Castagnoli) of bytes, compiled: eight bytes a step, by eight tables (Intel's slicing-by-8).

TensorFlow and LevelDB store it masked, since a checksum of bytes that contain a checksum is weak:
rotated right by 15 bits, plus a constant (leveldb, util/crc32c.h).
"""

from collections.abc import Callable

import numba
import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected
_MASK_DELTA = 0xA282EAD8


def masked_crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """The masked CRC-32C of contiguous bytes."""
    crc = int(_crc(np.frombuffer(data, np.uint8), _TABLES))
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _tables() -> np.ndarray:
    """(8, 256): row k is the effect of a byte that k further bytes follow."""
    tables = np.zeros((8, 256), np.uint32)
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = (values >> 1) ^ np.where(values & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    tables[0] = values
    for k in range(1, 8):
        tables[k] = (tables[k - 1] >> 8) ^ values[tables[k - 1] & 0xFF]
    return tables


_TABLES = _tables()


def _compile(function: Callable) -> Callable:
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # Numba found no folder that it may write to
        return numba.njit(nogil=True)(function)


@_compile
def _crc(data, tables):
    crc = np.uint32(0xFFFFFFFF)
    byte = np.uint32(0xFF)
    whole = len(data) // 8 * 8
    for i in range(0, whole, 8):
        low = crc ^ (
            np.uint32(data[i])
            | (np.uint32(data[i + 1]) << np.uint32(8))
            | (np.uint32(data[i + 2]) << np.uint32(16))
            | (np.uint32(data[i + 3]) << np.uint32(24))
        )
        crc = (
            tables[7, low & byte]
            ^ tables[6, (low >> np.uint32(8)) & byte]
            ^ tables[5, (low >> np.uint32(16)) & byte]
            ^ tables[4, low >> np.uint32(24)]
            ^ tables[3, data[i + 4]]
            ^ tables[2, data[i + 5]]
            ^ tables[1, data[i + 6]]
            ^ tables[0, data[i + 7]]
        )
    for i in range(whole, len(data)):
        crc = tables[0, (crc ^ data[i]) & byte] ^ np.uint32(crc >> np.uint32(8))
    return crc ^ np.uint32(0xFFFFFFFF)
