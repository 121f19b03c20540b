"""The commands of `simclr` and their flags. Imports no torch: `--help` is answered from here.

Each command names the function that does its work, and the field that holds the settings a recipe may start from.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from tyro.conf import Positional, arg

from simclr.config import PretrainConfig
from simclr.distill_config import DistillConfig
from simclr.evaluation.finetune_config import FinetuneConfig


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

    leave_one_out: bool = False
    """Of nearest neighbours: each labelled image is judged by all the others, instead of a split."""

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
class Finetune:
    """Turn an encoder into a classifier by training all of it on labelled images, and say how good that is.

    RUN is a run's folder, an encoder's folder, timm/NAME or torchvision/NAME (with their pretrained weights), or random
    for a network from scratch. Settings that no flag gives come from the recipe; the defaults below are those without
    one. After a stop the same command goes on. `simclr.load("OUT").classify(images)` and `simclr predict` use the
    result. Several processes: `torchrun --nproc-per-node K -m simclr finetune ...`.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Where training begins."""

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Labelled images: folder, .npz file or name. Without test images of their own a fifth of each class is kept to
    test with."""

    out: Path
    """Folder of the training and of the classifier."""

    labels: str | None = None
    """Labels that may be used, as in `simclr evaluate`: 1%, 10/class, or a file with names of images; unset: all."""

    seed: int = 0
    """Of the 80/20 split, the choice of labels, the order of the images and the views."""

    finetune_recipe: str | None = None
    """How to train: v1-1%, v1-10%, v1-100%, v2-1%, ..., small; unset: by the number of labels and the head."""

    size: int = 224
    """Pixels a side that models of timm and torchvision are given."""

    labels_file: Path | None = None
    """CSV of path,label lines for a folder of images."""

    pack: str = "auto"
    """Where a folder's images are kept decoded, as in `simclr pretrain`."""

    pack_side: int | None = None
    """Shrink larger images, as in `simclr pretrain`; unset: as the run did."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""

    config: Annotated[FinetuneConfig, arg(name="")] = field(default_factory=FinetuneConfig)


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Let a student learn a classifier's probabilities on images without labels, as in SimCLR v2.

    TEACHER is the folder of a fine-tuned, distilled or imported classifier, or timm/NAME or torchvision/NAME with their
    pretrained weights. DATA is what `simclr pretrain` takes; if it brings labelled test images, teacher and student are
    tested at the end. After a stop the same command goes on, to the same bits as if it had never stopped. Several
    processes: `torchrun --nproc-per-node K -m simclr distill ...`.
    """

    teacher: Positional[Annotated[str, arg(metavar="TEACHER")]]
    """Who teaches."""

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Images to learn on: folder, .npz file or name. No label is needed."""

    out: Path
    """Folder of the run."""

    student: str = "same"
    """Where the student starts: same (fresh weights in the teacher's shape: self-distillation), or the folder of a run
    or an encoder, such as the pretrained one that teacher and student share. Its classifier always starts anew."""

    encoder: str | None = None
    """A student of another shape with fresh weights: small, resnet50, timm/NAME, ...; instead of --student."""

    width: float = 1.0
    """With --encoder: multiplier on every channel count of a ResNet."""

    stem: Literal["auto", "cifar", "strided", "imagenet"] = "auto"
    """With --encoder: first layers of a ResNet."""

    sk: bool = False
    """With --encoder: selective kernels."""

    size: int | None = None
    """With --encoder: pixels a side of the student's images; unset: the teacher's."""

    head_layer: int | None = None
    """Layers of the projection head under the student's classifier; unset: the teacher's where the student has its
    shape, else 0."""

    teacher_size: int = 224
    """Pixels a side that a teacher of timm or torchvision is given."""

    labels: str | None = None
    """Labels that count beside the teacher (with --alpha): a share such as 1%, a number such as 10/class, or a file
    with the names of images, one a line; unset: none."""

    only_labels: str | None = None
    """Learn on these images alone, named as in --labels; unset: on all."""

    seed: int = 0
    """Of fresh weights, the choice of labels, the order of the images and every view."""

    test: bool = True
    """Test both at the end where DATA brings labelled test images."""

    recipe: str | None = None
    """Where the settings start from: v2-distill (the paper's) or small-distill; unset: by the number of images."""

    labels_file: Path | None = None
    """CSV of path,label lines for a folder of images."""

    pack: str = "auto"
    """Where a folder's images are kept decoded, as in `simclr pretrain`."""

    pack_side: int | None = None
    """Shrink larger images, as in `simclr pretrain`; unset: every pixel is kept."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""

    config: Annotated[DistillConfig, arg(name="")] = field(default_factory=DistillConfig)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Write the class of every image, and how sure the classifier is, to a .csv or .parquet file.

    MODEL is a folder of `simclr finetune` or `simclr import`, or any other that holds an encoder with a classifier.
    Rows are in the order of the keys; files that cannot be read are left out and counted. However many images there
    are, a few of them are in memory at a time.
    """

    model: Positional[Annotated[Path, arg(metavar="MODEL")]]
    """The classifier."""

    images: Positional[Annotated[str, arg(metavar="IMAGES")]]
    """Images: folder, .npz file or name; every split."""

    out: Path
    """The file to write, with columns key, class, probability; one that is there is replaced at the end."""

    top: int = 1
    """Likeliest classes to write: class_2, probability_2 and so on beside the first."""

    probabilities: bool = False
    """Also one column for each class."""

    pack_side: int | None = None
    """Shrink larger images of a folder first, where the classifier was trained so."""

    batch_size: int = 256
    """Images at a time; changes no class."""

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
class Export:
    """Hand an encoder on: as a folder, a torchvision or timm state dict, an ONNX file, a folder for the hub.

    What is written was loaded first and compared with the encoder; where a library's own network differs, that is said,
    or refused. Each export says what it expects of an image, and `simclr evaluate OUT DATA` takes it.
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run or of an encoder; a classifier goes along."""

    format: Literal["safetensors", "torchvision", "timm", "onnx", "hub-folder"]
    """safetensors: an encoder's folder; torchvision, timm: a state dict of theirs; onnx: images in [0, 1] to features;
    hub-folder: an encoder's folder with a model card written from the run."""

    out: Path
    """Folder or file to write; of torchvision and timm .safetensors or .pth."""

    licence: str | None = None
    """For the model card: an identifier such as apache-2.0; unset: none is stated."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a folder of `simclr export --format hub-folder` to huggingface.co; nothing else ever uploads anything."""

    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """Of files and model card."""

    repo_id: Positional[Annotated[str, arg(metavar="REPO_ID")]]
    """USER/NAME of the repository, made if there is none."""

    private: bool = False
    """Make a new repository private."""

    message: str = "Upload an encoder with simclr push"
    """Of the commit."""


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
    "finetune": Command(Finetune, "simclr.finetuning:finetune_run", "config"),
    "distill": Command(Distill, "simclr.distilling:distill", "config"),
    "predict": Command(Predict, "simclr.predicting:predict"),
    "embed": Command(Embed, "simclr.jobs:embed"),
    "import": Command(Import, "simclr.importing:import_checkpoint"),
    "export": Command(Export, "simclr.exporting.export:export"),
    "push": Command(Push, "simclr.exporting.hub:push"),
    "views": Command(Views, "simclr.jobs:views", "config"),
    "recipes": Command(Recipes, "simclr.jobs:recipes"),
}
