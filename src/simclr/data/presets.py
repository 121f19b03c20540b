"""Data sets to transfer to: the paper's twelve with splits and metrics (SimCLR, appendix B.8), or any other source.

Splits and metrics are those of Kornblith et al. 2019 (arXiv:1805.08974), which the paper follows. Where a set has no
official validation images, `HELD_OUT` of each class of its training images are held out; the papers state no number.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from simclr.data.images import Images
from simclr.data.labels import labelled, require_classes
from simclr.data.opening import open_source
from simclr.data.readers.layouts import LAYOUTS, open_parts
from simclr.data.readers.store import Reading
from simclr.data.splits import split_indices
from simclr.errors import UserError

Metric = Literal["top-1", "mean per class", "11-point mAP"]

HELD_OUT = 0.2
"""Share of the training images that choices are made on, and of the images tested on where there is no test part."""


class Preset(NamedTuple):
    """What is known of one of the paper's sets before its files are opened."""

    num_classes: int
    metric: Metric = "top-1"


PRESETS = {
    "food101": Preset(101),
    "cifar10": Preset(10),
    "cifar100": Preset(100),
    "birdsnap": Preset(500),
    "sun397": Preset(397),
    "cars": Preset(196),
    "aircraft": Preset(100, "mean per class"),
    "voc2007": Preset(20, "11-point mAP"),
    "dtd": Preset(47),
    "pets": Preset(37, "mean per class"),
    "caltech101": Preset(102, "mean per class"),
    "flowers102": Preset(102, "mean per class"),
}
"""In the order of the paper's tables."""


@dataclass(frozen=True, kw_only=True)
class TransferSet:
    """Labelled images in parts: to learn from, to choose by, and to report on."""

    name: str
    train: Images
    validation: Images | None
    """None where no class has an image to spare: nothing can then be chosen."""
    test: Images
    metric: Metric
    how: str
    """Where the parts come from, and their sizes."""

    @property
    def learn(self) -> Images:
        """Training and validation images: what the chosen settings are trained on in the end."""
        return self.train if self.validation is None else self.train.joined(self.validation)


def open_transfer_set(
    source: str | Path, *, seed: int = 0, labels: Path | None = None, reading: Reading | None = None
) -> TransferSet:
    """Open data to transfer to.

    Args:
        source: Anything that `open_data` opens: one of PRESETS with a folder of its files (flowers102:FOLDER), another
            name, a folder of images, an .npz file.
        seed: Of the parts that are held out.
        labels: CSV file of `path,label` lines for a folder.
        reading: How files are read.

    Returns:
        The data's own parts where it has them; else HELD_OUT of its images to test on. What is to be said aloud is in
        the `notes` of the images.

    Raises:
        UserError: as `open_data`; no labels, one class, a class that only the test images have.
    """
    reading = reading or Reading()
    name, _, place = str(source).partition(":")
    preset = PRESETS.get(name) if isinstance(source, str) else None
    if preset is not None and name in LAYOUTS:
        opened, parts = open_parts(name, Path(place).expanduser() if place else None, reading=reading)
        images = _readable(opened, reading)
        parts = parts[np.isin(np.array(opened.keys), np.array(images.keys))]
        learn = replace(images.subset(parts != "test"), split="train")
        test = replace(images.subset(parts == "test"), split="test")
        return _divide(learn, test, parts[parts != "test"] == "validation", preset, seed)
    learn = labelled(_readable(open_source(source, split="train", labels=labels, reading=reading), reading))
    if learn.has_own_split:
        test = labelled(_readable(open_source(source, split="test", labels=labels, reading=reading), reading))
    else:
        keep, hold = split_indices(_labels(learn), HELD_OUT, seed)
        learn, test = replace(learn.subset(keep), split="train"), replace(learn.subset(hold), split="test")
    return _divide(learn, test, np.zeros(len(learn), dtype=bool), preset, seed)


def _readable(images: Images, reading: Reading) -> Images:
    for note in images.prepare():
        reading.say(note)
    with reading.counting("Checking images") as progress:
        return images.readable(progress)


def _divide(learn: Images, test: Images, official: np.ndarray, preset: Preset | None, seed: int) -> TransferSet:
    """Take the validation images from those to learn from: the `official` ones (a mask), or some of each class."""
    if not len(learn) or not len(test):
        raise UserError(f"{learn.name} leaves no labelled image to test with; give more images of each class.")
    if learn.targets is None:
        require_classes(learn, test)
    how = "the official validation images"
    if not official.any():
        _, hold = split_indices(len(learn) if learn.targets is not None else _labels(learn), HELD_OUT, seed)
        official = np.isin(np.arange(len(learn)), hold)
        how = f"{HELD_OUT:.0%} of the training images held out, seed {seed}"
    train, validation = learn.subset(~official), learn.subset(official)
    tested = "its own test images" if test.has_own_split else f"{HELD_OUT:.0%} of all images to test on, seed {seed}"
    return TransferSet(
        name=learn.name,
        train=replace(train, notes=[*train.notes, *_lacking(learn, preset)]),
        validation=validation if len(validation) else None,
        test=test,
        metric="top-1" if preset is None else preset.metric,
        how=f"{tested}, {how}: {len(train):,} to learn from, {len(validation):,} to choose by, {len(test):,} to test",
    )


def _lacking(learn: Images, preset: Preset | None) -> list[str]:
    """What to say of a preset that is not whole."""
    if preset is None:
        return []
    shown = _labels(learn) if learn.targets is None else np.nonzero(learn.targets == 1)[1]
    num_present = len(np.unique(shown))
    if num_present == preset.num_classes:
        return []
    return [
        f"{learn.name} has {preset.num_classes} classes, and {num_present} of them are among the training images here."
    ]


def _labels(images: Images) -> np.ndarray:
    assert images.labels is not None
    return images.labels
