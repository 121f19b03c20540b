"""Which images to label first: typical ones of different clusters, by features and without labels.

TypiClust (Hacohen, Dekel and Weinshall 2022, arXiv:2202.02794, algorithm 1): k-means into as many clusters as there
shall be labels, and from each cluster without a label, the largest first, the image whose 20 nearest neighbours in the
cluster are nearest. For few labels this beats random images, and choosing by a classifier's doubts does not.

Constants, the order of the clusters and the rule for small clusters are those of the authors' code (avihu111/TypiClust,
deep-al/pycls/al/typiclust.py). Different here: features are standardised and then unit rows, distances are those of
the paper and not their squares, and k-means has a seed. (Standardised or not was compared on held-out training images:
docs/few-labels.md.)

Shapes: n images, m of them selected, F features, K clusters.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from simclr.errors import UserError
from simclr.evaluation.knn import nearest, standardised_unit
from simclr.models.inference import require_finite

SELECTION_VERSION = 1
"""Raise it when the same features, labelled rows and seed give other images."""
MAX_CLUSTERS = 500
MIN_CLUSTER_SIZE = 5  # images; smaller and equal clusters come last: they are outliers
NEIGHBOURS = 20
"""Neighbours that make an image typical; in small clusters half of the cluster."""
EPSILON = 1e-5
"""Added to the mean distance, so that copies of one image have a finite typicality."""
MAX_WORK = 25_000_000
"""Images x clusters up to which k-means passes over all images in each iteration; beyond, over batches."""
BATCH_SIZE = 5_000


@dataclass(frozen=True)
class Selection:
    """Images in the order in which they are to be labelled."""

    rows: np.ndarray
    """(m,) int64 rows of the features."""
    clusters: np.ndarray
    """(m,) int64 cluster of each, from 0 to K - 1."""
    typicality: np.ndarray
    """(m,) inverse mean distance of these rows to the nearest neighbours in the cluster; the larger, the denser."""


def select_typical(features: np.ndarray, count: int, *, labelled: np.ndarray | None = None, seed: int = 0) -> Selection:
    """Select images to label.

    Args:
        features: (n, F).
        count: Number of images.
        labelled: Rows of images that have a label already: none of them is selected, and their clusters come later.
        seed: Of k-means.

    Raises:
        UserError: Fewer images without a label than `count`, or features that are not finite.
    """
    require_finite(features, "images'")
    known = np.unique(np.zeros(0, np.int64) if labelled is None else labelled)
    num_free = len(features) - len(known)
    if not 1 <= count <= num_free:
        raise UserError(f"{count:,} of {num_free:,} images without a label cannot be selected; give 1 to {num_free:,}.")
    unit = standardised_unit(features)
    assigned = _clusters(unit, min(len(known) + count, MAX_CLUSTERS), seed)  # (n,)
    free = np.ones(len(features), bool)
    free[known] = False
    queues: list[tuple[int, np.ndarray, np.ndarray]] = []
    for cluster in _in_order(assigned, known):
        members = np.flatnonzero(assigned == cluster)
        if not free[members].any():
            continue
        typicality = _typicality(unit[members])
        order = np.argsort(-typicality, kind="stable")
        order = order[free[members[order]]]
        queues.append((cluster, members[order], typicality[order]))
        if len(queues) == count:
            break
    return _in_turn(queues, count)


def _in_order(assigned: np.ndarray, labelled: np.ndarray) -> list[int]:
    """Clusters by labels that they have, and then by size, the largest first; tiny ones after all others."""
    sizes = np.bincount(assigned)  # (K,)
    labels = np.bincount(assigned[labelled], minlength=len(sizes))  # (K,)
    return np.lexsort((-sizes, labels, sizes <= MIN_CLUSTER_SIZE)).tolist()


def _in_turn(queues: list[tuple[int, np.ndarray, np.ndarray]], count: int) -> Selection:
    """The first of each queue, then the second of each, until there are `count`.

    Args:
        queues: Cluster, and its images without a label and their typicality, from the most typical.
    """
    turns = range(max(len(members) for _, members, _ in queues))
    chosen = [
        (members[turn], cluster, typicality[turn])
        for turn in turns
        for cluster, members, typicality in queues
        if turn < len(members)
    ][:count]
    rows, clusters, typicality = zip(*chosen, strict=True)
    return Selection(np.array(rows, np.int64), np.array(clusters, np.int64), np.array(typicality))


def _clusters(unit: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """(n,) cluster of each row; fewer clusters where fewer rows differ."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(unit) * num_clusters <= MAX_WORK:
        method = KMeans(num_clusters, n_init=1, random_state=seed % 2**32)
    else:
        method = MiniBatchKMeans(num_clusters, n_init=1, random_state=seed % 2**32, batch_size=BATCH_SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # rows that are copies
        return method.fit_predict(unit)


def _typicality(unit: np.ndarray) -> np.ndarray:
    """(c,) inverse mean distance of each of c unit rows to its nearest neighbours among them; 0 for a lone one."""
    k = min(NEIGHBOURS, len(unit) // 2)
    if k == 0:
        return np.zeros(len(unit))
    rows = unit.astype(np.float64)
    distances = [(2 - 2 * cosine).clamp(min=0).sqrt() for _, cosine, _ in nearest(rows, rows, k, leave_one_out=True)]
    return np.concatenate([1 / (each.mean(1).numpy() + EPSILON) for each in distances])
