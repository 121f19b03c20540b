"""Flags of the commands that apply weights or pass them on: check, predict, embed, select, import, export, push."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Classify images, and write their most probable classes and probabilities to a .csv or .parquet file.

    MODEL is a folder of `simclr finetune` or `simclr import`, or another folder of an encoder with a classifier. Rows
    are in the order of the keys; files that cannot be read are left out and counted. Images are read batch by batch, so
    that memory does not grow with their number. In .csv, text that a spreadsheet would run as a formula (it begins with
    = + - @, tab or carriage return) or that begins with ' is written with a ' in front; remove that character to
    restore the text. In .parquet text is unchanged.
    """

    model: Positional[Annotated[Path, arg(metavar="MODEL")]]
    """The classifier."""

    images: Positional[Annotated[str, arg(metavar="IMAGES")]]
    """Images: folder, .npz file or name; every split."""

    out: Path
    """File to write, with columns key, class, probability; an existing file is replaced at the end."""

    top: int = 1
    """Number of most probable classes to write: further ones in columns class_2, probability_2 and so on."""

    probabilities: bool = False
    """Also write the probability of each class to a column of its own."""

    pack_side: int | None = None
    """Shorter side to which larger images of a folder are shrunk first; needed if the classifier was trained with
    it."""

    batch_size: int = 256
    """Images per batch; changes no class."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Decode every image of a data set and list the damaged files; exit code 1 if there are any."""

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Images: folder, .npz file or name; all parts."""


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Compute features of images, and write them to an .npz file (features, keys, labels)."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run or of an encoder."""

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Images: folder, .npz file or name."""

    out: Path
    """File to write (.npz)."""

    layer: str | None = None
    """Layer whose output is written: h, the average over the image; z, the projection; head.K, after K layers of the
    projection head (head.0: what the head reads); stageK, stage K averaged over the image; unset: the encoder's
    features."""

    labels_file: Path | None = None
    """CSV file with lines path,label for a folder of images."""

    pack: str = "auto"
    """Where decoded images are stored, as in `simclr pretrain`."""

    pack_side: int | None = None
    """Shorter side to which larger images are shrunk, as in `simclr pretrain`; unset: as in the run."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Select:
    """Name the images that are most worth labelling: typical ones of different clusters of their features.

    TypiClust (Hacohen, Dekel and Weinshall 2022, arXiv:2202.02794): k-means into as many clusters as there shall be
    labels (at most 500) and, from each cluster without a label, the largest first, the image that is nearest to its
    neighbours. No label is read but to know which images have one. Of data with a test part, the training part alone is
    looked at. Images that cannot be decoded are left out and named.
    """

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Encoder: a run's folder, an encoder's folder, timm/NAME or torchvision/NAME."""

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Images: folder, .npz file or name."""

    count: int = 50
    """Number of images to select."""

    out: Path | None = None
    """File to write: .csv (key, cluster, typicality) or .txt (one key per line, as --labels and --labelled take them);
    unset: the table is printed. The image to label first is the first one."""

    labelled: Path | None = None
    """File with the names of images that have a label already, one per line."""

    seed: int = 0
    """Seed of k-means."""

    size: int = 224
    """Side, in pixels, of the images for models of timm and torchvision."""

    labels_file: Path | None = None
    """CSV file with lines path,label for a folder of images; those with a label count as labelled already."""

    pack: str = "auto"
    """Where decoded images are stored, as in `simclr pretrain`."""

    pack_side: int | None = None
    """Shorter side to which larger images are shrunk, as in `simclr pretrain`; unset: as in the run."""

    cache: str = "auto"
    """Where computed features are stored for reuse: a folder, off, or auto: the user's cache folder."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Convert a checkpoint of another library to an encoder's folder; neither TensorFlow nor that library is needed.

    The authors' TensorFlow checkpoints (SimCLR v1, v2; TensorFlow 1, 2, SavedModels): encoder, projection head and
    supervised head are imported, as far as the checkpoint has them. Of files of PyTorch or safetensors (lightly,
    solo-learn, MoCo, torchvision) the ResNet is imported. Depth, width and stem are inferred from the weights; no
    pickle is executed. `simclr evaluate OUT DATA`, `simclr embed OUT DATA` and `simclr.load("OUT")` accept the result.
    """

    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
    """TensorFlow: common prefix of the files, such as r50_1x_sk0/model.ckpt-250228, or their folder. Otherwise a
    file."""

    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write."""

    format: Literal["auto", "tensorflow", "lightly", "solo-learn", "moco", "torchvision"] = "auto"
    """Library that wrote the checkpoint; auto: inferred from its files and names."""

    size: int | None = None
    """Side of the encoder's images, in pixels; unset: 32 for the 3x3 stem, 224 for the 7x7 stem."""

    mean: tuple[float, float, float] | None = None
    """Mean that training subtracted from pixels in [0, 1], for checkpoints of PyTorch; unset: ImageNet's, and
    CIFAR-10's for solo-learn's 3x3 stem. Requires --std."""

    std: tuple[float, float, float] | None = None
    """Standard deviation by which training then divided."""

    ema: bool = False
    """Import the moving average of the weights that SimCLR v2's checkpoints contain; it has no supervised head."""

    head_layer: int | None = None
    """Layers of the projection head under the supervised head; unset: inferred from the shapes, 1 for SimCLR v2's
    checkpoints that were fine-tuned on 1 % or 10 % of the labels."""

    classes: Path | None = None
    """Text file with the names of the supervised head's classes, one per line; unset: ImageNet's identifiers for 1,000
    classes, else numbers."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export an encoder as a folder, a torchvision or timm state dict, an ONNX file or a folder for the hub.

    Each export is loaded and compared with the encoder before it is published; if a library's own network differs, the
    difference is reported, or the export is rejected. Each export states its preprocessing, and `simclr evaluate OUT
    DATA` accepts it.
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run or of an encoder; a classifier is exported too."""

    format: Literal["safetensors", "torchvision", "timm", "onnx", "hub-folder"]
    """safetensors: an encoder's folder; torchvision, timm: a state dict of that library; onnx: a graph from images in
    [0, 1] to features; hub-folder: an encoder's folder with a model card written from the run."""

    out: Path
    """Folder or file to write; for torchvision and timm a file ending in .safetensors or .pth."""

    licence: str | None = None
    """Licence stated in the model card, as an identifier such as apache-2.0; unset: none is stated."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a folder of `simclr export --format hub-folder` to huggingface.co; no other command uploads anything."""

    folder: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """Folder of `simclr export --format hub-folder`."""

    repo_id: Positional[Annotated[str, arg(metavar="REPO_ID")]]
    """USER/NAME of the repository, created if it does not exist."""

    private: bool = False
    """Make a new repository private."""

    message: str = "Upload an encoder with simclr push"
    """Message of the commit."""
