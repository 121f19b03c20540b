"""Batches: the images of each step in their order, and what a method makes of them.

Order and views are functions of seed, epoch and index, so the batch of a step is the same whenever it is made, by
whichever process and thread.

Shapes: B images on this process, N over all processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from simclr.data.images import Images
from simclr.data.order import EndlessOrder
from simclr.distributed import DistributedContext
from simclr.training.device import keep_on_gpu
from simclr.training.progress import say
from simclr.views.views import has_kernels

Inputs = tuple[Any, ...]
"""What a method is called with."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one step on this process.

    Attributes:
        pixels: B uint8 images, or those images on the GPU.
        epochs: (B,) in which epoch each image stands.
        indices: (B,) of the images in the data set.
    """

    pixels: Any
    epochs: np.ndarray
    indices: np.ndarray
    _global_indices: Callable[[], np.ndarray]

    @cached_property
    def global_indices(self) -> np.ndarray:
        """(N,) of the images of all processes."""
        return self._global_indices()

    def rows(self, rows: slice) -> "Batch":
        """Some of the images."""
        return Batch(self.pixels[rows], self.epochs[rows], self.indices[rows], self._global_indices)


def make_batches(
    images: Images,
    make_inputs: Callable[[Batch], Inputs],
    *,
    batch_size: int,
    seed: int,
    world: DistributedContext,
    chunk: int = 0,
    verbose: bool = False,
) -> Callable[[int], Inputs]:
    """Step -> the inputs of this process.

    Args:
        make_inputs: Makes a method's inputs of a batch, on the device of this process.
        batch_size: N.
        seed: Of the order.
        chunk: To cache gradients: images per chunk; a step then has a function for each chunk instead, which makes
            that chunk's inputs. 0: none.
        verbose: Whether to say where the images are kept, if this process prints.
    """
    order = EndlessOrder(len(images), seed)
    resident = None
    if has_kernels(world.device):
        resident, sentence = keep_on_gpu(images, world)
        say(sentence, main=world.is_main and verbose)

    def all_indices(step: int) -> np.ndarray:
        return order.at(np.arange(step * batch_size, (step + 1) * batch_size))[1]

    def inputs_of(step: int) -> Inputs:
        mine = world.local_slice(batch_size)
        epochs, indices = order.at(np.arange(step * batch_size + mine.start, step * batch_size + mine.stop))
        pixels = images.read(indices, copy=False) if resident is None else resident[indices]
        batch = Batch(pixels, epochs, indices, partial(all_indices, step))
        if not chunk:
            return make_inputs(batch)
        starts = range(0, len(indices), chunk)
        return tuple(partial(make_inputs, batch.rows(slice(start, start + chunk))) for start in starts)

    return inputs_of
