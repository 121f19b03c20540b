"""Batch norm with TensorFlow's statistics, over one process or all (google-research/simclr, resnet.py).

The authors normalise by the statistics of the global batch, lest a replica's images know each other by
theirs (SimCLR section 2.3), and keep the biased batch variance as running variance, where torch keeps the
unbiased one. torch.nn.SyncBatchNorm is no substitute: it keeps the unbiased one and refuses CPU tensors.

Shapes: x is (N, C), (N, C, L) or (N, C, H, W); n is its number of values per channel, over all processes.
"""

import weakref
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from simclr.distributed import all_gather_flat
from simclr.errors import UserError

LEAST_FOR_KERNELS = 1 << 14
"""Values below which torch's own kernels are as fast as ours."""


class TensorFlowBatchNorm(_BatchNorm):
    """What `BatchNorm1d` and `BatchNorm2d` share; see there.

    Attributes:
        unbiased: Keep the unbiased running variance, as torch does; so set on layers that were torch's.
        splits: Equal parts of this process's batch that are normalised each by its own statistics, as on so many
            devices without global batch norm; running statistics take the mean over the parts.
    """

    unbiased: bool = False
    splits: int = 1
    _group: "weakref.ref[dist.ProcessGroup] | None" = None

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, beta: bool = True) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        if not beta:
            self.register_parameter("bias", None)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes whose batches form the batch; None: this process alone, also once the group has been left.

        Held weakly, because no group may outlive `distributed.stop`.
        """
        return None if self._group is None else self._group()

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._group = None if group is None else weakref.ref(group)

    def forward(self, input: Tensor, *, add: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalise each channel by the batch's statistics in training, by the running ones otherwise.

        Args:
            input: x.
            add: Like x; added to what is normalised.
            relu: Rectify the result.

        Raises:
            ValueError: In training, one value per channel alone, which has no variance (torch's rule).
        """
        self._check_input_dim(input)
        if not self.training:
            y = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return _finish(y, add, relu)
        if self.splits > 1:
            return self._by_parts(input, add, relu)
        y, mean, variance = self._normalise(input, add, relu)
        self._track(mean, variance)
        return y

    def _normalise(self, x: Tensor, add: Tensor | None, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and the statistics that are tracked: mean (C,) and variance (C,)."""
        group = self.process_group
        if group is not None and dist.get_world_size(group) == 1:
            group = None
        if group is not None or (_by_kernels(x) and x.numel() > x.shape[1]):
            y, mean, variance, n = _BatchNormFunction.apply(x, self.weight, self.bias, add, relu, self.eps, group)
            return y, mean, variance * (n / (n - 1)) if self.unbiased else variance
        y, mean, variance = self._by_torch(x)
        return _finish(y, add, relu), mean, variance

    def _by_parts(self, x: Tensor, add: Tensor | None, relu: bool) -> Tensor:
        if len(x) % self.splits:
            raise ValueError(f"a batch of {len(x)} cannot be split into {self.splits} equal parts")
        beside = [None] * self.splits if add is None else add.chunk(self.splits)
        parts = [self._normalise(*both, relu) for both in zip(x.chunk(self.splits), beside, strict=True)]
        ys, means, variances = zip(*parts, strict=True)
        self._track(torch.stack(means).mean(0), torch.stack(variances).mean(0))
        return torch.cat(ys)

    def _by_torch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, mean and variance by torch's kernel: at momentum 1 its running ones are the batch's."""
        assert self.running_mean is not None
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_mean)
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        n = x.numel() // x.shape[1]
        return y, mean, variance if self.unbiased else variance * ((n - 1) / n)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


class BatchNorm1d(TensorFlowBatchNorm, nn.BatchNorm1d):
    """Batch norm of (N, C) or (N, C, L).

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics; TensorFlow's decay of 0.9 is 0.1 here.
        beta: Whether to learn an offset; the last layer of a projection head has none.
    """


class BatchNorm2d(TensorFlowBatchNorm, nn.BatchNorm2d):
    """Batch norm of (N, C, H, W); arguments as in `BatchNorm1d`."""


class BatchNormAct2d(BatchNorm2d):
    """Stands in for timm's layer of the same name: batch norm, then that layer's drop and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, *, add: Tensor | None = None, relu: bool = False) -> Tensor:
        """(N, C, H, W) -> the same."""
        return self.act(self.drop(super().forward(input, add=add, relu=relu)))


def set_global_batch_norm(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Let every batch norm inside `module` use the statistics of the global batch, in place.

    With equal shards that is the authors' definition: the mean of the replicas' means; the mean of their
    variances plus the mean squared deviation of their means. Unequal shards are weighted by their sizes.
    The gradient of x is that of the global batch; those of gamma and beta are this process's share, as DDP
    expects.

    Args:
        module: Changed in place. torch's own layers (of timm models) become ours but keep their parameters,
            their buffers, their names and their unbiased running variance.
        group: The processes, such as `torch.distributed.group.WORLD`; None: each process for itself again.

    Raises:
        UserError: `module` has a kind of batch norm that has no global version.
    """
    for layer in _adopt_all(module):
        layer.process_group = group


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Let every batch norm inside `module` normalise so many equal parts of the batch apart, in place.

    As the batch norm of MoCo, whose devices do not share statistics, and SplitBatchNorm of its notebook for CIFAR-10,
    which takes every `splits`-th image where this takes images that follow each other.

    Raises:
        UserError: `module` has a kind of batch norm that cannot be split.
    """
    for layer in _adopt_all(module):
        layer.splits = splits


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances of every batch norm inside `module`, (C,) each: the buffers themselves."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    return [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


def track_once(module: nn.Module) -> None:
    """Let no batch norm inside `module` count a batch twice that passes it again during backward, in place.

    Recomputation and gradient caching run layers again inside the backward pass. They then normalise by the
    batch's statistics as before, and leave the running ones and the number of batches alone. For torch's and
    timm's layers as for ours; call it after `set_global_batch_norm`, which may put new layers in.
    """
    for layer in module.modules():
        if isinstance(layer, TensorFlowBatchNorm):
            layer.register_forward_pre_hook(_track_ours_once)
        elif isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.register_forward_pre_hook(partial(_track_torch_once, momentum=layer.momentum))


def _track_ours_once(layer: Any, _inputs: object) -> None:
    layer.track_running_stats = not _in_backward()


def _track_torch_once(layer: Any, _inputs: object, *, momentum: float | None) -> None:
    """Torch saves its running statistics for backward, so a recomputation must have them: it moves them by nothing."""
    layer.momentum = momentum
    if layer.training and _in_backward():
        layer.momentum = 0.0
        layer.num_batches_tracked.sub_(1)  # the layer adds 1


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks


def _adopt_all(module: nn.Module) -> list[TensorFlowBatchNorm]:
    """Put ours in place of every other batch norm inside `module`; all of them."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, TensorFlowBatchNorm):
                setattr(parent, name, _adopt(child))
    return [layer for layer in module.modules() if isinstance(layer, TensorFlowBatchNorm)]


def _adopt(layer: _BatchNorm) -> TensorFlowBatchNorm:
    """The layer of ours that computes what torch's or timm's `layer` does."""
    kind = {
        "torch.nn.modules.batchnorm.BatchNorm1d": BatchNorm1d,
        "torch.nn.modules.batchnorm.BatchNorm2d": BatchNorm2d,
        "timm.layers.norm_act.BatchNormAct2d": BatchNormAct2d,
    }.get(f"{type(layer).__module__}.{type(layer).__name__}")
    if kind is None or layer.running_mean is None or layer.momentum is None:
        raise UserError(
            f"This encoder's {type(layer).__name__} layers cannot normalise by the global batch, or by parts of it; "
            "give --no-global-bn, with MoCo --bn-splits 1, or take another encoder."
        )
    ours = kind(layer.num_features, eps=layer.eps, momentum=layer.momentum)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(ours, name, getattr(layer, name))
    ours.unbiased = True
    if isinstance(ours, BatchNormAct2d):
        for name in ("drop", "act"):
            setattr(ours, name, getattr(layer, name))
    return ours.train(layer.training)


class _BatchNormFunction(torch.autograd.Function):
    """Batch norm over this process or a group, which costs one collective forward and one backward.

    Statistics are fp32, or fp64 for fp64 x, whatever the autocast. On a CPU, norm_kernels.py does the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, add: Tensor | None, relu: bool, eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Output like x, and the mean (C,), biased variance (C,) and n () of the whole batch."""
        kernels = _kernels() if _by_kernels(x) else None
        mean, variance = kernels.moments(_as_pixels(x)) if kernels else _moments(x)  # (C,), (C,)
        n = mean.new_tensor(x.numel() // x.shape[1])
        if group is not None:
            mean, variance, n = _combine(mean, variance, n, group)
        if kernels:
            scale = torch.rsqrt(variance + eps)
            scale = scale if weight is None else scale * weight
            shift = -mean * scale if bias is None else bias - mean * scale
            beside = None if add is None else _as_pixels(add)
            y = kernels.normalize(_as_pixels(x), scale, shift, beside, relu).view(x.shape)
        else:
            y = _finish(F.batch_norm(x, mean, variance, weight, bias, eps=eps), add, relu)
        ctx.save_for_backward(x, weight, mean, variance, n, y if relu else None)
        ctx.eps, ctx.group = eps, None if group is None else weakref.ref(group)
        ctx.mark_non_differentiable(mean, variance, n)
        return y, mean, variance, n

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Dx of the whole batch's loss; the parameters' gradients are sums over this process's rows only."""
        x, weight, mean, variance, n, y = ctx.saved_tensors
        dy, inverse_std = grad_outputs[0], torch.rsqrt(variance + ctx.eps)
        kernels = _kernels() if _by_kernels(x) else None
        if kernels:
            x_, dy, y = _as_pixels(x), _as_pixels(dy), None if y is None else _as_pixels(y)
            sum_dy, sum_dy_xhat = kernels.sums(dy, y, x_, mean, inverse_std)  # (C,), (C,)
        else:
            x_, dy = x, dy if y is None else torch.where(y > 0, dy, 0)
            sum_dy, sum_dy_xhat = _sums(dy, x, mean, inverse_std)
        dweight = sum_dy_xhat if ctx.needs_input_grad[1] else None
        dbias = sum_dy if ctx.needs_input_grad[2] else None
        dx, dadd = None, dy if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([sum_dy, sum_dy_xhat])  # (2, C)
            if ctx.group is not None:
                dist.all_reduce(sums, group=ctx.group())
            mean_dy, mean_dy_xhat = sums / n
            # dx = gamma / std (dy - mean(dy) - xhat mean(dy xhat)): for each channel a dy + b x + c
            a = inverse_std if weight is None else inverse_std * weight  # (C,)
            b = -a * inverse_std * mean_dy_xhat
            c = -a * mean_dy - b * mean
            if kernels:
                dx, dadd = kernels.input_grad(dy, y, x_, a, b, c, with_other=ctx.needs_input_grad[3])
                dx, dadd = dx.view(x.shape), None if dadd is None else dadd.view(x.shape)
            else:
                shape = [1, -1] + [1] * (x.ndim - 2)
                dx = torch.addcmul(c.view(shape), _wide(dy), a.view(shape))
                dx = dx.addcmul_(_wide(x), b.view(shape)).to(x.dtype)
        return dx, dweight, dbias, dadd, None, None, None


def _combine(mean: Tensor, variance: Tensor, n: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and n of the batch whose shards the processes hold."""
    channels = len(mean)
    shard = torch.cat([n[None], mean, variance])  # (1 + 2C,)
    shards = shard.new_empty(dist.get_world_size(group) * len(shard))
    all_gather_flat(shards, shard, group=group)
    counts, means, variances = shards.view(-1, len(shard)).split([1, channels, channels], dim=1)
    total = counts.sum()
    share = counts / total  # (P, 1) for P processes
    mean = (share * means).sum(0)  # (C,)
    return mean, (share * (variances + (means - mean) ** 2)).sum(0), total


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased variance (C,)."""
    variance, mean = torch.var_mean(_wide(x), _all_but_channels(x), correction=0)
    return mean, variance


def _sums(dy: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows of dy and of dy times the normalised x: (C,), (C,)."""
    shape, dims = [1, -1] + [1] * (x.ndim - 2), _all_but_channels(x)
    dy, xhat = _wide(dy), (_wide(x) - mean.view(shape)) * inverse_std.view(shape)
    return dy.sum(dims), (dy * xhat).sum(dims)


def _finish(y: Tensor, add: Tensor | None, relu: bool) -> Tensor:
    """What follows the norm where no kernel does it in the same pass."""
    y = y if add is None else y + add
    return F.relu_(y) if relu else y


def _by_kernels(x: Tensor) -> bool:
    """Whether norm_kernels.py takes x: fp32 rows of channels on a CPU, enough of them.

    torch's kernels for such batches add up a channel's n values one after the other in fp32, an error of 5e-5 at
    n = 400,000; ours are a hundred times more accurate, and faster.
    """
    last = x.ndim == 2 or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.device.type == "cpu" and x.dtype == torch.float32 and last and x.numel() >= LEAST_FOR_KERNELS


def _kernels() -> ModuleType:
    from simclr.models import norm_kernels  # Numba takes a quarter of a second to import

    return norm_kernels


def _as_pixels(x: Tensor) -> Tensor:
    """(N, C) or (N, C, H, W) as channels-last (N, C, H, W)."""
    return x.view(*x.shape, *[1] * (4 - x.ndim)).contiguous(memory_format=torch.channels_last)


def _wide(x: Tensor) -> Tensor:
    """Half precisions as fp32; fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]
