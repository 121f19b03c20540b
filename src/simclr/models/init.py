"""How weights begin: the authors' initialisers, drawn from an explicit seed.

google-research/simclr: resnet.py (variance_scaling_initializer), model_util.py (random_normal_initializer).
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

DENSE_STD = 0.01
# Standard deviation of a unit normal cut at +-2; TensorFlow divides by it so that the cut keeps the variance.
_STD_OF_CUT_NORMAL = 0.87962566103423978


@contextmanager
def seeded(seed: int, role: str) -> Iterator[None]:
    """Draw from a generator of (seed, role) inside, and leave torch's own CPU generator as it was.

    The role keeps two parts of one run, such as encoder and head, from drawing the same numbers.
    """
    words = np.random.SeedSequence([seed, zlib.crc32(role.encode())]).generate_state(1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(words[0]))  # torch.manual_seed would also reseed the GPUs
        yield


def lecun_normal_(weight: Tensor) -> None:
    """Truncated normal of variance 1/fan_in, cut at 2 standard deviations of the uncut normal.

    Args:
        weight: (out, in, height, width) of a convolution.
    """
    std = math.sqrt(1 / weight[0].numel()) / _STD_OF_CUT_NORMAL
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
