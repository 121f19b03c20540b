"""The one assembly of a training, whatever the method: from a task and a folder to trained weights on the disk.

Pretraining, fine-tuning, training from scratch and distillation each build a `Task`; what happens to it is here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from simclr.config.training import TrainingConfig
from simclr.distributed import DistributedContext
from simclr.errors import Stopped, UserError
from simclr.training.device import choose_kernels, same_threads
from simclr.training.lock import hold
from simclr.training.loop import Outcome, Task, restore, train
from simclr.training.progress import Progress, ProgressCallback, StepCallback, say
from simclr.training.run import RunFolder, claim


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where a training runs, and where it is recorded: what `fit` is given beside the task and its settings."""

    world: DistributedContext | None = None
    """The processes that share each batch; None: this process, where the encoder is."""
    run: Path | RunFolder | None = None
    """Folder for records, checkpoints and the network (`simclr.load(run).classify`); where it holds an unfinished
    training of the same settings, that goes on bit for bit. None: nothing is kept."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of run.json (`RunRecord`): data, task."""
    progress: Callable[[int, int], None] | None = None
    """Called with (done, total) steps."""


HERE = Execution()
"""In this process; nothing is kept."""


def fit(
    task: Task,
    run: RunFolder,
    config: TrainingConfig,
    world: DistributedContext,
    *,
    manifest: Mapping[str, Any] | None = None,
    progress: ProgressCallback | Callable[[int, int], None] | None = None,
) -> Outcome:
    """Train, from the newest good checkpoint of the run's folder if it has one, until the end.

    Args:
        task: What is trained, with weights as they are before the first step.
        run: Folder of records, checkpoints and published weights; only the main process writes to it, and no other
            process can while this one trains.
        config: Settings that the task was built from.
        world: The processes that share each batch.
        manifest: What run.json is to hold, beside settings and machine, of a new run; a folder that holds a run must
            have the same method and inputs. None: the folder exists and is known to be right.
        progress: Told of each step and record; a function is called with (done, total) steps. None: a bar or lines on
            standard error.

    Raises:
        Stopped: A signal asked to stop; what was trained is saved, and a call with the same arguments continues.
        UserError: The folder holds another training, another process writes it, memory or disk are full, or the loss is
            not finite.
    """
    with hold(run.path, world):
        # 1. One folder: made now, when all else is known to be good, or known to hold this very training.
        if manifest is not None:
            world.on_main(partial(claim, run, config, manifest, task.keep_inputs))
        # 2. One arithmetic: sums depend on the number of threads and on the kernels.
        threads = world.on_main(lambda: run.cpu_threads if run.exists else None)
        if threads is not None:
            same_threads(threads, world)
        choose_kernels(world, deterministic=config.deterministic)
        # 3. Weights, optimiser and step of the newest good checkpoint; records after that step are dropped.
        start = restore(task, run, world)
        # 4. The loop. Order, views and random numbers are functions of the step, so nothing else has to be restored.
        with _displayed(progress, task, start, world) as callback, _arithmetic(task):
            try:
                outcome = train(task, run, config, world, start_step=start, progress=callback)
            except torch.OutOfMemoryError:
                raise UserError(task.out_of_memory) from None
        # 5. A signal, even one during the last step: whatever would follow the training must not begin.
        if outcome.signal is not None:
            saved = f", saved; {run.resuming} continues" if run.lasting else ""
            raise Stopped(f"Stopped at step {outcome.step}{saved}.", outcome.signal)
        return outcome


@contextmanager
def temporary_run(world: DistributedContext) -> Iterator[RunFolder]:
    """A run's folder that is removed at the end of the block."""
    with TemporaryDirectory(prefix="simclr-") if world.is_main else nullcontext("") as scratch:
        run = RunFolder(Path(world.broadcast(scratch)), lasting=False)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        yield run


@contextmanager
def _displayed(
    progress: ProgressCallback | Callable[[int, int], None] | None, task: Task, start: int, world: DistributedContext
) -> Iterator[ProgressCallback]:
    if progress is not None:
        yield StepCallback(progress, task.total_steps) if callable(progress) else progress
        return
    say(f"Resuming at step {start} of {task.total_steps}.", main=world.is_main and start > 0)
    formats = task.method.metric_formats
    with Progress(task.total_steps, start, task.views_per_step, formats=formats, main=world.is_main) as bar:
        yield bar


@contextmanager
def _arithmetic(task: Task) -> Iterator[None]:
    if not task.flush_denormal:
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
