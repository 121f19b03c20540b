"""Flags of the commands that put weights to use or pass them on: check, predict, embed, import, export, push."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Write the class of every image, and how sure the classifier is, to a .csv or .parquet file.

    MODEL is a folder of `simclr finetune` or `simclr import`, or any other that holds an encoder with a classifier.
    Rows are in the order of the keys; files that cannot be read are left out and counted. However many images there
    are, a few of them are in memory at a time. In .csv, text that a spreadsheet would run as a formula (it begins with
    = + - @, tab or carriage return) or that begins with ' has a ' in front; take one away to have it back. .parquet has
    text as it is.
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
class Check:
    """Decode every image of a data set and name the damaged files; exit code 1 if there are any."""

    data: Positional[Annotated[str, arg(metavar="DATA")]]
    """Images: folder, .npz file or name; all parts."""


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
