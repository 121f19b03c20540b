"""What several test files share: processes, comparisons of runs, networks, damaged bytes."""

import os
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet

from bundle_writer import varint
from processes import run_in_processes
from simclr.config.pretrain import PretrainConfig
from simclr.distributed import DistributedContext, joined
from simclr.models import EncoderConfig
from simclr.training.checkpoint import load_newest

SMALL_RUN = PretrainConfig(
    size=8, encoder="small", width=0.5, strength=0.5, batch_size=32, epochs=5, warmup_epochs=1, optimizer="lars",
    lr=0.3, log_every=3, save_every=5, max_checkpoints=2, knn_every=0.7, workers=0,
)  # fmt: skip

Value = TypeVar("Value")
Network = TypeVar("Network", bound=nn.Module)

CLASS_NAMES = ["cat", "Hund", "oiseau à plumes"]

MUTATIONS = int(os.environ.get("SIMCLR_MUTATIONS", "200"))  # 10,000 take some minutes


def in_processes(size: int, folder: Path, check: Callable[[DistributedContext], None]) -> None:
    """Run `check` in `size` processes; a failed assertion in any of them fails the test."""
    run_in_processes(size, run_check, size, str(folder / "store"), check)


def run_check(rank: int, size: int, store: str, check: Callable[[DistributedContext], None]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    with joined("cpu", timeout=timedelta(seconds=60), init_method=f"file://{store}") as world:
        check(world)
    assert not gloo_threads()


def gloo_threads() -> list[str]:
    """Threads of a process group, which end with the last reference to it; empty on systems without /proc."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo_runloop" in name]


def known(value: Value | None) -> Value:
    """The value, which must not be None."""
    assert value is not None
    return value


def parts_of(module: nn.Module) -> Any:
    """The module itself; torch's types do not know the names of its submodules."""
    return module


def final_state(run):
    """All that must be equal bit for bit, and the bytes of the records."""
    _, state = known(load_newest(run.checkpoints, pytest.fail))
    return flatten(state), run.metrics.read_bytes()


def flatten(value, name=""):
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{name}/{key}").items()}
    if isinstance(value, list):
        return flatten(dict(enumerate(value)), name)
    return {name: value}


def assert_same(a, b):
    state_a, metrics_a = a
    state_b, metrics_b = b
    assert state_a.keys() == state_b.keys()
    for name, value in state_a.items():
        same = torch.equal(value, state_b[name]) if isinstance(value, torch.Tensor) else value == state_b[name]
        assert same, name
    assert metrics_a == metrics_b


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


def as_trained(module: Network) -> Network:
    """Batch norm as training leaves it: no two channels alike, and no branch switched off."""
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((layer.weight, 0.5), (layer.bias, -0.3), (layer.running_mean, -0.3)):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, low + 0.8, generator=generator)
            nn.init.uniform_(known(layer.running_var), 0.5, 1.5, generator=generator)
    return module.eval()


def relative_error(found: torch.Tensor | np.ndarray, expected: torch.Tensor) -> float:
    return float((torch.as_tensor(found) - expected).norm() / expected.norm())


def random_inputs(config: EncoderConfig, count: int) -> torch.Tensor:
    return torch.rand(count, config.channels, config.size, config.size, generator=torch.Generator().manual_seed(2))


class NarrowResNet(resnet.ResNet):
    """A torchvision ResNet of few channels, so that tests are quick: planes are divided by `self.divisor`."""

    divisor = 16

    def __init__(self, block: type = resnet.BasicBlock, blocks: list[int] = [2, 2, 2, 2]) -> None:  # noqa: B006
        super().__init__(block, blocks)
        self.conv1 = nn.Conv2d(3, 64 // self.divisor, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64 // self.divisor)
        self.fc: nn.Module = nn.Identity()  # pyrefly: ignore[bad-override]

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:
            self.inplanes = 64 // self.divisor
        return super()._make_layer(block, planes // self.divisor, blocks, stride, dilate)


def with_random_state(model: Network, seed: int = 0) -> Network:
    """Every number of its state random, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
                value.copy_(scale * torch.randn(value.shape, generator=generator))
                if name.endswith(("running_var", "weight")) and value.ndim == 1:
                    value.abs_().add_(0.5)
    return model.eval()


def peak_bytes_of(work: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy held at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def mutate_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage as disks, networks and enemies do it."""
    raw = bytearray(content)
    at = int(rng.integers(len(raw)))
    match int(rng.integers(7)):
        case 0:
            for where in rng.integers(0, len(raw), rng.integers(1, 9)):
                raw[where] ^= 1 << int(rng.integers(8))
        case 1:
            del raw[at:]
        case 2:
            raw[at : at + 10] = varint(int(rng.integers(1 << 62)))
        case 3:
            raw[at:at] = rng.bytes(int(rng.integers(1, 100)))
        case 4:
            raw[-48:-8] = (varint(0) + varint(8) + varint(at) + varint(int(rng.integers(1 << 40)))).ljust(40, b"\0")
        case 5:
            return [b"", b"\x89PNG\r\n\x1a\n" + rng.bytes(500), rng.bytes(5000), bytes(5000), b"PK\3\4" * 99][at % 5]
        case _:
            raw[at : at + 8] = b"\xff" * 8
    return bytes(raw)
