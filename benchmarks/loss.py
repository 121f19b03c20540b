"""NT-Xent forward + backward: ours against lightly's NTXentLoss and our dense definition, time and extra memory.

    pip install lightly                   # optional
    python benchmarks/loss.py --json loss.json
    python benchmarks/loss.py --device cuda --json loss.json

Rows of width 128 (two views of half as many images), fp32, temperature 0.1. First the losses are held to each other.
Each round then times every contender once, one after the other, and takes the ratio within the round; the table gives
median (smallest to largest) over the rounds, and from 65,536 rows on there is one round. Extra memory is what a call
adds at its peak to a process that holds the projections, their gradients included: on a CPU the growth of the resident
set, each contender in a process of its own; on a GPU what torch allocates. A contender whose N x N matrices would not
fit is left out and its need stated. `--neighbours 0 1 2` measures beside as many processes that keep a core busy;
`simclr` runs with GOMP_SPINCOUNT=1000, which has to be set for this script.

The floor: N^2/2 pairs, 2 D operations each, for the similarities of forward, those of backward, and the gradients of
both rows, 4 N^2 D in all; on a GPU, where each row of backward is done by itself, 5 N^2 D, up to three times over where
a number is held as two of bf16 (losses/operands.py).
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import in_fresh_process, machine, neighbours, print_markdown, ratios, spread, write_json
from simclr.losses import nt_xent, nt_xent_dense

OURS, OURS_BF16, DENSE, LIGHTLY = "ours", "ours, bf16 projections", "dense definition", "lightly"
WIDTH = 128
TEMPERATURE = 0.1
LARGE = 65_536
"""Rows from which there is one round, and no call to warm up but a small one."""

BLOCK = 1 << 20
"""Bytes; memory on a CPU is measured to about as much."""

MATRICES = {DENSE: 3.2, LIGHTLY: 4.5}
"""N x N matrices of fp32 that a contender holds at its peak, for saying beforehand what fits."""

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--min-rows", type=int, default=1024)
    parser.add_argument("--max-rows", type=int, default=131_072, help="the largest takes minutes on two cores")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="least time of one measurement")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="threads, on a CPU")
    parser.add_argument(
        "--neighbours", type=int, nargs="+", default=[0], help="busy processes beside, one after another"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="also write every measurement here, after each size")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    sizes = [args.min_rows << n for n in range(64) if args.min_rows << n <= args.max_rows]
    for cores, rows, beside in product(args.cores if args.device == "cpu" else [1], sizes, args.neighbours):
        with neighbours(beside):
            result = measure(rows, cores, args.rounds, args.seconds, args.device)
        results.append(result | {"neighbours": beside})
        print(summary(results[-1]), flush=True)
        if args.json:
            write_json(args.json, {"machine": machine(), "width": WIDTH, "results": results})
    print_table(results)


def measure(rows: int, cores: int, rounds: int, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Agreement, seconds of each round and bytes of extra memory of every contender that fits.

    Raises:
        SystemExit: The losses differ by more than 1e-5 of their value.
    """
    fitting, left_out = which_fit(rows, device)
    work = (fitting, rows, 1 if rows >= LARGE else rounds, seconds, device)
    if device == "cpu":
        errors, times = in_fresh_process(cores, compare_and_time, *work)
        memory = {name: in_fresh_process(cores, extra_memory, name, rows, device) for name in fitting}
    else:
        errors, times = compare_and_time(*work)
        memory = {name: extra_memory(name, rows, device) for name in fitting}
    return {
        "rows": rows, "cores": cores, "device": device, "left_out": left_out, "errors": errors,
        "seconds": times, "extra_bytes": memory,
        "operations": (4 if device == "cpu" else 5) * rows**2 * WIDTH,
    }  # fmt: skip


# --- contenders -------------------------------------------------------------------------------------------------------


def contender(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ImportError: It is lightly's, which is not installed.
    """
    if name == LIGHTLY:
        from lightly.loss import NTXentLoss

        return NTXentLoss(TEMPERATURE)
    return (lambda za, zb: nt_xent_dense(za, zb, TEMPERATURE)) if name == DENSE else (
        lambda za, zb: nt_xent(za, zb, TEMPERATURE)
    )  # fmt: skip


def which_fit(rows: int, device: str) -> tuple[list[str], dict[str, str]]:
    """Contenders to measure, and why each other one is left out."""
    room = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()
    fitting, left_out = [OURS], {}
    if device == "cuda" and torch.cuda.is_bf16_supported():
        fitting.append(OURS_BF16)
    for name, matrices in MATRICES.items():
        need = matrices * 4 * rows**2
        if need > 0.8 * room:
            left_out[name] = f"would need {need / 1e9:,.0f} GB of the {room / 1e9:,.0f} free"
            continue
        try:
            contender(name)
            fitting.append(name)
        except ImportError:
            left_out[name] = "not installed"
    return fitting, left_out


def available_memory() -> float:
    """Bytes that Linux would give without swapping; elsewhere taken to be 8 GB."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024.0 * int(line.split()[1])
    return 8e9


def projections(name: str, rows: int, device: str) -> list[Tensor]:
    """Two correlated views, as leaves: the same for every contender, up to their precision."""
    draw = torch.Generator().manual_seed(0)
    za = torch.randn(rows // 2, WIDTH, generator=draw)
    zb = za + torch.randn(rows // 2, WIDTH, generator=draw)
    dtype = torch.bfloat16 if name == OURS_BF16 else torch.float32
    return [view.to(device, dtype).requires_grad_() for view in (za, zb)]


# --- measuring --------------------------------------------------------------------------------------------------------


def compare_and_time(
    names: list[str], rows: int, rounds: int, seconds: float, device: str
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """Differences of ours to each other contender, and seconds of a forward + backward in each round."""
    losses = {name: contender(name) for name in names}
    views = {name: projections(name, rows, device) for name in names}
    if rows >= LARGE:  # a large call is too long to be made twice
        for name in names:
            step(losses[name], projections(name, 2048, device))
    errors = compare(losses, views) if len(set(names) - {OURS, OURS_BF16}) else {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(seconds_per_call(losses[name], views[name], seconds))
    return errors, times


def compare(losses: dict[str, Loss], views: dict[str, list[Tensor]]) -> dict[str, dict[str, float]]:
    """Relative differences of loss and gradient to ours in fp32; the loss must agree to 1e-5."""
    found = {name: value_and_grad(losses[name], views[name]) for name in losses}
    value, grad = found.pop(OURS)
    errors = {
        name: {"loss": abs(v - value) / abs(value), "gradient": float((g - grad).norm() / grad.norm())}
        for name, (v, g) in found.items()
    }
    for name, error in errors.items():
        if name != OURS_BF16 and error["loss"] > 1e-5:
            sys.exit(f"the losses differ: ours is {value}, {name} has {found[name][0]}")
    return errors


def value_and_grad(loss: Loss, views: list[Tensor]) -> tuple[float, Tensor]:
    value = loss(*views)
    return value.item(), torch.cat(torch.autograd.grad(value, views)).float()


def step(loss: Loss, views: list[Tensor]) -> None:
    for view in views:
        view.grad = None
    loss(*views).backward()


def seconds_per_call(loss: Loss, views: list[Tensor], least: float) -> float:
    """Mean over as many calls as take at least `least` seconds."""
    wait = torch.cuda.synchronize if views[0].is_cuda else lambda: None
    wait()
    calls, begun, spent = 0, time.perf_counter(), 0.0
    while spent < least:
        step(loss, views)
        wait()
        calls, spent = calls + 1, time.perf_counter() - begun
    return spent / calls


def extra_memory(name: str, rows: int, device: str) -> int:
    """Bytes that one forward + backward adds at its peak."""
    loss = contender(name)
    step(loss, projections(name, 1024, device))  # libraries set up what they keep
    views = projections(name, rows, device)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, views)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The high-water mark of the resident set still has whatever importing took and gave back: fill that up first.
    before, ballast = highest_resident_bytes(), []
    while highest_resident_bytes() < before + BLOCK:
        ballast.append(torch.ones(BLOCK // 4))
    before = highest_resident_bytes()
    step(loss, views)
    return highest_resident_bytes() - before


def highest_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- the table --------------------------------------------------------------------------------------------------------


def summary(result: dict[str, Any]) -> str:
    """A line for people who wait."""
    times = ", ".join(f"{name} {1e3 * statistics.median(t):,.1f} ms" for name, t in result["seconds"].items())
    beside = f", {result['neighbours']} beside" if result["neighbours"] else ""
    return f"{result['rows']:,} rows, {result['device']} x {result['cores']}{beside}: {times}"


def print_table(results: list[dict[str, Any]]) -> None:
    header = ["rows", "device", "loss", "ms", "slower than ours", "extra MB", "times ours", "TFLOP/s of the floor"]
    table = []
    for result in results:
        where = f"{result['device']}, {result['cores']} thread{'s' * (result['cores'] > 1)}"
        if result["device"] == "cuda":
            where = "cuda"
        if result["neighbours"]:
            where += f", {result['neighbours']} beside"
        ours, ours_bytes = result["seconds"][OURS], result["extra_bytes"][OURS]
        for name, times in result["seconds"].items():
            extra = result["extra_bytes"][name]
            table.append([
                f"{result['rows']:,}", where, name, spread([1e3 * t for t in times], "{:,.2f}"),
                spread(ratios(times, ours), "{:.2f}"), f"{extra / 1e6:,.1f}", f"{extra / max(ours_bytes, 1):.1f}",
                f"{result['operations'] / statistics.median(times) / 1e12:.2f}",
            ])  # fmt: skip
        table += [
            [f"{result['rows']:,}", where, name, reason, "", "", "", ""] for name, reason in result["left_out"].items()
        ]
    print_markdown(header, table)
    worst = max((e["loss"] for r in results for n, e in r["errors"].items() if n != OURS_BF16), default=None)
    if worst is not None:
        print(f"\nThe losses agree to {worst:.0e} of their value.")


if __name__ == "__main__":
    main()
