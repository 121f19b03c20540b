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
    (random weights). PROTOCOL is one or more, separated by commas, of: knn (nearest neighbours); linear (a linear
    classifier on frozen features); logistic (the transfer protocol: 45 values of l2); finetune (the whole network);
    supervised (the same network from scratch on the same labels); curve (accuracy over the number of labels); probe
    (what each layer encodes); label-free (geometry, neighbours, copies between train and test); transfer (several sets
    in one table). Results that are stored already are not computed again. Several processes: `torchrun --nproc-per-node
    K -m simclr evaluate ...`.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The model under test."""

    data: Positional[Annotated[tuple[str, ...], arg(metavar="DATA...")]]
    """Labelled images: folder, .npz file or name; for transfer also several, and one of the papers' sets with its
    folder, such as flowers102:FOLDER."""

    protocol: str = "knn,linear"
    """Protocols, separated by commas."""

    labels: str | None = None
    """Labels that may be used: a share such as 1%, a number such as 10/class, or a file with the names of images, one
    per line; unset: all."""

    seed: int = 0
    """First seed, for the 80/20 split, the choice of labels, the random encoder and training."""

    seeds: int = 1
    """Number of seeds; with two or more the table shows mean and standard deviation."""

    compare: tuple[str, ...] = ("hog", "pixels", "random")
    """Models in further rows of the table, with spaces or commas between: anything that RUN may be, and init, what RUN
    was pretrained from (--init), which unset adds for such a run. `--compare` alone: none."""

    encoder: str | None = None
    """With RUN random: the network that is trained or measured, such as resnet50; unset: that of the recipe for these
    images."""

    width: float = 1.0
    """With --encoder: multiplier on every channel count of a ResNet."""

    stem: Literal["auto", "cifar", "strided", "imagenet"] = "auto"
    """With --encoder: first layers of a ResNet."""

    sk: bool = False
    """With --encoder: selective kernels."""

    size: int | None = None
    """Side of the images, in pixels, for models of timm and torchvision (unset: 224), and with --encoder (unset: that
    of the recipe)."""

    feature: Literal["auto", "h", "stage4", "stages3-4", "stages1-4"] = "auto"
    """Read other features from the same weights, of RUN, `init` and `random`: h, the average over the image, or the
    feature maps of these stages on grids of at most 4 x 4; auto: what RUN's head was trained on."""

    layer: str | None = None
    """With the protocols knn, linear, logistic and curve: layer of RUN and of the other networks whose output is
    evaluated: h, the average over the image; z, the projection; head.K, after K layers of the projection head (head.0:
    what the head reads); stageK, stage K averaged over the image; unset: the encoder's features."""

    leave_one_out: bool = False
    """With --protocol knn: classify each labelled image by all others, instead of splitting the images."""

    linear: Literal["auto", "sgd", "optimum"] = "auto"
    """Solver of the linear protocol: the exact optimum on features of the central crop, or sgd on random crops as in
    the papers, by the recipe cifar-linear up to 32 pixels, linear above, and small-linear (ours) up to 20,000 images;
    auto: optimum up to 100,000 images."""

    finetune_recipe: str | None = None
    """Recipe of fine-tuning: v1-1%, v1-10%, v1-100%, v2-1%, ..., v2-wide-1%, ..., small; unset: small for data sets of
    up to 100,000 labelled images, else chosen by projection head, width and share of labels."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Settings that replace those of the recipe, such as --finetune.lr 0.01."""

    pseudo_labels: bool = False
    """In the protocols finetune and supervised, train on pseudo-labels too, as `simclr finetune` does: finetune gets
    those of the model's own features, supervised those of raw pixels. Other protocols, the curve among them, take
    none."""

    counts: tuple[int, ...] = ()
    """Points of the curve, in labels per class; unset: 1, 2, 5, 10, 20, ... and all."""

    transfer_by: Literal["linear", "finetune", "scratch"] = "linear"
    """Transfer by logistic regression on frozen features, by fine-tuning over the papers' grid, or, for RUN's network
    with random weights, by training from scratch over the papers' grid for that."""

    grid_steps: int | None = None
    """Steps of each training of the grid; unset: the papers' 20,000, and 40,000 from scratch."""

    grid_rates: tuple[float, ...] = ()
    """Learning rates of the grid; unset: the seven of the papers."""

    grid_decays: tuple[float, ...] = ()
    """Products of weight decay and learning rate of the grid; unset: the eight of the papers."""

    out: Path | None = None
    """Folder for results and pictures; after a stop, the same command continues from it. Unset: RUN/evaluation where
    RUN is a run of `simclr pretrain`, else nothing is stored."""

    json: Path | None = None
    """Also write all results to this JSON file."""

    picture: Path | None = None
    """Also draw accuracies, nearest neighbours and a map of the features, to this .png file."""

    labels_file: Path | None = None
    """CSV file with lines path,label for a folder of images."""

    pack: str = "auto"
    """Where decoded images are stored, as in `simclr pretrain`."""

    pack_side: int | None = None
    """Shorter side to which larger images are shrunk, as in `simclr pretrain`; unset: as in the run."""

    cache: str = "auto"
    """Where computed features are stored for reuse: a folder, off, or auto: the user's cache folder."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Fine-tune an encoder on labelled images as a classifier, and report its test accuracy.

    RUN is a run's folder, an encoder's folder, timm/NAME or torchvision/NAME (with their pretrained weights), or random
    for a network from scratch (--encoder names it). Settings that no flag gives come from the recipe; the defaults
    below apply without a recipe. After a stop, the same command continues the training.
    `simclr.load("OUT").classify(images)` and `simclr predict` use the result. Several processes: `torchrun
    --nproc-per-node K -m simclr finetune ...`.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Network from which training starts."""

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Labelled images: folder, .npz file or name. If they have no test part, a fifth of each class is held out for
    testing."""

    out: Path
    """Folder of the training and of the classifier."""

    labels: str | None = None
    """Labels that may be used, as in `simclr evaluate`: 1%, 10/class, or a file with names of images; unset: all."""

    pseudo_labels: bool = False
    """Train on pseudo-labels too: each image to learn from that has no label (or none of --labels) takes its most
    probable class as label. The probabilities are those of label propagation over the graph of nearest neighbours,
    times those of the linear probe, by RUN's features, or by raw pixels if RUN is `random`. Images of the test part
    take no part. Recipe and number of steps are those of a training without pseudo-labels, and half of the images that
    are seen are labelled ones. --epochs counts passes over the labelled images."""

    seed: int = 0
    """Seed of the 80/20 split, the choice of labels, the order of the images and the views."""

    finetune_recipe: str | None = None
    """Recipe of the training: v1-1%, v1-10%, v1-100%, v2-1%, ..., v2-wide-1%, ..., small, linear, cifar-linear; unset:
    small for data sets of up to 100,000 labelled images, else chosen by projection head, width and share of labels."""

    encoder: str | None = None
    """With RUN random: the network that is trained, such as resnet50; unset: that of the recipe for these
    images."""

    width: float = 1.0
    """With --encoder: multiplier on every channel count of a ResNet."""

    stem: Literal["auto", "cifar", "strided", "imagenet"] = "auto"
    """With --encoder: first layers of a ResNet."""

    sk: bool = False
    """With --encoder: selective kernels."""

    size: int | None = None
    """Side of the images, in pixels, for models of timm and torchvision (unset: 224), and with --encoder (unset: that
    of the recipe)."""

    labels_file: Path | None = None
    """CSV file with lines path,label for a folder of images."""

    pack: str = "auto"
    """Where decoded images are stored, as in `simclr pretrain`."""

    pack_side: int | None = None
    """Shorter side to which larger images are shrunk, as in `simclr pretrain`; unset: as in the run."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""

    config: Annotated[FinetuneConfig, arg(name="")] = field(default_factory=FinetuneConfig)


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distil a classifier (the teacher) into a student on unlabelled images, as in SimCLR v2.

    TEACHER is the folder of a fine-tuned, distilled or imported classifier, or timm/NAME or torchvision/NAME with their
    pretrained weights. DATA is what `simclr pretrain` takes; if it has labelled test images, teacher and student are
    tested at the end. After a stop, the same command continues the training, with the same bits as without a stop.
    Several processes: `torchrun --nproc-per-node K -m simclr distill ...`.
    """

    teacher: Positional[Annotated[str, arg(metavar="TEACHER")]]
    """Classifier whose probabilities are learned."""

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Images to train on: folder, .npz file or name. No labels are needed."""

    out: Path
    """Folder of the run."""

    student: str = "same"
    """Initial student: same (new weights in the teacher's architecture: self-distillation), or the folder of a run or
    an encoder, such as the pretrained encoder of the teacher. Its classifier always starts from new weights."""

    encoder: str | None = None
    """Architecture of a student with new weights: small, resnet50, timm/NAME, ...; instead of --student."""

    width: float = 1.0
    """With --encoder: multiplier on every channel count of a ResNet."""

    stem: Literal["auto", "cifar", "strided", "imagenet"] = "auto"
    """With --encoder: first layers of a ResNet."""

    sk: bool = False
    """With --encoder: selective kernels."""

    size: int | None = None
    """With --encoder: side of the student's images, in pixels; unset: as the teacher's."""

    head_layer: int | None = None
    """Layers of the projection head under the student's classifier; unset: as in the teacher if the student has its
    architecture, else 0."""

    teacher_size: int = 224
    """Side, in pixels, of the images for a teacher of timm or torchvision."""

    labels: str | None = None
    """Labels that are used beside the teacher's probabilities (with --alpha): a share such as 1%, a number such as
    10/class, or a file with the names of images, one per line; unset: none."""

    only_labels: str | None = None
    """Train on these images only, given as in --labels; unset: on all."""

    seed: int = 0
    """Seed of new weights, the choice of labels, the order of the images and every view."""

    test: bool = True
    """Test teacher and student at the end if DATA has labelled test images."""

    recipe: str | None = None
    """Recipe whose settings the flags replace: v2-distill (the paper's) or small-distill; unset: chosen by the number
    of images."""

    labels_file: Path | None = None
    """CSV file with lines path,label for a folder of images."""

    pack: str = "auto"
    """Where decoded images are stored, as in `simclr pretrain`."""

    pack_side: int | None = None
    """Shorter side to which larger images are shrunk, as in `simclr pretrain`; unset: they are not shrunk."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""

    config: Annotated[DistillConfig, arg(name="")] = field(default_factory=DistillConfig)
