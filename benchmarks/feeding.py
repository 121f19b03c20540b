"""From JPEG files to finished views: images per second of ours against lightly, in one run on the same files.

    pip install lightly
    python benchmarks/feeding.py --json feeding.json

The files are made here, the same on every machine: 500 x 375 pixels of smooth noise at all scales with sharp-edged
shapes and grain, JPEG at quality 90, some 95 KB each, so that decoding one costs what decoding a photo costs (2.7 ms
with Pillow, where photos of ImageNet take 1.4 to 2.8 on various machines). Every contender makes two 224-pixel views of
each image (the paper's policy with blur, float32), from the second epoch on: files are in the page cache, the pack's
checksums are checked.

    ours      a pack, opened; then the threads and kernels of `simclr pretrain`, one thread per core
    lightly   SimCLRTransform over LightlyDataset in a torch DataLoader, as lightly's documentation advises; 0, 1, 2, 4,
              ... workers up to the cores + 2 are tried and the best is taken. Images are drawn with replacement, so
              that no worker waits for the end of an epoch

Each measurement starts its threads or workers, throws away what they make first, and then counts. Each round measures
both, one after the other, and takes the ratio within the round. What is paid once is printed beside it: decoding into
the pack, and opening it again.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, RandomSampler

from simclr.config.pretrain import PretrainConfig
from simclr.data import Images, open_data
from simclr.distributed import DistributedContext
from simclr.tasks.pretrain_images import build_task
from simclr.training.loop import Prefetcher
from simclr.training.run import RunFolder

HEIGHT, WIDTH, SIZE = 375, 500, 224
OURS = "ours"


@dataclass(frozen=True)
class Feed:
    """Endless batches: starting it gives the number of images of each, as soon as it is made."""

    workers: int
    start: Callable[[], Iterator[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="least time of one measurement")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="that everything may use")
    parser.add_argument("--folder", type=Path, help="where files and pack go; unset: a folder that is deleted again")
    parser.add_argument("--json", type=Path, help="also write every measurement here")
    args = parser.parse_args()
    os.sched_setaffinity(0, range(args.cores))
    torch.set_num_threads(1)  # the threads or workers of the loader are what shares the cores
    with tempfile.TemporaryDirectory() as passing:
        folder = args.folder or Path(passing)
        photos = folder / f"photos-{args.images}"
        jpeg_bytes = make_photos(photos, args.images)
        print(
            f"{args.images} JPEG files of {WIDTH} x {HEIGHT}, {jpeg_bytes / 1000:.0f} KB on average; {args.cores} cores"
        )
        images, once = open_twice(photos, args.cores)
        print(
            f"once: {once['packed_images_per_second']:,.0f} images/s into a {once['pack_bytes'] / 1e6:,.0f} MB pack, "
            f"opened again in {once['open_again_seconds'] * 1e3:,.1f} ms",
            flush=True,
        )
        feeds, tried = {OURS: ours(images, args.batch_size, args.cores)}, {}
        try:
            theirs = [lightly(photos, args.batch_size, n) for n in worker_counts(args.cores)]
        except ImportError as error:
            print(f"lightly is left out ({error}): pip install lightly")
        else:
            tried = {feed.workers: speed(feed, args.seconds) for feed in theirs}
            best = max(theirs, key=lambda feed: tried[feed.workers])
            print("lightly, images/s: " + ", ".join(f"{n} workers {rate:,.0f}" for n, rate in tried.items()))
            feeds[f"lightly, {best.workers} workers"] = best
        speeds = {name: [] for name in feeds}
        for _ in range(args.rounds):
            for name, feed in feeds.items():
                speeds[name].append(speed(feed, args.seconds))
        print_table(speeds)
    if args.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        setting = {name: value for name, value in vars(args).items() if name not in ("json", "folder")}
        results = {"jpeg_bytes": jpeg_bytes, "once": once, "lightly_workers": tried, "images_per_second": speeds}
        report = {"machine": machine, "versions": versions, "setting": setting, "results": results}
        args.json.write_text(json.dumps(report, indent=1))


def worker_counts(cores: int) -> list[int]:
    """0, 1, 2, 4, 8, ... and the cores + 2."""
    return sorted({0, *(2**k for k in range(10) if 2**k < cores + 2), cores + 2})


def speed(feed: Feed, seconds: float) -> float:
    """Images per second, over at least so many seconds and one batch of every worker."""
    each = max(1, feed.workers)
    with closing(feed.start()) as batches:
        for _ in range(2 * each):  # until each worker is in its stride
            next(batches)
        made, rounds, begun = 0, 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < seconds or not rounds:
            made += sum(next(batches) for _ in range(each))  # workers end in step: whole rounds, no half batch
            rounds += 1
    return made / spent


def print_table(speeds: dict[str, list[float]]) -> None:
    print("\nJPEG files to two 224-pixel views: images per second, and how many times as many ours makes")
    for name, values in speeds.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds[OURS], values, strict=True)]
        print(f"  {name:24} {spread(values, '{:9,.0f}')}   {spread(ratios, '{:6.2f}')}", flush=True)


def spread(values: list[float], form: str) -> str:
    median, low, high = (form.format(x) for x in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low.strip()} to {high.strip()})"


# --- the files --------------------------------------------------------------------------------------------------------


def make_photos(folder: Path, count: int) -> float:
    """Write the JPEG files, where they are not there yet; their mean size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    texture = None
    paths = [folder / f"{i:05}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            texture = make_texture() if texture is None else texture
            photo(texture, seed=i).save(path, quality=90)
    return statistics.mean(path.stat().st_size for path in paths)


def make_texture(side: int = 2048) -> np.ndarray:
    """(side, side, 3) smooth noise at all scales, most of it the same in all channels."""
    rng = np.random.default_rng(0)
    texture = np.full((side, side, 3), 128, np.float32)
    for cells in (8, 16, 32, 64, 128, 256, 512, 1024):
        for channel in (0, 1, 2, slice(None)):
            noise = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
            layer = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) * (250 / cells**0.6)
            texture[..., channel] += 1.5 * layer[..., None] if isinstance(channel, slice) else 0.5 * layer
    return texture.clip(0, 255).astype(np.uint8)


def photo(texture: np.ndarray, seed: int) -> Image.Image:
    """A window on the texture, with shapes before it and grain over it."""
    rng = np.random.default_rng(seed)
    top, left = (int(rng.integers(0, n)) for n in (len(texture) - HEIGHT, len(texture) - WIDTH))
    image = Image.fromarray(texture[top : top + HEIGHT, left : left + WIDTH])
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        (x, y), (w, h) = rng.integers(0, (WIDTH, HEIGHT)).tolist(), rng.integers(5, 75, 2).tolist()
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - w, y - h, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    grainy = np.asarray(image) + 16 * rng.standard_normal((HEIGHT, WIDTH, 1), np.float32)
    return Image.fromarray(grainy.clip(0, 255).astype(np.uint8))


# --- contenders -------------------------------------------------------------------------------------------------------


def open_twice(photos: Path, cores: int) -> tuple[Images, dict[str, float]]:
    """The photos with a pack of their own that is new, and what making and opening it cost."""
    with tempfile.TemporaryDirectory(dir=photos.parent) as packs:
        begun = time.perf_counter()
        images = open_data(photos, workers=cores, pack=packs)
        images.prepare()
        packed = time.perf_counter()
        images = open_data(photos, workers=cores, pack=packs)
        images.prepare()
        opened = time.perf_counter()
        pack_bytes = sum(path.stat().st_size for path in Path(packs).rglob("*.shard"))
    for row in range(len(images)):  # the first epoch: each image's checksum; the open pack outlives its names
        images.read([row], copy=False)
    return images, {
        "packed_images_per_second": len(images) / (packed - begun),
        "pack_bytes": pack_bytes,
        "open_again_seconds": opened - packed,
    }


def ours(images: Images, batch_size: int, threads: int) -> Feed:
    config = PretrainConfig(size=SIZE, batch_size=batch_size, encoder="small", epochs=10**6, workers=threads)
    task = build_task(images, config, RunFolder(Path("nowhere")), DistributedContext())

    def start() -> Iterator[int]:
        with Prefetcher(task.batch, 0, task.total_steps, threads) as batches:
            for _, (first, _) in batches:
                yield len(first)

    return Feed(threads, start)


def lightly(folder: Path, batch_size: int, workers: int) -> Feed:
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    data = LightlyDataset(str(folder), transform=SimCLRTransform(input_size=SIZE, normalize=None))
    sampler = RandomSampler(data, replacement=True, num_samples=10**9)
    loader = DataLoader(data, batch_size=batch_size, sampler=sampler, num_workers=workers, drop_last=True)
    return Feed(workers, lambda: (len(views[0]) for views, _, _ in loader))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightly|torchvision|pytorch_lightning")
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores are tried on purpose
    main()
