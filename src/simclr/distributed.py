"""Processes started by torchrun: who they are, and the few exchanges that training needs.

One process is the ordinary case, not a special one: every method of `DistributedContext` then returns at once, and no
process group exists. Several processes speak gloo for CPU tensors and NCCL for CUDA tensors, so that a flag
or a Python object never waits for the GPU.

    torchrun --nproc-per-node 4 -m simclr pretrain DATA
"""

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: its functions keep the one they find as a default
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from simclr.errors import ReportedElsewhere, Stopped, UserError, shown

__all__ = ["DistributedContext", "all_gather_flat", "is_first_to_fail", "joined", "start", "stop"]

Object = TypeVar("Object")

all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(output, input, group): concatenates the processes' inputs; torch 2.14 renamed it and warns of the old name."""


@dataclass(frozen=True)
class DistributedContext:
    """This process among its peers. `DistributedContext()` is a process on its own.

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

        Looked up and not kept: nothing may outlive the group (see `stop`).
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
        all_gather_flat(rows, x.contiguous(), group=self.group)
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

    def require_equal(self, what: str, values: Mapping[str, object], remedy: str) -> None:
        """Raise the same error in every process where they do not agree on small values that pickle.

        Args:
            what: Names the values in the sentence, as in "settings".
            values: By name; the first name that differs is quoted.
            remedy: What to try.

        Raises:
            UserError: A value differs between two processes.
        """
        if self.size == 1:
            return
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, dict(values), group=self.group)
        for rank, theirs in enumerate(every):
            difference = _first_difference(every[0], theirs)
            if difference is not None:
                name, ours, other = difference
                raise UserError(
                    f"The processes do not have the same {what}: {name} is {shown(str(ours))} on process 0 and "
                    f"{shown(str(other))} on process {rank}. {remedy}"
                )


@contextmanager
def joined(device: str = "auto", **meeting: Any) -> Iterator[DistributedContext]:
    """Be one of the processes that torchrun started for as long as the block runs; arguments as for `start`.

    An error in one process ends them all at once: it is noted where the others can read it, then the connections close,
    and a process that waits for this one finds the note. So no exchange per step is needed for it.

    Raises:
        UserError: As `start`; or another process ended without a note.
        ReportedElsewhere: Another process failed first, and reports it.
    """
    world = start(device, **meeting)
    try:
        yield world
    except (Exception, KeyboardInterrupt) as error:
        if world.size == 1 or isinstance(error, Stopped):  # all processes stop after the same step
            raise
        if not is_first_to_fail(str(error)):
            raise ReportedElsewhere("Another process of this run failed first, and reports why.") from None
        if _is_lost_connection(error):
            raise UserError(
                "Another process of this run ended without a message: it was killed, or its machine ran out of memory. "
                "What was saved is kept; start all processes again."
            ) from None
        raise
    finally:
        stop()


def start(
    device: str = "auto", *, timeout: timedelta = timedelta(minutes=30), init_method: str = "env://"
) -> DistributedContext:
    """Join the processes that torchrun started; without torchrun, a world of one.

    Args:
        device: "cpu", "cuda", "cuda:1", ..., or "auto": a GPU where there is one. With several processes,
            "cuda" means the GPU numbered by the process's local rank.
        timeout: How long a process waits for a silent peer before it fails. It must outlast whatever rank 0
            does alone (saving, evaluating); a peer that dies is noticed at once by gloo, and by torchrun.
        init_method: Where the processes meet; the default is what torchrun prepares.

    Raises:
        UserError: The environment is torchrun's only in part, there is no GPU for this process, or the processes run
            different versions.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    size = _environment("WORLD_SIZE", default=1)
    rank, local_rank = (_environment("RANK"), _environment("LOCAL_RANK")) if size > 1 else (0, 0)
    if place.type == "cuda":
        place = _gpu(local_rank if size > 1 else place.index or 0, local_rank)
    if size == 1:
        return DistributedContext(device=place)
    store = _meet(init_method, rank, size, timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=place if place.type == "cuda" else None,
    )
    if place.type == "cpu":
        atexit.register(stop)  # an abort by gloo must not hide the message of an earlier error
    world = DistributedContext(rank=rank, size=size, local_rank=local_rank, device=place)
    world.require_equal("software", _versions(), "Install the same versions on every machine.")
    return world


def stop() -> None:
    """Leave the process group, if there is one, with nothing that outlives it.

    Gloo's threads end with the last reference to their group. One that still runs when Python ends may want the lock of
    the interpreter, to drop what a finished exchange held, and the process aborts. References are kept by every
    DistributedDataParallel (which is part of a cycle), by the frames of an exception's traceback, and by the default
    arguments of torch.distributed.nn.functional where that, as by the first DistributedDataParallel, is imported late.
    """
    if not dist.is_initialized():
        return
    for error in (sys.exception(), getattr(sys, "last_value", None)):
        _clear_frames(error)
    for candidate in gc.get_objects():
        if issubclass(type(candidate), DistributedDataParallel):
            _detach(candidate)
    candidate = None
    gc.collect()
    dist.destroy_process_group()


def is_first_to_fail(sentence: str) -> bool:
    """Whether this process is the first of torchrun's that failed, which reports it; a lone process always is.

    The first one to ask keeps that role until it ends. Every other one waits until the first has reported and ended,
    because torchrun ends all processes as soon as one has failed.

    Args:
        sentence: Kept beside the rank, for whoever looks into the store.
    """
    global _is_first
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") or _is_first:
        return True
    rank = os.environ.get("RANK", "0")
    try:
        store = _notes if _notes is not None else _notes_of_torchrun()
        note = store.compare_set("failed", "", f"{rank} {sentence[:2000]}").decode()
        _is_first = note.partition(" ")[0] == rank
    except (RuntimeError, UserError):  # the store is gone with its process, or there has been none: all report
        return True
    if _is_first:
        atexit.register(_tell_reported, store)
        return True
    with suppress(RuntimeError):
        store.wait(["reported"], REPORT_TIMEOUT)
    return False


REPORT_TIMEOUT = timedelta(seconds=10)
"""For printing a sentence and ending, after which a process that waits for that ends too."""

_notes: dist.Store | None = None
"""Where the processes leave notes; it outlives the group."""
_is_first = False


def _meet(init_method: str, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store that the processes share; notes are kept apart from torch's own keys."""
    global _notes, _is_first
    _is_first = False
    store = next(iter(dist.rendezvous(init_method, rank, size, timeout=timeout)))[0]
    _notes = dist.PrefixStore("simclr", store)
    return store


def _notes_of_torchrun() -> dist.Store:
    """The same notes before the processes have met, where torchrun itself keeps the store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise UserError("only processes of torchrun can leave notes before they have met")
    _meet("env://", _environment("RANK"), _environment("WORLD_SIZE"), REPORT_TIMEOUT)
    assert _notes is not None
    return _notes


def _tell_reported(store: dist.Store) -> None:
    with suppress(RuntimeError):
        store.set("reported", "1")


def _is_lost_connection(error: BaseException) -> bool:
    """Whether torch says that a peer is gone; gloo has no exception of its own, only sentences that name its files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _clear_frames(error: BaseException | None) -> None:
    """Drop the local variables of the frames that an exception, and those before it, came through."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _detach(module: DistributedDataParallel) -> None:
    """Take away what holds the process group; without that the module is of no use either."""
    for name, value in list(vars(module).items()):
        if isinstance(value, (dist.ProcessGroup, dist.Reducer, dist.Logger)):
            vars(module)[name] = None


def _gpu(index: int, local_rank: int) -> torch.device:
    """The GPU of this process, made current."""
    gpus = torch.cuda.device_count()
    if not gpus:
        raise UserError("--device was cuda, but torch sees no GPU here; use cpu or auto.")
    if index >= gpus:
        raise UserError(
            f"process {local_rank} of this machine needs GPU {index}, but torch sees {gpus} (counted "
            "from 0): start as many processes as there are GPUs, or compute on the cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _versions() -> dict[str, str]:
    """What must be the same in every process, lest they compute different things."""
    from simclr import __version__

    python = ".".join(map(str, sys.version_info[:3]))
    return {"simclr": __version__, "torch": torch.__version__, "Python": python}


def _first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, object, object] | None:
    """Name and values of the first entry that differs, within nested dicts too."""
    for name in {**ours, **theirs}:
        our_value, their_value = ours.get(name), theirs.get(name)
        if our_value != their_value:
            nested = isinstance(our_value, dict) and isinstance(their_value, dict)
            return _first_difference(our_value, their_value) if nested else (name, our_value, their_value)
    return None


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
