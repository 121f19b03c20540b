"""Features of a single layer of k-means patches (Coates, Lee and Ng 2011, "An analysis of single-layer networks").

Small patches are drawn from the training images, normalised in contrast, whitened and clustered. An image is then
described by how near its patches, at every position, are to each centroid (triangle activation), summed over the four
quadrants. No label takes part. The numbers of the authors' code are kept, except for fewer centroids (1,600 there) and
the standardised features being taken before the classifier, so that nearest neighbours see them too.

Shapes: B images, C channels, S x S pixels, P positions of a patch, D = C * 6 * 6 numbers in a patch, K centroids.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.keys import pixels_digest
from simclr.models.inference import outputs
from simclr.random import shuffled, uniforms
from simclr.views.policy import AugmentationPreset
from simclr.views.views import eval_images

PATCHES_VERSION = 1
"""Raise it when the same training images, seed and pixels give other features by more than rounding."""
PATCH = 6  # pixels a side
MAX_PATCHES_SIDE = 32  # pixels, the size that these patches were made for; larger images are shrunk to it
CENTROIDS = 400  # at most; 1,600 features
PATCHES_PER_CENTROID = 10  # positions in the training images, at least: fewer positions give fewer centroids
FIT_PATCHES = 100_000
FIT_IMAGES = 10_000  # at most, that patches and the scale of the features come from
CONTRAST = 10 / 255**2  # added to a patch's variance, of pixels in [0, 1]
WHITENING = 0.1  # added to the eigenvalues of the covariance of patches of unit variance
ITERATIONS = 50  # of k-means
MIN_DEVIATION = 1e-2  # added to the deviation of a feature, a sum of activations
CHUNK = 16  # images at a time: some 20 MB of activations


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchFeatures:
    """Features of k-means patches, learnt from training images, as features of a model under test.

    Raises:
        UserError: The images are too small for two patches each way.
    """

    size: int
    """Side of the images, in pixels."""
    preset: AugmentationPreset
    """Of the evaluation preprocessing."""
    images: Images
    """Training images, whose labels take no part, with the channels of the model."""
    seed: int
    """Of the patches and of k-means."""

    def __post_init__(self) -> None:
        if self.size <= PATCH:
            raise UserError(
                f"patches needs images of at least {PATCH + 1} x {PATCH + 1} pixels, for patches of {PATCH} x {PATCH}, "
                f"and they are evaluated at {self.size} x {self.size}; leave patches out."
            )

    @property
    def positions(self) -> int:
        """Of a patch in an image."""
        return (self.size - PATCH + 1) ** 2

    @property
    def num_centroids(self) -> int:
        """K."""
        return min(CENTROIDS, max(2, len(self.images) * self.positions // PATCHES_PER_CENTROID))

    @property
    def num_features(self) -> int:
        """Of an image: K per quadrant."""
        return 4 * self.num_centroids

    @property
    def record(self) -> dict[str, Any]:
        """All that determines the features of given pixels, as JSON can hold it."""
        return {
            "name": "patches", "version": PATCHES_VERSION, "centroids": self.num_centroids, "seed": self.seed,
            "images": pixels_digest(self.images),
        }  # fmt: skip

    @property
    def description(self) -> str:
        """For the legend of a table."""
        return (
            f"k-means patches of {self.size} x {self.size} pixels: {self.num_centroids} centroids of {PATCH} x {PATCH} "
            f"pixels from {len(self.images):,} training images, {self.num_features:,} numbers"
        )

    def network(self, world: DistributedContext) -> nn.Module:
        """(B, C, S, S) in [0, 1] -> (B, 4 K), fitted by the main process of those that call.

        Returns:
            On the CPU.
        """
        return world.on_main(self._fit)

    def _fit(self) -> "Patches":
        rows = np.sort(shuffled(len(self.images), self.seed, 0)[:FIT_IMAGES])
        patches = normalised(self._drawn_patches(rows))  # (n, D)
        mean, whitening = zca(patches)
        patches = (patches - mean) @ whitening
        network = Patches(mean, whitening, _kmeans(patches, self.num_centroids, self.seed))
        features = outputs(
            network, self.images.subset(rows), self.num_features, size=self.size, preset=self.preset
        )  # (n, F)
        network.set_scale(torch.from_numpy(features))
        return network

    def _drawn_patches(self, rows: np.ndarray) -> Tensor:
        """(FIT_PATCHES or some more, D) patches at random positions, as many from each of the images."""
        per_image = -(-FIT_PATCHES // len(rows))
        numbers = uniforms(self.seed, 0, rows[:, None], 0, np.arange(per_image))[..., 0]  # (n, per_image)
        positions = torch.from_numpy((numbers * self.positions).astype(np.int64))
        drawn = []
        for begin in range(0, len(rows), 256):
            pixels = eval_images(
                self.images.read(rows[begin : begin + 256], copy=False), self.size, self.preset
            )  # (B, C, S, S)
            columns = F.unfold(pixels, PATCH)  # (B, D, P)
            chosen = positions[begin : begin + 256, None].expand(-1, columns.shape[1], -1)
            drawn.append(columns.gather(2, chosen).transpose(1, 2).flatten(0, 1))
        return torch.cat(drawn)


class Patches(nn.Module):
    """(B, C, S, S) -> (B, 4 K): triangle activations of whitened patches, summed over quadrants and standardised."""

    mean: Tensor
    whitening: Tensor
    centroids: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, whitening: Tensor, centroids: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)  # (D,)
        self.register_buffer("whitening", whitening)  # (D, D)
        self.register_buffer("centroids", centroids)  # (K, D)
        self.register_buffer("shift", torch.zeros(4 * len(centroids)))  # (4 K,)
        self.register_buffer("scale", torch.ones(4 * len(centroids)))  # (4 K,)

    def set_scale(self, features: Tensor) -> None:
        """Standardise by the (n, 4 K) features of training images."""
        self.shift = features.double().mean(dim=0).float()
        self.scale = 1 / (features.double().std(dim=0, correction=0).float() + MIN_DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        return torch.cat([self._features(some) for some in x.split(CHUNK)])

    def _features(self, x: Tensor) -> Tensor:
        patches = normalised(F.unfold(x, PATCH).transpose(1, 2))  # (B, P, D)
        patches = (patches - self.mean) @ self.whitening
        squares = patches.square().sum(dim=-1, keepdim=True) + self.centroids.square().sum(dim=-1)  # (B, P, K)
        distances = (squares - 2 * patches @ self.centroids.T).clamp(min=0).sqrt()
        activations = (distances.mean(dim=-1, keepdim=True) - distances).relu()  # (B, P, K)
        side = x.shape[-1] - PATCH + 1
        halves = slice(None, (side + 1) // 2), slice((side + 1) // 2, None)
        grid = activations.unflatten(1, (side, side))
        quadrants = [grid[:, rows, columns].sum(dim=(1, 2)) for rows in halves for columns in halves]  # (B, K) each
        return (torch.cat(quadrants, dim=1) - self.shift) * self.scale


def normalised(patches: Tensor) -> Tensor:
    """Patches (..., D) with their mean at 0 and their contrast at 1, up to CONTRAST."""
    centred = patches - patches.mean(dim=-1, keepdim=True)
    return centred / (patches.var(dim=-1, keepdim=True, correction=1) + CONTRAST).sqrt()


def zca(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and symmetric whitening matrix (D, D) of patches (n, D)."""
    numbers = patches.double()
    mean = numbers.mean(dim=0)
    values, vectors = torch.linalg.eigh((numbers - mean).T @ (numbers - mean) / len(numbers))
    return mean.float(), (vectors / (values.clamp(min=0) + WHITENING).sqrt() @ vectors.T).float()


def _kmeans(patches: Tensor, num_centroids: int, seed: int) -> Tensor:
    """(K, D) centroids."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    clusters = KMeans(num_centroids, init="random", n_init=1, max_iter=ITERATIONS, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # images of few colours have fewer different patches
        return torch.from_numpy(clusters.fit(patches.numpy()).cluster_centers_.astype(np.float32))
