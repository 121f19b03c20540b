"""The one training loop: any method, one process or many, stopped at any step and resumed to the same bits.

State is one integer: the step. Batches, views and random numbers are functions of it, so a resumed run needs
the weights, the optimiser's state and nothing else.
"""

import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr.config.training import TrainingConfig
from simclr.distributed import DistributedContext
from simclr.errors import Diverged, UserError
from simclr.methods.method import Method
from simclr.training.batches import Inputs
from simclr.training.checkpoint import checkpoints, load_newest, remove_oldest, save_checkpoint, set_aside_newer
from simclr.training.cuda_graph import CudaRecorder, ReplayedUpdates
from simclr.training.grad_cache import GradCache
from simclr.training.optim import set_lr
from simclr.training.progress import Outcome, ProgressCallback, say
from simclr.training.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the loop trains. Everything that depends on the step is a pure function of it.

    Attributes:
        method: Turns a batch into a loss.
        batch: This process's inputs of a step: tensors on the device, or functions that make them there.
        optimizer: Over the method's parameters.
        learning_rate: Of a step.
        total_steps: Where training ends.
        batch_size: Items per step over all processes.
        seed: Of the stochastic layers, if the encoder has any.
        precision: Autocast of the forward pass.
        grad_cache: Cache gradients; `batch` then gives a function for each chunk.
        cuda_graph: Replay updates from a CUDA graph (training/cuda_graph.py); `batch` gives tensors of constant shapes.
        flush_denormal: Take denormal numbers for 0 on a CPU.
        out_of_memory: What to say where the device's memory gives out.
        evaluate: Metrics too costly for each record, such as kNN accuracy.
        evaluate_every: Steps between two of them; 0: never.
        publish: Writes the encoder's folder; called with the step after each checkpoint, and on resuming.
        keep_inputs: Writes what the training begins from into the folder of a new run; None: nothing has to be kept.
    """

    method: Method
    batch: Callable[[int], Inputs]
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    total_steps: int
    batch_size: int
    seed: int = 0
    precision: torch.dtype = torch.float32
    grad_cache: bool = False
    cuda_graph: bool = False
    flush_denormal: bool = False
    out_of_memory: str = "The device's memory is used up; give a smaller --batch-size, or more processes."
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluate_every: int = 0
    publish: Callable[[int], None] | None = None
    keep_inputs: Callable[[], None] | None = None

    @property
    def views_per_step(self) -> int:
        """Views that all processes take in a step."""
        return self.batch_size * self.method.num_views


def train(
    task: Task,
    run: RunFolder,
    config: TrainingConfig,
    world: DistributedContext,
    *,
    start_step: int,
    progress: ProgressCallback,
) -> Outcome:
    """Train from `start_step` to the end, or until a signal asks to stop.

    Args:
        config: Says how many threads prepare batches, how often records and checkpoints are written, and how many
            checkpoints are kept; nothing else of it is read.

    Raises:
        UserError: The loss or the weights became non-finite (the last good checkpoint is kept), or the disk refused.
    """
    model = training_module(task, world)
    replayed = _replayed_updates(model, task, world) if task.cuda_graph else None
    device = next(task.method.parameters()).device
    finite = torch.ones((), dtype=torch.bool, device=device)
    outcome = Outcome(step=start_step, finished=start_step >= task.total_steps)
    clock = time.perf_counter()
    if start_step and world.is_main:
        _catch_up(task, run, start_step, outcome, config.max_checkpoints)

    with _stop_signals() as signals, Prefetcher(task.batch, start_step, task.total_steps, config.workers) as batches:
        for step, inputs in batches:
            done = step + 1
            last = done == task.total_steps
            evaluate = task.evaluate_every > 0 and (done % task.evaluate_every == 0 or last)
            log = done % config.log_every == 0 or evaluate or last

            loss, metrics = take_step(model, task, step, inputs, world, detail=log, replayed=replayed)
            finite &= torch.isfinite(loss)

            outcome.step, outcome.steps_run = done, outcome.steps_run + 1
            outcome.steps_replayed = 0 if replayed is None else replayed.count
            interrupted = world.any_rank(bool(signals))
            save = done % config.save_every == 0 or last or interrupted

            if log or save:
                _stop_if_broken(finite, task, run, world, done)
            if log:  # the only synchronisation with the device
                outcome.last = _record(task, step, metrics, evaluate=evaluate and world.is_main)
                outcome.seconds, outcome.wait_seconds = time.perf_counter() - clock, batches.wait_seconds
                _report(outcome, task, run, progress, world)
            else:
                progress.step(done)
            if save and world.is_main:
                with run.writing():
                    run.sync()
                    _save(task, run, done, world, config.max_checkpoints)
            if interrupted:
                outcome.signal = next(iter(signals), signal.SIGTERM)
                break

    outcome.finished = outcome.step >= task.total_steps
    outcome.seconds, outcome.wait_seconds = time.perf_counter() - clock, batches.wait_seconds
    return outcome


def _report(
    outcome: Outcome, task: Task, run: RunFolder, progress: ProgressCallback, world: DistributedContext
) -> None:
    """Show the newest record, and append it to the files of the run."""
    outcome.warnings = task.method.warnings(outcome.last)
    progress.record(outcome.last, outcome)
    if world.is_main:
        run.append(run.metrics, outcome.last)
        run.append(run.timing, {"step": outcome.step} | _timing(outcome, task))


def _record(task: Task, step: int, metrics: dict[str, Tensor], *, evaluate: bool) -> dict[str, float]:
    """The record of a step: its number counted from 1, learning rate and metrics."""
    record = {"step": step + 1, "lr": task.learning_rate(step)}
    record |= {name: float(value) for name, value in metrics.items()}
    return record | task.evaluate() if evaluate and task.evaluate is not None else record


def _save(task: Task, run: RunFolder, step: int, world: DistributedContext, max_checkpoints: int) -> None:
    """Write the checkpoint of a step, then publish what was trained."""
    state = {
        "step": step,
        "method": task.method.state_dict(),
        "optimizer": task.optimizer.state_dict(),
        "processes": world.size,
    }
    save_checkpoint(run.checkpoints, step, state, max_checkpoints=max_checkpoints, resuming=run.resuming)
    if task.publish is not None:
        task.publish(step)


def _catch_up(task: Task, run: RunFolder, step: int, outcome: Outcome, max_checkpoints: int) -> None:
    """Do what a process that was killed after writing the checkpoint of `step` did not come to."""
    remove_oldest(run.checkpoints, max_checkpoints=max_checkpoints)
    if task.publish is not None:
        with run.writing():
            task.publish(step)
    records = run.read_metrics()
    if records:
        outcome.last = records[-1]
        outcome.warnings = task.method.warnings(outcome.last)


def restore(task: Task, run: RunFolder, world: DistributedContext) -> int:
    """Load the run's newest good checkpoint into the task, on every process; the step that it was written after."""
    loaded = load_newest(run.checkpoints, say if world.is_main else lambda _: None)
    world.barrier()  # nobody reads any more: the main process may tidy up
    start = 0
    if loaded is not None:
        start, state = loaded
        processes = _load(task, state, f"The checkpoint of step {start} in {run.checkpoints}")
        if processes != world.size:
            say(
                f"The run was trained by {processes} processes and continues with {world.size}: the same up "
                "to rounding, not bit for bit.",
                main=world.is_main,
            )
    elif checkpoints(run.checkpoints):
        say("No checkpoint is whole: starting again from step 0.", main=world.is_main)
    if world.is_main:
        with run.writing():
            set_aside_newer(run.checkpoints, start)
            run.rewind(start)
    return start


def _load(task: Task, state: dict[str, Any], name: str) -> int:
    """Put a checkpoint's state into the task; the number of processes that wrote it.

    Raises:
        UserError: It is of another network or optimiser.
    """
    try:
        task.method.load_state_dict(state["method"])
        task.optimizer.load_state_dict(state["optimizer"])
        for parameter, values in task.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{key} has shape {tuple(value.shape)}, its weights {tuple(parameter.shape)}")
        return int(state["processes"])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        what = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch lists every tensor
        raise UserError(
            f"{name} does not fit the settings that the run began with ({what}); restore the run's settings or its "
            "checkpoints, or start a new run."
        ) from None


def take_step(
    model: nn.Module,
    task: Task,
    step: int,
    inputs: Inputs,
    world: DistributedContext,
    *,
    detail: bool = False,
    replayed: ReplayedUpdates | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One update of the weights; the loss and metrics before it, without gradient.

    Args:
        model: The task's method as it is called in training (`training_module`).
        inputs: The task's batch of this step.
        detail: As the method takes it.
        replayed: Does the update unless `detail` is asked for.
    """
    torch.manual_seed(_step_seed(task.seed, step, world))
    set_lr(task.optimizer, task.learning_rate(step))
    task.method.prepare_step(step)
    if replayed is not None and not detail:
        return replayed(*inputs)
    return _update(model, task, world.device, inputs, detail=detail)


def _update(
    model: nn.Module, task: Task, device: torch.device, inputs: Inputs, *, detail: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    with _autocast(device, task.precision):
        loss, metrics = model(*inputs, detail=detail)
    task.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    task.optimizer.step()
    return loss.detach(), metrics


def _replayed_updates(model: nn.Module, task: Task, world: DistributedContext) -> ReplayedUpdates:
    def update(*inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return _update(model, task, world.device, inputs)

    return ReplayedUpdates(update, task.optimizer, CudaRecorder(world.device))


class Prefetcher:
    """Batches in the order of their steps, prepared ahead by threads; how many changes no batch."""

    def __init__(self, batch: Callable[[int], Inputs], start: int, stop: int, workers: int) -> None:
        self._batch, self._start, self._stop = batch, start, stop
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="views") if workers else None
        self._ahead = workers
        self.wait_seconds = 0.0

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, Inputs]]:
        if self._pool is None:
            for step in range(self._start, self._stop):
                begun = time.perf_counter()
                inputs = self._batch(step)
                self.wait_seconds += time.perf_counter() - begun
                yield step, inputs
            return
        pending = deque()
        for step in range(self._start, min(self._start + self._ahead, self._stop)):
            pending.append(self._pool.submit(self._batch, step))
        for step in range(self._start, self._stop):
            begun = time.perf_counter()
            inputs = pending.popleft().result()
            self.wait_seconds += time.perf_counter() - begun
            if step + self._ahead < self._stop:
                pending.append(self._pool.submit(self._batch, step + self._ahead))
            yield step, inputs


def training_module(task: Task, world: DistributedContext) -> nn.Module:
    """The method as it is called in training: with cached gradients, averaged over processes, where that applies."""
    module = GradCache(task.method) if task.grad_cache else task.method
    return _over_processes(module) if world.size > 1 else module


def _over_processes(module: nn.Module) -> DistributedDataParallel:
    """Average gradients over the processes; buffers stay each process's own (global batch norm keeps them equal)."""
    with warnings.catch_warnings():  # torch 2.15 deprecates the flag, torch 2.11 knows no other
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def _autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def _step_seed(seed: int, step: int, world: DistributedContext) -> int:
    """Dropout and stochastic depth draw from the step too; no generator's state needs saving."""
    return ((seed << 40) + step * world.size + world.rank) % 2**63


def _stop_if_broken(finite: Tensor, task: Task, run: RunFolder, world: DistributedContext, step: int) -> None:
    """Raise in all processes at the same step where one of them has seen a loss or weights that are not finite."""
    weights = torch.stack(torch._foreach_norm([p.detach() for p in task.method.parameters()]))
    if world.any_rank(not bool(finite & torch.isfinite(weights).all())):
        kept = "the last good checkpoint is kept" if checkpoints(run.checkpoints) else "there is no earlier checkpoint"
        raise Diverged(
            f"The loss or the weights were no longer finite at step {step}; nothing of that was saved, {kept}. "
            + task.method.remedy
        )


def _timing(outcome: Outcome, task: Task) -> dict[str, float]:
    views = outcome.steps_run * task.views_per_step
    return {
        "seconds": round(outcome.seconds, 3),
        "views_per_second": round(views / outcome.seconds, 1),
        "wait_share": round(outcome.wait_seconds / outcome.seconds, 4),
    }


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM ask the loop to save and stop by joining this list; a second Ctrl-C stops at once."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def on_signal(signum: int, _frame: object) -> None:
        if signals and signum == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(signum)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
