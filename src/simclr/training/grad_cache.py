"""Gradient caching: a batch of any size in the memory of a part of it (GradCache, Gao et al. 2021,
arXiv:2101.06983).

    forward   each chunk of the images passes the network without a graph; only its projections are kept
    loss      over all projections, so every image is every other's negative; its gradient is taken as far as them
    backward  each chunk passes again, with a graph, which takes its projections' gradient on to the parameters

One more forward than an ordinary step, so about 4/3 of its time. The gradient is exact for what the network
computes, and that is chunk by chunk: batch norm sees one chunk at a time (docs/architecture.md, ghost batch norm).
Both passes must see the same: views are made again from their counters, random layers draw again from the
state they had, autocast is as it was. To autograd it is one function of the parameters, whose gradients come all
at once, so DistributedDataParallel exchanges them once a step, as ever.

Shapes: K chunks of b images, B = K b images on this process, F features, D projection width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MakeViews = Callable[[], tuple[Tensor, Tensor]]
"""Makes both views (b, C, S, S) of a chunk's images: the same whenever it is called."""

Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Both views of b images -> features (2b, F) and projections (2b, D), the first views' rows first."""


def cached(network: Network, chunks: Sequence[MakeViews], parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """What `network` makes of all chunks, one after the other, in the memory of one.

    Args:
        network: Called twice for each chunk; `track_once` keeps its batch norm from counting twice.
        chunks: K functions that make the views of b images each.
        parameters: All of the network's that gradients are wanted for.

    Returns:
        Features (2B, F) without gradient and projections (2B, D), the first views of all chunks' rows first.
    """
    return _Cached.apply(network, chunks, *parameters)


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, network: Network, chunks: Sequence[MakeViews], *parameters: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        device = parameters[0].device
        ctx.network, ctx.chunks, ctx.device = network, chunks, device
        ctx.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        ctx.random_states = []
        ctx.save_for_backward(*parameters)
        features, projections = [], []
        for make_views in chunks:
            ctx.random_states.append(_random_state(device))
            h, z = network(*make_views())
            features.append(h.unflatten(0, (2, -1)))  # (2, b, F)
            projections.append(z.unflatten(0, (2, -1)))  # (2, b, D)
        h, z = (torch.cat(parts, dim=1).flatten(0, 1) for parts in (features, projections))
        ctx.mark_non_differentiable(h)
        return h, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyrefly: ignore[bad-override]
        parameters = ctx.saved_tensors
        grads = grad_outputs[1].unflatten(0, (2, len(ctx.chunks), -1)).unbind(1)  # K of (2, b, D)
        totals: list[Tensor | None] = [None] * len(parameters)
        gpus = [ctx.device] if ctx.device.type == "cuda" else []
        with torch.random.fork_rng(gpus, device_type="cuda"):
            for make_views, state, grad in zip(ctx.chunks, ctx.random_states, grads, strict=True):
                _set_random_state(state, ctx.device)
                with torch.enable_grad(), _autocast(ctx):
                    _, z = ctx.network(*make_views())
                of_chunk = torch.autograd.grad(z, parameters, grad.flatten(0, 1), allow_unused=True)
                del z  # and with it the graph, before the next chunk makes its own
                totals = [_sum(total, more) for total, more in zip(totals, of_chunk, strict=True)]
        return None, None, *totals


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """None stands for a parameter that took no part; gradients may share memory, so none is changed in place."""
    if total is None or more is None:
        return more if total is None else total
    return total + more


def _autocast(ctx: Any) -> AbstractContextManager:
    enabled, dtype = ctx.autocast
    return torch.autocast(ctx.device.type, dtype=dtype, enabled=enabled)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """What dropout and its like will draw from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
