"""Seeded, stratified train/test splits and label subsets, the same on every machine.

The random numbers are raw PCG64 words, whose stream NumPy guarantees for all versions (that of
`Generator.permutation` it does not), so a seed that is stated in a paper means the same images on another
machine in another year.
"""

import re
from fractions import Fraction

import numpy as np

from simclr.errors import UserError


def split_indices(labels_or_n: np.ndarray | int, fraction: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Train and test indices, both sorted; stratified where labels are given.

    Args:
        labels_or_n: (n,) labels, or the number of images. Images labelled -1 are in neither part.
        fraction: Share of the images that go to the test part, in (0, 1). Each class gives its share,
            rounded down or up so that the total is right, and keeps at least one image for training; so the
            test part is empty where every class has a single image.
        seed: The same seed gives the same parts on every machine.

    Raises:
        UserError: a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise UserError(f"A test part of {fraction} of the images is not possible: give a fraction between 0 and 1.")
    labels = np.zeros(labels_or_n, np.int64) if isinstance(labels_or_n, int) else np.asarray(labels_or_n)
    order = _shuffled(labels, seed)  # (m,) indices of labelled images, m <= n
    _, first_seen, members, counts = np.unique(
        labels[order], return_index=True, return_inverse=True, return_counts=True
    )  # (K,), (m,), (K,) for K classes
    wanted = fraction * counts
    take = np.floor(wanted).astype(np.int64)  # (K,) test images of each class
    # The largest remainders round up; of equal ones, the class that the shuffle met first.
    by_remainder = np.lexsort((first_seen, -(wanted - take)))
    by_remainder = by_remainder[take[by_remainder] + 1 < counts[by_remainder]]
    take[by_remainder[: max(0, round(fraction * len(order)) - int(take.sum()))]] += 1
    in_test = _rank_in_class(labels[order]) < take[members]
    return np.sort(order[~in_test]), np.sort(order[in_test])


def label_subset(labels: np.ndarray, spec: str, seed: int = 0) -> np.ndarray:
    """Indices of the images that keep their label, sorted; nested: the 1 % of a seed lie inside its 10 %.

    As in the semi-supervised protocol of the paper the subset is class-balanced: every class gives the same
    number of images, as far as it has them.

    Args:
        labels: (n,) labels; -1 (no label) is never chosen.
        spec: "1%", "10%", "0.5%" of the labelled images, or "20/class".

    Raises:
        UserError: a spec that is neither, fewer images than classes, or a class with fewer images than
            asked for.
    """
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", spec.strip())
    per_class = re.fullmatch(r"(\d+)\s*/\s*class", spec.strip())
    labels = np.asarray(labels)
    order = _shuffled(labels, seed)
    rank = _rank_in_class(labels[order])
    classes, first = np.unique(labels[order], return_index=True)
    if percent and 0 < float(percent[1]) <= 100:
        num_images = int(Fraction(percent[1]) * len(order) / 100)  # rounded down: 12,811 of ImageNet at 1 %
        if num_images < len(classes):
            raise UserError(
                f"{spec} of {len(order):,} labelled images is {num_images}, fewer than one for each of "
                f"{len(classes)} classes: give a larger share, or a number such as 1/class."
            )
        # Round-robin over the classes: all first images, all second ones, ..., so that subsets are nested.
        turn = np.lexsort((first[np.searchsorted(classes, labels[order])], rank))
        return np.sort(order[turn[:num_images]])
    if per_class and int(per_class[1]) > 0:
        num_images = int(per_class[1])
        fewest = int(np.unique(labels[order], return_counts=True)[1].min(initial=len(order)))
        if fewest < num_images or len(order) == 0:
            raise UserError(f"{spec} is not possible: the smallest class has {fewest} labelled images.")
        return np.sort(order[rank < num_images])
    raise UserError(
        f"{spec!r} is no share of the labels and no file: write '1%', '10%' or '20/class', or name a file with the "
        "names of images, one per line."
    )


def _shuffled(labels: np.ndarray, seed: int) -> np.ndarray:
    """Indices of the labelled images in a random order."""
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    return order[labels[order] >= 0]


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """How many images of its own class stand before each image."""
    by_class = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return rank
