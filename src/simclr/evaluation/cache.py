"""Features are made once: kept on disk under a hash of encoder, images and preprocessing.

A file holds one array in NumPy's own format and appears whole or not at all; one that cannot be read is made again. The
oldest go when all together grow beyond `MOST_BYTES`.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

from simclr.data.place import user_cache
from simclr.distributed import World
from simclr.errors import UserError
from simclr.files import write_atomically

MOST_BYTES = 20 << 30


@dataclass(frozen=True)
class FeatureCache:
    """A folder of arrays. `FeatureCache(None)` keeps them as long as it lives, in memory."""

    folder: Path | None
    _memory: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def get(self, key: str, make: Callable[[], np.ndarray], world: World) -> np.ndarray:
        """The array kept under `key`, else what `make` gives, which is kept from now on.

        Args:
            key: Everything that the array depends on, as text.
            make: Called by every process, or by none.
            world: The processes that call, of which the main one keeps the array.

        Raises:
            UserError: The folder cannot be written.
        """
        if self.folder is None:
            if key not in self._memory:
                self._memory[key] = make()
            return self._memory[key]
        path = self.folder / f"{sha256(key.encode()).hexdigest()}.npy"
        found = _read(path)
        if world.any_rank(found is None):
            found = make()
            if world.is_main:
                self._keep(path, found)
        assert found is not None
        return found

    def _keep(self, path: Path, array: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
            _prune(path)
        except OSError as error:
            raise UserError(
                f"Features cannot be kept in {path.parent} ({error.strerror}); give --cache another folder, or off."
            ) from None


def cache_of(setting: str) -> FeatureCache:
    """The cache that a user asks for: auto (in the user's cache folder), off, or a folder."""
    if setting == "off":
        return FeatureCache(None)
    return FeatureCache(user_cache() / "features" if setting == "auto" else Path(setting).expanduser().resolve())


def _read(path: Path) -> np.ndarray | None:
    try:
        array = np.load(path, allow_pickle=False)
        os.utime(path)  # used now: the last to go
    except (OSError, ValueError, EOFError):
        return None
    return array


def _prune(newest: Path) -> None:
    """Remove the arrays that were not used for longest, all but the newest, until the rest is small enough."""
    files = sorted(newest.parent.glob("*.npy"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > MOST_BYTES and path != newest:
            path.unlink(missing_ok=True)
