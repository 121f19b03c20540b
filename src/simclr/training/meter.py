"""How much memory a computation takes, and how much the machine has to give.

The first is counted, not timed or sampled: the bytes of every tensor storage that torch's operations make, from its
birth to its death, so it is the same on every run and on every device. Memory within a kernel (workspaces of
convolutions) and in the allocator's gaps is not seen; who asks adds a margin.
"""

import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from simclr.data.pack.place import free_memory
from simclr.distributed import DistributedContext


def peak_bytes(compute: Callable[[], Iterable[Tensor]]) -> int:
    """Most bytes of tensors that were alive at once among those that `compute` made.

    Args:
        compute: Runs forward and backward; the tensors that it returns (gradients of parameters) are left out of the
            count, as they do not grow with the batch.
    """
    with _Meter() as meter:
        kept = list(compute())
    apart = {meter.number(tensor.untyped_storage()) for tensor in kept}
    alive = peak = 0
    for storage, change in meter.changes:
        alive += 0 if storage in apart else change
        peak = max(peak, alive)
    return peak


class _Meter(TorchDispatchMode):
    """Numbers each new storage, and notes its bytes and their return when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[int, int]] = []
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # by id, which a later storage may have again
        self._numbers = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in known and id(storage) not in self._alive:
                self._note(storage)
        return result

    def number(self, storage: torch.UntypedStorage) -> int | None:
        return self._alive[id(storage)][0] if id(storage) in self._alive else None

    def _note(self, storage: torch.UntypedStorage) -> None:
        number, key, size = next(self._numbers), id(storage), storage.nbytes()

        def died(_: weakref.ref) -> None:
            self.changes.append((number, -size))
            del self._alive[key]

        self.changes.append((number, size))
        self._alive[key] = number, weakref.ref(storage, died)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def free_bytes(world: DistributedContext) -> int:
    """Bytes that this process may still take on its device.

    On a CPU its share of what the machine, and the cgroup (container, batch job) that it lives in, have left.
    """
    if world.device.type == "cuda":
        unused = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return torch.cuda.mem_get_info(world.device)[0] + unused
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))  # torchrun says how many processes share the machine
    return free_memory() // here
