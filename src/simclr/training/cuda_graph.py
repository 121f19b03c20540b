"""Updates replayed from a CUDA graph: one launch for a forward pass, a backward pass and a step of the optimiser.

A small network on a fast GPU spends more time on starting its kernels than on running them. The first updates run as
always, on the stream that is recorded later; the next one is recorded, and from then on it is replayed:

    inputs   copied into tensors of the graph
    rate     a tensor of the graph, in fp32; set_lr rounds the rates of all GPU runs likewise
    outputs  the loss and metrics, overwritten by the next replay
    random   torch's generator, whose state a replay reads when it begins

An update whose metrics are recorded (`detail`) and whatever follows the training run outside the graph. Replayed
kernels are those of an update that is not replayed, so with deterministic kernels the weights are the same bits
(`cuda-graph` in benchmarks/gpu_suite.py compares them). The views of a batch are made by the threads that prepare
batches, in one or two launches, while the graph before it runs.

Source: "Whole-network capture" in torch's notes on CUDA semantics.
"""

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from simclr.distributed import DistributedContext
from simclr.methods.method import Method
from simclr.training.progress import say

WARM_UP = 3
"""Updates before the one that is recorded: cuDNN chooses its algorithms, Triton compiles, optimisers make their state,
none of which can be recorded."""

MARGIN = 1.1
"""On the memory of an update, for gaps between the tensors of the graph."""

Update = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""Inputs -> loss and metrics, all without gradient; updates the weights."""


class Recorder(Protocol):
    """Runs work on a stream of its own and records it there."""

    def shortage(self) -> str:
        """Why there is no memory for a recording; empty if there is."""
        ...

    def run(self, work: Callable[[], Any]) -> Any:
        """The work's result; what was started before comes before it, and what is started later after it."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats the work's operations on the device, on the same tensors; the work itself is not done.

        Raises:
            RuntimeError: They cannot be recorded.
        """
        ...


class CudaRecorder:
    """Records a CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._peak = 0
        """Bytes that the work which ran last took beyond what was there before it."""

    def shortage(self) -> str:
        """The tensors of a graph take memory beside those of the updates outside it."""
        used, reserved = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + reserved - used
        both = 2 * MARGIN * self._peak
        if both <= free:
            return ""
        return f"it takes an update's memory twice, {both / 1e9:.1f} GB of {free / 1e9:.1f} GB free"

    def run(self, work: Callable[[], Any]) -> Any:
        """See `Recorder`."""
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        self._peak = torch.cuda.max_memory_allocated(self._device) - before
        return result

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`. Threads that prepare batches may allocate and copy meanwhile ("thread_local")."""
        gc.collect()  # a forgotten autograd graph would hold nodes of another stream
        graph = torch.cuda.CUDAGraph()
        leaving = torch.cuda.stream(self._stream)  # torch.cuda.graph stays in its stream where recording failed
        with leaving, torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class ReplayedUpdates:
    """Stands in for `update` where no metrics are recorded, and replays it as soon as it can.

    Args:
        update: Inputs of constant shapes -> loss and metrics.
        optimizer: Whose groups all have the learning rate of the update that comes next.
        recorder: Of the device where the weights are.
    """

    def __init__(self, update: Update, optimizer: torch.optim.Optimizer, recorder: Recorder) -> None:
        self.count = 0
        """Updates that were replayed."""
        self._update, self._optimizer, self._recorder = update, optimizer, recorder
        self._before = WARM_UP
        self._inputs: tuple[Tensor, ...] = ()
        self._rate = torch.zeros((), dtype=torch.float32, device=optimizer.param_groups[0]["params"][0].device)
        self._outputs: tuple[Tensor, dict[str, Tensor]] | None = None
        self._replay: Callable[[], None] | None = None
        self._refused = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Update the weights; the loss and metrics before it, which the next call overwrites."""
        if self._refused:
            return self._update(*inputs)
        if not self._inputs:
            self._inputs = tuple(torch.empty_like(values) for values in inputs)  # of the same strides
        for own, values in zip(self._inputs, inputs, strict=True):
            own.copy_(values)
        if self._before:
            self._before -= 1
            return self._recorder.run(lambda: self._update(*self._inputs))
        if self._replay is None:
            self._record()
        if self._replay is None or self._outputs is None:
            return self._update(*inputs)
        self._rate.fill_(self._optimizer.param_groups[0]["lr"])
        self._replay()
        self.count += 1
        return self._outputs

    def _record(self) -> None:
        """Record an update, or say why not."""
        reason = self._recorder.shortage()
        if not reason:
            self._optimizer.zero_grad(set_to_none=True)  # gradients are to be tensors of the graph
            groups = self._optimizer.param_groups
            own = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
            try:
                for group, settings in zip(groups, own, strict=True):
                    group.update({name: self._rate if name == "lr" else True for name in settings})
                self._replay = self._recorder.record(self._recorded)
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
            finally:
                for group, settings in zip(groups, own, strict=True):
                    group.update(settings)
        if reason:
            self._refused = True
            self._inputs = ()
            say(f"Updates are not replayed from a CUDA graph: {reason}.")

    def _recorded(self) -> None:
        self._outputs = self._update(*self._inputs)


def obstacle(method: Method, memory: str, world: DistributedContext) -> str:
    """Why the updates of this method cannot be recorded, in a sentence; empty if they can."""
    if world.device.type != "cuda":
        reason = "there is no GPU"
    elif world.size > 1:
        reason = f"{world.size} processes exchange gradients"
    elif memory != "plain":
        reason = f"--memory is {memory}, and it must be plain"
    elif not method.capturable:
        reason = f"{type(method).__name__}'s updates depend on numbers that are drawn or counted on the host"
    else:
        return ""
    return f"Updates are not replayed from a CUDA graph: {reason}."
