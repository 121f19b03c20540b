"""Flags of the commands that need no label: plan, pretrain, resume, views, recipes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from simclr.config.pretrain import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say before a run what fits the memory, how long it takes and how much disk, from a few measured steps.

    Takes the settings of `simclr pretrain`, and trains a few steps on the images in well under a minute. Neither a run
    nor a pack is written; images that an existing pack holds are read from it.
    """

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Folder, .npz file or name of the images."""

    recipe: str | None = None
    """As in `simclr pretrain`."""

    memory_budget: str | None = None
    """What training may take of the device's memory (of a process), such as 2GB; unset: nearly all that is free."""

    json: Path | None = None
    """Also write the plan to this file."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Learn an encoder from unlabelled images.

    DATA is a folder of images at any depth, an .npz file with `x` (and `y`), or one of: digits, fashion-mnist, cifar10,
    cifar100, stl10, svhn (NAME:FOLDER if its files are in FOLDER). Settings that no flag gives come from the recipe;
    the defaults below are those without one. Several processes: `torchrun --nproc-per-node K -m simclr pretrain ...`.
    """

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Folder, .npz file or name of the images."""

    out: Path | None = None
    """Folder of the run; unset: runs/NAME of the data."""

    recipe: str | None = None
    """Where the settings start from: a name (see `simclr recipes`) or a config.json; unset: chosen for the data."""

    strict: bool = False
    """Stop at the first image that cannot be read, instead of leaving it out."""

    labels_file: Path | None = None
    """CSV of path,label lines for a folder of images; only for the kNN check, training uses no label."""

    pack: str = "auto"
    """Where a folder's images are kept decoded, for all runs: a folder, off, or auto: the user's cache folder, if
    decoding is slow."""

    pack_side: int | None = None
    """Shrink images whose shorter side is longer to this many pixels, once; unset: every pixel is kept."""

    memory_budget: str | None = None
    """What training may take of the device's memory (of a process), such as 2GB; unset: nearly all that is free."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run from its newest good checkpoint, to the same bits as if it had never stopped.

    All settings are those that the run began with. Only --workers, --save-every, --max-checkpoints and --knn-every may
    differ; any other flag would change the result and is refused.
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of the run."""

    data: str | None = None
    """Where the images are now, if they have moved."""

    pack: str | None = None
    """Where a folder's images are kept decoded, as in `simclr pretrain`; unset: as the run began. Changes no pixel."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class Views:
    """Draw rows of images with their views, to look at the policy before spending a night on it.

    Takes the flags of `simclr pretrain`; those of size, colour, crop, flip and blur make a difference.
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
    """Rows."""

    columns: int = 8
    """Views of each image."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Print the recipes with their settings, command, cost and expected result."""

    name: Positional[str | None] = None
    """Only this one."""
