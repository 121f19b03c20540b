"""Features standardised or whitened, by statistics of the training images.

kNN and retrieval compare features by their cosine, which features of large mean or variance decide. Whitening here also
shrinks the largest principal components, and only those: to whiten all of them blows up what is noise. It helps kNN
further, and a linear classifier on hundreds of labels or more; on a few dozen labels it hurts (docs/lab-notes.md,
2026-11-30).

Shapes: B rows, F features, K components.
"""

import numpy as np
import torch
from torch import Tensor, nn

MAX_COMPONENTS = 32
"""K, if F is at least four times as large. Of the 2,304 features of small images the components beyond have about the
average variance; shrinking twice as many changed nothing."""
FLOOR = 10.0
"""Variance, in units of the average feature's, at which a component keeps 0.7 of its length; far above, all that are
shrunk end with about this variance."""


class FeatureScaling(nn.Module):
    """(B, F) -> (B, F): x -> (x - mean) scale, and if `whitened` from there (I - V diag(shrunk) V^T); fixed by `fit`.

    Args:
        num_features: F.
        whitened: Whether the largest components are shrunk.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor
    shrunk: Tensor

    def __init__(self, num_features: int, *, whitened: bool) -> None:
        super().__init__()
        self.whitened = whitened
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        if whitened:
            components = max(1, min(MAX_COMPONENTS, num_features // 4))
            self.register_buffer("directions", torch.zeros(num_features, components))  # V, orthonormal columns
            self.register_buffer("shrunk", torch.zeros(components))  # share of its length that each direction loses

    @property
    def is_fitted(self) -> bool:
        """Whether it does anything."""
        return bool(self.mean.any()) or bool((self.scale != 1).any())

    def forward(self, x: Tensor) -> Tensor:
        """In fp32 under any autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = (x.float() - self.mean) * self.scale
            return x - (x @ self.directions * self.shrunk) @ self.directions.T if self.whitened else x

    def fit(self, features: np.ndarray) -> None:
        """Set the buffers by features of training images, without labels.

        With standardised features, lambda_k the variance along the k-th principal direction: its length is multiplied
        with sqrt(FLOOR / (lambda_k + FLOOR)). A feature that is constant keeps its scale.

        Args:
            features: (n, F) float32, of the module that this one stands behind.
        """
        mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
        varies = deviation > np.maximum(1e-6 * np.abs(mean), 1e-12)  # beyond what fp32 rounds off
        scale = 1 / np.where(varies, deviation, 1.0)
        values = {"mean": mean, "scale": scale}
        rows = ((features - mean) * scale * varies).astype(np.float32)  # (n, F)
        if self.whitened and rows.any():
            singular_values, directions = _largest(rows, len(self.shrunk))  # (K,), (K, F)
            variances = singular_values**2 / len(rows)
            values |= {"directions": directions.T, "shrunk": 1 - np.sqrt(FLOOR / (variances + FLOOR))}
        for name, value in values.items():
            getattr(self, name).copy_(torch.from_numpy(value.astype(np.float32)))


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
