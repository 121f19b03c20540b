"""Fingerprints: one digest of everything in a data set that a result can depend on."""

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

SCHEME = "v2:"
"""What a fingerprint begins with. Those of the first scheme, without it, held names and sizes of files but no bytes."""
_ROWS = 4096  # images hashed at a time


def fingerprint_of(
    contents: str,
    keys: Sequence[str],
    sizes: np.ndarray,
    labels: Iterable[np.ndarray | None],
    classes: Sequence[str] | None,
    channels: int,
) -> str:
    """SCHEME and the SHA-256 (hexadecimal) of the fields of `Images` that bear these names.

    `sizes` hold how far images were shrunk at opening: the shorter side of a shrunk image is the limit itself.
    """
    digest = sha256(f"{contents} {channels} {len(keys)}\n".encode())
    digest.update(_text(keys))
    digest.update(sizes.astype("<i8").tobytes())
    for known in labels:
        digest.update(b"none\n" if known is None else f"{known.shape}\n".encode() + known.astype("<i8").tobytes())
    digest.update(b"none\n" if classes is None else f"{len(classes)}\n".encode() + _text(classes))
    return SCHEME + digest.hexdigest()


def digest_of_files(digests: Iterable[bytes]) -> str:
    """SHA-256 (hexadecimal) of the SHA-256 digests of files."""
    return sha256(b"".join(digests)).hexdigest()


def digest_of_array(pixels: np.ndarray) -> str:
    """SHA-256 (hexadecimal) of the shape and the bytes of (n, H, W, C) uint8 pixels."""
    return _array_digest(pixels.shape, lambda rows: pixels[rows]).hexdigest()


def digest_of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 (hexadecimal) of separate images, each (H, W, C) uint8."""
    digest = sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def first_scheme(images: Any) -> str:
    """The fingerprint that `Images`, as they were opened, had in the first scheme: to resume a run that has it.

    It says whether names, sizes and labels of files are the same, and of arrays whether all is.
    """
    files = getattr(images.store, "files", None)
    if files is not None:
        digest = sha256()
        for row in images.rows:
            digest.update(f"{files[row].key}\0{files[row].num_bytes}\0".encode())
        digest.update(images.sizes.astype("<i8").tobytes())
    else:
        first = np.asarray(images.store(images.rows[:1]))  # (1, H, W, C)
        digest = _array_digest((len(images), *first.shape[1:]), lambda rows: images.store(images.rows[rows]))
    for known in (images.labels, images.targets):
        if known is not None:
            digest.update(known.astype("<i8").tobytes())
    return digest.hexdigest()


def _array_digest(shape: tuple[int, ...], read: Callable[[slice], Any]) -> Any:
    digest = sha256(repr(shape).encode())
    for start in range(0, shape[0], _ROWS):
        digest.update(np.ascontiguousarray(read(slice(start, start + _ROWS))).data)
    return digest


def _text(names: Sequence[str]) -> bytes:
    """Names with their lengths, so that no two lists give the same bytes."""
    return "".join(f"{len(name)}:{name}" for name in names).encode("utf-8", "surrogatepass")
