"""The memory ladder: how a step that does not fit is made to fit, and which rung a run takes.

    plain      every activation is kept for backward
    recompute  only the inputs of blocks are (models/recompute.py); the same result, a step about a third longer
    cache      one chunk of the batch at a time (methods/caching.py), about a third longer; the loss is that of the
               whole batch, but batch norm sees chunks, so the chunk is part of the result and is saved with the run

The first rung that fits is taken. What a step needs is counted on two tiny batches and extended in a straight line,
which it is: all that grows with the batch grows in proportion, but for the loss's tiles, which have a fixed size.

Shapes: n images on this process, two views of each, (C, S, S) pixels.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from simclr.config.pretrain import PretrainConfig
from simclr.data.images import Images
from simclr.distributed import World
from simclr.errors import UserError
from simclr.methods.simclr import SimCLR
from simclr.models.recompute import can_recompute, recompute_blocks
from simclr.training.meter import free_bytes, peak_bytes

RungName = Literal["plain", "recompute", "cache"]

MARGIN = 1.15
"""On counted activations, for what the count cannot see: workspaces of kernels, gaps of the allocator."""

SPARE = 0.1
"""Share of the free memory that is left alone where the user names no budget."""

LEAST_CHUNK = 8
"""Images; batch norm over fewer than 16 views is noise, so a smaller chunk is only taken where it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Bytes of activations and their gradients in a step of n images."""

    fixed: float
    per_image: float

    def at(self, n: int) -> float:
        return (self.fixed + self.per_image * n) * MARGIN


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a step of these settings needs, on each rung."""

    weights: int
    """Gradients, optimiser state and the update's temporaries."""
    views: int
    """Both finished views of an image."""
    pixels: float
    """An image as it was decoded, if that takes the device's memory."""
    projections: int
    """What gradient caching keeps of an image: features and projections of both views, and gradients."""
    ahead: int
    """Batches prepared beside the one in use."""
    plain: Line
    recompute: Line | None
    """None: the encoder cannot."""

    def need(self, rung: RungName, n: int, chunk: int = 0) -> int:
        """Bytes beyond the weights themselves for a step of n images."""
        if rung == "cache":
            waiting = (1 + self.ahead) * n * self.pixels
            kept = n * self.projections + chunk * self.views + waiting
            return int(self.weights + kept + self.plain.at(chunk))
        line = self.plain if rung == "plain" else self.recompute
        assert line is not None
        return int(self.weights + (1 + self.ahead) * n * self.views + line.at(n))


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A way to take a step, with its need in bytes."""

    name: RungName
    chunk: int
    """Images of this process in a chunk; 0 but for cache."""
    need: int


def ladder(footprint: Footprint, n: int, budget: int) -> list[Rung]:
    """The rungs for n images on this process, cheapest step first; the chunk is the largest that fits the budget, or
    the smallest that is sensible."""
    rungs = [Rung(name="plain", chunk=0, need=footprint.need("plain", n))]
    if footprint.recompute is not None:
        rungs.append(Rung(name="recompute", chunk=0, need=footprint.need("recompute", n)))
    chunks = [chunk for chunk in range(n // 2, 0, -1) if n % chunk == 0] or [n]
    chunks = [chunk for chunk in chunks if chunk >= LEAST_CHUNK] or chunks[:1]
    chunk = next((chunk for chunk in chunks if footprint.need("cache", n, chunk) <= budget), chunks[-1])
    return [*rungs, Rung(name="cache", chunk=chunk, need=footprint.need("cache", n, chunk))]


def choose(footprint: Footprint, n: int, budget: int) -> Rung:
    """The first rung that fits.

    Raises:
        UserError: None does.
    """
    rungs = ladder(footprint, n, budget)
    for rung in rungs:
        if rung.need <= budget:
            return rung
    least = min(rungs, key=lambda rung: rung.need)
    how = f"{least.name} in chunks of {least.chunk}" if least.chunk else least.name
    raise UserError(
        f"--batch-size gives a process {n:,} images, which need {readable(least.need)} even with --memory {how}, and "
        f"there are {readable(budget)}; give a smaller --size, --width or --encoder, or a batch that splits evenly "
        f"into chunks of {LEAST_CHUNK} images a process."
    )


def settle(
    config: PretrainConfig,
    images: Images,
    build: Callable[[], SimCLR],
    world: World,
    *,
    precision: torch.dtype,
    budget: int | None,
) -> tuple[PretrainConfig, str]:
    """The settings with rung and chunk resolved, the same on all processes, and a sentence that says so.

    Args:
        build: Makes a method to measure, on its device and without exchange with other processes.
        precision: Of autocast.
        budget: Bytes that a process may take; None: nearly all that is free on the fullest device.

    Raises:
        UserError: Nothing fits.
    """
    if config.memory in ("plain", "recompute") or config.chunk:
        return config, "" if budget is None else f"The memory budget decides nothing: --memory is {config.memory}."
    n = config.batch_size // world.size
    method = build()  # first: what its weights take is no longer free
    budget = available(world) if budget is None else budget
    footprint = measure(method, config, images, precision)
    rung = ladder(footprint, n, budget)[-1] if config.memory == "cache" else choose(footprint, n, budget)
    rung = world.broadcast(rung)
    return replace(config, memory=rung.name, chunk=rung.chunk), describe(rung, n, budget)


def available(world: World) -> int:
    """Bytes that each process may count on: nearly all that is free on the fullest device."""
    free = torch.tensor(free_bytes(world))
    return int(int(world.all_gather_rows(free[None]).min()) * (1 - SPARE))


def describe(rung: Rung, n: int, budget: int) -> str:
    """The choice in one sentence."""
    fits = f"{readable(rung.need)} of {readable(budget)}"
    if rung.name == "plain":
        return f"Memory: a step needs about {fits}."
    if rung.name == "recompute":
        return f"Memory: recompute, which needs about {fits}; each block runs twice, the result stays the same."
    return (
        f"Memory: cache, {n // rung.chunk} chunks of {rung.chunk} images, about {fits}; the loss is that of all "
        f"{n:,} images, batch norm sees a chunk at a time."
    )


def out_of_memory(config: PretrainConfig) -> UserError:
    """What to say when the device's memory gave out after all."""
    rung = f"cache --chunk {config.chunk}" if config.chunk else config.memory
    next_rung = {"plain": "recompute", "recompute": "cache", "cache": f"cache --chunk {max(1, config.chunk // 2)}"}
    return UserError(
        f"The device ran out of memory with --memory {rung} and {config.batch_size:,} images a step; start a new run "
        f"with --memory {next_rung[config.memory]}, or with a --memory-budget below what was free."
    )


def measure(method: SimCLR, config: PretrainConfig, images: Images, precision: torch.dtype) -> Footprint:
    """Count two tiny steps of `method`, on its device and on noise, on each rung; its running statistics change."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    state = 2 if config.optimizer == "adamw" else 1
    on_cpu = parameters[0].device.type == "cpu"
    plain = _line(method, images.channels, config.size, precision)
    again = None
    if can_recompute(method.encoder.backbone):
        recompute_blocks(method.encoder.backbone)
        again = _line(method, images.channels, config.size, precision)
    return Footprint(
        weights=sum(p.nbytes for p in parameters) * (1 + state + 2),  # 2: LARS's decayed and scaled gradients
        views=2 * 4 * images.channels * config.size**2,
        pixels=float(images.sizes.prod(1).mean()) * images.channels if on_cpu else 0,
        projections=2 * 4 * (method.encoder.num_features + 3 * method.head.dim),
        ahead=config.workers,
        plain=plain,
        recompute=again,
    )


def _line(method: SimCLR, channels: int, size: int, precision: torch.dtype) -> Line:
    few = 2 if size > 96 else 8
    first, second = (_count(method, (n, channels, size, size), precision) for n in (few, 2 * few))
    per_image = (second - first) / few
    return Line(fixed=first - few * per_image, per_image=per_image)


def _count(method: SimCLR, shape: tuple[int, ...], precision: torch.dtype) -> int:
    device = next(method.parameters()).device
    views = [torch.rand(shape, device=device).to(memory_format=torch.channels_last) for _ in range(2)]

    def step() -> list[Tensor]:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss, _ = method(*views)
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
