"""Views per second of ours against lightly, torchvision and kornia, in one run on the same images.

    pip install lightly kornia            # both optional
    python benchmarks/views.py --json views.json

Colour images, the paper's policy (crop, flip, jitter of strength 1, grayscale; blur above 32 pixels), strength 0.5 for
32 pixels as the paper has it for CIFAR. Two views of each image, as float32. Each round times every contender once, one
after the other, and takes the ratio within the round; the table gives median (smallest to largest) over the rounds.

On one core everything runs in this process. On two, ours and kornia have two threads; lightly and torchvision work on
one image at a time and have two worker processes of a DataLoader, started and warm before the clock runs.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from common import Contender, Transformed, machine, paired_rounds, ratios, spread, write_json
from simclr.views.policy import Policy
from simclr.views.views import make_views

OURS = "ours"


@dataclass(frozen=True)
class Setting:
    size: int
    source: int
    strength: float
    batch: int
    """Images that batched contenders get at once."""

    @property
    def name(self) -> str:
        return f"{self.size} pixels from {self.source}"

    @property
    def blur(self) -> float:
        return 0.5 if self.size > 32 else 0.0


SETTINGS = [Setting(32, 32, 0.5, 256), Setting(224, 256, 1.0, 32)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of one measurement")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write every measurement here")
    args = parser.parse_args()
    results = []
    for setting in SETTINGS:
        for cores in args.cores:
            torch.set_num_threads(cores)
            speeds = paired_rounds(contenders(setting, cores), args.rounds, args.seconds)
            results.append({"setting": setting.name, "cores": cores, "views_per_second": speeds})
            print_table(setting, cores, speeds)
    if args.json:
        write_json(args.json, {"machine": machine(), "results": results})


def print_table(setting: Setting, cores: int, speeds: dict[str, list[float]]) -> None:
    print(f"\n{setting.name}, {cores} core{'s' * (cores > 1)}: views per second, and how many times as many ours makes")
    for name, values in speeds.items():
        times = spread(ratios(speeds[OURS], values), "{:.2f}")
        print(f"  {name:24} {spread(values, '{:,.0f}'):>28}   {times:>24}", flush=True)


# --- contenders -------------------------------------------------------------------------------------------------------


def contenders(setting: Setting, cores: int) -> dict[str, Contender]:
    shape = (setting.batch, setting.source, setting.source, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = {
        OURS: ours(setting, images, "cpu"),
        "our reference": ours(setting, images, "reference"),
        "torchvision v2": one_by_one(
            torchvision(setting), [torch.from_numpy(i).permute(2, 0, 1) for i in images], cores
        ),
    }
    try:
        found["lightly"] = one_by_one(lightly(setting), [Image.fromarray(image) for image in images], cores)
    except ImportError as error:
        print(f"lightly is left out ({error}): pip install lightly")
    try:
        found["kornia"] = kornia(setting, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    except ImportError as error:
        print(f"kornia is left out ({error}): pip install kornia")
    return found


def ours(setting: Setting, images: np.ndarray, backend: str) -> Contender:
    policy = Policy.google(setting.size, strength=setting.strength)
    epochs = iter(range(2**32))

    def contender() -> int:
        first, _ = make_views(
            images, policy, seed=0, epoch=next(epochs), indices=np.arange(len(images)), backend=backend
        )
        return 2 * len(first)

    return contender


def torchvision(setting: Setting) -> Callable:
    s, kernel = setting.strength, setting.size // 10 | 1
    blur = [v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], setting.blur)] if setting.blur else []
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(setting.size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], 0.8),
            v2.RandomGrayscale(0.2),
            *blur,
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return lambda image: (chain(image), chain(image))


def lightly(setting: Setting) -> Callable:
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(
        input_size=setting.size, cj_strength=setting.strength, gaussian_blur=setting.blur, normalize=None
    )


def kornia(setting: Setting, images: torch.Tensor) -> Contender:
    import kornia.augmentation as K

    s, size, kernel = setting.strength, setting.size, setting.size // 10 | 1
    blur = [K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=setting.blur)] if setting.blur else []
    chain = torch.nn.Sequential(
        K.RandomResizedCrop((size, size)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        K.RandomGrayscale(p=0.2),
        *blur,
    )

    def contender() -> int:
        with torch.no_grad():
            return len(chain(images)) + len(chain(images))

    return contender


def one_by_one(transform: Callable, images: list, cores: int) -> Contender:
    """Views in batches of 16 images, from this process or from as many workers as there are cores."""
    workers = {"num_workers": cores, "persistent_workers": True} if cores > 1 else {}
    # enough images for workers to be busy most of the time; few enough for one pass to be a short measurement
    data = Transformed(images[:32] if cores == 1 else (images * 4)[:256], transform)
    loader = DataLoader(data, batch_size=16, **workers)
    return lambda: sum(len(first) + len(second) for (first, second), _ in loader)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="kornia|lightly|torchvision|pytorch_lightning")
    main()
