"""What several processes exchange in a training step: counted, against the formula, and the formula on 1,024 GPUs.

    python benchmarks/scaling.py --json scaling.json

Starts 1, 2 and 4 gloo processes with torchrun on this machine, the same global batch, and counts the bytes that each
process hands to every collective of `simclr pretrain`'s own loop. P processes, n images each, projections of width D:

| exchange | bytes handed over by a process, a step |
|---|---|
| all-gather of the projections Z | 2 n x D x 4 |
| all-gather of the rows' log-sums | 2 n x 4 |
| all-reduce of the gradients (DDP's buckets) | 4 for each parameter |
| global batch norm: all-gather forward, all-reduce backward, for each layer of C channels | (1 + 2 C) x 4, 2 C x 4 |
| all-reduce of the flag that asks to stop | 8 |

The backward pass of the loss exchanges nothing. Steps that are logged gather some more for the signs of health.

On the wire a ring moves, out of each process, P - 1 times what an all-gather is handed, and 2 (P - 1) / P times what
an all-reduce is. The table for GPUs takes these bytes at the bandwidths stated there, and a latency for every hop of a
tree; it is arithmetic, no measurement. Steps per second of processes that share two cores say what the exchange costs,
not how training would scale.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from common import Stop, machine, print_markdown, random_images, ratios, run_ours, spread, write_json
from simclr import distributed
from simclr.config.encoder import EncoderConfig
from simclr.config.recipes import RECIPES
from simclr.models import batchnorm
from simclr.models.batchnorm import TensorFlowBatchNorm
from simclr.models.encoder import build_encoder
from simclr.models.heads import ProjectionHead
from simclr.training import loop as training
from simclr.training.loop import Task

FLOAT, FLAG = 4, 8  # bytes of an fp32 and of an int64
GATHERED = frozenset({"projections", "log-sums", "batch norm forward"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=256, help="images a step over all processes")
    parser.add_argument("--encoder", default="small")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="timed steps in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/scaling.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    results: dict[int, dict[str, Any]] = {}
    for _ in range(args.rounds):
        for processes in args.processes:
            measured = launch(processes, args)
            found = results.setdefault(processes, measured | {"steps_per_second": []})
            assert found["counted"] == measured["counted"], "every step exchanges the same"
            found["steps_per_second"].append(measured["steps_per_second"])
            write_json(args.json, {"machine": machine(), "processes": results, "gpus": gpu_table()})
    print_counted(results)
    print_gpus(gpu_table())


def print_counted(results: dict[int, dict[str, Any]]) -> None:
    rows = []
    alone = results.get(1, next(iter(results.values())))["steps_per_second"]
    for processes, result in results.items():
        for kind, counted in sorted(result["counted"].items()) or [("nothing", 0)]:
            expected = result["formula"].get(kind, 0)
            agrees = "equal" if counted == expected else "DIFFERENT"
            wire = on_the_wire(kind, counted, processes)
            rows.append([str(processes), kind, f"{counted:,}", f"{expected:,} ({agrees})", f"{wire:,.0f}"])
    print_markdown(["processes", "exchange", "bytes counted, a process and step", "formula", "on the wire"], rows)
    rows = []
    for processes, result in results.items():
        speeds = result["steps_per_second"]
        rows.append([str(processes), spread(speeds, "{:.2f}"), spread(ratios(speeds, alone), "{:.2f}")])
    print_markdown(["processes", "steps/s, same global batch", "against one process"], rows)


# --- the formula ------------------------------------------------------------------------------------------------------


def formula(method: nn.Module, *, batch_size: int, processes: int, width: int) -> dict[str, int]:
    """Bytes that one process hands to each collective in one step that is not logged.

    Args:
        method: Encoder and head; its parameters and batch-norm layers count.
        batch_size: Images over all processes.
        width: D of the projections.
    """
    if processes == 1:
        return {}
    rows = 2 * batch_size // processes
    channels = [layer.num_features for layer in method.modules() if isinstance(layer, TensorFlowBatchNorm)]
    return {
        "projections": FLOAT * rows * width,
        "log-sums": FLOAT * rows,
        "gradients": FLOAT * sum(p.numel() for p in method.parameters() if p.requires_grad),
        "batch norm forward": FLOAT * sum(1 + 2 * c for c in channels),
        "batch norm backward": FLOAT * sum(2 * c for c in channels),
        "flag": FLAG,
    }


def on_the_wire(kind: str, handed: float, processes: int) -> float:
    """Bytes that leave a process when P of them form a ring."""
    return handed * (processes - 1) * (1 if kind in GATHERED else 2 / processes)


# --- counting ---------------------------------------------------------------------------------------------------------


class Counting(ExitStack):
    """Within it, every collective of a training run is counted: bytes handed over by this process, by purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> "Counting":
        super().__enter__()
        gather, reduce, wrap = distributed.all_gather_flat, dist.all_reduce, training._over_processes

        def counted_gather(output: torch.Tensor, given: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.bytes[_purpose(sys._getframe(1).f_globals["__name__"], given, "forward")] += given.nbytes
            return gather(output, given, *args, **options)

        def counted_reduce(given: torch.Tensor, *args: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith("simclr"):  # DDP's buckets are counted where they are handed over
                self.bytes[_purpose(caller, given, "backward")] += given.nbytes
            return reduce(given, *args, **options)

        def bucket_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            self.bytes["gradients"] += bucket.buffer().nbytes
            return allreduce_hook(state, bucket)

        def counted_wrap(method: nn.Module) -> nn.Module:
            model = wrap(method)
            model.register_comm_hook(None, bucket_hook)
            return model

        for module in (distributed, batchnorm):
            self.enter_context(patch.object(module, "all_gather_flat", counted_gather))
        self.enter_context(patch.object(dist, "all_reduce", counted_reduce))
        self.enter_context(patch.object(training, "_over_processes", counted_wrap))
        return self


def _purpose(caller: str, given: torch.Tensor, when: str) -> str:
    if caller == "simclr.models.batchnorm":
        return f"batch norm {when}"
    if given.dtype == torch.int64:
        return "flag"
    return "projections" if given.ndim == 2 else "log-sums"


def worker(args: argparse.Namespace) -> None:
    """One of the processes: train a few steps, count and time them; the main one writes the file."""
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    images = random_images(2 * args.batch, args.size)
    recipe = RECIPES["cpu"].config
    config = replace(
        recipe, encoder=args.encoder, size=args.size, batch_size=args.batch, knn_every=0, log_every=10**6,
        save_every=10**6, device="cpu",
    )  # fmt: skip
    warm = 3
    moments: list[float] = []
    seen: list[Counter[str]] = []

    with Counting() as counting:

        def on_step(task: Task, done: int) -> None:
            if done >= warm:
                moments.append(time.perf_counter())
                seen.append(counting.bytes.copy())
            if len(moments) > args.steps:
                a_step = seen[-1] - seen[-2]
                assert all(later - earlier == a_step for earlier, later in pairwise(seen))
                if world.is_main:
                    expected = formula(task.method, batch_size=args.batch, processes=world.size, width=recipe.head_dim)
                    speed = args.steps / (moments[-1] - moments[0])
                    write_json(args.worker, {"counted": a_step, "formula": expected, "steps_per_second": speed})
                raise Stop

        run_ours(images, config, on_step, change=lambda task: replace(task, total_steps=10**6), world=world)
    distributed.stop()


def launch(processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run the worker in that many processes; what the main one wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "worker.json"
        options = ["--batch", args.batch, "--encoder", args.encoder, "--size", args.size, "--steps", args.steps]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        subprocess.run(
            [str(part) for part in (*start, __file__, *options, "--worker", out)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return json.loads(out.read_text())


# --- on paper ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    name: str
    bytes_per_second: float
    """Out of one GPU, one direction."""
    hop: float
    """Seconds of latency for each of the log2(P) hops of a tree."""
    most: int
    """GPUs that it connects."""


NVLINK = Network("NVLink (450 GB/s a GPU and direction, 3 us a hop)", 450e9, 3e-6, 8)
INFINIBAND = Network("InfiniBand NDR (50 GB/s a GPU, 5 us a hop)", 50e9, 5e-6, 1024)
VIEWS_PER_SECOND = 4500.0
"""Of ResNet-50 at 224 pixels on an H100, forward and backward: the goal of issue 3, not a measurement."""


def gpu_table() -> list[dict[str, Any]]:
    """ResNet-50 at 224 pixels: seconds of each exchange beside the encoder's, by batch and number of GPUs."""
    encoder = build_encoder(EncoderConfig(name="resnet50", channels=3, size=224), seed=0)
    method = nn.ModuleList([encoder, ProjectionHead(encoder.num_features, kind="nonlinear", layers=2, dim=128, seed=0)])
    layers = sum(isinstance(layer, TensorFlowBatchNorm) for layer in method.modules())
    table = []
    for batch in (4096, 16_384, 65_536):
        for gpus in (8, 64, 256, 1024):
            network = NVLINK if gpus <= NVLINK.most else INFINIBAND
            handed = formula(method, batch_size=batch, processes=gpus, width=128)
            del handed["flag"]  # a CPU tensor over gloo: the GPU does not wait for it
            calls = {"batch norm forward": layers, "batch norm backward": layers}
            hops = math.log2(gpus)
            seconds = {
                kind: on_the_wire(kind, size, gpus) / network.bytes_per_second + calls.get(kind, 1) * hops * network.hop
                for kind, size in handed.items()
            }
            table.append(
                {
                    "batch": batch,
                    "gpus": gpus,
                    "network": network.name,
                    "handed_bytes": handed,
                    "wire_bytes": {kind: on_the_wire(kind, size, gpus) for kind, size in handed.items()},
                    "seconds": seconds,
                    "encoder_seconds": 2 * batch / gpus / VIEWS_PER_SECOND,
                }
            )
    return table


def print_gpus(table: list[dict[str, Any]]) -> None:
    print(f"\nResNet-50 at 224 pixels on paper, {VIEWS_PER_SECOND:,.0f} views/s and GPU, per GPU and step;")
    print(f"{NVLINK.name} up to {NVLINK.most} GPUs, {INFINIBAND.name} above.")
    print("`hidden`: share of the step if the gradients travel during the backward pass.")
    rows = []
    for row in table:
        ms = {kind: 1e3 * seconds for kind, seconds in row["seconds"].items()}
        encoder = 1e3 * row["encoder_seconds"]
        exposed = sum(ms.values()) - ms["gradients"] + max(0.0, ms["gradients"] - encoder * 2 / 3)
        rows.append(
            [
                f"{row['batch']:,}",
                f"{row['gpus']:,}",
                f"{encoder:.1f}",
                *(
                    f"{row['wire_bytes'][kind] / 1e6:.2f} MB, {ms[kind]:.2f} ms"
                    for kind in ("projections", "log-sums", "gradients")
                ),
                f"{ms['batch norm forward'] + ms['batch norm backward']:.2f} ms",
                f"{100 * sum(ms.values()) / (sum(ms.values()) + encoder):.1f} %",
                f"{100 * exposed / (exposed + encoder):.1f} %",
            ]
        )
    header = ["batch", "GPUs", "encoder, ms", "Z", "log-sums", "gradients", "batch norm", "exchange", "hidden"]
    print_markdown(header, rows)


if __name__ == "__main__":
    main()
