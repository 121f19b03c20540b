"""Replayed updates, with a recorder of operations in place of the CUDA graph that a machine without a GPU cannot make.

`Tape` repeats recorded operations on the same tensors and with the same numbers, as a CUDA graph does: what a recording
wrongly holds fast (a learning rate, an order that the host drew) it holds fast too, and what reads the device back it
refuses. `cuda-graph` of benchmarks/gpu_suite.py makes the same comparison on a GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import SMALL_RUN, assert_same, final_state
from simclr.config.recipes import RECIPES
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.methods.moco import MoCo
from simclr.methods.simclr import SimCLR
from simclr.models import batchnorm
from simclr.tasks.pretrain_images import build_method, build_task
from simclr.training import loop
from simclr.training.cuda_graph import WARM_UP, ReplayedUpdates, obstacle
from simclr.training.fit import fit
from simclr.training.run import RunFolder, describe_machine

READS_BACK = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
UNDECLARED = ("running_mean", "running_var")  # torch's batch norm writes these without declaring it
STEPS = 12
FAST = RECIPES["cifar-fast"].config
LIKE_CIFAR_FAST = {
    name: getattr(FAST, name)
    for name in (
        "augmentation", "crop_min", "encoder", "stem", "head_norm", "temperature", "optimizer", "nesterov",
        "weight_decay", "decay_all",
    )
}  # fmt: skip


class Tape(TorchDispatchMode):
    """Records the operations of some work, undoes what they changed, and repeats them on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.reason = ""
        self._operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self._made: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def shortage(self) -> str:
        return self.reason

    def run(self, work: Callable[[], Any]) -> Any:
        self.runs += 1
        return work()

    def record(self, work: Callable[[], Any]) -> Callable[[], None]:
        try:
            with self:
                work()
        finally:
            for storage, content in self._before.values():
                storage.copy_(content)
        return self._replay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in READS_BACK:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        self._keep_written(func._schema, args, kwargs)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in outputs):
            if storage.data_ptr() not in inputs:
                self._made[storage.data_ptr()] = storage
        self._operations.append((func, args, kwargs, outputs))
        return result

    def _keep_written(self, schema: Any, args: tuple, kwargs: dict) -> None:
        """Keep the content of tensors from outside before an operation first changes them."""
        for i, argument in enumerate(schema.arguments):
            if not (argument.alias_info and argument.alias_info.is_write) and argument.name not in UNDECLARED:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for storage in (t.untyped_storage() for t in tree_leaves(value) if isinstance(t, Tensor)):
                if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
                    self._before[storage.data_ptr()] = storage, storage.clone()

    @torch.no_grad()
    def _replay(self) -> None:
        for func, args, kwargs, outputs in self._operations:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for output, value in zip(outputs, again, strict=True):
                if output.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    output.copy_(value)


def trained(folder: Path, tape: Tape | None, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Any, int]:
    """Final state and records of a short run, and how many of its updates were replayed."""
    monkeypatch.setattr(batchnorm, "LEAST_FOR_KERNELS", 1 << 40)  # Numba's work is no operation of torch
    monkeypatch.setattr(loop, "CudaRecorder", lambda device: tape)
    config = replace(SMALL_RUN, epochs=1, log_every=5, save_every=100, knn_every=0, **settings)
    run, world = RunFolder(folder), DistributedContext()
    task = build_task(open_data("digits", channels=config.channels).subset(np.arange(200)), config, run, world)
    task = replace(
        task, total_steps=STEPS, cuda_graph=tape is not None,
        learning_rate=lambda step: (1 + step % 5) / 64,  # exact in fp32
    )  # fmt: skip
    outcome = fit(task, run, config, world, manifest={"machine": describe_machine()}, progress=lambda done, total: None)
    return final_state(run), outcome.steps_replayed


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "lars"},
        {"optimizer": "sgd"},
        {"optimizer": "adamw"},
        LIKE_CIFAR_FAST | {"width": 0.125, "channels": "3"},
    ],
    ids=["lars", "sgd", "adamw", "cifar-fast"],
)
def test_replayed_updates_give_the_same_weights_and_records(settings, tmp_path, monkeypatch):
    """Steps 5, 10 and 12 are recorded in metrics.jsonl and run as always; three warm up."""
    plain, none = trained(tmp_path / "plain", None, monkeypatch, **settings)
    tape = Tape()
    replayed, count = trained(tmp_path / "replayed", tape, monkeypatch, **settings)
    assert (none, count, tape.runs) == (0, STEPS - 3 - WARM_UP, WARM_UP)
    assert_same(replayed, plain)


def test_the_tape_holds_numbers_fast_and_undoes_the_recording():
    weight = torch.ones(3)
    numbers = iter((2.0, 100.0))
    tape = Tape()
    replay = tape.record(lambda: weight.mul_(next(numbers)).add_(torch.tensor([1.0, 2.0, 3.0])))
    assert weight.tolist() == [1, 1, 1]
    replay()
    replay()
    assert weight.tolist() == [7, 10, 13]


class ReadsBack(nn.Module):
    def __init__(self, method: SimCLR) -> None:
        super().__init__()
        self.method = method

    def forward(self, *views: Tensor, detail: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.method(*views, detail=detail)
        return loss * (1.0 if loss.detach().item() > 0 else 2.0), metrics


@pytest.mark.parametrize("obstructed", ["reads back", "no memory"])
def test_what_cannot_be_recorded_runs_as_always(obstructed, tmp_path, monkeypatch, capfd):
    """One sentence says so, and the weights are those of a run without a graph."""
    tape = Tape()
    if obstructed == "no memory":
        tape.reason = "it takes an update's memory twice, 9.0 GB of 5.0 GB free"
    else:
        monkeypatch.setattr(loop, "training_module", lambda task, world: ReadsBack(task.method))
    plain, _ = trained(tmp_path / "plain", None, monkeypatch)
    capfd.readouterr()
    replayed, count = trained(tmp_path / "replayed", tape, monkeypatch)
    assert count == 0
    assert_same(replayed, plain)
    sentences = [line for line in capfd.readouterr().err.splitlines() if "CUDA graph" in line]
    reason = tape.reason or "operation not permitted when stream is capturing: aten._local_scalar_dense.default"
    assert sentences == [f"Updates are not replayed from a CUDA graph: {reason}."]


def test_a_failed_recording_leaves_the_optimiser_as_it_was():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
    settings = dict(optimizer.param_groups[0])

    def update(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (weight * x).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), {"loss": loss.detach() * loss.detach().item()}

    updates = ReplayedUpdates(update, optimizer, Tape())
    for _ in range(WARM_UP + 2):
        updates(torch.tensor([1.0, -1.0]))
    assert dict(optimizer.param_groups[0]) == settings
    assert optimizer.state[weight]["step"] == WARM_UP + 2


def test_methods_and_settings_that_cannot_be_recorded_are_named():
    gpu = DistributedContext(device=torch.device("cuda"))
    here = DistributedContext()
    simclr = build_method(replace(SMALL_RUN), 1, here)
    memory = build_method(replace(SMALL_RUN, queue=64), 1, here)
    moco = build_method(replace(SMALL_RUN, queue=64, method="moco", global_bn=False), 1, here, MoCo)
    assert obstacle(simclr, "plain", gpu) == ""
    assert "there is no GPU" in obstacle(simclr, "plain", here)
    assert "2 processes" in obstacle(simclr, "plain", replace(gpu, size=2))
    assert "--memory is grad-cache" in obstacle(simclr, "grad-cache", gpu)
    assert "SimCLR's updates" in obstacle(memory, "plain", gpu)
    assert "MoCo's updates" in obstacle(moco, "plain", gpu)


def test_without_a_gpu_the_setting_is_said_to_have_no_effect(capfd):
    images = open_data("digits").subset(np.arange(64))
    task = build_task(images, replace(SMALL_RUN, cuda_graph=True), RunFolder(Path("nowhere")), DistributedContext())
    assert not task.cuda_graph
    assert "Updates are not replayed from a CUDA graph: there is no GPU." in capfd.readouterr().err
