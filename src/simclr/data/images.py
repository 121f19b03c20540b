"""`Images`: the `Source` of n images with keys, sizes and labels, read batch by batch as uint8 pixels.

Where the pixels are (one array, a list in memory, a pack, files that are decoded again) is known to `store` alone, so
that everything above sees one kind of data.

Shapes: n images, B of them in a batch, H x W pixels, C = 1 (gray) or 3 (RGB) channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Literal, Protocol

import numpy as np

from simclr.data.fingerprint import digest_of_array, digest_of_arrays, fingerprint_of
from simclr.data.source import Kind, Skipped, some
from simclr.errors import UserError

Split = Literal["train", "test", "all"]
Channels = Literal["auto", "1", "3"]
Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class Store(Protocol):
    """Where pixels come from: rows of a store are what `Images.rows` holds."""

    @property
    def damaged(self) -> Mapping[int, str]:
        """Rows that were found to be undecodable so far, and why."""
        ...

    def __call__(self, rows: np.ndarray) -> np.ndarray | Sequence[np.ndarray | None]:
        """One fresh (B, H, W, 1 or 3) uint8 array, or the store's own (H, W, 1 or 3) arrays, None for a damaged one."""
        ...

    def prepare(self) -> list[str]:
        """As `Images.prepare`."""
        ...

    def check(self, rows: np.ndarray, progress: Progress | None = None) -> Mapping[int, str]:
        """Decode all of `rows`; those that cannot be decoded, and why."""
        ...

    def contents_of(self, rows: np.ndarray) -> str:
        """Digest of the contents of some rows."""
        ...

    def tell_replaced(self, row: int) -> None:
        """Say, the first time, that another image is read in the place of a damaged one."""
        ...


class MemoryStore:
    """Pixels in memory: (n, H, W, 1 or 3) uint8, or n arrays (H, W, 1 or 3)."""

    def __init__(self, pixels: np.ndarray | Sequence[np.ndarray]) -> None:
        self.damaged: dict[int, str] = {}
        self._pixels = pixels

    def __call__(self, rows: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """As in `Store`; contiguous also where the pixels are a transposed view (STL-10)."""
        if isinstance(self._pixels, np.ndarray):
            return np.ascontiguousarray(self._pixels[rows])
        return [self._pixels[row] for row in rows]

    def prepare(self) -> list[str]:
        """Nothing is to be done."""
        return []

    def check(self, rows: np.ndarray, progress: Progress | None = None) -> Mapping[int, str]:
        """Nothing can be damaged."""
        return {}

    def contents_of(self, rows: np.ndarray) -> str:
        """Digest of the pixels."""
        return digest_of_arrays(self._pixels[row] for row in rows)

    def tell_replaced(self, row: int) -> None:
        """Never called."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Images that are images by their headers, and are decoded when they are read. Made by `simclr.data.open_data`."""

    name: str
    split: Split
    """The part that this is; "all" where the data brings no split of its own."""
    has_own_split: bool
    """Whether the data brings a train and a test part (then `open_data(..., split="test")` works)."""
    channels: int
    """1 or 3: what `read` returns."""
    keys: Sequence[str]
    """Relative POSIX paths for folders, else the index in the data set as text."""
    sizes: np.ndarray
    """(n, 2) int64: height and width of each image."""
    labels: np.ndarray | None
    """(n,) int64, -1 for an image without a label; None where no image has one."""
    classes: list[str] | None
    """Names that the labels, or the columns of `targets`, index; None where there are none (.npz labels with gaps)."""
    contents: str
    """SHA-256 of what the pixels come from, in the order of the images: the files' bytes, or the array."""
    store: Store = field(repr=False)
    rows: np.ndarray = field(repr=False)
    """(n,) row in the store of each image."""
    targets: np.ndarray | None = None
    """(n, K) int8 where an image may show several of K classes, and `labels` is None: 1 it does, 0 it does not, -1 too
    hard to tell, which counts neither way."""
    skipped: list[Skipped] = field(default_factory=list)
    """Files that are left out."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the user: what was left out, what was converted."""

    @property
    def kind(self) -> Kind:
        """Modality of the items."""
        return "image"

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Images({self.name!r}, {len(self):,} images, split={self.split!r}, channels={self.channels})"

    def read(self, indices: np.ndarray | Sequence[int], *, copy: bool = True) -> np.ndarray | list[np.ndarray]:
        """Pixels of some images, in the order asked for.

        In the place of an image that cannot be decoded, the next one that can be is read, counted on from it and from
        the last to the first: a function of its index and of the files' contents alone. `items_read` says which.

        Args:
            copy: Whether the arrays are the caller's to change. Without a copy those of a pack or of separate images
                in memory are only to be read; they stay valid for as long as anyone holds them.

        Returns:
            (B, H, W, C) uint8 where all images of the data have one size, else a list of B (H, W, C) uint8 arrays.
            Without a copy it may be a list even where they have one size.

        Raises:
            UserError: A file has changed or gone since it was opened, or no image can be decoded.
        """
        indices = np.asarray(indices, dtype=np.intp if len(indices) == 0 else None)
        pixels = self.store(self.rows[indices])
        if isinstance(pixels, np.ndarray):
            return with_channels(pixels, self.channels)
        images = [
            with_channels(self._next_readable(int(i)) if image is None else image, self.channels)
            for i, image in zip(indices, pixels, strict=True)
        ]
        if not copy:
            return images
        if not self._one_size:
            return [image.copy() for image in images]
        return np.stack(images) if images else np.empty((0, *self.sizes[0], self.channels), np.uint8)

    def items_read(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """(B,) which images `read(indices)` has returned: `indices` but for those that cannot be decoded.

        Labels and keys of what was read are those of these images. Known once they were read or checked.
        """
        indices = np.array(indices, np.int64) % max(1, len(self))
        if self.store.damaged:
            for position, i in enumerate(indices):
                following = (np.arange(len(self)) + i) % len(self) if int(self.rows[i]) in self.store.damaged else [i]
                indices[position] = next((j for j in following if int(self.rows[j]) not in self.store.damaged), i)
        return indices

    def label_names(self, labels: Iterable[int]) -> list[str]:
        """What labels are called; a label without a name is its number."""
        return [str(label) if self.classes is None else self.classes[label] for label in labels]

    @property
    def replaced(self) -> list[Skipped]:
        """Images that could not be decoded so far, and were replaced where they were asked for."""
        damaged = self.store.damaged
        rows = enumerate(self.rows.tolist()) if damaged else ()
        return [Skipped(self.keys[i], damaged[row]) for i, row in rows if row in damaged]

    def prepare(self) -> list[str]:
        """Complete the pack, where one is wanted; sentences for the user. Reading does it too, at the first time."""
        return self.store.prepare()

    def check(self, progress: Progress | None = None) -> list[Skipped]:
        """Decode all images; those that cannot be decoded.

        Args:
            progress: Called with (done, total) of the images that were not decoded before.
        """
        return list(self._damaged(progress).values())

    def readable(self, progress: Progress | None = None) -> "Images":
        """The images that can be decoded, which all are now, for work that may see no image in another's place.

        Raises:
            UserError: None can be decoded.
        """
        damaged = self._damaged(progress)
        if not damaged:
            return self
        items = list(damaged.values())
        if len(damaged) == len(self):
            raise UserError(_none_readable(self.name, len(self), items[0]))
        named = some([f"{item.key} ({item.reason})" for item in items], max_named=10)
        left = self.subset(np.delete(np.arange(len(self)), list(damaged)))
        return replace(
            left,
            contents=self.store.contents_of(left.rows),
            skipped=sorted([*self.skipped, *items]),
            notes=[*self.notes, f"{len(items):,} of {len(self):,} images are damaged and left out: {named}."],
        )

    def read_readable(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | list[np.ndarray], list[Skipped]]:
        """Those of `indices` that can be decoded, their pixels (only to be read), and the others."""
        pixels = self.store(self.rows[indices])
        if isinstance(pixels, np.ndarray):
            return indices, with_channels(pixels, self.channels), []
        good = [k for k, image in enumerate(pixels) if image is not None]
        images = [with_channels(image, self.channels) for image in pixels if image is not None]
        damaged = self.store.damaged
        bad = [
            Skipped(self.keys[int(i)], damaged[int(self.rows[i])])
            for i, image in zip(indices, pixels, strict=True)
            if image is None
        ]
        return indices[good], images, bad

    def subset(self, indices: np.ndarray | Sequence[int]) -> "Images":
        """The images at `indices` (integers or a mask), in that order, as data of their own."""
        chosen = np.arange(len(self))[np.asarray(indices, dtype=np.intp if len(indices) == 0 else None)]
        return replace(
            self,
            keys=[self.keys[i] for i in chosen],
            sizes=self.sizes[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            targets=None if self.targets is None else self.targets[chosen],
            rows=self.rows[chosen],
            contents=sha256(self.contents.encode() + chosen.astype("<i8").tobytes()).hexdigest(),
        )

    def joined(self, other: "Images") -> "Images":
        """These images, then those of `other`: another part of the same data."""
        assert self.store is other.store and self.channels == other.channels, "parts of the same opened data"
        return replace(
            self,
            keys=[*self.keys, *other.keys],
            sizes=np.concatenate([self.sizes, other.sizes]),
            labels=_joined(self.labels, other.labels),
            targets=_joined(self.targets, other.targets),
            rows=np.concatenate([self.rows, other.rows]),
            contents=sha256(f"{self.contents} {other.contents}".encode()).hexdigest(),
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the contents, the same on every machine: of all that a result can depend on.

        Computed from the fields as they are, so that images whose labels or channels were replaced are other data.
        """
        return fingerprint_of(
            self.contents, self.keys, self.sizes, [self.labels, self.targets], self.classes, self.channels
        )

    def _damaged(self, progress: Progress | None) -> dict[int, Skipped]:
        """By index, the images that cannot be decoded."""
        reasons = self.store.check(self.rows, progress)
        rows = enumerate(self.rows.tolist()) if reasons else ()
        return {i: Skipped(self.keys[i], reasons[row]) for i, row in rows if row in reasons}

    def _next_readable(self, index: int) -> np.ndarray:
        self.store.tell_replaced(int(self.rows[index]))
        for step in range(1, len(self)):
            (pixels,) = self.store(self.rows[[(index + step) % len(self)]])
            if pixels is not None:
                return pixels
        reason = self.store.damaged[int(self.rows[index])]
        raise UserError(_none_readable(self.name, len(self), Skipped(self.keys[index], reason)))

    @cached_property
    def _one_size(self) -> bool:
        return len(self) > 0 and bool((self.sizes == self.sizes[0]).all())


def array_images(
    pixels: np.ndarray,
    labels: np.ndarray | None,
    *,
    name: str,
    split: Split,
    has_own_split: bool,
    classes: list[str] | None,
    channels: Channels,
    notes: Sequence[str] = (),
) -> Images:
    """`Images` over one array of pixels, (n, H, W) or (n, H, W, 1 or 3) uint8; their keys are their positions."""
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels  # (n, H, W, 1 or 3)
    labels = None if labels is None else labels.astype(np.int64)
    num_channels, said = choose_channels(channels, np.full(len(pixels), pixels.shape[-1] == 1))
    return Images(
        name=name,
        split=split,
        has_own_split=has_own_split,
        channels=num_channels,
        keys=[str(i) for i in range(len(pixels))],
        sizes=np.tile(np.array(pixels.shape[1:3], dtype=np.int64), (len(pixels), 1)),
        labels=labels,
        classes=classes,
        contents=digest_of_array(pixels),
        store=MemoryStore(pixels),
        rows=np.arange(len(pixels)),
        notes=[*notes, *said],
    )


def choose_channels(channels: Channels, gray: np.ndarray) -> tuple[int, list[str]]:
    """Number of channels of the data, and notes for the user.

    Args:
        channels: "auto" is 1 where every image is gray, else 3; "1" and "3" convert what is different.
        gray: (n,) whether each image is gray.
    """
    num_gray, num_images = int(gray.sum()), len(gray)
    if channels == "auto":
        channels = "1" if num_gray == num_images else "3"
        if channels == "1":
            return 1, ["Gray images: one channel."]
    if channels == "1" and num_gray < num_images:
        return 1, [f"{num_images - num_gray:,} of {num_images:,} images are colour and converted to gray."]
    if channels == "3" and num_gray:
        return 3, [f"{num_gray:,} of {num_images:,} images are gray and become three equal channels."]
    return int(channels), []


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(..., 1 or 3) uint8 pixels as (..., channels); gray is ITU-R 601-2 luma, just as Pillow's mode L."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    luma = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)  # 16-bit fixed point
    return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]


def fit_channels(images: Images, channels: int, *, who: str = "The encoder") -> Images:
    """Gray images as colour ones for an encoder of colour, which loses nothing; the reverse is refused.

    Raises:
        UserError: Colour images for an encoder of gray ones.
    """
    require_no_colour(images.channels, channels, images.name, who=who)
    return replace(images, channels=channels)


def require_no_colour(channels: int, expected: int, what: str, *, who: str = "The encoder") -> None:
    """Reject colour images for an encoder of gray ones."""
    if channels > expected:
        raise UserError(
            f"{who} expects {expected}-channel images and {what} is in colour; give it gray images (Pillow's "
            'convert("L")), or an encoder that was pretrained with --channels 3.'
        )


def part_of(split: Split, has_own_split: bool, name: str) -> Split:
    """The part to open where `split` is asked for: all of the data where it brings no split of its own."""
    if has_own_split:
        return split
    if split == "test":
        raise UserError(
            f"{name} has no test part of its own: open it whole and split it, or give a folder with train/ "
            "and test/, or an .npz file with x_train and x_test."
        )
    return "all"


def _joined(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def _none_readable(name: str, count: int, first: Skipped) -> str:
    return f"None of the {count:,} images of {name} can be decoded, the first is {first.key} ({first.reason})."
