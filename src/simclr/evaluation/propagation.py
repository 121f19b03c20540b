"""Label propagation over the nearest-neighbour graph of features: labels for images that have none.

Zhou et al. 2004 ("Learning with local and global consistency") as in Iscen et al. 2019 (arXiv:1904.04717, sections 3.2
and 3.4): A has the cosines of each image's nearest neighbours to the power gamma, W = A + A^T, S = D^-1/2 W D^-1/2,
and the columns of Z solve (I - alpha S) Z = Y by conjugate gradients. The label of an image is the largest entry of its
row of Z, and its certainty is 1 - entropy / log K of the row scaled to sum 1 (equation 11). Y has 1 / (labels of the
class) for a labelled image, as in the authors' code (ahmetius/LP-DeepSSL, lp/db_semisuper.py). Different here: features
are standardised before they are unit rows, and k is 10 where the paper takes 50 (docs/few-labels.md).

Shapes: n images, F features, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import cg

from simclr.evaluation.knn import nearest, standardised_unit

PROPAGATION_VERSION = 1
"""Raise it when the same features and labels give other labels or certainties by more than rounding."""
NEIGHBOURS = 10
GAMMA = 3
ALPHA = 0.99
TOLERANCE, MAX_ITERATIONS = 1e-6, 100  # of conjugate gradients; the authors' code makes 20


@dataclass(frozen=True)
class Propagated:
    """What the graph says of each image."""

    classes: np.ndarray
    """(K,) the labels that occur, ascending."""
    probabilities: np.ndarray
    """(n, K) rows of Z, each scaled to sum 1; equal shares for an image that no label reaches."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) the most probable label of each image."""
        return self.classes[self.probabilities.argmax(1)]

    @property
    def certainty(self) -> np.ndarray:
        """(n,) from 0 (all classes equally probable) to 1."""
        return certainty(self.probabilities)


def propagation_settings() -> dict[str, Any]:
    """The constants that decide what is propagated, as JSON can hold them."""
    return {"neighbours": NEIGHBOURS, "gamma": GAMMA, "alpha": ALPHA, "tolerance": [TOLERANCE, MAX_ITERATIONS]}


def certainty(probabilities: np.ndarray) -> np.ndarray:
    """1 - entropy / log K of each row (n, K) that sums to 1; K is 2 or more."""
    entropy = -np.where(probabilities > 0, probabilities * np.log(np.maximum(probabilities, 1e-300)), 0).sum(1)
    return 1 - entropy / np.log(probabilities.shape[1])


def propagate(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Propagated:
    """Propagate labels from some images to all.

    Args:
        features: (n, F), finite; n is 2 or more.
        labels: (n,) integers, -1 for an image without a label; two classes at least.
        device: Where neighbours are looked for.
        progress: Called with (done, total) images while they are.
    """
    graph = _normalised_graph(features, device, progress)  # (n, n)
    classes = np.unique(labels[labels >= 0])
    system = sparse.identity(len(labels), format="csr") - ALPHA * graph
    columns = []
    for label in classes:
        seeds = (labels == label).astype(np.float64)
        solution, _ = cg(system, seeds / seeds.sum(), rtol=TOLERANCE, maxiter=MAX_ITERATIONS)
        columns.append(np.maximum(solution, 0))  # below zero by rounding alone
    scores = np.stack(columns, axis=1)  # (n, K)
    sums = scores.sum(1, keepdims=True)
    unreached = np.full_like(scores, 1 / len(classes))
    return Propagated(classes, np.divide(scores, sums, out=unreached, where=sums > 0))


def _normalised_graph(
    features: np.ndarray, device: torch.device | str, progress: Callable[[int, int], None] | None
) -> sparse.csr_matrix:
    """S (n, n): symmetric, at least 2 x NEIGHBOURS numbers for each image; zero rows for one without neighbours."""
    n, unit = len(features), standardised_unit(features)
    k = min(NEIGHBOURS, n - 1)
    values, columns = np.empty((n, k)), np.empty((n, k), np.int64)
    for begin, cosine, rows in nearest(unit, unit, k, leave_one_out=True, device=device, progress=progress):
        values[begin : begin + len(rows)] = cosine.clamp(min=0).cpu().double().numpy() ** GAMMA
        columns[begin : begin + len(rows)] = rows.cpu().numpy()
    directed = sparse.csr_matrix((values.ravel(), columns.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    weights = directed + directed.T
    degrees = np.asarray(weights.sum(1)).ravel()
    scale = sparse.diags(np.divide(1, np.sqrt(degrees), out=np.zeros(n), where=degrees > 0))
    return (scale @ weights @ scale).tocsr()
