"""Feature cache: features of a model on images are computed once and kept on the disk, one file per key.

A file begins with one line of JSON: the key (all that determines the features, `keys.py`), shape, and the CRC-32 of the
numbers, which follow as little-endian float32 in C order. A file that does not have the expected key, shape and
checksum counts as missing and is replaced. CRC-32 is the cheapest checksum at hand (1.2 GB/s; SHA-256 without hardware
support reaches half of that) and enough against damage: the key, not the checksum, says what the numbers belong to.

Files appear whole or not at all. The least recently used ones are removed when all together grow beyond `MAX_BYTES`.
"""

import json
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simclr.data.pack.place import user_cache
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.results import Entry, name_of
from simclr.files import open_regular, reason_of, replacing, sweep
from simclr.models.inference import require_finite
from simclr.training.progress import say

MAX_BYTES = 20 << 30
FORMAT = "simclr-features-1"
SUFFIX = ".features"
MAX_HEADER = 1 << 16  # bytes of the first line


@dataclass(frozen=True)
class FeatureCache:
    """A folder of arrays. `FeatureCache(None)` keeps them in memory, as long as the object lives.

    A folder that cannot be written loses no features: a warning is printed once, and they stay in memory.
    """

    folder: Path | None
    _memory: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def get(
        self, key: Entry, shape: tuple[int, int], make: Callable[[], np.ndarray], world: DistributedContext
    ) -> np.ndarray:
        """The features kept under `key`, else what `make` gives, which are kept from now on.

        Args:
            key: All that determines the features, as JSON can hold it (`features_key`).
            shape: (n, F) of the features.
            make: Called by every process, or by none; returns float32.
            world: The processes that call, of which the main one keeps the features.

        Raises:
            UserError: `make` gave features that are not finite.
        """
        name = name_of(key)
        if name in self._memory:
            return self._memory[name]
        path = None if self.folder is None else self.folder / f"{name}{SUFFIX}"
        features = None if path is None else _read(path, key, shape)
        if world.any_rank(features is None):
            features = make()
            assert features.shape == shape and features.dtype == np.float32, (features.shape, shape, features.dtype)
            require_finite(features, "encoder's")
            kept = path is not None and (not world.is_main or self._keep(path, key, features))
            if world.any_rank(not kept):
                self._memory[name] = features
        assert features is not None
        return features

    def _keep(self, path: Path, key: Entry, features: np.ndarray) -> bool:
        """Write the file, or print why it cannot be written; whether it was written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, open(temporary, "wb") as file:
                file.write(_header(key, features))
                file.write(_bytes_of(np.ascontiguousarray(features, "<f4")))
        except OSError as error:
            if not self._memory:
                say(
                    f"Features cannot be kept in {path.parent} ({reason_of(error)}); they stay in memory, and another "
                    "call makes them again. --cache names another folder, or off."
                )
            return False
        _prune(path)
        return True


def open_cache(setting: str) -> FeatureCache:
    """The cache that `--cache` names: auto (in the user's cache folder), off, or a folder."""
    if setting == "off":
        return FeatureCache(None)
    try:
        return FeatureCache(user_cache() / "features" if setting == "auto" else Path(setting).expanduser().resolve())
    except (RuntimeError, OSError) as error:  # a user without a home, as in containers
        say(f"There is no folder for features ({error}); they stay in memory. --cache names one.")
        return FeatureCache(None)


def _header(key: Entry, features: np.ndarray) -> bytes:
    described = {"format": FORMAT, "key": key, "shape": list(features.shape), "crc32": _crc32(features)}
    return json.dumps(described, sort_keys=True).encode() + b"\n"


def _crc32(features: np.ndarray) -> int:
    return zlib.crc32(_bytes_of(np.ascontiguousarray(features, "<f4")))


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.data.cast("B") if array.size else memoryview(b"")


def _read(path: Path, key: Entry, shape: tuple[int, int]) -> np.ndarray | None:
    """The features in a file; None where key, shape or checksum are not the expected ones."""
    num_bytes = 4 * shape[0] * shape[1]
    try:
        with open_regular(path) as file:
            header = file.readline(MAX_HEADER)
            if os.fstat(file.fileno()).st_size != len(header) + num_bytes:
                return None
            described: Any = json.loads(header)
            features = np.empty(shape, "<f4")
            if num_bytes and file.readinto(_bytes_of(features)) != num_bytes:
                return None
        expected = {"format": FORMAT, "key": key, "shape": list(shape), "crc32": _crc32(features)}
        if described != json.loads(json.dumps(expected)) or not np.isfinite(features).all():
            return None
    except (OSError, UserError, ValueError, RecursionError):
        return None
    with suppress(OSError):  # of a folder that one may only read
        os.utime(path)  # used now: the last to go
    return features.astype(np.float32, copy=False)


def _prune(newest: Path) -> None:
    """Remove the files that were not used for longest, all but the newest, until the rest is small enough.

    Also what killed processes were writing, and arrays that earlier versions kept as .npy.
    """
    with suppress(OSError):
        sweep(newest.parent)
    sizes = {}
    with suppress(OSError):
        for entry in os.scandir(newest.parent):
            if entry.name.endswith((SUFFIX, ".npy")):
                with suppress(OSError):  # removed by another process
                    sizes[Path(entry.path)] = entry.stat().st_mtime, entry.stat().st_size
    total = 0
    for path in sorted(sizes, key=lambda path: sizes[path][0], reverse=True):
        total += sizes[path][1]
        if total > MAX_BYTES and path != newest:
            with suppress(OSError):
                path.unlink()
