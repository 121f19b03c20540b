"""Where the time of a training step goes: views, encoder and head, loss, optimiser, each by itself, in CPU time.

    python benchmarks/parts.py --recipe cifar --batch 64 --threads 1
    python benchmarks/parts.py --recipe cpu --channels 1 --size 28

`benchmarks/train.py` takes the difference of two measured speeds, which noise drowns where a step takes seconds. Here
each part is timed alone, by the process's CPU time (all threads), which other programs hardly touch; medians.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch

from common import print_markdown, random_images
from simclr.config.recipes import find_recipe
from simclr.distributed import DistributedContext
from simclr.losses import nt_xent
from simclr.tasks.pretrain_images import build_task
from simclr.training.loop import take_step, training_module
from simclr.training.malloc import keep_freed_memory
from simclr.training.run import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="cpu")
    parser.add_argument("--batch", type=int, help="images a step, instead of the recipe's")
    parser.add_argument("--size", type=int, help="pixels a side, instead of the recipe's")
    parser.add_argument("--channels", choices=["1", "3"], default="3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after one to warm up")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config = replace(find_recipe(args.recipe).config, channels=cast(Literal["1", "3"], args.channels), workers=0)
    config = replace(config, batch_size=args.batch or config.batch_size, size=args.size or config.size)
    images = random_images(2 * config.batch_size, config.size, int(args.channels))
    task = build_task(images, config, RunFolder(Path(tempfile.mkdtemp())), DistributedContext())
    inputs = task.batch(0)
    context = DistributedContext()
    module = training_module(task, context)
    take_step(module, task, 0, inputs, context)
    za, zb = (torch.randn(config.batch_size, config.head_dim, requires_grad=True) for _ in range(2))
    parts = {
        "views": median(lambda: task.batch(1), args.steps),
        "loss, forward and backward": median(lambda: nt_xent(za, zb, temperature=0.5).backward(), args.steps),
        "optimiser": median(lambda: task.optimizer.step(), args.steps),
    }
    step = median(
        lambda: take_step(module, task, 1, inputs, context),
        args.steps,
    )
    whole = step + parts["views"]
    parts["encoder and head, forward and backward"] = whole - sum(parts.values())
    print(f"{args.recipe}: {config.encoder}, {config.size} px, {args.channels} channels, batch {config.batch_size}\n")
    print_markdown(
        ["part", "CPU ms", "share, %"],
        [[name, f"{1000 * seconds:.1f}", f"{100 * seconds / whole:.1f}"] for name, seconds in parts.items()],
    )


def median(work: Callable[[], object], times: int) -> float:
    """Seconds of CPU time."""
    spent = []
    for _ in range(times):
        begun = time.process_time()
        work()
        spent.append(time.process_time() - begun)
    return sorted(spent)[times // 2]


if __name__ == "__main__":
    main()
