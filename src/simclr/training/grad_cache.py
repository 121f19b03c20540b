"""Gradient caching: a batch of any size in the memory of a part of it (GradCache, Gao et al. 2021, arXiv:2101.06983).

    forward   each chunk of the images passes the network without a graph; only its projections are kept
    loss      over all projections, so every image is every other's negative; its gradient is taken as far as them
    backward  each chunk passes again, with a graph, which takes its projections' gradient on to the parameters

One more forward than an ordinary step, so about 4/3 of its time. The gradient is exact for what the network
computes, and that is chunk by chunk: batch norm sees one chunk at a time (docs/memory.md, ghost batch norm).
Both passes must see the same: views are made again from their counters, random layers draw again from the
state they had, autocast is as it was. To autograd it is one function of the parameters, whose gradients come all
at once, so DistributedDataParallel exchanges them once a step, as ever.

Shapes: K chunks of b images, B = K b images on this process, V views, F features, D projection width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr.methods.method import Method

MakeInputs = Callable[[], tuple[Tensor, ...]]
"""Makes the views (b, C, S, S) of a chunk's images, and what else the method takes: the same whenever it is called."""


class GradCache(nn.Module):
    """A method whose gradients are cached: called with a `MakeInputs` for each chunk in place of the inputs.

    Args:
        method: With `grad_cache`; its `encode` runs twice for each chunk, and `track_once` keeps its batch norm from
            counting twice.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, *chunks: MakeInputs, detail: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics as of the method; gradients of all its parameters that want them."""
        parameters = [p for p in self.method.parameters() if p.requires_grad]
        features, projections, *others = _Cached.apply(self.method, chunks, *parameters)  # (V B, F), (V B, D)
        return self.method.loss(features, projections, *others, detail=detail)


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, method: Method, chunks: Sequence[MakeInputs], *parameters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        device = parameters[0].device
        ctx.method, ctx.chunks, ctx.device = method, chunks, device
        ctx.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        ctx.random_states = []
        ctx.save_for_backward(*parameters)
        features, projections, others = [], [], []
        for make_inputs in chunks:
            ctx.random_states.append(_random_state(device))
            inputs = make_inputs()
            method.observe(*inputs)
            h, z = method.encode(*inputs)
            features.append(h.unflatten(0, (method.num_views, -1)))  # (V, b, F)
            projections.append(z.unflatten(0, (method.num_views, -1)))  # (V, b, D)
            others.append(inputs[method.num_views :])
        h, z = (torch.cat(parts, dim=1).flatten(0, 1) for parts in (features, projections))
        rest = [torch.cat(parts) for parts in zip(*others, strict=True)]  # (B, ...) each
        ctx.mark_non_differentiable(h, *rest)
        return h, z, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyrefly: ignore[bad-override]
        parameters = ctx.saved_tensors
        grads = grad_outputs[1].unflatten(0, (ctx.method.num_views, len(ctx.chunks), -1)).unbind(1)  # K of (V, b, D)
        totals: list[Tensor | None] = [None] * len(parameters)
        gpus = [ctx.device] if ctx.device.type == "cuda" else []
        with torch.random.fork_rng(gpus, device_type="cuda"):
            for make_inputs, state, grad in zip(ctx.chunks, ctx.random_states, grads, strict=True):
                _set_random_state(state, ctx.device)
                with torch.enable_grad(), _autocast(ctx):
                    _, z = ctx.method.encode(*make_inputs())
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
