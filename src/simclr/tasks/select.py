"""`simclr select RUN DATA --count 50`: the images that are most worth labelling, by features and without labels."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simclr import distributed
from simclr.config.encoder import TIMM, TORCHVISION, EncoderConfig
from simclr.config.pretrain import require_seed
from simclr.data.images import Images
from simclr.data.labels import read_label_list
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.cache import open_cache
from simclr.evaluation.selection import select_typical
from simclr.evaluation.subjects import BASELINE_NAMES, EvaluatedModel, open_subject, require_model, subject_of
from simclr.tasks.opening import (
    DataOptions,
    load_model,
    open_aloud,
    require_writable,
    side_of,
    tell_if_replaced,
    write,
)
from simclr.tasks.tables import open_table
from simclr.training.progress import say

if TYPE_CHECKING:
    from simclr.tasks.options.using import Select

COLUMNS = {"key": str, "cluster": float, "typicality": float}


class Selected(NamedTuple):
    """An image that is worth labelling."""

    key: str
    """Its name in the data: the path below the folder."""
    cluster: int
    typicality: float
    """Inverse mean distance to its neighbours in the cluster; the larger, the more typical."""


def select(options: "Select", *, quiet: bool = False) -> list[Selected]:
    """The command.

    Args:
        quiet: Whether no table is printed where no file is written.

    Returns:
        The images, the one to label first first.

    Raises:
        UserError: RUN, DATA and flags do not go together, or there are too few images without a label.
    """
    _check(options)
    with distributed.joined(options.device) as world:
        images = _open_images(options, world)
        labelled = _labelled(options, images)
        if not 1 <= options.count <= len(images) - len(labelled):
            raise UserError(
                f"--count was {options.count:,}; {images.name} has {len(images) - len(labelled):,} images without a "
                f"label, of {len(images):,}: give 1 or more, and no more than these."
            )
        features = _open_subject(options, world).features(images)  # (n, F)
        chosen = select_typical(features, options.count, labelled=labelled, seed=options.seed)
        selected = [
            Selected(images.keys[row], cluster, typicality)
            for row, cluster, typicality in zip(
                chosen.rows.tolist(), chosen.clusters.tolist(), chosen.typicality.tolist(), strict=True
            )
        ]
        if world.is_main:
            _report(options, selected, len(images), quiet)
        return selected


def _check(options: "Select") -> None:
    """What can be wrong before any image is opened."""
    if options.run in BASELINE_NAMES:
        raise UserError(
            f"{options.run} is no trained network; give a run's folder, an encoder's folder, timm/NAME or "
            "torchvision/NAME."
        )
    require_model(options.run)
    require_seed(options.seed)
    if options.out is None:
        return
    if options.out.suffix.lower() not in (".csv", ".txt"):
        raise UserError(f"--out was {options.out}; its name must end in .csv or .txt.")
    require_writable(options.out)
    tell_if_replaced(options.out)


def _open_images(options: "Select", world: DistributedContext) -> Images:
    opened = DataOptions.of(options)
    opened = replace(opened, side=side_of(Path(options.run), options.data, options.pack_side))
    return open_aloud(options.data, world, opened.reading(world), labels=opened.labels, readable=True)


def _labelled(options: "Select", images: Images) -> np.ndarray:
    """Rows of images that have a label already: those of --labelled, and those that --labels-file gives one."""
    rows = np.zeros(0, np.int64)
    if options.labelled is not None:
        rows = read_label_list(options.labelled, images, need_labels=False)
    if options.labels_file is not None and images.labels is not None:
        rows = np.union1d(rows, np.flatnonzero(images.labels >= 0))
    return rows


def _open_subject(options: "Select", world: DistributedContext) -> EvaluatedModel:
    cache = open_cache(options.cache)
    if options.run.startswith((TIMM, TORCHVISION)):
        like = EncoderConfig(name=options.run, channels=3, size=options.size)
        return open_subject(
            options.run, like=like, preprocessing="torchvision", seed=options.seed, cache=cache, world=world,
            size=options.size,
        )  # fmt: skip
    return subject_of(load_model(options.run, main=world.is_main), options.run, cache=cache, world=world)


def _report(options: "Select", selected: list[Selected], num_images: int, quiet: bool) -> None:
    """The images in the file or on standard output."""
    num_clusters = len({each.cluster for each in selected})
    say(f"{len(selected):,} of {num_images:,} images, from {num_clusters:,} clusters; label the first ones first.")
    if options.out is None:
        if not quiet:
            print("key\tcluster\ttypicality")
            for each in selected:
                print(f"{each.key}\t{each.cluster}\t{each.typicality:.3f}")
        return
    if options.out.suffix.lower() == ".txt":
        write(options.out, "".join(f"{each.key}\n" for each in selected).encode())
    else:
        with open_table(options.out, COLUMNS) as add:
            add(list(zip(*selected, strict=True)))
    say(f"Their names are in {options.out}.")
