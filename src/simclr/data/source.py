"""`Source`: what training, evaluation and embedding need of a data set, whatever its modality or format."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np

Kind = Literal["image", "audio"]


class Skipped(NamedTuple):
    """A file that cannot be used, and why."""

    key: str
    reason: str


class Source(Protocol):
    """n items, opened: all that is known of them without decoding any.

    Opening is cheap and lazy: it lists, reads headers and takes identity by content. Whoever holds a source asks
    neither which format its items have nor where they are. What `len`, `keys`, `labels` and `fingerprint` say depends
    on the contents alone, never on what was decoded before: an item that cannot be decoded stays, and is replaced when
    it is read.
    """

    @property
    def kind(self) -> Kind:
        """Modality of the items."""
        ...

    @property
    def name(self) -> str:
        """Name of the data set, for messages and records."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """N names of the items, unique and the same on every machine."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64 indices into `classes`, -1 for an item without a label; None where no item has one."""
        ...

    @property
    def classes(self) -> list[str] | None:
        """Class names; None where there are none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of all that a result can depend on: contents, keys, labels, classes, conversions."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray | Sequence[int], *, copy: bool = True) -> Any:
        """Decoded items in the order of `indices`: an array with one row per item, or a list of arrays.

        In the place of an item that cannot be decoded, the next one that can be is read, counted on from it and from
        the last to the first. Reading is a pure function of the indices and the contents.

        Args:
            copy: Whether the arrays are the caller's to change; without a copy they are only to be read.
        """
        ...

    def items_read(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """(B,) which items `read(indices)` has returned: `indices`, but for replaced ones. Labels go with these."""
        ...

    @property
    def replaced(self) -> list[Skipped]:
        """Items that could not be decoded so far."""
        ...

    def prepare(self) -> list[str]:
        """Decode ahead what is kept decoded on the disk, where that is wanted; sentences for the user."""
        ...

    def check(self, progress: Callable[[int, int], None] | None = None) -> list[Skipped]:
        """Decode all items; those that cannot be decoded.

        Args:
            progress: Called with (done, total).
        """
        ...

    def readable(self, progress: Callable[[int, int], None] | None = None) -> Self:
        """The items that can be decoded, for work that may see none in another's place, such as an evaluation."""
        ...

    def subset(self, indices: np.ndarray | Sequence[int]) -> Self:
        """The items at `indices` (integers or a mask), in that order, as a source of their own."""
        ...


def some(names: list[str], max_named: int = 5) -> str:
    """The first few names for a sentence, unprintable characters escaped, and how many more there are."""
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:max_named])
    return shown if len(names) <= max_named else f"{shown} and {len(names) - max_named:,} more"
