"""How long it takes to open a folder of many small files: the first time, and later.

    python benchmarks/opening.py --json opening.json

Makes 50,000 gray PNG files of 28 x 28 pixels (some 0.9 KB each) in a temporary folder, or opens `--folder`, and times
each part in a fresh process, files in the page cache:

    identity   which files there are, and the SHA-256 and shape of each: hashed the first time, looked up later
    opening    `open_data`, as every command calls it, with --pack auto: nothing is decoded

The table also has the peak of resident memory above that of the interpreter with the package imported.

The first time has an empty cache folder. Wall-clock seconds; median and range over the rounds.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from common import in_fresh_process, machine, print_markdown, spread, write_json
from simclr.data import open_data
from simclr.data.digests import RACY_NS, identify
from simclr.data.readers.scan import scan_folder

SIDE = 28  # pixels
CLASSES = 10
PARTS = ("identity", "opening")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="that everything may use")
    parser.add_argument("--folder", type=Path, help="open the images in this folder instead of making some")
    parser.add_argument("--json", type=Path, help="also write every measurement here")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {f"{part}, {when}": [] for part in PARTS for when in ("first", "later")}
    megabytes: dict[str, list[float]] = {name: [] for name in seconds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or make_files(Path(temporary) / "images", args.images)
        for round_ in range(args.rounds):
            for part in PARTS:
                cache = Path(temporary) / "cache" / f"{part}-{round_}"
                for when in ("first", "later"):
                    spent, taken = in_fresh_process(args.cores, measure, part, folder, cache, args.cores)
                    seconds[f"{part}, {when}"].append(spent)
                    megabytes[f"{part}, {when}"].append(taken)
    rows = [[name, spread(seconds[name], "{:.2f}"), spread(megabytes[name], "{:.0f}")] for name in seconds]
    print_markdown(["", "seconds", "MB"], rows)
    if args.json:
        setting = {"images": args.images, "folder": args.folder and str(args.folder), "cores": args.cores}
        write_json(args.json, {"machine": machine(), "setting": setting, "seconds": seconds, "megabytes": megabytes})


def make_files(folder: Path, count: int) -> Path:
    """Random gray images in ten classes, old enough for their digests to be kept."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i % CLASSES}" / f"{i:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(path)
    time.sleep(RACY_NS / 1e9 + 0.1)
    return folder


def measure(part: str, folder: Path, cache: Path, workers: int) -> tuple[float, float]:
    """Seconds of one part, with what is kept in `cache`, and MB by which the peak of resident memory grew."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    before = peak_megabytes()
    begun = time.perf_counter()
    if part == "identity":
        identify(folder, scan_folder(folder).files, workers=workers, say=print)
    else:
        open_data(folder, pack="auto", workers=workers)
    return time.perf_counter() - begun, peak_megabytes() - before


def peak_megabytes() -> float:
    """Peak of resident memory of this process so far, in MB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
