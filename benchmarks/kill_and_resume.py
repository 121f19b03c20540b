"""Kill runs with SIGKILL at random moments, resume them until they are done, and compare with one left alone.

    python benchmarks/kill_and_resume.py --kills 20

Moments are drawn uniformly over the first half of a whole run's time, for each process anew: while images are read, in
the middle of a step, while a checkpoint is written. Every fourth kill comes a moment after a checkpoint's temporary
file appears, so that saving is hit for certain. Exit code 0 only when weights, optimiser state and metrics.jsonl are
equal bit for bit.
(The test suite holds a short form: tests/test_train.py.)
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from simclr.checkpoint import checkpoints, load_newest, step_of

FLAGS = ["--recipe", "digits", "--epochs", "30", "--batch-size", "128", "--log-every", "3", "--save-every", "5",
         "--knn-every", "2", "--workers", "2"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        begun = time.perf_counter()
        subprocess.run(pretrain(alone), check=True, stderr=subprocess.DEVNULL)
        life = time.perf_counter() - begun
        print(f"undisturbed: {life:.1f} s")
        kills, same = 0, True
        while kills < args.kills or not finished(killed):
            command = resume(killed) if (killed / "config.json").exists() else pretrain(killed)
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            if kills == args.kills:
                process.wait()
                break
            how = wait(process, killed, generator, life / 2, while_saving=kills % 4 == 3)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                newest = checkpoints(killed / "checkpoints")
                print(
                    f"kill {kills:2d} {how}; newest checkpoint: step {step_of(newest[0]) if newest else 0}", flush=True
                )
            if finished(killed):
                same = same and compare(alone, killed)
                print(f"reached its end: {'the same' if same else 'DIFFERENT'}; again from the start", flush=True)
                killed = killed.with_name(killed.name + "+")
        same = same and compare(alone, killed)
    print("bit for bit the same" if same else "DIFFERENT")
    sys.exit(0 if same else 1)


def finished(run: Path) -> bool:
    return (run / "summary.json").exists()


def pretrain(out: Path) -> list[str]:
    return [sys.executable, "-m", "simclr", "pretrain", "digits", "--out", str(out), *FLAGS]


def resume(out: Path) -> list[str]:
    return [sys.executable, "-m", "simclr", "resume", str(out)]


def wait(process: subprocess.Popen, run: Path, generator: random.Random, life: float, *, while_saving: bool) -> str:
    """Until the moment of the kill; returns how it was chosen."""
    begun = time.perf_counter()
    moment = generator.uniform(0, life)
    while process.poll() is None:
        alive = time.perf_counter() - begun
        if while_saving and any((run / "checkpoints").glob(".*.tmp")):
            return f"after {alive:4.1f} s, while saving"
        if not while_saving and alive > moment:
            return f"after {alive:4.1f} s"
        time.sleep(0 if while_saving else 0.01)
    return "after its end"


def compare(a: Path, b: Path) -> bool:
    states = [load_newest(run / "checkpoints", print) for run in (a, b)]
    same = states[0] is not None and states[1] is not None and equal(states[0][1], states[1][1])
    return same and (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
