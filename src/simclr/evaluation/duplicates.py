"""Images that a data set has twice, or in both of its parts: copies across parts make every accuracy too high.

They are detected from pixels alone, whatever the encoder:

    1. Identical pixels, by hash.
    2. Candidates: the rows whose sketch (8 x 8 cells) is nearest to the query's after the best small shift and
       stretch, in first order: tangent distance (Simard, LeCun and Denker 1993). Exact, a matrix product in blocks.
    3. Verification: thumbnails of 32 x 32 pixels are laid over each other (Gauss-Newton over shift, stretch, gain and
       offset) and their fine structure compared, which images that are merely alike do not share.

Finds copies that were stored again as JPEG, resized, trimmed by up to a twentieth of a side, or made a little brighter
or darker; docs/lab-notes.md has the shares. Not mirrored, rotated or further cropped ones, and, of images below some 16
pixels a side, little but identical ones. Pairs that differ in less than JPEG changes (a face in another skin tone on a
picture full of other things) are reported too: the report says where to look, not what to delete.

Shapes: n rows to search in, m queries, C channels, S = 32 pixels, D = 64 cells, K candidates of a query, P pairs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.data.images import Images
from simclr.errors import UserError
from simclr.evaluation.registration import SIDE, SMOOTHING, blurred, gray_pixels, overlay, positions
from simclr.views import cpu
from simclr.views.resize import image_sizes

SKETCH = 8  # cells of a sketch's side
CANDIDATES = 8  # rows that are verified for each query
NEAREST_SKETCH = 0.6  # of 1: candidates below are not verified
SIMILARITY = {
    1: 0.992,
    3: 0.985,
}  # correlation of fine structure from which a pair is one image, by number of channels:
# JPEG keeps colour at half the resolution, and colour is more to differ in
SIMILARITY_RESIZED = 0.975  # where one image has fewer pixels than a thumbnail and than the other
GAIN = (0.6, 1.65)  # contrast of one copy against the other's
FLAT = 2 / 255  # standard deviation of a thumbnail below which there is no structure to compare
RESIZING_BLUR = 0.6  # of an image's pixel: what shrinking to it and enlarging again blurs
QUERY_BLOCK, ROW_BLOCK, PAIR_BLOCK = 256, 4096, 256


@dataclass(frozen=True)
class Pair:
    """A copy, and what it is a copy of."""

    original: str
    """Key of the image that is searched in: a training image."""
    copy: str
    """Key of the query: a test image, or a later image of the same set."""
    original_row: int
    copy_row: int
    similarity: float
    """1 for identical pixels; else the correlation of fine structure, after the two were laid over each other."""
    kind: Literal["identical", "near"]


@dataclass(frozen=True)
class Duplicates:
    """Copies of images of `searched` among `asked`, at most one pair for each image asked about; most alike first."""

    searched: str
    asked: str
    num_searched: int
    num_asked: int
    num_identical: int
    num_near: int
    num_flat: int
    """Images without any structure, of which only identical copies can be told."""
    pairs: list[Pair]

    @property
    def sentence(self) -> str:
        """The outcome, and what to do about it."""
        number = self.num_identical + self.num_near
        if self.searched == self.asked:
            what = f"{number:,} of {self.num_asked:,} images of {self.asked} are copies of others of them, or nearly"
        else:
            what = f"{number:,} of {self.num_asked:,} images of {self.asked} are in {self.searched} too, or nearly"
        if not number:
            return f"{what}."
        advice = "look at them" if self.searched == self.asked else "look at them: accuracy on a copy is memory"
        return f"{what} ({self.num_identical:,} identical, {self.num_near:,} near); {advice}."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "sentence": self.sentence}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Duplicates":
        """What `to_dict` wrote."""
        values: dict[str, Any] = {name: value for name, value in plain.items() if name != "sentence"}
        values["pairs"] = [Pair(**pair) for pair in plain["pairs"]]
        return cls(**values)


def find_duplicates(
    images: Images, test: Images | None = None, *, progress: Callable[[int, int], None] | None = None
) -> Duplicates:
    """Images of `test` that are copies of one of `images`, or, without `test`, copies within `images`.

    Memory: 3 kB a colour image, 1 kB a gray one, and some 50 MB. On a CPU.

    Args:
        images: To search in, such as the training part.
        test: Other images, with the same number of channels.
        progress: Called with (done, total) queries.

    Raises:
        UserError: The two have different channels.
    """
    if test is not None and test.channels != images.channels:
        raise UserError(
            f"{images.name} has {images.channels} channels and {test.name} {test.channels}: open both with --channels "
            f"{images.channels} to look for copies."
        )
    within = test is None
    searched = _read(images)
    queried = searched if test is None else _read(test)
    first: dict[bytes, int] = {}  # hash -> first row
    for row, digest in enumerate(searched.hashes):
        first.setdefault(digest, row)
    identical = [
        (row, first[digest])
        for row, digest in enumerate(queried.hashes)
        if digest in first and not (within and first[digest] == row)
    ]
    known = {row for row, _ in identical}
    distinct = np.array(sorted(first.values()), np.int64)  # (n,) one row for each distinct image
    flat = _are_flat(queried.thumbnails)
    queries = [row for row in range(len(queried.images)) if row not in known and not flat[row]]  # m of them
    near = _near_copies(searched, distinct, queried, np.array(queries, np.int64), within=within, progress=progress)

    names, asked_names = images.keys, queried.images.keys
    pairs = [Pair(names[o], asked_names[c], o, c, 1.0, "identical") for c, o in identical]
    pairs += [Pair(names[o], asked_names[c], o, c, round(value, 4), "near") for value, c, o in near]
    return Duplicates(
        searched=_part(images), asked=_part(queried.images), num_searched=len(images), num_asked=len(queried.images),
        num_identical=len(identical), num_near=len(near), num_flat=int(flat.sum()), pairs=pairs,
    )  # fmt: skip


class _Read(NamedTuple):
    """Images as they are compared."""

    images: Images
    thumbnails: Tensor
    """(n, C, S, S) uint8, stretched to a square without aliasing."""
    hashes: list[bytes]
    """SHA-256 of the pixels of each image."""


def _near_copies(
    searched: _Read,
    distinct: np.ndarray,
    queried: _Read,
    queries: np.ndarray,
    *,
    within: bool,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[float, int, int]]:
    """Similarity, row of the copy and row of the original of each copy that is not identical; most alike first.

    Args:
        distinct: (n,) rows to search in.
        queries: (m,) rows of the images asked about.
        within: Whether the two are the same images.
    """
    best: dict[int, tuple[float, int]] = {}  # copy -> similarity, original
    blocks = [_sketch(searched.thumbnails[rows]) for rows in _blocks(distinct, ROW_BLOCK)]
    sketches = torch.cat(blocks) if blocks else torch.empty(0, SKETCH**2)
    for done, rows in enumerate(_blocks(queries, QUERY_BLOCK)):
        count = CANDIDATES + within  # a query within the images finds itself too
        nearness, nearest = _nearest(queried.thumbnails[rows], sketches, count)
        candidates = distinct[nearest.numpy()]
        worth = (nearness >= NEAREST_SKETCH).numpy()
        if within:
            worth &= candidates != rows[:, None]
        query, original = np.broadcast_to(rows[:, None], candidates.shape)[worth], candidates[worth]  # (P,)
        sides = queried.images.sizes[query].min(1), searched.images.sizes[original].min(1)
        similarity = _verify(queried.thumbnails, query, searched.thumbnails, original, sides)
        for row, other, value in zip(query.tolist(), original.tolist(), similarity.tolist(), strict=True):
            copy, source = (max(row, other), min(row, other)) if within else (row, other)
            if value > 0 and value > best.get(copy, (0.0, 0))[0]:
                best[copy] = (value, source)
        if progress is not None:
            progress(min((done + 1) * QUERY_BLOCK, len(queries)), len(queries))
    return sorted(((value, copy, source) for copy, (value, source) in best.items()), reverse=True)


def _part(images: Images) -> str:
    return images.name if images.split == "all" else f"{images.name} ({images.split})"


def _blocks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def _read(images: Images, chunk: int = 1024) -> _Read:
    thumbnails = torch.empty(len(images), images.channels, SIDE, SIDE, dtype=torch.uint8)
    hashes = []
    for rows in _blocks(np.arange(len(images)), chunk):
        pixels = images.read(rows, copy=False)
        sizes = image_sizes(pixels)
        small = cpu.crop_resize(pixels, np.column_stack([np.zeros_like(sizes), sizes]), SIDE, "torchvision")
        thumbnails[torch.from_numpy(rows)] = small.mul_(255).round_().to(torch.uint8)
        hashes += [sha256(repr(image.shape).encode() + image.tobytes()).digest() for image in pixels]
    return _Read(images, thumbnails, hashes)


def _are_flat(thumbnails: Tensor) -> np.ndarray:
    """(n,) bool."""
    return np.concatenate(
        [np.zeros(0, bool)]
        + [(part.float() / 255).flatten(1).std(1).numpy() < FLAT for part in thumbnails.split(ROW_BLOCK)]
    )


def _sketch(thumbnails: Tensor) -> Tensor:
    """(n, C, S, S) -> (n, D): cells of the smoothed gray thumbnail, without mean, of unit length."""
    return _unit(_cells(blurred(gray_pixels(thumbnails), SMOOTHING)))


def _nearest(queries: Tensor, sketches: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest sketches to each query: nearness in [0, 1] and index, both (B, count).

    Nearness is the squared length of a sketch's projection on the space that the query and its four tangents span
    (shift and stretch along both sides), which absorbs a small misplacement.
    """
    gray = blurred(gray_pixels(queries), SMOOTHING)  # (B, S, S)
    along = positions()
    down, right = torch.gradient(gray, dim=(1, 2))
    spanning = [_unit(_cells(x)) for x in (gray, right, down, right * along, down * along[:, None])]
    basis = torch.linalg.qr(torch.stack(spanning, 2)).Q  # (B, D, 5)
    columns = basis.mT.reshape(-1, basis.shape[1])  # (B * 5, D)
    nearness, nearest = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for begin in range(0, len(sketches), ROW_BLOCK):
        block = sketches[begin : begin + ROW_BLOCK]
        near = (columns @ block.T).square_().view(len(queries), 5, -1).sum(1)  # (B, rows)
        values, rows = near.topk(min(count, len(block)), dim=1)
        nearness, nearest = torch.cat([nearness, values], 1), torch.cat([nearest, rows + begin], 1)
        nearness, order = nearness.topk(min(count, nearness.shape[1]), dim=1)
        nearest = nearest.gather(1, order)
    return nearness, nearest


def _verify(
    first: Tensor, first_rows: np.ndarray, second: Tensor, second_rows: np.ndarray, sides: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """(P,) similarity of each pair, 0 where they are not the same image.

    Args:
        sides: (P,) shorter sides of the images, in pixels: the finer thumbnail is blurred to the other's resolution.
    """
    pixel = np.stack([np.maximum(1.0, SIDE / side) for side in sides])  # (2, P) of the image, in those of the thumbnail
    blur = RESIZING_BLUR * np.sqrt(np.maximum(pixel.max(0) ** 2 - pixel**2, 0))  # (2, P)
    similarity = np.zeros(len(first_rows))
    for pairs in _blocks(np.arange(len(first_rows)), PAIR_BLOCK):
        a, b = first[first_rows[pairs]].float() / 255, second[second_rows[pairs]].float() / 255  # (P, C, S, S)
        for thumbnails, sigmas in ((a, blur[0, pairs]), (b, blur[1, pairs])):
            for sigma in np.unique(sigmas[sigmas > 0]):
                rows = torch.from_numpy(np.flatnonzero(sigmas == sigma))
                thumbnails[rows] = blurred(thumbnails[rows], float(sigma))
        alike, gain = overlay(a, b)
        threshold = np.where(blur[:, pairs].max(0) > 0, SIMILARITY_RESIZED, SIMILARITY[first.shape[1]])
        same = (alike.numpy() >= threshold) & (gain.numpy() >= GAIN[0]) & (gain.numpy() <= GAIN[1])
        similarity[pairs] = np.where(same, alike.numpy(), 0)
    return similarity


def _cells(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, SKETCH).flatten(1)


def _unit(x: Tensor) -> Tensor:
    x = x - x.mean(1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)
