"""Processes started by torchrun: who they are, and the few exchanges that training needs.

One process is the ordinary case, not a special one: every method of `World` then returns at once, and no
process group exists. Several processes speak gloo for CPU tensors and NCCL for CUDA tensors, so that a flag
or a Python object never waits for the GPU.

    torchrun --nproc-per-node 4 -m simclr pretrain DATA
"""

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from simclr.errors import UserError

__all__ = ["World", "start", "stop"]

Object = TypeVar("Object")


@dataclass(frozen=True)
class World:
    """This process among its peers. `World()` is a process on its own.

    Every method but `local_slice` is a collective when `size > 1`: all processes must call it, in the same
    order.
    """

    rank: int = 0
    """0 .. size - 1, over all machines."""

    size: int = 1
    """Number of processes."""

    local_rank: int = 0
    """0 .. processes of this machine - 1; which of its GPUs is ours."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and saves."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group, None for a process on its own.

        Looked up and not kept: gloo aborts the process if anything still holds a group when Python ends.
        """
        return dist.group.WORLD if self.size > 1 else None

    def local_slice(self, batch_size: int) -> slice:
        """This process's part of a global batch of `batch_size` images.

        Raises:
            UserError: The batch cannot be shared out evenly.
        """
        if batch_size % self.size:
            raise UserError(
                f"--batch-size was {batch_size}, which {self.size} processes cannot share evenly; give a multiple of "
                f"{self.size}."
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def all_gather_rows(self, x: Tensor) -> Tensor:
        """(n, ...) of each process -> (size * n, ...) in order of rank, without gradient.

        `x` must have the same shape and dtype everywhere.
        """
        x = x.detach()
        if self.size == 1:
            return x
        rows = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(rows, x.contiguous(), group=self.group)
        return rows

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum of `x` over the processes, without gradient."""
        total = x.detach().clone()
        if self.size > 1:
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """Mean of `x` over the processes, without gradient."""
        return self.all_reduce_sum(x) / self.size

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true in at least one process."""
        if self.size == 1:
            return flag
        seen = torch.tensor(int(flag))  # a CPU tensor: gloo carries it, the GPU's queue is not waited for
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self.group)
        return bool(seen.item())

    def broadcast(self, value: Object) -> Object:
        """Rank 0's `value` (anything that pickles) in every process."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]

    def on_main(self, action: Callable[[], Object]) -> Object:
        """What `action` returns in the main process, the only one that calls it, in every process.

        Raises:
            UserError: The main process's, in every process: none waits for one that has given up.
        """
        if self.size == 1:
            return action()
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except UserError as raised:
                error = raised
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return cast("Object", result)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.any_rank(False)


def start(device: str = "auto", *, timeout: timedelta = timedelta(minutes=30), init_method: str = "env://") -> World:
    """Join the processes that torchrun started; without torchrun, a world of one.

    Args:
        device: "cpu", "cuda", "cuda:1", ..., or "auto": a GPU where there is one. With several processes,
            "cuda" means the GPU numbered by the process's local rank.
        timeout: How long a process waits for a silent peer before it fails. It must outlast whatever rank 0
            does alone (saving, evaluating); a peer that dies is noticed at once by gloo, and by torchrun.
        init_method: Where the processes meet; the default is what torchrun prepares.

    Raises:
        UserError: The environment is torchrun's only in part, or there is no GPU for this process.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    size = _environment("WORLD_SIZE", default=1)
    rank, local_rank = (_environment("RANK"), _environment("LOCAL_RANK")) if size > 1 else (0, 0)
    if place.type == "cuda":
        place = torch.device("cuda", local_rank if size > 1 else place.index or 0)
        gpus = torch.cuda.device_count()
        if not gpus:
            raise UserError("--device was cuda, but torch sees no GPU here; use cpu or auto.")
        if place.index >= gpus:
            raise UserError(
                f"process {local_rank} of this machine needs GPU {place.index}, but torch sees {gpus} (counted "
                "from 0): start as many processes as there are GPUs, or compute on the cpu"
            )
        torch.cuda.set_device(place)
    if size == 1:
        return World(device=place)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=place if place.type == "cuda" else None,
    )
    if place.type == "cpu":
        atexit.register(stop)  # an abort by gloo must not hide the message of an earlier error
    return World(rank=rank, size=size, local_rank=local_rank, device=place)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _environment(name: str, default: int | None = None) -> int:
    """A whole number from torchrun's environment."""
    value = os.environ.get(name, default)
    try:
        return int(value)  # pyrefly: ignore[bad-argument-type]
    except (TypeError, ValueError):
        raise UserError(
            f"environment variable {name} is {value!r} where a whole number is needed: "
            "start several processes with torchrun, or unset WORLD_SIZE"
        ) from None
