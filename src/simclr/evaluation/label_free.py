"""Measures of features that need no labels: geometry, neighbours, clusters, and copies that spoil every accuracy.

    alignment, uniformity   Wang and Isola 2020 (arXiv:2005.10242), on unit rows; alpha = 2, t = 2
    effective rank          RankMe (arXiv:2210.02885), with the spectrum that it sums up
    nearest neighbours      by cosine
    clusters                k-means on unit rows; the images that fit theirs worst
    copies                  from pixels (`duplicates.py`)

reports/pictures.py draws the last three. Shapes: n images, F features, K clusters.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from simclr.data.images import Images
from simclr.errors import UserError
from simclr.evaluation.duplicates import Duplicates, find_duplicates
from simclr.losses.metrics import alignment, effective_rank, uniformity
from simclr.models.encoder import Encoder
from simclr.models.inference import device_of, inference, require_channels, require_finite
from simclr.random import shuffled
from simclr.views.policy import AugmentationPreset, Policy
from simclr.views.views import make_views

LABEL_FREE_VERSION = 1
"""Raise it when the same features and images give other values: measures, samples, views, clusters, copies."""
METRICS = ("alignment", "uniformity", "effective_rank", "silhouette")
"""Fields of `LabelFree` that are the metrics of its `Result`."""
VIEW_ROWS = 2_000  # images of which two views are compared
UNIFORMITY_ROWS = 5_000  # all their pairs, in double precision
RANK_ROWS = 10_000
SPECTRUM = 256  # largest singular values that are kept
QUERIES, NEIGHBOURS = 6, 7  # of the picture
SILHOUETTE_ROWS = 5_000  # its cost is their square
WORST = 24
CLUSTER_NEIGHBOURS = 10  # nearest rows whose clusters are compared
MAX_CLUSTERS = 50


@dataclass(frozen=True)
class Neighbours:
    """An image and those nearest to it."""

    query: str
    query_row: int
    nearest: list[str]
    nearest_rows: list[int]
    cosine: list[float]


@dataclass(frozen=True)
class Outlier:
    """An image that does not fit its cluster."""

    key: str
    row: int
    cluster: int
    silhouette: float
    """From -1 (as near as can be to another cluster) to 1 (all within its own)."""
    disagreement: float
    """Share of its nearest neighbours that lie in other clusters."""


@dataclass(frozen=True)
class LabelFree:
    """Measures of features; every sample is drawn with the seed, and its size stands beside the figure."""

    alignment: float | None
    """Mean squared distance of two views' unit features, 0 to 4; None where no views were given."""
    alignment_rows: int
    uniformity: float
    """Log of the mean of exp(-2 d^2) over pairs of unit features; 0 where all are one."""
    uniformity_rows: int
    effective_rank: float
    """1 to min(rows, F)."""
    rank_rows: int
    num_features: int
    spectrum: list[float]
    """Singular values over their sum, the largest first."""
    neighbours: list[Neighbours]
    num_clusters: int
    silhouette: float
    """Mean over the sample."""
    silhouette_rows: int
    outliers: list[Outlier]
    """The worst silhouettes, the worst first."""
    within: Duplicates | None
    """Copies within the images; None where they were not looked for."""
    across: Duplicates | None
    """Images of the test part that are copies of these."""
    seed: int

    @property
    def metrics(self) -> dict[str, float | None]:
        """The metrics of a `Result`."""
        return {name: getattr(self, name) for name in METRICS}

    @property
    def details(self) -> dict[str, Any]:
        """Everything else, as JSON can hold it."""
        copies = {"within": self.within, "across": self.across}
        plain = {name: value for name, value in asdict(self).items() if name not in METRICS}
        return plain | {name: None if part is None else part.to_dict() for name, part in copies.items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "LabelFree":
        """From metrics and details together, as JSON gives them."""
        plain: dict[str, Any] = dict(values)
        plain["neighbours"] = [Neighbours(**each) for each in values["neighbours"]]
        plain["outliers"] = [Outlier(**each) for each in values["outliers"]]
        for name in ("within", "across"):
            plain[name] = None if values[name] is None else Duplicates.from_dict(values[name])
        return cls(**plain)


def label_free(
    features: np.ndarray,
    images: Images,
    *,
    views: tuple[np.ndarray, np.ndarray] | None = None,
    test: Images | None = None,
    duplicates: bool = True,
    clusters: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> LabelFree:
    """All measures of features and images that need no labels.

    Args:
        features: (n, F), a row for each image.
        images: The n images; their labels are not read.
        views: (m, F) features of two views of each of m images, from `view_features`.
        test: Other images: which of them are copies?
        duplicates: Whether to look for copies; they depend on the images alone, so once is enough.
        clusters: K; None: the square root of n / 2, at most MAX_CLUSTERS.
        seed: Of the samples and of k-means.
        progress: Called with what is being done.

    Raises:
        UserError: Fewer than 4 images, features that are not finite or all zero, or more clusters than images.
    """
    assert len(features) == len(images)
    _check(features, clusters)
    chosen = _sample(len(features), UNIFORMITY_ROWS, seed)
    ranked = _sample(len(features), RANK_ROWS, seed)
    progress("uniformity and rank")
    spread = float(uniformity(_double(features[chosen])))
    rows = torch.from_numpy(features[ranked].astype(np.float32))
    singular = torch.linalg.svdvals(rows)  # (min(rows, F),)
    unit = _unit(features)
    progress("neighbours and clusters")
    k = clusters or int(np.clip(round((len(features) / 2) ** 0.5), 2, MAX_CLUSTERS))
    assigned, sampled, silhouettes = _cluster(unit, k, seed)
    return LabelFree(
        alignment=None if views is None else float(alignment(_double(views[0]), _double(views[1]))),
        alignment_rows=0 if views is None else len(views[0]),
        uniformity=spread,
        uniformity_rows=len(chosen),
        effective_rank=float(effective_rank(rows)),
        rank_rows=len(ranked),
        num_features=features.shape[1],
        spectrum=(singular / singular.sum())[:SPECTRUM].tolist(),
        neighbours=nearest_neighbours(features, images),
        num_clusters=len(np.unique(assigned)),
        silhouette=float(silhouettes.mean()),
        silhouette_rows=len(sampled),
        outliers=_outliers(unit, images, assigned, sampled, silhouettes),
        within=_copies("copies within", images, None, progress) if duplicates else None,
        across=_copies("copies across", images, test, progress) if duplicates and test is not None else None,
        seed=seed,
    )


def nearest_neighbours(features: np.ndarray, images: Images) -> list[Neighbours]:
    """The images nearest by cosine to QUERIES of them, evenly spaced."""
    unit = _unit(features)
    queries = np.linspace(0, len(unit) - 1, min(QUERIES, len(unit))).round().astype(int)
    cosine = unit[queries] @ unit.T  # (Q, n)
    cosine[np.arange(len(queries)), queries] = -np.inf
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(unit) - 1)]
    return [
        Neighbours(
            images.keys[q],
            int(q),
            [images.keys[i] for i in rows],
            rows.tolist(),
            [round(float(c), 4) for c in row[rows]],
        )
        for q, rows, row in zip(queries, nearest, cosine, strict=True)
    ]


def view_features(
    encoder: Encoder,
    images: Images,
    *,
    policy: Policy | None = None,
    preset: AugmentationPreset = "google",
    seed: int = 0,
    rows: int = VIEW_ROWS,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Features of two views of each of at most `rows` images, drawn with the seed: positive pairs, (m, F) each.

    Args:
        policy: The run's, for the alignment that it was trained for; None: crop and flip alone, which is fair to all.
        preset: Whose crop, without a policy.
    """
    config = encoder.config
    require_channels(config.channels, images)
    if policy is None:
        make_policy = Policy.google if preset == "google" else Policy.torchvision
        policy = make_policy(config.size, channels=config.channels, jitter=0, gray=0, blur=0)
    device = device_of(encoder)
    chosen = _sample(len(images), rows, seed)
    first: list[np.ndarray] = []
    second: list[np.ndarray] = []
    with inference(encoder):
        for begin in range(0, len(chosen), batch_size):
            indices = chosen[begin : begin + batch_size]
            views = make_views(
                images.read(indices, copy=False), policy, seed=seed, epoch=0, indices=indices, device=device
            )
            for features, view in zip((first, second), views, strict=True):
                features.append(encoder(view).float().cpu().numpy())
    pairs = np.concatenate(first), np.concatenate(second)
    for features in pairs:
        require_finite(features, "views'")
    return pairs


def _check(features: np.ndarray, clusters: int | None) -> None:
    n = len(features)
    if n < 4:
        raise UserError(f"{n} images are too few for measures of how features are spread; give at least 4.")
    require_finite(features, "images'")
    if not features.any():
        raise UserError("All features are zero; the encoder is broken, train it again.")
    if clusters is not None and not 2 <= clusters < n:
        raise UserError(f"{clusters} clusters of {n:,} images are not possible; give 2 or more, and fewer than images.")


def _copies(what: str, images: Images, test: Images | None, progress: Callable[[str], None]) -> Duplicates:
    progress(what)
    return find_duplicates(images, test)


def _cluster(unit: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) cluster of each row; the rows of the sample, and their silhouettes by cosine distance within it."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import silhouette_samples

    assigned = MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=2048).fit_predict(unit)
    sampled = _sample(len(unit), SILHOUETTE_ROWS, seed)
    num_clusters = len(np.unique(assigned[sampled]))
    if not 2 <= num_clusters < len(sampled):  # all rows alike, or none like another: no silhouette is defined
        return assigned, sampled, np.zeros(len(sampled))
    return assigned, sampled, silhouette_samples(unit[sampled], assigned[sampled], metric="cosine")


def _outliers(
    unit: np.ndarray, images: Images, assigned: np.ndarray, sampled: np.ndarray, silhouettes: np.ndarray
) -> list[Outlier]:
    order = np.argsort(silhouettes, kind="stable")[:WORST]
    rows = sampled[order]
    cosine = unit[rows] @ unit.T  # (W, n)
    cosine[np.arange(len(rows)), rows] = -np.inf
    count = min(CLUSTER_NEIGHBOURS, len(unit) - 1)
    nearest = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
    disagree = (assigned[nearest] != assigned[rows][:, None]).mean(1)
    return [
        Outlier(images.keys[row], int(row), int(assigned[row]), round(float(s), 4), float(d))
        for row, s, d in zip(rows, silhouettes[order], disagree, strict=True)
    ]


def _double(features: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(features.astype(np.float64))


def _sample(n: int, at_most: int, seed: int) -> np.ndarray:
    """Sorted rows drawn with the seed; all rows where there are no more than `at_most`."""
    return np.arange(n) if n <= at_most else np.sort(shuffled(n, seed, 0)[:at_most])


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
