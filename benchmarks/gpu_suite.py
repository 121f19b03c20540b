"""Everything that needs a GPU, checked and measured in one call of less than nine minutes.

    PYTHONPATH=src python benchmarks/gpu_suite.py                               # benchmarks/results/DATE-GPU.json
    PYTHONPATH=src python benchmarks/gpu_suite.py --only views-speed,loss-speed   # some sections
    PYTHONPATH=src python benchmarks/gpu_suite.py --device cpu --tiny             # does the script itself run?
    PYTHONPATH=src python benchmarks/gpu_suite.py --only cifar-fast --data FOLDER   # in a call of its own

Needs torch, numpy, numba, timm, scikit-learn, safetensors, rich and pydantic (to resume), pyarrow (cifar-fast), no
network. The sections are functions in gpu_sections.py and gpu_challenge.py. Each has a budget of seconds; one that
fails leaves its traceback in the file, one that cannot run says why, and the next goes on. The file is written after
every section.

Beside each measurement stands what the hardware allows: the matrix product and the copy of memory measured first, in
this run, and the FLOPs and bytes of a view (performance-facts: ResNet-18 at 32 pixels 3.33 GFLOP and about 20 MB a
view, ResNet-50 at 224 pixels 24.5 GFLOP and about 370 MB, bf16, forward and backward).
"""

import argparse
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import gpu_challenge
import gpu_sections
from common import machine, print_markdown, write_json
from gpu_sections import Bench, Skip

SECTIONS: list[tuple[str, Callable[[Bench], dict[str, Any]], float]] = [
    # what, function, seconds at most; what the README promises most comes first
    ("ceilings", gpu_sections.ceilings, 20),
    ("views-against-reference", gpu_sections.views_against_reference, 60),
    ("loss-against-dense", gpu_sections.loss_against_dense, 45),
    ("queue-loss", gpu_sections.queue_loss, 20),
    ("views-speed", gpu_sections.views_speed, 25),
    ("loss-speed", gpu_sections.loss_speed, 40),
    ("train-resnet18-32", gpu_sections.train_resnet18, 70),
    ("cuda-graph", gpu_sections.cuda_graph, 80),
    ("train-resnet50-224", gpu_sections.train_resnet50, 60),
    ("batch-65536", gpu_sections.huge_batch, 50),
    ("precision-and-compile", gpu_sections.precision_and_compile, 60),
    ("resume", gpu_sections.resume, 45),
    ("processes", gpu_sections.processes, 40),
    ("time-to-accuracy", gpu_sections.time_to_accuracy, 50),
    ("tests", gpu_sections.tests, 60),
]
BY_NAME = {"cifar-fast": gpu_challenge.cifar_fast}
"""Sections that run only where --only names them, for --minutes each."""
TOTAL = 520.0  # seconds; a call on a lent machine may take ten minutes
MINUTES = 8.0  # of cifar-fast; with the start of Python and torch less than nine


@dataclass
class Suite:
    """Runs sections, keeps what they return, writes it down each time."""

    bench: Bench
    out: Path
    total: float
    """Seconds for all sections."""
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)

    def run(self, name: str, section: Callable[[Bench], dict[str, Any]], budget: float) -> None:
        left = self.total - (time.perf_counter() - self.begun)
        began = time.perf_counter()
        if left < 5:
            result: dict[str, Any] = {"status": "skipped", "why": "the time of the whole suite is over"}
        else:
            result = self._guarded(section, min(budget, left))
        result["seconds"] = round(time.perf_counter() - began, 1)
        self.sections[name] = result
        write_json(self.out, {"machine": machine(), "device": str(self.bench.device), "sections": self.sections})
        print(f"--- {name}: {result['status']} after {result['seconds']} s", flush=True)
        for key, value in result.items():
            if key not in ("status", "seconds"):
                print(f"  {key}: {value}", flush=True)

    def _guarded(self, section: Callable[[Bench], dict[str, Any]], budget: float) -> dict[str, Any]:
        self.bench.budget = budget
        self.bench.deadline = time.perf_counter() + 0.8 * budget  # loops end by themselves; the alarm is for what hangs
        self.bench.partial = {}
        try:
            with _alarm(budget):
                return {"status": "done"} | section(self.bench)
        except Skip as reason:
            return {"status": "skipped", "why": str(reason)} | self.bench.partial
        except Exception as error:
            last = traceback.format_exc().splitlines()[-12:]
            return {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": last} | (
                self.bench.partial
            )
        finally:
            self.bench.free()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """`TimeoutError` in the main thread after so many seconds."""

    def ring(_signum: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: to try the script")
    parser.add_argument("--only", help="names of sections, separated by commas")
    parser.add_argument("--seconds", type=float, help=f"of the whole suite ({TOTAL:.0f}, or what --minutes asks for)")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's train.parquet and test.parquet, for cifar-fast")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of cifar-fast, all included ({MINUTES:g})")
    parser.add_argument("--out", type=Path, help="JSON file, or the folder for it (benchmarks/results)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu --tiny tries the script itself.")
    warnings.filterwarnings("ignore")
    sections = [*SECTIONS, *((name, section, 60 * args.minutes) for name, section in BY_NAME.items())]
    names = [name for name, _, _ in sections]
    wanted = args.only.split(",") if args.only else [name for name in names if name not in BY_NAME]
    if unknown := set(wanted) - set(names):
        sys.exit(f"There is no section {', '.join(unknown)}; there are {', '.join(names)}.")
    sections = [section for section in sections if section[0] in wanted]
    bench = Bench(torch.device(args.device), tiny=args.tiny, data=args.data)
    budgets = {name: budget for name, _, budget in sections}
    suite = Suite(bench, _file(args), args.seconds or total_seconds(budgets))
    for name, section, budget in sections:
        suite.run(name, section, budget)
    print_goals(suite.sections)
    print(f"\nWritten: {suite.out}")
    failed = [name for name, result in suite.sections.items() if result["status"] == "failed"]
    wrong = [name for name, result in suite.sections.items() if result.get("right") is False]
    if failed or wrong:
        sys.exit(f"failed: {', '.join(failed) or 'none'}; ran, but not right: {', '.join(wrong) or 'none'}")


def total_seconds(budgets: dict[str, float]) -> float:
    """Seconds for sections with these budgets: all share `TOTAL` but those that run by name, which have their own."""
    own = sum(budget for name, budget in budgets.items() if name in BY_NAME)
    shared = sum(budget for name, budget in budgets.items() if name not in BY_NAME)
    return own + min(shared, TOTAL)


def _file(args: argparse.Namespace) -> Path:
    out = args.out or Path(__file__).parent / "results"
    if out.suffix == ".json":
        return out
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    some = f"-{args.only.replace(',', '-')}" if args.only else ""  # lest it take the place of the whole suite's
    return out / f"{time.strftime('%Y-%m-%d')}-{name.lower().replace(' ', '-')}{some}.json"


def _to_the_goal(sections: dict[str, dict[str, Any]]) -> str:
    """What the challenge's section says of it."""
    result = sections.get("cifar-fast", {})
    if "knn" not in result:
        return "not measured"
    minutes = result.get("minutes_to_90_knn")
    if minutes:
        return f"{minutes['training']:.1f} ({result['gpu']})"
    return f"not reached: {result['knn']:.1%}" + ("" if result["schedule"]["complete"] else ", training was cut off")


def print_goals(sections: dict[str, dict[str, Any]]) -> None:
    """Issue 3's goals for an H100 beside what was measured."""

    def found(section: str, *path: str) -> Any:
        value: Any = sections.get(section, {})
        for key in path:
            value = value.get(key, {})
        return value if value != {} else None

    def form(value: Any, pattern: str) -> str:
        return "not measured" if value is None else pattern.format(value)

    rows = [
        ["ResNet-18, 32 px, views/s", "80,000", form(found("train-resnet18-32", "best", "median"), "{:,.0f}")],
        [
            "ResNet-18, 32 px, outside the encoder",
            "5 %",
            form(found("train-resnet18-32", "best", "outside_encoder"), "{:.1%}"),
        ],
        ["ResNet-50, 224 px, views/s", "4,500", form(found("train-resnet50-224", "best", "median"), "{:,.0f}")],
        [
            "ResNet-50, 224 px, outside the encoder",
            "5 %",
            form(found("train-resnet50-224", "best", "outside_encoder"), "{:.1%}"),
        ],
        ["loss at 65,536 rows, ms", "15", form(found("loss-speed", "rows", "65536", "ms"), "{:.2f}")],
        ["CIFAR-10, minutes to 90.0 % kNN", f"{gpu_challenge.STANDING_MINUTES} on an A100", _to_the_goal(sections)],
        ["batch 65,536 of ResNet-18 at 32 px", "runs", form(found("batch-65536", "median"), "{:,.0f} views/s")],
    ]
    print_markdown(["goal", "wanted", "measured"], rows)


if __name__ == "__main__":
    main()
