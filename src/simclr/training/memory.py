"""The memory strategies: how a step that does not fit is made to fit, and which strategy a run takes.

    plain          every activation is kept for backward
    checkpointing  only the inputs of blocks are kept (models/activation_checkpointing.py); same result, 4/3 of the time
    grad-cache     one chunk of the batch at a time (training/grad_cache.py), 4/3 of the time; the loss is that of
                   the whole batch, but batch norm sees chunks, so the chunk is part of the result and is saved

The first strategy that fits is taken. What a step needs is counted on two tiny batches and extended in a straight line,
which it is: all that grows with the batch grows in proportion, but for the loss's tiles, which have a fixed size.

Shapes: n images on this process, V views of each, (C, S, S) pixels.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from simclr.config.pretrain import PretrainConfig
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.methods.method import Method
from simclr.models.activation_checkpointing import can_checkpoint, checkpoint_blocks
from simclr.training.meter import free_bytes, peak_bytes

MemoryStrategyName = Literal["plain", "checkpointing", "grad-cache"]

MARGIN = 1.15
"""On counted activations, for what the count cannot see: workspaces of kernels, gaps of the allocator."""

SPARE = 0.1
"""Share of the free memory that is left alone where the user names no budget."""

MIN_CHUNK = 8
"""Images; batch norm over fewer than 16 views is noise, so a smaller chunk is only taken where it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Bytes of activations and their gradients in a step of n images."""

    fixed: float
    per_image: float

    def at(self, n: int) -> float:
        """Bytes of a step of n images, with the margin."""
        return (self.fixed + self.per_image * n) * MARGIN


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a step of these settings needs, on each strategy."""

    weights: int
    """Gradients, optimiser state and the update's temporaries."""
    views: int
    """All finished views of an image."""
    pixels: float
    """An image as it was decoded, if that takes the device's memory."""
    projections: int | None
    """What gradient caching keeps of an image: features and projections of its views, and gradients; None: the method
    cannot cache gradients."""
    ahead: int
    """Batches prepared beside the one in use."""
    plain: Line
    recompute: Line | None
    """None: the encoder cannot."""

    def need(self, strategy: MemoryStrategyName, n: int, chunk: int = 0) -> int:
        """Bytes beyond the weights themselves for a step of n images."""
        if strategy == "grad-cache":
            assert self.projections is not None
            waiting = (1 + self.ahead) * n * self.pixels
            kept = n * self.projections + chunk * self.views + waiting
            return int(self.weights + kept + self.plain.at(chunk))
        line = self.plain if strategy == "plain" else self.recompute
        assert line is not None
        return int(self.weights + (1 + self.ahead) * n * self.views + line.at(n))


@dataclass(frozen=True, kw_only=True)
class MemoryStrategy:
    """A way to take a step, with its need in bytes."""

    name: MemoryStrategyName
    chunk: int
    """Images of this process in a chunk; 0 except for grad-cache."""
    need: int


def list_strategies(footprint: Footprint, n: int, budget: int) -> list[MemoryStrategy]:
    """The strategies for n images on this process, fastest step first.

    The chunk is the largest that fits the budget, or the smallest that is sensible.
    """
    strategies = [MemoryStrategy(name="plain", chunk=0, need=footprint.need("plain", n))]
    if footprint.recompute is not None:
        strategies.append(MemoryStrategy(name="checkpointing", chunk=0, need=footprint.need("checkpointing", n)))
    if footprint.projections is None:
        return strategies
    chunks = [chunk for chunk in range(n // 2, 0, -1) if n % chunk == 0] or [n]
    chunks = [chunk for chunk in chunks if chunk >= MIN_CHUNK] or chunks[:1]
    chunk = next((chunk for chunk in chunks if footprint.need("grad-cache", n, chunk) <= budget), chunks[-1])
    return [*strategies, MemoryStrategy(name="grad-cache", chunk=chunk, need=footprint.need("grad-cache", n, chunk))]


def choose(footprint: Footprint, n: int, budget: int) -> MemoryStrategy:
    """The first strategy that fits.

    Raises:
        UserError: None does.
    """
    strategies = list_strategies(footprint, n, budget)
    for strategy in strategies:
        if strategy.need <= budget:
            return strategy
    smallest = min(strategies, key=lambda strategy: strategy.need)
    description = f"{smallest.name} in chunks of {smallest.chunk}" if smallest.chunk else smallest.name
    raise UserError(
        f"--batch-size gives a process {n:,} images, which need {readable(smallest.need)} even with --memory "
        f"{description}, and there are {readable(budget)}; give a smaller --size, --width or --encoder, or a "
        f"batch that splits evenly into chunks of {MIN_CHUNK} images per process."
    )


def settle(
    config: PretrainConfig,
    images: Images,
    build: Callable[[], Method],
    world: DistributedContext,
    *,
    precision: torch.dtype,
    budget: int | None,
) -> tuple[PretrainConfig, str]:
    """The settings with strategy and chunk resolved, the same on all processes, and a sentence that says so.

    Args:
        build: Makes a method to measure, on its device and without exchange with other processes.
        precision: Of autocast.
        budget: Bytes that a process may take; None: nearly all that is free on the fullest device.

    Raises:
        UserError: Nothing fits.
    """
    if config.memory in ("plain", "checkpointing") or config.chunk:
        return config, "" if budget is None else f"The memory budget decides nothing: --memory is {config.memory}."
    n = config.batch_size // world.size
    method = build()  # first: what its weights take is no longer free
    budget = available(world) if budget is None else budget
    footprint = measure(method, config, images, precision)
    strategy = (
        list_strategies(footprint, n, budget)[-1] if config.memory == "grad-cache" else choose(footprint, n, budget)
    )
    strategy = world.broadcast(strategy)
    return replace(config, memory=strategy.name, chunk=strategy.chunk), describe(strategy, n, budget)


def available(world: DistributedContext) -> int:
    """Bytes that each process may count on: nearly all that is free on the fullest device."""
    free = torch.tensor(free_bytes(world))
    return int(int(world.all_gather_rows(free[None]).min()) * (1 - SPARE))


def describe(strategy: MemoryStrategy, n: int, budget: int) -> str:
    """The choice in one sentence."""
    fits = f"{readable(strategy.need)} of {readable(budget)}"
    if strategy.name == "plain":
        return f"Memory: a step needs about {fits}."
    if strategy.name == "checkpointing":
        return f"Memory: activation checkpointing, about {fits}; each block runs twice, the result stays the same."
    return (
        f"Memory: gradient caching, {n // strategy.chunk} chunks of {strategy.chunk} images, about {fits}; the loss is "
        f"that of all {n:,} images, batch norm sees a chunk at a time."
    )


def out_of_memory(config: PretrainConfig) -> str:
    """What to say when the device's memory gave out after all."""
    strategy = f"grad-cache --chunk {config.chunk}" if config.chunk else config.memory
    next_strategy = {
        "auto": "checkpointing",
        "plain": "checkpointing",
        "checkpointing": "grad-cache",
        "grad-cache": f"grad-cache --chunk {max(1, config.chunk // 2)}",
    }
    return (
        f"The device ran out of memory with --memory {strategy} and {config.batch_size:,} images per step; start a new "
        f"run with --memory {next_strategy[config.memory]}, or with a --memory-budget below what was free."
    )


def measure(method: Method, config: PretrainConfig, images: Images, precision: torch.dtype) -> Footprint:
    """Count two tiny steps of `method`, on its device and on noise, on each strategy; its running statistics change."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    state = 2 if config.optimizer == "adamw" else 1
    on_cpu = parameters[0].device.type == "cpu"
    few = 2 if config.size > 96 else 8  # images
    few = -(-few // method.trial_multiple) * method.trial_multiple
    plain = _line(method, few, precision)
    again = None
    if can_checkpoint(method.encoder.backbone):
        checkpoint_blocks(method.encoder.backbone)
        again = _line(method, few, precision)
    return Footprint(
        weights=sum(p.nbytes for p in parameters) * (1 + state + 2),  # 2: LARS's decayed and scaled gradients
        views=sum(4 * images.channels * size**2 for size in method.view_sizes),
        pixels=float(images.sizes.prod(1).mean()) * images.channels if on_cpu else 0,
        projections=_cached_bytes(method) if method.grad_cache else None,
        ahead=config.workers,
        plain=plain,
        recompute=again,
    )


@torch.no_grad()
def _cached_bytes(method: Method) -> int:
    """Of an image: its features, its projections, and twice as much for their gradients; in fp32."""
    features, projections = method.encode(*method.trial_inputs(2))
    return 4 * (features.numel() + 3 * projections.numel()) // 2


def _line(method: Method, few: int, precision: torch.dtype) -> Line:
    first, second = (_count(method, n, precision) for n in (few, 2 * few))
    per_image = (second - first) / few
    return Line(fixed=first - few * per_image, per_image=per_image)


def _count(method: Method, n: int, precision: torch.dtype) -> int:
    device = next(method.parameters()).device
    inputs = method.trial_inputs(n)

    def step() -> list[Tensor]:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss, _ = method(*inputs)
        loss.backward()
        return [p.grad for p in method.parameters() if p.grad is not None]

    count = peak_bytes(step)
    method.zero_grad(set_to_none=True)
    return count


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes of "2GB", "1.5 GiB", "800M".

    Raises:
        UserError: Anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise UserError(f"--memory-budget was {text}; it must be an amount such as 2GB, 1.5GiB or 800MB.")
    return int(float(match[1]) * UNITS[match[2]])


def readable(count: float) -> str:
    """Bytes for people: 3.1 GB, 42 MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.3g} MB"
