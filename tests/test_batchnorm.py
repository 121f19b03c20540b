"""Batch norm: TensorFlow's statistics by a naive formula, and one batch spread over processes against the whole."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from helpers import known
from processes import run_in_processes
from simclr.distributed import stop
from simclr.errors import UserError
from simclr.models import EncoderConfig, ProjectionHead, build_encoder, set_global_batch_norm
from simclr.models.batchnorm import BatchNorm1d, BatchNorm2d
from simclr.models.init import seeded
from simclr.models.selective_kernel import SelectiveKernel

SHAPES = [(6, 3), (5, 3, 7), (4, 3, 5, 2), (7, 3, 1, 1)]


def layer_for(x: Tensor, **settings: Any) -> BatchNorm1d | BatchNorm2d:
    """A layer with other than initial parameters and statistics."""
    layer = (BatchNorm2d if x.ndim == 4 else BatchNorm1d)(x.shape[1], **settings)
    return randomised(layer).to(x.dtype)


def randomised(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    if tensor is not None:
                        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module


def example(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Values far from standard normal, other in each channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.arange(1, shape[1] + 1, dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return (x * scale + 3 * scale).to(dtype)


def naive(x: Tensor, layer: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and biased variance, channel by channel."""
    y, means, variances = torch.empty_like(x), [], []
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        y[:, c] = (values - mean) / torch.sqrt(variance + 1e-5) * layer.weight[c]
        if layer.bias is not None:
            y[:, c] = y[:, c] + layer.bias[c]
        means.append(mean)
        variances.append(variance)
    return y, torch.stack(means), torch.stack(variances)


# ---- one process


@pytest.mark.parametrize("beta", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_naive_formula(shape: tuple[int, ...], beta: bool) -> None:
    x = example(shape).requires_grad_()
    layer = layer_for(x, beta=beta)
    running_mean, running_var = known(layer.running_mean).clone(), known(layer.running_var).clone()
    expected, mean, variance = naive(x, layer)
    y = layer(x)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(layer.running_mean, 0.9 * running_mean + 0.1 * mean.detach(), **close)
    torch.testing.assert_close(layer.running_var, 0.9 * running_var + 0.1 * variance.detach(), **close)

    probe = example(shape, seed=1)
    wanted = [x, *layer.parameters()]
    ours = torch.autograd.grad((y * probe).sum(), wanted)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * probe).sum(), wanted), **close)


def test_inference_uses_the_running_statistics_and_keeps_them() -> None:
    x = example((4, 3, 5, 2))
    layer = layer_for(x).eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    column = (1, 3, 1, 1)
    mean, variance = known(layer.running_mean).view(column), known(layer.running_var).view(column)
    expected = (x - mean) / torch.sqrt(variance + 1e-5)
    expected = expected * layer.weight.view(column) + known(layer.bias).view(column)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_channels_last_stays_so() -> None:
    x = example((4, 3, 5, 2), torch.float32)
    layer = layer_for(x)
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


def test_statistics_are_fp32_under_bf16() -> None:
    x = example((64, 3, 8, 8), torch.bfloat16)
    layer = layer_for(x.float())
    expected, mean, _ = naive(x.double(), layer)
    before = known(layer.running_mean).clone()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(layer.running_mean, 0.9 * before + 0.1 * mean.detach().float())


def test_one_value_per_channel_has_no_variance() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm1d(3)(torch.ones(1, 3))


# ---- several processes


@dataclass(frozen=True)
class Case:
    """A layer, the whole batch, and how closely shards must agree with it."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    channels_last: bool = False
    equal_shards: bool = True

    def whole(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Layer in training mode, x and the gradient of its output."""
        x, dy = (example(self.shape, self.dtype, seed) for seed in (0, 1))
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        parameters = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        return randomised(nn.Sequential(self.layer())).to(parameters).train(), x, dy

    def shards(self, x: Tensor, processes: int) -> tuple[Tensor, ...]:
        if self.equal_shards:
            return x.chunk(processes)
        return x.split([1 + rank for rank in range(processes - 1)] + [len(x) - processes * (processes - 1) // 2])


def selective_kernel() -> nn.Module:
    with seeded(3, "the same weights in every process"):
        return SelectiveKernel(3, 3)


CASES = {
    "rows": Case(lambda: BatchNorm1d(3), (12, 3)),
    "no beta": Case(lambda: BatchNorm1d(3, beta=False), (12, 3)),
    "sequences": Case(lambda: BatchNorm1d(3), (6, 3, 5)),
    "images": Case(lambda: BatchNorm2d(3), (6, 3, 5, 2)),
    "one pixel": Case(lambda: BatchNorm2d(3), (6, 3, 1, 1)),
    "unequal shards": Case(lambda: BatchNorm2d(3), (9, 3, 2, 2), equal_shards=False),
    "channels last": Case(lambda: BatchNorm2d(3), (6, 3, 5, 2), channels_last=True),
    "fp32": Case(lambda: BatchNorm2d(3), (6, 3, 5, 2), torch.float32, 1e-5),
    "bf16": Case(lambda: BatchNorm2d(3), (6, 3, 5, 2), torch.bfloat16, 2e-2),
    "selective kernel": Case(selective_kernel, (6, 3, 5, 2), channels_last=True),
    "torch's rows": Case(lambda: nn.BatchNorm1d(3), (12, 3)),
    "torch's images": Case(lambda: nn.BatchNorm2d(3), (6, 3, 5, 2)),
    "torch's without parameters": Case(lambda: nn.BatchNorm2d(3, affine=False), (6, 3, 5, 2)),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [2, 3])
def test_shards_equal_the_whole_batch(processes: int, tmp_path: Path) -> None:
    run_in_processes(processes, _shard, processes, tmp_path)
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for name, case in CASES.items():
        layer, x, dy = case.whole()
        expected = _run(layer, x, dy)
        mine = [shard[name] for shard in shards]
        for key in ("y", "dx"):
            _assert_close(torch.cat([m[key] for m in mine]), expected[key], case, f"{name}, {key}")
        for key, gradient in expected["gradients"].items():
            summed = torch.stack([m["gradients"][key] for m in mine]).sum(0)
            _assert_close(summed, gradient, case, f"{name}, gradient of {key}")
        for key, buffer in expected["buffers"].items():
            for m in mine:
                assert torch.equal(m["buffers"][key], mine[0]["buffers"][key]), f"{name}, {key}: ranks differ"
            _assert_close(mine[0]["buffers"][key], buffer, case, f"{name}, {key}")

    model, images, probe = _model()
    (model(images) * probe).sum().backward()
    for shard in shards:
        for key, parameter in model.named_parameters():
            scale = known(parameter.grad).abs().max()
            error = (shard["ddp gradients"][key] - parameter.grad).abs().max()
            assert error <= 1e-10 * scale, f"{key}: {error / scale:.1e}"
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(shard["ddp buffers"][key], buffer, rtol=1e-10, atol=1e-12, msg=key)


def _shard(rank: int, processes: int, folder: Path) -> None:
    """One process: its rows of every case, and of a whole model under DDP."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        layer, x, dy = case.whole()
        set_global_batch_norm(layer, dist.group.WORLD)
        results[name] = _run(layer, case.shards(x, processes)[rank], case.shards(dy, processes)[rank])

    model, images, probe = _model()
    set_global_batch_norm(model, dist.group.WORLD)
    parallel = DistributedDataParallel(model)
    z = parallel(images.chunk(processes)[rank])
    (processes * (z * probe.chunk(processes)[rank]).sum()).backward()  # DDP takes the mean over processes
    results["ddp gradients"] = {key: parameter.grad for key, parameter in model.named_parameters()}
    results["ddp buffers"] = dict(model.named_buffers())
    torch.save(results, folder / f"{rank}.pt")
    stop()  # while `parallel` is alive


def _run(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Any]:
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()
    y.backward(dy)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "gradients": {key: parameter.grad for key, parameter in layer.named_parameters()},
        "buffers": dict(layer.named_buffers()),
    }


def _assert_close(ours: Tensor, expected: Tensor, case: Case, message: str) -> None:
    assert ours.dtype == expected.dtype, message
    error = (ours.double() - expected.double()).abs().max()
    assert error <= case.tolerance * expected.double().abs().max(), f"{message}: {error:.1e}"


def _model() -> tuple[nn.Module, Tensor, Tensor]:
    """An encoder whose last feature map is one pixel, and a head; images and the gradient of z."""
    encoder = build_encoder(EncoderConfig("small", channels=1, size=8), seed=1)
    model = randomised(nn.Sequential(encoder, ProjectionHead(encoder.num_features, dim=4, seed=1))).double()
    return model.train(), example((12, 1, 8, 8)) / 9, example((12, 4), seed=2)


# ---- conversion


def test_conversion_keeps_parameters_names_and_mode() -> None:
    from timm.layers import BatchNormAct2d  # here: other processes import this file, and need no timm

    model = nn.Sequential(nn.BatchNorm2d(3, eps=1e-3, momentum=0.2), BatchNormAct2d(3), BatchNorm2d(3)).eval()
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    set_global_batch_norm(model, None)
    assert list(model.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not any(module.training for module in model.modules())
    assert (model[0].eps, model[0].momentum) == (1e-3, 0.2)
    x = example((4, 3, 5, 2), torch.float32)
    torch.testing.assert_close(model.train()[0](x), nn.BatchNorm2d(3, eps=1e-3)(x))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_conversion_of_a_timm_model_changes_nothing_on_one_process(name: str) -> None:
    x = torch.rand(4, 3, 32, 32)
    plain, converted = (build_encoder(EncoderConfig(f"timm/{name}", channels=3, size=32)) for _ in range(2))
    set_global_batch_norm(converted, None)
    for _ in range(2):
        torch.testing.assert_close(converted(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(converted.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


def test_an_unknown_batch_norm_is_refused() -> None:
    with pytest.raises(UserError, match="BatchNorm3d"):
        set_global_batch_norm(nn.Sequential(nn.BatchNorm3d(3)), None)


@pytest.mark.parametrize("shape", [(256, 16, 16, 16), (30, 6, 3, 5), (4096, 24)], ids=str)
def test_channels_last_sums_are_accurate(shape: tuple[int, ...]) -> None:
    """fp32 against fp64: torch's own channels-last kernels err by 1e-5 at the first shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = []
    for dtype in (torch.float64, torch.float32):
        norm = (BatchNorm2d if len(shape) == 4 else BatchNorm1d)(shape[1]).to(dtype)
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        leaf = x.to(dtype).contiguous(memory_format=layout).detach().clone().requires_grad_()
        y = norm(leaf)
        y.backward(dy.to(dtype).contiguous(memory_format=layout))
        found.append([y, leaf.grad, norm.weight.grad, known(norm.bias).grad, norm.running_mean, norm.running_var])
    for exact, single in zip(*found, strict=True):
        assert (single.double() - exact).norm() <= 3e-6 * exact.norm() + 1e-12


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", [(33, 24, 7, 9), (64, 8, 16, 16), (2048, 40)])
def test_norm_addition_and_relu_in_one_pass(shape: tuple[int, ...], added: bool, relu: bool, threads: int) -> None:
    """The kernels for fp32 on a CPU against torch's own operations, in fp64 and one after the other."""
    x, beside, weight = (example(shape, torch.float32, seed).div_(shape[1]) for seed in (1, 2, 3))
    outputs, gradients = [], []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.float64):
            layer = layer_for(x.to(dtype))
            inputs = [t.to(dtype) for t in (x, beside)]
            if x.ndim == 4:
                inputs = [t.contiguous(memory_format=torch.channels_last) for t in inputs]
            inputs = [t.requires_grad_() for t in inputs]
            if dtype == torch.float32:
                y = layer(inputs[0], add=inputs[1] if added else None, relu=relu)
            else:
                y = torch.nn.functional.batch_norm(
                    inputs[0], None, None, layer.weight, layer.bias, training=True, eps=layer.eps
                )
                y = y + inputs[1] if added else y
                y = y.relu() if relu else y
            outputs.append(y)
            wanted = [*inputs[: 1 + added], layer.weight, known(layer.bias)]
            gradients.append(torch.autograd.grad((y * weight.to(dtype)).sum(), wanted))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-5, atol=1e-5)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_what_is_not_a_number_stays_visible() -> None:
    """A ReLU that hides it would let training go on with it."""
    x = torch.randn(64, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    x[0, 3, 2, 1] = math.nan
    y = BatchNorm2d(8)(x, relu=True)
    assert y[:, 3].isnan().all()
    assert not y[:, :3].isnan().any()


def test_an_overflow_prints_no_warning_of_numpy():
    """It is found once a step and said in a sentence; warnings are errors here."""
    x = torch.full((4, 2, 8, 8), 1e38).contiguous(memory_format=torch.channels_last)
    x[0] = -1e38
    x[1, 0, 0, 0] = float("inf")
    layer = BatchNorm2d(2)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert not y.isfinite().all()


def test_kernels_leave_torch_its_number_of_threads():
    """As many as torchrun, or a user, gives a process: sums, and so the bits of a run, depend on it."""
    program = (
        "import torch; from simclr.models.norm_kernels import moments\n"
        "moments(torch.rand(64, 8, 8, 8).to(memory_format=torch.channels_last)); print(torch.get_num_threads())"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
