"""The commands of `simclr` and their flags. Imports no torch: `--help` is answered from here.

Each command names the function that does its work, and the field that holds the settings a recipe may start from.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from tyro.conf import Positional, arg

from simclr.config import PretrainConfig
from simclr.evaluation.finetune_config import FinetuneConfig


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

    All settings are those that the run began with. Of the flags only --workers, --save-every, --keep and --knn-every
    may say otherwise; any other would change the result and is refused.
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of the run."""

    data: str | None = None
    """Where the images are now, if they have moved."""

    pack: str | None = None
    """Where a folder's images are kept decoded, as in `simclr pretrain`; unset: as the run began. Changes no pixel."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Say how good an encoder is: accuracies by the papers' protocols, beside what it has to beat.

    RUN is a run's folder, an encoder's folder, timm/NAME or torchvision/NAME (with their pretrained weights), random or
    pixels. PROTOCOL is one or more, with commas between, of: knn (nearest neighbours); linear (a linear classifier on
    frozen features); logistic (the transfer protocol: 45 l2 strengths); finetune (the whole network); supervised (the
    same network from scratch on the same labels); curve (how many labels are needed); probe (what each layer knows);
    label-free (geometry, neighbours, copies between train and test); transfer (several sets in one table). What was
    measured before is not measured again. Several processes: `torchrun --nproc-per-node K -m simclr evaluate ...`.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """What to evaluate."""

    data: Positional[Annotated[tuple[str, ...], arg(metavar="DATA...")]]
    """Labelled images: folder, .npz file or name; for transfer also several, and one of the papers' sets with its
    folder, such as flowers102:FOLDER."""

    protocol: str = "knn,linear"
    """How to measure."""

    labels: str | None = None
    """Labels that may be used: a share such as 1%, a number such as 10/class, or a file with the names of images, one a
    line; unset: all."""

    seed: int = 0
    """First seed: of the 80/20 split, the choice of labels, the random encoder and what is trained."""

    seeds: int = 1
    """How many seeds; the table then has mean and spread."""

    compare: tuple[str, ...] = ("random", "pixels")
    """What stands beside RUN: anything that RUN may be. `--compare` alone: nothing."""

    size: int = 224
    """Pixels a side that models of timm and torchvision are given."""

    linear: Literal["auto", "sgd", "optimum"] = "auto"
    """The linear protocol by SGD on crops, as in the papers, or as the exact optimum on features of the central crop;
    auto: the latter up to 100,000 images."""

    finetune_recipe: str | None = None
    """How to fine-tune: v1-1%, v1-10%, v1-100%, v2-1%, ..., small; unset: by the number of labels and the head."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Over the recipe that is named, such as --finetune.lr 0.01."""

    counts: tuple[int, ...] = ()
    """Of the curve: labels a class; unset: 1, 2, 5, 10, 20, ... and all."""

    transfer_by: Literal["linear", "finetune"] = "linear"
    """Transfer by logistic regression on frozen features, or by fine-tuning over the papers' grid."""

    grid_steps: int = 20_000
    """Of transfer by fine-tuning: steps of each training."""

    grid_rates: tuple[float, ...] = ()
    """Learning rates that are tried; unset: the papers' seven."""

    grid_decays: tuple[float, ...] = ()
    """Weight decays times learning rate that are tried; unset: the papers' eight."""

    out: Path | None = None
    """Folder for results and pictures, from which the same command goes on after a stop; unset: RUN/evaluation."""

    json: Path | None = None
    """Also write all figures to this file."""

    picture: Path | None = None
    """Also draw accuracies, neighbours and a map of the features to this file (.png)."""

    labels_file: Path | None = None
    """CSV of path,label lines for a folder of images."""

    pack: str = "auto"
    """Where a folder's images are kept decoded, as in `simclr pretrain`."""

    pack_side: int | None = None
    """Shrink larger images, as in `simclr pretrain`; unset: as the run did."""

    cache: str = "auto"
    """Where features are kept for the next time: a folder, off, or auto: the user's cache folder."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Put an encoder to work: write the features of images to an .npz file (features, keys, labels)."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run or of an encoder."""

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Images: folder, .npz file or name."""

    out: Path
    """The .npz file to write."""

    labels_file: Path | None = None
    """CSV of path,label lines for a folder of images."""

    pack: str = "auto"
    """Where a folder's images are kept decoded, as in `simclr pretrain`."""

    pack_side: int | None = None
    """Shrink larger images, as in `simclr pretrain`; unset: as the run did."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


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
class Plan:
    """Say before a run what fits the memory, how long it takes and how much disk, from a few measured steps.

    Takes the flags of `simclr pretrain`, trains a few steps on the images in well under a minute, and writes nothing.
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
class Import:
    """Turn somebody else's checkpoint into an encoder's folder; needs neither TensorFlow nor the library it came from.

    The authors' TensorFlow checkpoints (SimCLR v1, v2; TensorFlow 1, 2, SavedModels): encoder, projection head and
    supervised head are taken, whatever of them is there. Files of PyTorch or safetensors (lightly, solo-learn, MoCo,
    torchvision): the ResNet. Depth, width and stem follow from the weights; no pickle is run. `simclr evaluate OUT
    DATA`, `simclr embed OUT DATA` and `simclr.load("OUT")` then work.
    """

    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
    """TensorFlow: what the names of its files begin with, such as r50_1x_sk0/model.ckpt-250228, or their folder. Else a
    file."""

    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """The folder to write."""

    format: Literal["auto", "tensorflow", "lightly", "solo-learn", "moco", "torchvision"] = "auto"
    """Whose checkpoint it is; auto: found out by its files and names."""

    size: int | None = None
    """Pixels a side of the encoder's images; unset: 32 for the small stem, 224 for the other."""

    mean: tuple[float, float, float] | None = None
    """What was subtracted from pixels in [0, 1] in training, for checkpoints of PyTorch; unset: ImageNet's, and
    CIFAR-10's for solo-learn's small stem. Give --std too."""

    std: tuple[float, float, float] | None = None
    """What they were then divided by."""

    ema: bool = False
    """Take the moving average that SimCLR v2's checkpoints keep beside the weights; the supervised head is left out."""

    head_layer: int | None = None
    """Layers of the projection head before the supervised head; unset: what fits, 1 for SimCLR v2's checkpoints that
    were fine-tuned on 1 % or 10 % of the labels."""

    classes: Path | None = None
    """Text file with the names of the supervised head's classes, one a line; unset: ImageNet's identifiers for 1,000
    classes, else numbers."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Print the recipes with their settings, command, cost and expected result."""

    name: Positional[str | None] = None
    """Only this one."""


class Command(NamedTuple):
    """One command.

    Attributes:
        flags: Its arguments.
        job: module:function; takes them, and, where there are settings, `over(settings)`: those with the flags on top.
        settings: The field of the settings; None: it has none.
    """

    flags: type
    job: str
    settings: str | None = None


COMMANDS: dict[str, Command] = {
    "plan": Command(Plan, "simclr.jobs:plan", "config"),
    "pretrain": Command(Pretrain, "simclr.jobs:pretrain", "config"),
    "resume": Command(Resume, "simclr.jobs:resume", "config"),
    "evaluate": Command(Evaluate, "simclr.evaluate:evaluate", "finetune"),
    "embed": Command(Embed, "simclr.jobs:embed"),
    "import": Command(Import, "simclr.importing:import_checkpoint"),
    "views": Command(Views, "simclr.jobs:views", "config"),
    "recipes": Command(Recipes, "simclr.jobs:recipes"),
}
