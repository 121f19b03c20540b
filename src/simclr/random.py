"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").

A draw is a pure function of (seed, epoch, index, stream, block), so workers, threads, batch position and
resuming cannot change it, and any back end that has 32-bit integers can repeat it.
"""

import operator

import numpy as np
from numpy.typing import ArrayLike

from simclr.errors import UserError

SHUFFLE_STREAM = 0xFFFF_FFFF
"""Stream of the epoch's order; streams 0, 1, ... are the views of an image."""

KEY_STREAM = 0xFFFF_FFFE
"""Stream of the order in which MoCo's keys of the first view are normalised; the one below is the second view's."""

SHARED_CROP_STREAM = 0xFFFF_FFFC
"""Stream of the crop that all views of an image are cut from, where there is one."""

_MASK = 0xFFFF_FFFF
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_KEY_STEPS = (0x9E37_79B9, 0xBB67_AE85)


def shuffled(n: int, seed: int, epoch: int, *, stream: int = SHUFFLE_STREAM) -> np.ndarray:
    """The order in which epoch `epoch` visits `n` images: an int64 permutation (n,), another for each stream."""
    words = philox((np.arange(n), epoch, stream, 0), seed)
    return np.argsort(words[0] << 32 | words[1], kind="stable")


def uniforms(seed: int, epoch: ArrayLike, index: ArrayLike, stream: ArrayLike, block: ArrayLike) -> np.ndarray:
    """Four uniform float64 numbers in [0, 1), multiples of 2**-32, for each counter.

    Args:
        seed: 0 to 2**64 - 1.
        epoch, index, stream, block: integers from 0 to 2**32 - 1, of shapes that broadcast together.

    Returns:
        (..., 4) float64, where ... is the shape of the counters.
    """
    return np.stack(philox((index, epoch, stream, block), seed), axis=-1) * 2.0**-32


def philox(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: int) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 of four 32-bit words under a 64-bit key: four uint64 arrays that hold 32-bit words."""
    if not 0 <= key < 2**64:
        raise UserError(f"seed {key}: a seed is an integer from 0 to 2**64 - 1; try 0.")
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    key = operator.index(key)  # a numpy integer would not mix with uint64
    k0, k1 = key & _MASK, key >> 32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 bits fit in 64
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & _MASK, p0 >> 32 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _KEY_STEPS[0] & _MASK, k1 + _KEY_STEPS[1] & _MASK
    return c0, c1, c2, c3
