"""Order of images in training: shuffled epochs that follow each other without a gap.

As in the authors' input pipeline (tf2/data.py: shuffle, repeat, batch): position p of the endless sequence is image
`order(epoch)[p % n]` of epoch p // n. So a batch may straddle two epochs, or hold several where it is larger than the
data, every image is seen equally often, and none is left over.
"""

import numpy as np

from simclr.random import shuffled


class EndlessOrder:
    """Positions -> images of n, for a seed. Threads may share it.

    Args:
        n: Number of images.
        seed: 0 to 2**64 - 1.
    """

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._seed = n, seed
        self._orders: dict[int, np.ndarray] = {}

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch (B,) and image (B,) of each of B positions."""
        epochs = positions // self._n
        indices = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            indices[rows] = self._order(int(epoch))[positions[rows] % self._n]
        return epochs, indices

    def _order(self, epoch: int) -> np.ndarray:
        found = self._orders.get(epoch)
        if found is None:
            found = shuffled(self._n, seed=self._seed, epoch=epoch)
            for old in [e for e in self._orders if e < epoch - 1]:
                self._orders.pop(old, None)
            self._orders[epoch] = found
        return found
