"""Which labelled images a protocol learns from, and which it is tested on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simclr.data.images import Images
from simclr.data.labels import read_label_list
from simclr.data.scan import some
from simclr.data.splits import label_subset, split_indices
from simclr.errors import UserError


@dataclass(frozen=True)
class Split:
    """Labelled images to learn a classifier from, and others to test it on."""

    train: Images
    test: Images
    """The very `train` where each image is left out in turn."""
    how: str
    """In words."""
    num_labelled: int
    """Images to learn from before a part of the labels was chosen."""


def split_data(
    train: Images, test: Images | None, *, seed: int, labels: str | None = None, leave_one_out: bool = False
) -> Split:
    """Training and test images: the data's own split where it has one, else 80/20, stratified by class.

    Args:
        test: The data's own test images, if any.
        seed: Of the 80/20 split and of the choice of labelled images.
        labels: Which labels the classifiers may use: a share such as "1%", a number such as "10/class", or a file with
            the names of the images, one a line, as the authors publish them for ImageNet. None: all.
        leave_one_out: Each labelled image of `train` is to be judged by all the others; both parts are then one object.

    Raises:
        UserError: There are no labels, fewer than two classes, or a class of the test images that none teaches.
    """
    train, test = _labelled(train), None if test is None else _labelled(test)
    if leave_one_out:
        test, how = train, f"each of {len(train):,} labelled images by the others"
    elif test is not None:
        how = f"the data's own split, {len(train):,} to learn from and {len(test):,} to test"
    else:
        assert train.labels is not None
        learn, hold = split_indices(train.labels, fraction=0.2, seed=seed)
        train, test = train.subset(learn), train.subset(hold)
        how = f"80/20 by class, seed {seed}: {len(train):,} to learn from and {len(test):,} to test"
    if not len(test):
        raise UserError(f"{train.name} leaves no labelled image to test with; give more images of each class.")
    num_labelled = len(train)
    assert train.labels is not None and test.labels is not None
    if labels is not None:
        if Path(labels).is_file():
            chosen, drawn = read_label_list(Path(labels), train), labels
        else:
            chosen, drawn = label_subset(train.labels, labels, seed=seed), f"{labels}, seed {seed}"
        train = train.subset(chosen)
        test = train if leave_one_out else test
        how += f", {len(train):,} labels used ({drawn})"
    assert train.labels is not None and test.labels is not None
    known = np.unique(train.labels)
    if len(known) < 2:
        raise UserError(f"{train.name} has a single class among the images to learn from; evaluation needs two.")
    unknown = np.setdiff1d(test.labels, known)
    if len(unknown):
        names = some([str(label) if test.classes is None else test.classes[label] for label in unknown])
        raise UserError(
            f"{train.name} has test images of {len(unknown)} classes of which none is there to learn from ({names}); "
            "give labelled training images of each class, or more --labels."
        )
    return Split(train, test, how, num_labelled)


def _labelled(images: Images) -> Images:
    """The images that have a label."""
    if images.labels is None or not (images.labels >= 0).any():
        raise UserError(
            f"{images.name} has no labels, and evaluation needs them; give a folder with one sub-folder per class "
            "(or --labels-file with path,label lines), or an .npz file with y."
        )
    return images.subset(np.flatnonzero(images.labels >= 0))
