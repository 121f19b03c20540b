"""Weighted cosine k-nearest-neighbour classification (Wu et al. 2018, arXiv:1805.01978, section 3.4), exact.

Each of the k nearest rows votes for its class with weight exp(cosine / temperature).

Shapes: n labelled rows, m queries, c of them in a chunk, F features, K classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from simclr.errors import UserError
from simclr.models.inference import require_finite

KNN_VERSION = 1
"""Raise it when the same features, labels, k and temperature give other votes."""
KNN_K = 20
KNN_TEMPERATURE = 0.07  # Wu et al. 2018, section 3.4
CHUNK = 256  # rows classified at a time; memory grows with CHUNK x n


@dataclass(frozen=True)
class Votes:
    """Scores of the classes for each query."""

    classes: np.ndarray
    """(K,) the labels that occur, ascending."""
    scores: np.ndarray
    """(m, K) float64 share of the weight that went to each class."""
    k: int
    """Neighbours that voted: at most the number of labelled rows."""

    @property
    def predicted(self) -> np.ndarray:
        """(m,) the label with the highest score; ties go to the smaller label."""
        return self.classes[self.scores.argmax(1)]


def knn(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
    leave_one_out: bool = False,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """(m,) labels predicted by the neighbours' votes; arguments and errors as for `knn_votes`."""
    return knn_votes(
        train, labels, test, k=k, temperature=temperature, leave_one_out=leave_one_out, device=device
    ).predicted


def knn_votes(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
    leave_one_out: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Votes:
    """Votes of each test row's k nearest training rows.

    Args:
        train: (n, F) features of the labelled rows.
        labels: (n,) integers, of any values.
        test: (m, F) features of the queries.
        k: Number of neighbours; with fewer rows all of them vote (`Votes.k`).
        leave_one_out: `test` is `train`, row by row, and no row votes for itself (its duplicates do).
        device: Where the similarities are computed, in float32, or in float64 if the features are.
        progress: Called with (done, total) test rows.

    Raises:
        UserError: Not a label for each row, NaN or infinite features, no row left to vote, or k or temperature not
            positive.
    """
    if len(labels) != len(train) or (leave_one_out and len(test) != len(train)):
        raise UserError(
            f"kNN was given {len(train)} training rows, {len(labels)} labels and {len(test)} test rows; each training "
            "row needs a label, and with leave_one_out the test rows are the training rows."
        )
    require_finite(train, "training")
    if not leave_one_out:
        require_finite(test, "test")
    k = _possible_k(k, temperature, len(train) - leave_one_out)
    classes, targets = np.unique(labels, return_inverse=True)
    votes_for = torch.from_numpy(targets).to(device)
    scores = np.empty((len(test), len(classes)))
    for begin, cosine, rows in nearest(train, test, k, leave_one_out=leave_one_out, device=device, progress=progress):
        scores[begin : begin + CHUNK] = _shares(cosine, votes_for[rows], temperature, len(classes)).cpu().numpy()
    return Votes(classes, scores, k)


def nearest(
    bank: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    leave_one_out: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The k rows of a bank that are nearest to each query by cosine, exactly, chunk by chunk.

    Args:
        bank: (n, F) finite features, n at least k.
        queries: (m, F) finite features.
        k: Number of rows, without the query's own.
        leave_one_out: `queries` is `bank`, row by row, and no row is its own neighbour.
        device: Where the similarities are computed, in float32, or in float64 if the features are.
        progress: Called with (done, total) queries.

    Yields:
        First query of a chunk, cosines (c, k) from the highest, and rows of the bank (c, k).
    """
    precision = torch.float64 if np.result_type(bank, queries) == np.float64 else torch.float32

    def unit_rows(features: np.ndarray) -> Tensor:
        return normalize(torch.tensor(np.ascontiguousarray(features), dtype=precision, device=device), dim=1)

    columns = unit_rows(bank).T  # (F, n)
    for begin in range(0, len(queries), CHUNK):
        cosine = unit_rows(queries[begin : begin + CHUNK]) @ columns  # (c, n)
        if leave_one_out:
            cosine.diagonal(begin).fill_(-torch.inf)
        yield begin, *cosine.topk(k, dim=1)
        if progress is not None:
            progress(min(begin + CHUNK, len(queries)), len(queries))


def standardised_unit(features: np.ndarray) -> np.ndarray:
    """(n, F) float32 rows of length 1, after each feature was given mean 0 and variance 1; constant ones are 0."""
    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    rows = ((features - mean) / np.where(deviation > 1e-6, deviation, np.inf)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


def _shares(cosine: Tensor, votes_for: Tensor, temperature: float, num_classes: int) -> Tensor:
    """(c, K) share of each class in the weight of the neighbours (c, k)."""
    cosine = cosine.double()
    weights = ((cosine - cosine[:, :1]) / temperature).exp()  # (c, k) relative to the nearest: cannot overflow
    votes = weights.new_zeros(len(cosine), num_classes).scatter_add_(1, votes_for, weights)
    return votes / weights.sum(1, keepdim=True)


def _possible_k(k: int, temperature: float, rows: int) -> int:
    if k < 1 or temperature <= 0:
        raise UserError(f"kNN with k {k} and temperature {temperature} is not defined; both must be positive.")
    if rows < 1:
        raise UserError("kNN has no labelled row that could vote; give more labelled images.")
    return min(k, rows)
