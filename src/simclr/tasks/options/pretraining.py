"""Flags of the commands that need no label: plan, pretrain, resume, views, recipes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from simclr.config.pretrain import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimate memory, time and disk space of a pretraining run from a few measured steps.

    Takes the settings of `simclr pretrain`, and trains a few steps on the images in well under a minute. Neither a run
    nor a pack is written; images that an existing pack holds are read from it.
    """

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Folder, .npz file or name of the images."""

    recipe: str | None = None
    """As in `simclr pretrain`."""

    memory_budget: str | None = None
    """Device memory that each process may use for training, such as 2GB; unset: nearly all that is free."""

    json: Path | None = None
    """Also write the plan to this file."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain an encoder on unlabelled images.

    DATA is a folder of images at any depth, an .npz file with `x` (and `y`), or one of: digits, fashion-mnist, cifar10,
    cifar100, stl10, svhn (NAME:FOLDER if its files are in FOLDER). Settings that no flag gives come from the recipe;
    the defaults below apply without a recipe. Several processes: `torchrun --nproc-per-node K -m simclr pretrain ...`.
    """

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Folder, .npz file or name of the images."""

    out: Path | None = None
    """Folder of the run; unset: runs/NAME, after the name of the data."""

    recipe: str | None = None
    """Recipe whose settings the flags replace: a name (see `simclr recipes`) or a config.json; unset: chosen by the
    data."""

    strict: bool = False
    """Stop at the first image that cannot be read, instead of leaving it out."""

    labels_file: Path | None = None
    """CSV file with lines path,label for a folder of images. Labels are used by the kNN check, never by the
    training."""

    pack: str = "auto"
    """Where decoded copies of a folder's images are stored for all runs (a pack): a folder, off, or auto: the user's
    cache folder, if decoding is slow."""

    pack_side: int | None = None
    """Shorter side, in pixels, to which larger images are shrunk before views are made; unset: they are not shrunk."""

    memory_budget: str | None = None
    """Device memory that each process may use for training, such as 2GB; unset: nearly all that is free."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Resume a run from its newest intact checkpoint; the result has the same bits as that of an uninterrupted run.

    The settings are those that the run was started with. Only --workers, --save-every, --max-checkpoints and
    --knn-every may be given; any other setting would change the result and is rejected.
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of the run."""

    data: str | None = None
    """New place of the images, if they have moved."""

    pack: str | None = None
    """Where decoded images are stored, as in `simclr pretrain`; unset: as at the start of the run. Changes no pixel."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class Views:
    """Draw images and random views of them, to check the augmentation before a long run.

    Takes the settings of `simclr pretrain`; those of size, colour, crop, flip and blur change the picture.
    """

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Folder, .npz file or name of the images."""

    out: Path = Path("views.png")
    """The picture to write."""

    recipe: str | None = None
    """As in `simclr pretrain`."""

    pack: str = "auto"
    """As in `simclr pretrain`."""

    images: int = 8
    """Number of images, one per row."""

    columns: int | None = None
    """Number of views per image; unset: 8, or all those of an epoch if they are more."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Print recipes with their settings: of pretraining with command, cost and expected result, and of fine-tuning."""

    name: Positional[str | None] = None
    """Name of the recipe to print, of pretraining or fine-tuning; unset: all."""
