"""Who teaches: any classifier that can be loaded, ours, imported, or of timm or torchvision, as one kind of thing."""

import numpy as np

from simclr.config.encoder import TIMM, TORCHVISION
from simclr.data.images import Images
from simclr.data.source import some
from simclr.errors import UserError
from simclr.models.classifier import pretrained_classifier, usual_names
from simclr.tasks.opening import load_model
from simclr.weights.folder import Model


def open_teacher(name: str, *, size: int, main: bool = True) -> Model:
    """The classifier that a user names, with its preprocessing and the names of its classes.

    Args:
        name: The folder of a fine-tuned, distilled or imported network, timm/NAME or torchvision/NAME.
        size: Of the images that a model of timm or torchvision is given, in pixels.
        main: Whether this process prints messages.

    Raises:
        UserError: There is no such thing, or it is an encoder without a classifier.
    """
    if name.startswith((TIMM, TORCHVISION)):
        network = pretrained_classifier(name, size=size)
        classes, _ = usual_names(network.linear.out_features)
        return Model(network.encoder, "torchvision", classifier=network, classes=classes)
    teacher = load_model(name, main=main)
    if teacher.classifier is None:
        raise UserError(
            f"{name} is an encoder without a classifier, and a teacher needs one; fine-tune it on labelled images "
            "first (`simclr finetune`), then name that folder."
        )
    return teacher


def teachers_columns(teacher: Model, images: Images) -> np.ndarray:
    """(n,) int64 column of the teacher's logits of each image's label; -1 for an image without one.

    Classes are the same where their names are, whatever their order; a class that only the teacher knows does no harm.

    Raises:
        UserError: The images have no labels, or labels of a class that the teacher does not know.
    """
    if images.labels is None:
        raise UserError(
            f"{images.name} has no labels; leave --labels out, or give a folder with one sub-folder per class "
            "(or --labels-file with path,label lines)."
        )
    columns = {name: column for column, name in enumerate(teacher.classes)}
    used_labels = np.unique(images.labels[images.labels >= 0])
    names = dict(zip(used_labels.tolist(), images.label_names(used_labels), strict=True))
    unknown = [name for name in names.values() if name not in columns]
    if unknown:
        raise UserError(
            f"{len(unknown)} of the {len(names)} classes of {images.name} ({some(unknown)}) are not among the "
            f"teacher's {len(teacher.classes)} ({some(teacher.classes)}); take a teacher of these classes, or do "
            "without --labels and with --no-test."
        )
    return np.array([columns[names[int(label)]] if label >= 0 else -1 for label in images.labels], dtype=np.int64)
