"""Data sets by name that come as arrays: digits, fashion-mnist, torchvision's CIFAR-10, CIFAR-100, STL-10 and SVHN."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from simclr.data.images import Channels, Images, Split, array_images
from simclr.data.readers.idx import find_idx, read_idx
from simclr.data.readers.layouts import LAYOUTS
from simclr.data.splits import split_indices
from simclr.errors import UserError, first_line

ARRAYS = ("digits", "fashion-mnist", "cifar10", "cifar100", "stl10", "svhn")
"""Sets whose images come in one array of equal sizes."""
NAMES = (*ARRAYS, *LAYOUTS)
CACHE = Path("~/.cache/simclr")
"""Where torchvision puts what it downloads, unless a folder is named, as in cifar10:FOLDER."""
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four idx files."""
DIGITS_SEED = 0

FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def open_named(name: str, folder: Path | None, *, split: Split = "train", channels: Channels = "auto") -> Images:
    """Open a data set that comes in one array by its name.

    Args:
        name: One of ARRAYS.
        folder: Where its files are, or where torchvision is to put them; None: the usual places.

    Raises:
        UserError: the files are nowhere to be found, are damaged, or cannot be downloaded.
    """
    if name == "digits":
        if folder is not None:
            raise UserError(
                f"digits comes with scikit-learn and takes no folder: write 'digits', not 'digits:{folder}'."
            )
        return _open_digits(split, channels)
    if name == "fashion-mnist":
        return _open_fashion_mnist(folder, split, channels)
    return _open_torchvision(name, folder or CACHE.expanduser(), split, channels)


def _open_digits(split: Split, channels: Channels) -> Images:
    """1,797 handwritten digits, 8 x 8, from scikit-learn; no split is published, so a seed makes one."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels, labels = np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target  # the values are 0..16
    train, test = split_indices(labels, fraction=0.2, seed=DIGITS_SEED)
    rows = {"train": train, "test": test, "all": np.arange(len(labels))}[split]
    images = array_images(
        pixels[rows],
        labels[rows],
        name="digits",
        split=split,
        has_own_split=True,
        classes=[str(digit) for digit in range(10)],
        channels=channels,
        notes=[f"digits, {len(train):,} and {len(test):,} images: 80/20 by class, seed {DIGITS_SEED}."]
        * (split != "all"),
    )
    return replace(images, keys=[str(row) for row in rows])


def _open_fashion_mnist(folder: Path | None, split: Split, channels: Channels) -> Images:
    """70,000 gray images of clothes, 28 x 28, 60,000 to train (Xiao et al. 2017, arXiv:1708.07747)."""
    place = _find_fashion_mnist(folder)

    def load(part: str) -> tuple[np.ndarray, np.ndarray]:
        prefix = {"train": "train", "test": "t10k"}[part]
        pixels = read_idx(place, f"{prefix}-images-idx3-ubyte", 3)
        labels = read_idx(place, f"{prefix}-labels-idx1-ubyte", 1)
        if len(pixels) != len(labels) or pixels.size == 0:
            raise UserError(f"{place} is damaged: {len(pixels):,} {part} images and {len(labels):,} labels.")
        if labels.max() >= len(FASHION_CLASSES):
            raise UserError(
                f"{place} is not fashion-mnist: a {part} label is {labels.max()}, and there are ten classes."
            )
        return pixels, labels

    pixels, labels = _parts(load, split)
    return array_images(
        pixels,
        labels,
        name="fashion-mnist",
        split=split,
        has_own_split=True,
        classes=FASHION_CLASSES,
        channels=channels,
    )


def _find_fashion_mnist(folder: Path | None) -> Path:
    below = ("", "raw", "FashionMNIST/raw")  # torchvision's layout
    roots = [folder] if folder is not None else [DEBIAN_FASHION_MNIST, CACHE.expanduser()]
    places = [root / name for root in roots for name in below]
    for place in places:
        if find_idx(place, "train-images-idx3-ubyte") or find_idx(place, "t10k-images-idx3-ubyte"):
            return place
    if folder is not None:
        raise UserError(
            f"{folder} does not hold fashion-mnist: its four files are train-images-idx3-ubyte.gz, "
            "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz."
        )
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(CACHE.expanduser()), download=True)
    except Exception as error:  # torchvision passes on whatever the network, the disk or the archive raises
        raise UserError(
            f"fashion-mnist is not on this machine and could not be downloaded ({first_line(error)}): "
            "install Debian's package dataset-fashion-mnist, or name the folder of the four idx files, "
            "fashion-mnist:FOLDER."
        ) from error
    return CACHE.expanduser() / "FashionMNIST/raw"


def _open_torchvision(name: str, root: Path, split: Split, channels: Channels) -> Images:
    """CIFAR-10 and -100, SVHN and STL-10, downloaded where they are not yet.

    STL-10's train part is its 5,000 labelled and 100,000 unlabelled images (label -1): contrastive
    pretraining takes all of them, an evaluation those with `labels >= 0`. SVHN's extra images are not used.
    """
    from torchvision import datasets

    classes: list[str] = [str(digit) for digit in range(10)]

    def load(part: str) -> tuple[np.ndarray, np.ndarray]:
        nonlocal classes
        if name in ("cifar10", "cifar100"):
            dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](
                str(root), train=part == "train", download=True
            )
            classes = list(dataset.classes)
            return np.asarray(dataset.data), np.asarray(dataset.targets)  # (n, 32, 32, 3)
        if name == "svhn":
            dataset = datasets.SVHN(str(root), split=part, download=True)
        else:
            dataset = datasets.STL10(str(root), split="train+unlabeled" if part == "train" else part, download=True)
            classes = list(dataset.classes)
        return dataset.data.transpose(0, 2, 3, 1), np.asarray(dataset.labels)  # (n, 3, H, W) -> (n, H, W, 3)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's about pickles of 2009
            pixels, labels = _parts(load, split)
    except Exception as error:  # torchvision passes on whatever the network, the disk or the archive raises
        raise UserError(
            f"{name} is not in {root} and could not be downloaded ({first_line(error)}): name the folder "
            f"that holds it as torchvision lays it out, {name}:FOLDER, or use digits, which needs none."
        ) from error
    return array_images(pixels, labels, name=name, split=split, has_own_split=True, classes=classes, channels=channels)


def _parts(load: Callable[[str], tuple[np.ndarray, np.ndarray]], split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of a part, or of both, train first."""
    if split != "all":
        return load(split)
    pixels, labels = zip(load("train"), load("test"), strict=True)
    return np.concatenate(pixels), np.concatenate(labels)
