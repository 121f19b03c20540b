"""Features standardised, and their largest principal components shrunk, by statistics of the training images.

kNN and retrieval compare features by their cosine, which a few components of large variance decide. Full whitening
helps them and hurts linear classifiers on few labels, since it blows up components that hold noise; this only takes the
largest down (docs/lab-notes.md, 2026-11-30).

Shapes: B rows, F features, K components.
"""

import numpy as np
import torch
from torch import Tensor, nn

COMPONENTS = 32
"""Of encoders that are pretrained here. Of the 2,304 features of small images the components beyond have about the
average variance; shrinking twice as many changed nothing."""
FLOOR = 10.0
"""Variance, in units of the average feature's, at which a component keeps 0.7 of its length; far above, all that are
shrunk end with about this variance."""


class Whitening(nn.Module):
    """(B, F) -> (B, F): x -> (I - V diag(shrunk) V^T) (x - mean) scale; the identity until `fit_whitening`.

    Args:
        num_features: F.
        components: Largest K; it is at most a quarter of F.
    """

    def __init__(self, num_features: int, components: int) -> None:
        super().__init__()
        components = max(1, min(components, num_features // 4))
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.register_buffer("directions", torch.zeros(num_features, components))  # V, orthonormal columns
        self.register_buffer("shrunk", torch.zeros(components))  # share of its length that each direction loses
        self.mean: Tensor
        self.scale: Tensor
        self.directions: Tensor
        self.shrunk: Tensor

    @property
    def is_fitted(self) -> bool:
        """Whether it does anything."""
        return bool(self.shrunk.any())

    def forward(self, x: Tensor) -> Tensor:
        """In fp32 under any autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = (x.float() - self.mean) * self.scale
            return x - (x @ self.directions * self.shrunk) @ self.directions.T


def fit_whitening(whitening: Whitening, features: np.ndarray) -> None:
    """Set the buffers by features of training images, without labels.

    With standardised features, lambda_k the variance along the k-th principal direction: its length is multiplied with
    sqrt(FLOOR / (lambda_k + FLOOR)). A feature that is constant keeps its scale.

    Args:
        features: (n, F) float32, of the module that `whitening` stands behind.
    """
    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    varies = deviation > np.maximum(1e-6 * np.abs(mean), 1e-12)  # beyond what fp32 rounds off
    scale = 1 / np.where(varies, deviation, 1.0)
    rows = ((features - mean) * scale * varies).astype(np.float32)  # (n, F)
    if not rows.any():
        return  # every feature is constant, as those of a broken network
    singular_values, directions = _largest(rows, len(whitening.shrunk))  # (K,), (K, F)
    shrunk = 1 - np.sqrt(FLOOR / (singular_values**2 / len(rows) + FLOOR))
    for buffer, values in (
        (whitening.mean, mean), (whitening.scale, scale), (whitening.directions, directions.T),
        (whitening.shrunk, shrunk),
    ):  # fmt: skip
        buffer.copy_(torch.from_numpy(values.astype(np.float32)))


def _largest(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest singular values (count,) and right singular vectors (count, F) of (n, F); 0 where n is smaller."""
    if min(rows.shape) > 4 * count:
        from scipy.sparse.linalg import svds

        start = np.random.default_rng(0).standard_normal(min(rows.shape)).astype(np.float32)
        _, values, vectors = svds(rows, k=count, v0=start)
        return values, vectors
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    padding = max(0, count - len(values))
    return np.pad(values[:count], (0, padding)), np.pad(vectors[:count], ((0, padding), (0, 0)))
