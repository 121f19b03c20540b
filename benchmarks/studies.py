"""Runs the studies of MoCo (src/simclr/studies/moco.py) and prints their tables.

    python benchmarks/studies.py fashion-mnist --out runs/studies --seeds 0 1 2 --epochs 4 --images 10000

`--images` takes so many random images of the training part; accuracies are on the data's own test part. Runs are kept:
the same command goes on where it was stopped, and a training that is part of two studies is made once.
"""

import argparse
from pathlib import Path

import numpy as np

from simclr.data.opening import open_data
from simclr.studies.grid import run_study, table
from simclr.studies.moco import STUDIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, help="training images that are used; default: all")
    args = parser.parse_args()
    data = part_of(args.data, args.images, args.out) if args.images else args.data
    for name in args.studies:
        study = STUDIES[name]
        results = run_study(study, data, out=args.out, seeds=args.seeds, settings={"epochs": args.epochs})
        print(f"\n{study.source}: {study.claim}\n\n{table(study, results)}\n", flush=True)


def part_of(data: str, count: int, out: Path) -> str:
    """An .npz with `count` training images of a gray or colour data set of one size, and all of its test images."""
    path = out / f"{Path(data).name}-{count}.npz"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        train, test = open_data(data, split="train"), open_data(data, split="test")
        chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:count])
        arrays = {}
        for part, images, rows in (("train", train, chosen), ("test", test, np.arange(len(test)))):
            arrays[f"x_{part}"] = np.stack([np.asarray(image) for image in images.read(rows)]).squeeze()
            assert images.labels is not None
            arrays[f"y_{part}"] = images.labels[rows]
        np.savez(path, **arrays)
    return str(path)


if __name__ == "__main__":
    main()
