"""Before a run: what fits, what it costs, how long it takes on this machine (`simclr plan DATA`).

Memory is counted on two tiny batches (training/memory.py). Time is measured on steps that train exactly as the run
would, on its own images, for each memory strategy: at the run's batch where that fits and takes seconds, else at a
smaller one, and extended: encoder and views grow with the images, the loss with their square, the update not at all.

Shapes: n images per step.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simclr import distributed
from simclr.config.overrides import Overrides
from simclr.config.pretrain import PretrainConfig, refuse_unused_head_settings
from simclr.config.recipes import choose_recipe, find_recipe
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.methods import find_method
from simclr.methods.method import Method
from simclr.tasks.initial import InitialWeights, open_initial
from simclr.tasks.opening import DataOptions, open_aloud, require_writable, write
from simclr.tasks.pretrain import settled
from simclr.tasks.pretrain_images import build_method, build_task, check_images, check_settings, num_classes_of
from simclr.tasks.pretrain_views import describe_views
from simclr.training.device import choose_kernels, precision_of
from simclr.training.loop import Prefetcher, Task, take_step, training_module
from simclr.training.memory import Footprint, MemoryStrategy, available, list_strategies, measure, parse_bytes, readable
from simclr.training.progress import duration
from simclr.training.run import RunFolder

if TYPE_CHECKING:
    from simclr.tasks.options.pretraining import Plan as PlanOptions

SECONDS_PER_STRATEGY = 6.0
"""What measuring a strategy may take, about: three strategies and the counting stay under half a minute."""

STEPS = 3
"""Steps that are timed, after a warm-up that empties the queue of views prepared ahead."""

LOSS_UP_TO = 4096
"""Images up to which the loss is timed; beyond, its time is taken to grow with their square."""


@dataclass(frozen=True, kw_only=True)
class StrategyPlan:
    """A strategy with its memory and its time."""

    name: str
    chunk: int
    """Images in a chunk; 0 except for grad-cache."""
    need_bytes: int
    fits: bool
    timed_at: int
    """Images of the steps that were timed; 0: not even the smallest fits."""
    step_seconds: float | None
    """At the run's batch: measured if that is `timed_at`, else predicted."""
    views_per_second: float | None
    epoch_seconds: float | None
    run_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `simclr plan` says."""

    data: str
    images: int
    channels: int
    recipe: str
    encoder: str
    encoder_parameters: int
    head_parameters: int
    frozen_parameters: int
    """Parameters without gradient, such as those of a momentum encoder."""
    size: int
    view_sizes: list[int]
    """Height and width, in pixels, of each view of an image."""
    batch_size: int
    epochs: int
    steps: int
    device: str
    budget_bytes: int
    strategies: list[StrategyPlan]
    choice: str | None
    """The strategy that `simclr pretrain` would take; None: none fits."""
    checkpoint_bytes: int
    checkpoints_kept: int
    encoder_bytes: int
    initial_bytes: int = 0
    """Of the copy of the initial weights that a run with --init keeps."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The plan as text."""
        disk = self.checkpoints_kept * self.checkpoint_bytes + self.encoder_bytes + self.initial_bytes
        lines = [
            f"{self.data}: {self.images:,} images, {'gray' if self.channels == 1 else 'colour'}",
            f"recipe {self.recipe}: {self.encoder} with {self.encoder_parameters:,} parameters, and "
            f"{self.head_parameters:,} in the head; {describe_views(self.view_sizes)}",
            *([f"{self.frozen_parameters:,} more parameters without gradient"] if self.frozen_parameters else []),
            f"{self.batch_size:,} images per step, {self.steps:,} steps, {self.epochs:,} epochs",
            f"{self.device}, memory budget {readable(self.budget_bytes)}",
            "",
            f"{'strategy':<24}{'memory':>10}{'step':>12}{'views/s':>10}{'epoch':>10}{'run':>11}",
        ]
        for strategy in self.strategies:
            name = f"grad-cache, chunks of {strategy.chunk:,}" if strategy.chunk else strategy.name
            verdict = "" if strategy.fits else "  does not fit"
            if strategy.name == self.choice:
                verdict = "  <- chosen by pretrain"
            lines.append(f"{name:<24}{readable(strategy.need_bytes):>10}{_times(strategy, self.batch_size)}{verdict}")
        lines += ["", *_how_timed(self.strategies, self.batch_size)]
        if self.choice is None:
            lines.append("No strategy fits: give a smaller --batch-size, --size, --width or --encoder.")
        elif self.choice == "grad-cache":
            lines.append(
                "With gradient caching the loss is that of all images, and batch norm has the statistics of one chunk."
            )
        kept = f", the weights it begins from of {readable(self.initial_bytes)}" if self.initial_bytes else ""
        lines.append(
            f"On disk: {readable(disk)} ({self.checkpoints_kept} checkpoints of {readable(self.checkpoint_bytes)}, "
            f"the encoder of {readable(self.encoder_bytes)}{kept}). Evaluation and checkpoints take additional time."
        )
        return "\n".join(lines)


def plan(options: "PlanOptions", overrides: Overrides) -> Plan:
    """Print the plan of a run as a table, and write it as JSON on request."""
    if options.json is not None:
        require_writable(options.json)
    recipe = find_recipe(options.recipe) if options.recipe else None
    budget = parse_bytes(options.memory_budget) if options.memory_budget else None
    with distributed.joined(options.config.device) as world:
        settings = overrides(recipe.config if recipe else PretrainConfig())
        initial, overrides = open_initial(settings, overrides, pretrained=False)
        settings = overrides(settings)
        refuse_unused_head_settings(overrides.values, settings)
        check_settings(settings, world)
        reading = replace(DataOptions().reading(world, channels=settings.channels), completes_pack=False)
        images = open_aloud(options.data, world, reading)
        name = (recipe or choose_recipe(images, on_gpu=world.device.type == "cuda", method=settings.method)[0]).name
        config = settled(recipe, images, overrides, world)
        planned = measure_plan(images, config, world, recipe=name, budget=budget, initial=initial)
    print(planned.table())
    if options.json is not None:
        write(options.json, (json.dumps(planned.to_dict(), indent=2) + "\n").encode())
    return planned


def measure_plan(
    images: Images, config: PretrainConfig, world: DistributedContext, *, recipe: str, budget: int | None = None,
    initial: InitialWeights | None = None,
) -> Plan:  # fmt: skip
    """Measure what `pretrain` with these settings would need. Writes nothing, and takes no more than fits.

    Args:
        recipe: The name to print.
        budget: Bytes that training may take; None: nearly all that are free.
        initial: What training would begin from; None: random weights.

    Raises:
        UserError: Images and settings do not go together, or there are several processes.
    """
    if world.size > 1:
        raise UserError(
            "simclr plan was started as several processes; leave torchrun out, and give --batch-size of one process."
        )
    check_images(images, config, world, initial=initial)
    choose_kernels(world, deterministic=config.deterministic)
    num_classes = num_classes_of(images, find_method(config.method), config)
    method = build_method(config, images.channels, world, initial=initial, num_classes=num_classes)
    budget = available(world) if budget is None else budget
    footprint = measure(method, config, images, precision_of(config.precision, world))
    strategies = []
    for strategy in list_strategies(footprint, config.batch_size, budget):
        if strategy.name == "grad-cache" and config.chunk:
            need = footprint.need("grad-cache", config.batch_size, config.chunk)
            strategy = MemoryStrategy(name="grad-cache", chunk=config.chunk, need=need)
        timing = _time(strategy, footprint, budget, images, config, method, world, initial)
        strategies.append(_strategy_plan(strategy, budget, timing, images, config, method.num_views))
    first = next((strategy.name for strategy in strategies if strategy.fits), None)
    trained = [p for p in method.parameters() if p.requires_grad]
    encoder_parameters = sum(p.numel() for p in method.encoder.parameters())
    optimizer_state = sum(p.nbytes for p in trained) * (2 if config.optimizer == "adamw" else 1)
    return Plan(
        data=images.name,
        images=len(images),
        channels=images.channels,
        recipe=recipe,
        encoder=config.encoder,
        encoder_parameters=encoder_parameters,
        head_parameters=sum(p.numel() for p in trained) - encoder_parameters,
        frozen_parameters=sum(p.numel() for p in method.parameters() if not p.requires_grad),
        size=config.size,
        view_sizes=list(method.view_sizes),
        batch_size=config.batch_size,
        epochs=config.epochs,
        steps=config.steps(len(images)),
        device=_device_name(world),
        budget_bytes=budget,
        strategies=strategies,
        choice=first if config.memory == "auto" else config.memory,
        checkpoint_bytes=sum(t.nbytes for t in method.state_dict().values()) + optimizer_state,
        checkpoints_kept=config.max_checkpoints,
        encoder_bytes=sum(t.nbytes for t in method.encoder.state_dict().values()),
        initial_bytes=0 if initial is None else sum(t.nbytes for t in initial.encoder.state_dict().values()),
    )


def _strategy_plan(
    strategy: MemoryStrategy,
    budget: int,
    timing: tuple[int, float | None],
    images: Images,
    config: PretrainConfig,
    num_views: int,
) -> StrategyPlan:
    """Memory and time of a strategy, from the images of the steps that were timed and the seconds of a step."""
    timed_at, seconds = timing
    return StrategyPlan(
        name=strategy.name,
        chunk=strategy.chunk,
        need_bytes=strategy.need,
        fits=strategy.need <= budget,
        timed_at=timed_at,
        step_seconds=seconds,
        views_per_second=num_views * config.batch_size / seconds if seconds else None,
        epoch_seconds=seconds * len(images) / config.batch_size if seconds else None,
        run_seconds=seconds * config.steps(len(images)) if seconds else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Timing:
    """Seconds of a step, and of its update of the weights, which does not grow with the batch."""

    step: float
    update: float


def _time(
    strategy: MemoryStrategy,
    footprint: Footprint,
    budget: int,
    images: Images,
    config: PretrainConfig,
    method: Method,
    world: DistributedContext,
    initial: InitialWeights | None,
) -> tuple[int, float | None]:
    """Images of the steps that were timed, and seconds of one at the run's batch; (0, None) if none can be timed."""
    n = config.batch_size

    def chunk_of(m: int) -> int:
        if strategy.chunk == 0 or m == n:
            return strategy.chunk
        return next(chunk for chunk in range(min(strategy.chunk, m // 2), 0, -1) if m % chunk == 0)

    def timing(m: int) -> _Timing:
        smaller = replace(config, batch_size=m, memory=strategy.name, chunk=chunk_of(m))
        return _time_steps(
            build_task(images, smaller, RunFolder(Path()), world, initial=initial), config.workers, world
        )

    multiple = method.trial_multiple
    few = min(n, -(-(4 if config.size > 96 else 32) // multiple) * multiple)
    sizes = [n, *(2**k for k in reversed(range(n.bit_length())))]  # n, and the powers of two below
    sizes = [
        m
        for m in sizes
        if m >= few and (m == n or m % multiple == 0) and footprint.need(strategy.name, m, chunk_of(m)) <= budget
    ]
    if few not in sizes:
        return 0, None
    timed = timing(few)
    per_image = timed.step * (max(2, config.workers) + STEPS) / few
    at = next((m for m in sizes if m * per_image <= SECONDS_PER_STRATEGY), few)
    if at > few:
        timed = timing(at)
    if at == n:
        return n, timed.step
    in_proportion = timed.step - timed.update - _loss_seconds(method, at, world)
    return at, max(in_proportion, 0) * n / at + timed.update + _loss_seconds(method, n, world)


def _time_steps(task: Task, workers: int, world: DistributedContext) -> _Timing:
    """Steps as in training, views prepared by its threads; fewer where a step takes long."""
    warm_up = max(2, workers)  # until the views prepared ahead are used up
    started = _now(world)
    begun, timed = 0.0, 0
    model = training_module(task, world)
    with Prefetcher(task.batch, 0, warm_up + STEPS + workers, workers) as batches:
        for step, inputs in batches:
            take_step(model, task, step, inputs, world)
            now = _now(world)
            if begun:
                timed += 1
            elif step + 1 == warm_up or now - started > SECONDS_PER_STRATEGY / 3:
                begun = now
            if timed == STEPS or (timed and now - started > SECONDS_PER_STRATEGY):
                break
    seconds = (_now(world) - begun) / timed
    begun = _now(world)
    task.optimizer.step()
    return _Timing(step=seconds, update=_now(world) - begun)


def _loss_seconds(method: Method, n: int, world: DistributedContext) -> float:
    """Forward and backward of the loss of n images; 0 of a method that does not split its forward pass."""
    if not method.grad_cache:
        return 0.0
    timed = min(n, LOSS_UP_TO)
    with torch.no_grad():
        inputs = method.trial_inputs(2)
        features, projections = method.encode(*inputs)
    others = [x[torch.arange(timed, device=x.device) % 2] for x in inputs[method.num_views :]]  # labels, if any
    rows = timed * method.num_views
    h = torch.randn(rows, features.shape[1], device=world.device)
    z = torch.randn(rows, projections.shape[1], device=world.device, requires_grad=True)
    method.loss(h, z, *others)[0].backward()
    begun = _now(world)
    method.loss(h, z, *others)[0].backward()
    return (_now(world) - begun) * (n / timed) ** 2


def _now(world: DistributedContext) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


def _times(strategy: StrategyPlan, batch_size: int) -> str:
    """Columns of the table; a tilde marks what is predicted."""
    if strategy.step_seconds is None or strategy.views_per_second is None:
        return f"{'-':>12}{'-':>10}{'-':>10}{'-':>11}"
    assert strategy.epoch_seconds is not None and strategy.run_seconds is not None
    about = "" if strategy.timed_at == batch_size else "~"
    step, rate = f"{about}{strategy.step_seconds:.3g} s", strategy.views_per_second
    views = f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}"
    return f"{step:>12}{views:>10}{duration(strategy.epoch_seconds):>10}{duration(strategy.run_seconds):>11}"


def _how_timed(strategies: list[StrategyPlan], batch_size: int) -> list[str]:
    """What the tilde means, if there is one."""
    at = sorted({strategy.timed_at for strategy in strategies if 0 < strategy.timed_at < batch_size})
    return [f"~ predicted from steps of {' and '.join(f'{m:,}' for m in at)} images."] if at else []


def _device_name(world: DistributedContext) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
