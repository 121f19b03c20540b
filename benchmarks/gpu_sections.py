"""The sections of gpu_suite.py: each takes a `Bench` and returns what it found, `right` where it checked something.

What a section has so far lies in `bench.partial`, so that one that is cut off or fails leaves it.
"""

import gc
import importlib.util
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException

from common import Contender, Stop, encoder_alone, in_fresh_process, random_images, run_ours, stretched
from simclr.config.encoder import EncoderConfig
from simclr.config.pretrain import PretrainConfig
from simclr.config.recipes import RECIPES
from simclr.data.images import Images
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext, stop
from simclr.errors import UserError
from simclr.evaluation.knn import knn
from simclr.evaluation.metrics import accuracy
from simclr.evaluation.split import split_data
from simclr.evaluation.subjects import random_encoder
from simclr.losses.contrastive import ContrastiveLoss
from simclr.losses.info_nce import info_nce, info_nce_dense
from simclr.losses.nt_xent import nt_xent, nt_xent_dense
from simclr.methods.simclr import SimCLR
from simclr.models.batchnorm import set_global_batch_norm
from simclr.models.encoder import build_encoder
from simclr.models.heads import ProjectionHead
from simclr.models.inference import extract, pixels_of
from simclr.training.loop import Task
from simclr.views.policy import Policy
from simclr.views.views import make_views

GFLOP = {"resnet18-32": 3.33, "resnet50-224": 24.5}
"""Of a view, forward and backward (6 x multiply-adds; performance-facts section 4)."""

MEGABYTES = {"resnet18-32": 20.0, "resnet50-224": 370.0}
"""That a view moves through memory in bf16 with fused batch norm (an estimate, same source)."""


class Skip(Exception):
    """This section cannot run here, and why."""


@dataclass
class Bench:
    """The device, the sizes, and the clock of the section that runs."""

    device: torch.device
    tiny: bool
    data: Path | None = None
    """Folder of CIFAR-10's train.parquet and test.parquet."""
    budget: float = math.inf
    """Seconds of the section that runs, after which it is cut off."""
    deadline: float = math.inf
    partial: dict[str, Any] = field(default_factory=dict)
    matmul: float | None = None
    """Measured FLOP/s of a large bf16 matrix product."""
    copy: float | None = None
    """Measured bytes/s of a copy, read and written."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def need_gpu(self) -> None:
        if not self.on_gpu:
            raise Skip("needs CUDA")

    def seconds(self, work: Callable[[], Any], *, repeats: int = 10, warm: int = 3) -> float:
        """Median seconds of `work`, device and host, over single calls."""
        times = []
        for i in range(warm + repeats if not self.tiny else 2):
            self.sync()
            begun = time.perf_counter()
            work()
            self.sync()
            if i >= (warm if not self.tiny else 1):
                times.append(time.perf_counter() - begun)
            if self.late and times:
                break
        return statistics.median(times)

    def peak(self, work: Callable[[], Any]) -> int | None:
        """Bytes of device memory that `work` needs beyond what is there before it."""
        if not self.on_gpu:
            return None
        self.free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.sync()
        return torch.cuda.max_memory_allocated() - before


# --- what the hardware does -------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> dict[str, Any]:
    """A large bf16 matrix product on random data, and a copy in memory, counting bytes read and written."""
    n = bench.size(8192, 256)
    kind = torch.bfloat16 if bench.on_gpu else torch.float32
    a, b = (torch.randn(n, n, device=bench.device, dtype=kind) for _ in range(2))
    bench.matmul = 2 * n**3 / bench.seconds(lambda: a @ b)
    source = torch.randn(bench.size(2**29, 2**18), device=bench.device)  # 2 GiB: no cache holds it
    target = torch.empty_like(source)
    bench.copy = 2 * source.nbytes / bench.seconds(lambda: target.copy_(source))
    found: dict[str, Any] = {"matmul_tflops": bench.matmul / 1e12, "copy_gb_per_second": bench.copy / 1e9}
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    return found


# --- kernels against references ---------------------------------------------------------------------------------------


def views_against_reference(bench: Bench) -> dict[str, Any]:
    """Largest difference of any pixel between the kernels' views and the definition's, for every kind of policy."""
    generator = np.random.default_rng(0)
    cases: dict[str, Any] = bench.partial.setdefault("cases", {})
    wrong = []
    shapes = [  # view pixels, images' height and width (None: all different, odd), channels
        (32, (32, 32), 3),
        (28, (28, 28), 1),
        (33, (47, 61), 3),
        (96, None, 3),
        (224, (256, 256), 3),
        (224, None, 1),
    ]
    for preset in (Policy.google, Policy.torchvision):
        for size, source, channels in shapes[: 3 if bench.tiny else None]:
            count = bench.size(64 if size <= 33 else 12, 3)
            policy = preset(size, strength=1.0, channels=channels, blur=0.5)
            images = _images(generator, count, source, channels)
            draws = {"seed": 3, "epoch": 5, "indices": np.arange(count)}
            want = make_views(images, policy, **draws, backend="reference")
            for dtype in (torch.float32, torch.bfloat16) if bench.on_gpu else (torch.float32,):
                got, again = (_fast_views(bench, images, policy, draws, dtype) for _ in range(2))
                error = max(float((a.float().cpu() - b).abs().max()) for a, b in zip(got, want, strict=True))
                same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
                name = f"{preset.__name__}, {size} px from {source or 'mixed sizes'}, {channels} channels, {dtype}"
                cases[name] = {"largest_error": error, "same_bits_again": same}
                # bf16 steps by 2^-8 below 1; a step may be lost where an fp32 difference crosses an edge
                if error > 1e-4 + (0 if dtype == torch.float32 else 2**-8) or not same:
                    wrong.append(name)
            if bench.late:
                return {"right": not wrong, "wrong": wrong, "cut": "time is over", "cases": cases}
    return {"right": not wrong, "wrong": wrong, "cases": cases}


def _images(generator: np.random.Generator, count: int, source: tuple[int, int] | None, channels: int) -> Any:
    if source is not None:
        return generator.integers(0, 256, (count, *source, channels), dtype=np.uint8)
    sides = generator.integers(40, 500, (count, 2)) | 1
    return [generator.integers(0, 256, (h, w, channels), dtype=np.uint8) for h, w in sides]


def _fast_views(bench: Bench, images: Any, policy: Policy, draws: dict[str, Any], dtype: torch.dtype) -> Any:
    if bench.on_gpu:
        return make_views(images, policy, **draws, device=bench.device, backend="cuda", dtype=dtype)
    return make_views(images, policy, **draws, backend="cpu")


def loss_against_dense(bench: Bench) -> dict[str, Any]:
    """NT-Xent as training calls it against the dense definition in fp64: loss, gradient, and the same bits again."""
    cases: dict[str, Any] = bench.partial.setdefault("cases", {})
    wrong = []
    for rows, width in ((2, 128), (6, 64), (510, 128), (2048, 128), (8190, 128), (2048, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            for temperature in (0.01, 0.05, 0.1, 0.5, 1.0):
                z = _projections(rows, width).to(bench.device, dtype)
                want, want_gradient = _loss(nt_xent_dense, z.double(), temperature)
                (got, gradient), (_, again) = (_loss(nt_xent, z, temperature) for _ in range(2))
                # a gradient far below this scale is what is left of large numbers that cancel
                least = 1e-2 / (temperature * math.sqrt(rows * width))
                off = (gradient.double() - want_gradient).norm() / want_gradient.norm().clamp_min(least)
                errors = {
                    "loss": float((got.double() - want).abs() / want.abs().clamp_min(1e-3)),
                    "gradient": float(off),
                    "same_bits_again": torch.equal(gradient, again),
                }
                name = f"{rows} rows of {width}, {dtype}, temperature {temperature}"
                cases[name] = errors
                # fp32 holds 1e-5; tf32 would show as about 1e-4, bf16 operands as 1e-3: written down, not refused
                if not (errors["loss"] < 1e-2 and errors["gradient"] < 2e-2 and errors["same_bits_again"]):
                    wrong.append(name)
        if bench.late or (bench.tiny and rows == 510):
            break
    worst = {
        f"{key}, {dtype}": max(case[key] for name, case in cases.items() if str(dtype) in name)
        for key in ("loss", "gradient")
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {"right": not wrong, "wrong": wrong, "largest_relative_errors": worst, "cases": cases}


def _projections(rows: int, width: int) -> Tensor:
    """(2, rows / 2, width): views of an image are alike, and two images are the same."""
    z = torch.randn(2, rows // 2, width, generator=torch.Generator().manual_seed(rows))
    z[1] = 0.7 * z[1] + z[0]
    if rows > 6:
        z[:, 1] = z[:, 0]
    return z


def _loss(function: Callable[..., Tensor], z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = function(z[0], z[1], temperature)
    loss.backward()
    assert z.grad is not None
    return loss.detach(), z.grad


def queue_loss(bench: Bench) -> dict[str, Any]:
    """MoCo's loss over a queue against the dense definition: errors in fp64, time and memory."""
    cases: dict[str, Any] = bench.partial.setdefault("cases", {})
    wrong = []
    for n, keys in ((256, 4096), (256, 65_536), (4096, 65_536)) if not bench.tiny else ((32, 128),):
        rows = torch.nn.functional.normalize(torch.randn(2 * n + keys, 128, device=bench.device), dim=1)
        q, k, bank = rows.split([n, n, keys])

        def work(loss: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, Tensor]:
            queries = operands[0].clone().requires_grad_()
            value = loss(queries, *operands[1:], 0.2)
            return value.detach(), torch.autograd.grad(value, queries)[0]

        want, want_gradient = work(info_nce_dense, q.double(), k.double(), bank.double())
        (got, gradient), (_, again) = (work(info_nce, q, k, bank) for _ in range(2))
        result: dict[str, Any] = {
            "loss": float((got.double() - want).abs() / want.abs()),
            "gradient": float((gradient.double() - want_gradient).norm() / want_gradient.norm()),
            "same_bits_again": torch.equal(gradient, again),
            "ms": 1e3 * bench.seconds(lambda: work(info_nce, q, k, bank)),  # noqa: B023
            "dense_ms": 1e3 * bench.seconds(lambda: work(info_nce_dense, q, k, bank)),  # noqa: B023
            "extra_bytes": bench.peak(lambda: work(info_nce, q, k, bank)),  # noqa: B023
            "dense_extra_bytes": bench.peak(lambda: work(info_nce_dense, q, k, bank)),  # noqa: B023
        }
        cases[f"{n} queries, {keys} keys"] = result
        if not (result["loss"] < 1e-4 and result["gradient"] < 1e-3 and result["same_bits_again"]):
            wrong.append(f"{n} queries, {keys} keys")
        if bench.late:
            break
    return {"right": not wrong, "wrong": wrong, "cases": cases}


# --- parts of a step --------------------------------------------------------------------------------------------------


def views_speed(bench: Bench) -> dict[str, Any]:
    """Finished views per second, both views of each image, from uint8 images in host memory or on the device."""
    found: dict[str, Any] = bench.partial
    for size, source, count, blur in ((32, 32, bench.size(4096, 8), 0.0), (224, 256, bench.size(256, 2), 0.5)):
        images = np.random.default_rng(0).integers(0, 256, (count, source, source, 3), dtype=np.uint8)
        policy = Policy.google(size, strength=0.5 if size == 32 else 1.0, blur=blur)
        draws = {"seed": 0, "epoch": 0, "indices": np.arange(count)}
        places: dict[str, Any] = {"host": images}
        if bench.on_gpu:
            from simclr.views.device_images import DeviceImages

            places["device"] = DeviceImages.upload(images, 3, bench.device)
        for place, held in places.items():
            for dtype in (torch.bfloat16, torch.float32) if bench.on_gpu else (torch.float32,):
                seconds = bench.seconds(lambda: _fast_views(bench, held, policy, draws, dtype))  # noqa: B023
                moved = 2 * count * 3 * size * size * dtype.itemsize + images.nbytes
                found[f"{size} px from {source} on the {place}, {dtype}"] = {
                    "views_per_second": 2 * count / seconds,
                    "share_of_copy_speed": moved / seconds / bench.copy if bench.copy else None,
                }
    return dict(found)


def loss_speed(bench: Bench) -> dict[str, Any]:
    """Forward and backward by number of rows: time, memory, and arithmetic against the measured matrix product."""
    rows: dict[str, Any] = bench.partial.setdefault("rows", {})
    width = 128
    for n in (1024, 4096, 8192, 16_384, 65_536, 131_072) if not bench.tiny else (64, 1024):
        z = torch.randn(2, n // 2, width, device=bench.device)
        ours = bench.seconds(lambda: _loss(nt_xent, z, 0.1))  # noqa: B023
        flops = 5 * n * n * width  # N^2 D forward by symmetry, 4 N^2 D backward
        result: dict[str, Any] = {
            "ms": 1e3 * ours,
            "tflops": flops / ours / 1e12,
            "share_of_matmul": flops / ours / bench.matmul if bench.matmul else None,
            "extra_bytes": bench.peak(lambda: _loss(nt_xent, z, 0.1)),  # noqa: B023
        }
        if n <= 16_384:
            result["dense_ms"] = 1e3 * bench.seconds(lambda: _loss(nt_xent_dense, z, 0.1))  # noqa: B023
            result["dense_extra_bytes"] = bench.peak(lambda: _loss(nt_xent_dense, z, 0.1))  # noqa: B023
        rows[str(n)] = result
        if bench.late:
            break
    return {"width": width, "rows": rows}


# --- whole steps ------------------------------------------------------------------------------------------------------


class Timed:
    """Told of each step: warms up, then times segments of steps in turn with the encoder alone, then stops training.

    The device is waited for at the ends of a segment only.

    Args:
        warm: Steps before anything is timed.
        probe: Steps that say how many make a second, which is a segment.
        rounds: Segments.
        alone: Whether to time the encoder too; it may not fit the memory without the run's own means.
    """

    def __init__(self, bench: Bench, *, warm: int = 6, probe: int = 4, rounds: int = 5, alone: bool = True) -> None:
        self.bench, self.with_encoder = bench, alone
        self.warm, self.probe, self.rounds = (1, 1, 1) if bench.tiny else (warm, probe, rounds)
        self.whole: list[float] = []
        self.alone: list[float] = []
        self.peak_bytes: int | None = None
        self.seconds_to_first_step = 0.0
        self._created = time.perf_counter()
        self._encoder: Contender | None = None
        self._begun, self._count, self._segment = 0.0, 0, 0

    def __call__(self, task: Task, done: int) -> None:
        if done <= self.warm:
            self._mark()
            if done == 1:
                self.seconds_to_first_step = self._begun - self._created
            return
        if done <= self.warm + self.probe:
            if done == self.warm + self.probe:
                a_second = self.probe / self._elapsed()
                self._segment = 1 if self.bench.tiny else max(2, round(a_second))
                self._mark()
            return
        self._count += 1
        if self._count < self._segment:
            return
        self.whole.append(self._segment * task.views_per_step / self._elapsed())
        if self.bench.on_gpu and self.peak_bytes is None:
            self.peak_bytes = torch.cuda.max_memory_allocated()
        if self.with_encoder:
            self._time_encoder(task)
        if len(self.whole) >= self.rounds or self.bench.late:
            raise Stop
        self._mark()

    def _time_encoder(self, task: Task) -> None:
        if self._encoder is None:
            self._encoder = encoder_alone(task)
            for _ in range(1 if self.bench.tiny else 4):
                self._encoder()
        self._mark()
        views = sum(self._encoder() for _ in range(self._segment))
        self.alone.append(views / self._elapsed())

    def _mark(self) -> None:
        self.bench.sync()
        self._begun, self._count = time.perf_counter(), 0

    def _elapsed(self) -> float:
        self.bench.sync()
        return time.perf_counter() - self._begun


def _train(
    bench: Bench,
    images: Images,
    config: PretrainConfig,
    kind: str | None = None,
    *,
    timed: Timed | None = None,
    change: Callable[[Task], Task] = lambda task: task,
) -> dict[str, Any]:
    """Views per second of `simclr pretrain`, its share outside the encoder, and what the hardware would allow."""
    if bench.on_gpu:
        bench.free()
        torch.cuda.reset_peak_memory_stats()
    timed = timed or Timed(bench)
    run_ours(images, config, timed, change=lambda task: change(replace(task, total_steps=10**9)))
    median = statistics.median(timed.whole)
    found: dict[str, Any] = {
        "batch": config.batch_size,
        "median": median,
        "views_per_second": timed.whole,
        "peak_bytes": timed.peak_bytes,
        "seconds_to_first_step": timed.seconds_to_first_step,
    }
    if timed.alone:
        shares = [1 - whole / alone for whole, alone in zip(timed.whole, timed.alone, strict=True)]
        found |= {"encoder_alone": timed.alone, "outside_encoder": statistics.median(shares)}
    if kind and bench.on_gpu and bench.matmul and bench.copy:
        found["model_flops_share_of_matmul"] = median * GFLOP[kind] * 1e9 / bench.matmul
        found["bytes_share_of_copy"] = median * MEGABYTES[kind] * 1e6 / bench.copy
    return found


def settings_of(bench: Bench, recipe: str, **changes: Any) -> PretrainConfig:
    """A recipe's settings on this device, without checks and checkpoints on the way; of the smallest sizes if asked."""
    config = replace(RECIPES[recipe].config, knn_every=0, save_every=10**9, device=bench.device.type)
    if bench.tiny:
        changes |= {"encoder": "small", "width": 0.25, "batch_size": 4, "size": 16, "head_dim": 16}
    return replace(config, **changes)


def train_resnet18(bench: Bench) -> dict[str, Any]:
    """ResNet-18 at 32 pixels from random images in memory."""
    images = random_images(bench.size(16_384, 8), 32)
    found: dict[str, Any] = bench.partial
    for batch in (512, 4096):
        found[f"batch {batch}"] = _train(bench, images, settings_of(bench, "cifar", batch_size=batch), "resnet18-32")
        if bench.late or bench.tiny:
            break
    return {**found, "best": max(found.values(), key=lambda result: result["median"])}


def train_resnet50(bench: Bench) -> dict[str, Any]:
    """ResNet-50 at 224 pixels from random images of 256 pixels in memory, as a pack would hold them."""
    images = random_images(bench.size(2048, 8), 32 if bench.tiny else 256)
    found: dict[str, Any] = bench.partial
    for batch in (256, 512):
        found[f"batch {batch}"] = _train(bench, images, settings_of(bench, "photos", batch_size=batch), "resnet50-224")
        if bench.late or bench.tiny:
            break
    return {**found, "best": max(found.values(), key=lambda result: result["median"])}


def huge_batch(bench: Bench) -> dict[str, Any]:
    """Batch 65,536 of ResNet-18 at 32 pixels on one GPU: the run picks and names the memory strategy."""
    bench.need_gpu()
    config = settings_of(bench, "cifar", batch_size=65_536, log_every=10**9)
    timed = Timed(bench, warm=2, probe=1, rounds=3, alone=False)
    return _train(bench, random_images(131_072, 32), config, "resnet18-32", timed=timed)


def precision_and_compile(bench: Bench) -> dict[str, Any]:
    """The same step in fp32 and bf16, with each memory strategy, and compiled: speed and peak memory."""
    images = random_images(bench.size(8192, 8), 32)
    found: dict[str, Any] = bench.partial
    found["fp32"] = _train(bench, images, settings_of(bench, "cifar", batch_size=1024, precision="fp32"))
    if not bench.on_gpu:
        return dict(found)
    half = settings_of(bench, "cifar", batch_size=1024, precision="bf16")
    found["bf16"] = _train(bench, images, half)
    for strategy in ("checkpointing", "grad-cache"):
        if not bench.late:
            found[f"bf16, {strategy}"] = _train(
                bench, images, replace(half, memory=strategy), timed=Timed(bench, alone=False)
            )
    if not bench.late:

        def compiled(task: Task) -> Task:
            task.method.encoder.compile()
            return task

        found["bf16, compiled"] = _train(bench, images, half, timed=Timed(bench, alone=False), change=compiled)
    return dict(found)


def cuda_graph(bench: Bench) -> dict[str, Any]:
    """Updates replayed from a CUDA graph: the weights against those without, with deterministic kernels, and speeds."""
    same_weights: dict[str, Any] = bench.partial.setdefault("same_weights", {})
    if bench.on_gpu:  # cuBLAS is to be deterministic from its start
        same_weights |= in_fresh_process(torch.get_num_threads(), _replayed_weights, bench.device.type, bench.tiny)
    else:
        same_weights |= _replayed_weights(bench.device.type, bench.tiny)
    images = random_images(bench.size(8192, 8), 32)
    speeds = bench.partial.setdefault("speeds", {})
    for name, replayed in (("replayed", True), ("launched", False)):
        config = settings_of(bench, "cifar-fast", cuda_graph=replayed)
        speeds[name] = _train(bench, images, config, "resnet18-32", timed=Timed(bench, warm=8, alone=False))
        if bench.late:
            break
    return {"right": all(result["right"] for result in same_weights.values()), **bench.partial}


def _replayed_weights(device: str, tiny: bool) -> dict[str, Any]:
    """For each optimiser: whether a run with replayed updates ends with the weights of one without, bit for bit."""
    bench = Bench(torch.device(device), tiny)
    steps = 6 if tiny else 24
    images = random_images(bench.size(1024, 16), 16 if tiny else 32)
    found: dict[str, Any] = {}
    for recipe, optimizer, rate in (("cifar", "lars", 1.0), ("cifar-fast", "sgd", 0.06), ("cifar", "adamw", 1e-3)):
        config = settings_of(bench, recipe, batch_size=256, deterministic=True, optimizer=optimizer, lr=rate)
        config = replace(config, log_every=10, max_checkpoints=1, memory="plain")
        ends, counts = [], []
        for replayed in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                outcome = run_ours(
                    images, replace(config, cuda_graph=replayed), lambda *_: None, folder=Path(folder) / "run",
                    change=lambda task: stretched(task, steps),
                )  # fmt: skip
                assert outcome is not None
                ends.append(_last_state(Path(folder) / "run"))
                counts.append(outcome.steps_replayed)
        different = [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]
        found[optimizer] = {
            "right": not different and (counts[1] > 0 or not bench.on_gpu),
            "different": different[:5],
            "steps": steps,
            "steps_replayed": counts[1],
        }
    return found


# --- promises ---------------------------------------------------------------------------------------------------------


def resume(bench: Bench) -> dict[str, Any]:
    """A run that is stopped and gone on with ends in the same bits, with deterministic kernels."""
    return in_fresh_process(torch.get_num_threads(), _resume, bench.device.type, bench.tiny)


def _resume(device: str, tiny: bool) -> dict[str, Any]:
    bench = Bench(torch.device(device), tiny)
    steps = 4 if tiny else 20
    images = random_images(bench.size(1024, 16), 16 if tiny else 32)
    config = replace(
        settings_of(bench, "cifar", batch_size=256, deterministic=True),
        save_every=steps // 2,
        log_every=1,
        max_checkpoints=9,
    )

    def stop_at(step: int) -> Callable[[Task, int], None]:
        def on_step(_task: Task, done: int) -> None:
            if done == step:
                raise Stop

        return on_step

    def shortened(task: Task) -> Task:
        return replace(task, total_steps=steps)

    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        run_ours(images, config, lambda *_: None, change=shortened, folder=whole)
        run_ours(images, config, stop_at(steps // 2 + 1), change=shortened, folder=parts)
        run_ours(images, config, lambda *_: None, change=shortened, folder=parts)
        ends = [_last_state(run) for run in (whole, parts)]
        records = [(run / "metrics.jsonl").read_bytes() for run in (whole, parts)]
    different = [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]
    same_records = records[0] == records[1]
    return {"right": not different and same_records, "different": different[:5], "same_records": same_records}


def _last_state(run: Path) -> dict[str, Tensor]:
    newest = max((run / "checkpoints").glob("step-*.pt"), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
    return torch.load(newest, map_location="cpu", weights_only=True)["method"]


def processes(bench: Bench) -> dict[str, Any]:
    """Loss and gradients of one process against the mean over two that share the batch and this device (gloo)."""
    with tempfile.TemporaryDirectory() as folder:
        alone = _gradients(0, 1, bench.device.type, bench.tiny)
        try:
            torch.multiprocessing.spawn(_process, (2, folder, bench.device.type, bench.tiny), nprocs=2, daemon=True)
        except ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            if "support" in last or "No backend" in last:  # NCCL refuses two processes on a GPU, gloo some exchanges
                raise Skip(f"two processes cannot share this device: {last}") from None
            raise
        shared = torch.load(Path(folder) / "result.pt", weights_only=True)
    differences = [(a - b).norm() / a.norm().clamp_min(1e-12) for a, b in zip(alone[1], shared[1], strict=True)]
    error = {"loss": abs(alone[0] - shared[0]) / abs(alone[0]), "gradient": float(torch.stack(differences).max())}
    return {"right": error["loss"] < 1e-4 and error["gradient"] < 1e-2, "largest_relative_errors": error}


def _process(rank: int, size: int, folder: str, device: str, tiny: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    result = _gradients(rank, size, device, tiny)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.barrier()
    stop()


def _gradients(rank: int, size: int, device: str, tiny: bool) -> tuple[float, list[Tensor]]:
    """Global loss, and gradients averaged over the processes, of one step in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    world = DistributedContext(rank=rank, size=size, device=torch.device(device))
    side, batch = (8, 8) if tiny else (32, 256)
    encoder = build_encoder(EncoderConfig(name="small", channels=3, size=side), seed=0)
    head = ProjectionHead(encoder.num_features, kind="nonlinear", layers=2, dim=32, seed=0)
    method = SimCLR(encoder, head, criterion=ContrastiveLoss(temperature=0.5), loss_scale=1.0, world=world).to(device)
    set_global_batch_norm(method, world.group)
    views = torch.rand(2, batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    mine = views[:, world.local_slice(batch)].to(device)
    loss, _ = method(mine[0], mine[1])
    loss.backward()
    loss = loss.detach()
    gradients = [world.all_reduce_mean(p.grad.cpu()) for p in method.parameters() if p.grad is not None]
    return float(loss), gradients


def time_to_accuracy(bench: Bench) -> dict[str, Any]:
    """Seconds of `simclr pretrain`'s recipe for the data, and kNN accuracy beside raw pixels and a random encoder."""
    found: dict[str, Any] = bench.partial
    for data, recipe, epochs in (("fashion-mnist", "cpu", 8), ("digits", "digits", 60)):
        try:
            train = open_data(data)
            test = open_data(data, split="test") if train.has_own_split else None
        except UserError as error:
            found[data] = {"skipped": str(error)}
            continue
        if bench.tiny:
            train, test = train.subset(np.arange(200)), None
        split = split_data(train, test, seed=0)
        config = replace(
            RECIPES[recipe].config, size=int(min(train.sizes[0])), epochs=1 if bench.tiny else epochs, knn_every=0,
            save_every=10**9, device=bench.device.type, batch_size=bench.size(256, 64),
        )  # fmt: skip
        config = replace(config, warmup_epochs=min(config.warmup_epochs, 1))
        found[data] = _train_and_ask(bench, split.train, split.test, config)
        if bench.late or bench.tiny:
            break
    return dict(found)


def _train_and_ask(bench: Bench, train: Images, test: Images, config: PretrainConfig) -> dict[str, Any]:
    begun = time.perf_counter()
    seen: dict[str, Any] = {}

    def on_step(task: Task, done: int) -> None:
        seen.update(steps=done, first=seen.get("first", time.perf_counter()), encoder=task.method.encoder)
        if bench.late:
            raise Stop

    run_ours(train, config, on_step)
    bench.sync()
    seconds = time.perf_counter() - begun
    encoder = seen["encoder"]

    def ask(features: Callable[[Images], np.ndarray]) -> float:
        return accuracy(knn(features(train), train.labels, features(test)), test.labels)

    random = random_encoder(encoder.config, seed=0).to(bench.device)
    return {
        "seconds": seconds,
        "seconds_to_first_step": seen["first"] - begun,
        "steps": seen["steps"],
        "epochs": seen["steps"] * config.batch_size / len(train),
        "knn": ask(lambda images: extract(encoder, images)),
        "knn_random_encoder": ask(lambda images: extract(random, images)),
        "knn_pixels": ask(lambda images: pixels_of(images, size=config.size)),
    }


def tests(bench: Bench) -> dict[str, Any]:
    """The tests that speak of GPUs, with pytest."""
    bench.need_gpu()
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    left = max(5.0, bench.deadline - time.perf_counter())
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", "cuda or triton or gpu", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, "-W", "default"], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        raise Skip(f"more than {left:.0f} seconds") from None
    return {"right": done.returncode == 0, "last_lines": done.stdout.splitlines()[-15:]}
