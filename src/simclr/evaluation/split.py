"""Which labelled images a protocol learns from, and which it is tested on."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from simclr.data.images import Images
from simclr.data.labels import chosen_by, labelled, require_classes
from simclr.data.splits import split_indices
from simclr.errors import UserError


@dataclass(frozen=True)
class Split:
    """Labelled images to learn a classifier from, and others to test it on."""

    train: Images
    test: Images
    """The very `train` where each image is left out in turn."""
    description: str
    """How the images were divided, in words."""
    num_labelled: int
    """Images to learn from before a part of the labels was chosen."""
    pool: Images | None = None
    """All images that are not tested on, with or without a label, in the order of the data; their labels are hidden.
    None: each image is tested on."""
    pool_rows: np.ndarray | None = None
    """(n,) rows of the pool that are the training images."""


def split_data(
    train: Images, test: Images | None, *, seed: int, labels: str | None = None, leave_one_out: bool = False
) -> Split:
    """Training and test images: the data's own split where it has one, else 80/20, stratified by class.

    Args:
        test: The data's own test images, if any.
        seed: Of the 80/20 split and of the choice of labelled images.
        labels: Which labels the classifiers may use: a share such as "1%", a number such as "10/class", or a file with
            the names of the images, one per line, as the authors publish them for ImageNet. None: all.
        leave_one_out: Each labelled image of `train` is to be classified by all the others; both parts are then one
            object.

    Raises:
        UserError: There are no labels, fewer than two classes, or a class of the test images that none teaches.
    """
    pool = replace(train, labels=None)
    rows = np.arange(len(train)) if train.labels is None else np.flatnonzero(train.labels >= 0)  # (n,), of the pool
    train, test = labelled(train), None if test is None else labelled(test)
    if leave_one_out:
        test, description = train, f"each of {len(train):,} labelled images by the others"
    elif test is not None:
        description = f"the data's fixed split, {len(train):,} to learn from and {len(test):,} to test"
    else:
        assert train.labels is not None
        learn, hold = split_indices(train.labels, fraction=0.2, seed=seed)
        kept = np.delete(np.arange(len(pool)), rows[hold])  # (p,)
        pool, rows = pool.subset(kept), np.searchsorted(kept, rows[learn])
        train, test = train.subset(learn), train.subset(hold)
        description = f"80/20 by class, seed {seed}: {len(train):,} to learn from and {len(test):,} to test"
    if not len(test):
        raise UserError(f"{train.name} leaves no labelled image to test with; give more images of each class.")
    num_labelled = len(train)
    assert train.labels is not None and test.labels is not None
    if labels is not None:
        drawn = labels if Path(labels).is_file() else f"{labels}, seed {seed}"
        chosen = chosen_by(labels, train, seed=seed)
        train, rows = train.subset(chosen), rows[chosen]
        test = train if leave_one_out else test
        description += f", {len(train):,} labels used ({drawn})"
    require_classes(train, test)
    if leave_one_out:
        return Split(train, test, description, num_labelled)
    return Split(train, test, description, num_labelled, pool, rows)
