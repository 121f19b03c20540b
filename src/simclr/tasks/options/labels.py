"""Flags of the commands that learn or measure with labels: evaluate, finetune, distill."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from simclr.config.distill import DistillConfig
from simclr.config.finetune import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate an encoder by the papers' protocols, beside baselines.

    RUN is a run's folder, an encoder's folder, timm/NAME or torchvision/NAME (with their pretrained weights), or a
    baseline: hog (histograms of oriented gradients), patches (k-means patches of the training images), pixels, random
    (random weights). PROTOCOL is one or more, with commas between, of: knn (nearest neighbours); linear (a linear
    classifier on frozen features); logistic (the transfer protocol: 45 values of l2); finetune (the whole network);
    supervised (the same network from scratch on the same labels); curve (how many labels are needed); probe (what each
    layer knows); label-free (geometry, neighbours, copies between train and test); transfer (several sets in one
    table). What was measured before is not measured again. Several processes: `torchrun --nproc-per-node K -m simclr
    evaluate ...`.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """What to evaluate."""

    data: Positional[Annotated[tuple[str, ...], arg(metavar="DATA...")]]
    """Labelled images: folder, .npz file or name; for transfer also several, and one of the papers' sets with its
    folder, such as flowers102:FOLDER."""

    protocol: str = "knn,linear"
    """Protocols, with commas between."""

    labels: str | None = None
    """Labels that may be used: a share such as 1%, a number such as 10/class, or a file with the names of images, one
    per line; unset: all."""

    seed: int = 0
    """First seed: of the 80/20 split, the choice of labels, the random encoder and training."""

    seeds: int = 1
    """Number of seeds; with two or more the table has mean and spread."""

    compare: tuple[str, ...] = ("hog", "pixels", "random")
    """Models in further rows of the table, with spaces or commas between: anything that RUN may be. `--compare` alone:
    none."""

    size: int = 224
    """Pixels a side that models of timm and torchvision are given."""

    leave_one_out: bool = False
    """kNN alone: each labelled image is classified by all the others, instead of a split."""

    linear: Literal["auto", "sgd", "optimum"] = "auto"
    """The linear protocol by SGD on crops, as in the papers, or as the exact optimum on features of the central crop;
    auto: the latter up to 100,000 images."""

    finetune_recipe: str | None = None
    """Recipe of fine-tuning: v1-1%, v1-10%, v1-100%, v2-1%, ..., small; unset: by the number of labels and the head."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Settings that replace those of the recipe, such as --finetune.lr 0.01."""

    counts: tuple[int, ...] = ()
    """Points of the curve, in labels per class; unset: 1, 2, 5, 10, 20, ... and all."""

    transfer_by: Literal["linear", "finetune"] = "linear"
    """Transfer by logistic regression on frozen features, or by fine-tuning over the papers' grid."""

    grid_steps: int = 20_000
    """Steps of each training, in transfer by fine-tuning."""

    grid_rates: tuple[float, ...] = ()
    """Learning rates that are tried; unset: the papers' seven."""

    grid_decays: tuple[float, ...] = ()
    """Weight decays times learning rate that are tried; unset: the papers' eight."""

    out: Path | None = None
    """Folder for results and pictures, from which the same command goes on after a stop; unset: RUN/evaluation where
    RUN is a run of `simclr pretrain`, else nothing is kept."""

    json: Path | None = None
    """Also write all figures and results to this file."""

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
