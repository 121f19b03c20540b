"""A trained encoder as a folder, and back: `simclr.load(PATH).embed(images)`.

The folder holds `model.safetensors` and a `config.json` that states what the encoder expects: size, channels,
range, preprocessing, and where the features are taken. So a saved encoder cannot be fed wrongly without an error.

The projection head travels with its encoder, because fine-tuning may begin inside it (SimCLR v2). A fine-tuned network
is the same folder with a classifier in it: `simclr.load(PATH).classify(images)`; for more images than memory holds
there is `simclr predict`. All tensors lie in the one file, under `backbone.`, `head.` and `classifier.`, with a digest
of what config.json says of them: two files that were not written together are refused.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from simclr.data.forms import ImagesLike, Pixels
from simclr.data.images import Images, fit_channels
from simclr.errors import UserError, shown
from simclr.files import reason_of, write_atomically
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder
from simclr.models.heads import ProjectionHead
from simclr.models.inference import outputs, probabilities_of
from simclr.models.restoring import require_same, restore_encoder, sketch_encoder
from simclr.models.safetensors_file import open_safetensors
from simclr.training.device import find_device
from simclr.views.policy import AugmentationPreset
from simclr.weights.record import (
    FORMAT,
    EncoderRecord,
    escaped,
    read_json,
    require_class_names,
    validated,
)
from simclr.weights.single_file import read_file
from simclr.weights.training_progress import TrainingProgress, UnfinishedTraining

WEIGHTS_MARK = '"described"'
"""Stands in the header of every model.safetensors that `save_encoder` writes."""
_HEAD, _CLASSIFIER = "head.", "classifier."  # names in model.safetensors; the encoder's begin with "backbone."


def save_encoder(
    encoder: Encoder,
    folder: Path,
    *,
    preprocessing: AugmentationPreset,
    origin: dict[str, Any],
    head: ProjectionHead | None = None,
    progress: TrainingProgress | None = None,
) -> None:
    """Write the encoder's folder; each file appears whole or not at all, config.json last.

    Args:
        preprocessing: Whose evaluation preprocessing belongs to it: "google" or "torchvision".
        origin: Free facts about where the weights come from, kept in config.json.
        head: The projection head that it was trained under, if there is one.
        progress: How far its training has come; None: unknown.
    """
    _save(folder, encoder, head, None, _describe(encoder, head, preprocessing, progress) | {"origin": origin})


def save_classifier(
    network: Classifier,
    folder: Path,
    *,
    classes: Sequence[str],
    preprocessing: AugmentationPreset,
    origin: dict[str, Any],
    head: ProjectionHead | None = None,
    progress: TrainingProgress | None = None,
) -> None:
    """Write a network that names classes: its encoder's folder, with the classifier.

    Args:
        classes: Names of the classes, in the order of the logits.
        preprocessing, origin, progress: As in `save_encoder`.
        head: A projection head that is to be kept though the classifier does not stand on it.
    """
    assert len(classes) == network.linear.out_features, (len(classes), network.linear)
    head = network.head or head
    described = _describe(network.encoder, head, preprocessing, progress)
    described |= {
        "classifier": {"classes": [escaped(name) for name in classes], "head_layer": network.head_layer},
        "origin": origin,
    }
    _save(folder, network.encoder, head, network.linear, described)


def load(path: str | PathLike[str], *, device: str | torch.device = "cpu") -> "Model":
    """Load an encoder from the folder of a run or an encoder, or from a file that `simclr export` wrote.

    Head and classifier come along where there are any.

    Example:
        >>> import simclr
        >>> encoder = simclr.load("runs/digits")          # doctest: +SKIP
        >>> features = encoder.embed(["a.png", "b.png"])  # doctest: +SKIP

    Args:
        path: The folder or file.
        device: "cpu", "cuda", "cuda:1", ..., or "auto": a GPU where there is one.

    Raises:
        UserError: There is no encoder at `path`, its files do not fit together, or there is no such device.

    Warns:
        UnfinishedTraining: The training of these weights had not reached its end.
    """
    model = load_quietly(path, device=device)
    if model.progress is not None and not model.progress.finished:
        warnings.warn(model.progress.warning(path), UnfinishedTraining, stacklevel=2)
    return model


def load_quietly(path: str | PathLike[str], *, device: str | torch.device = "cpu") -> "Model":
    """As `load`, without the warning, for callers that say it in their own way."""
    path, device = Path(path), find_device(device)
    if path.is_file():
        parts = read_file(path)
        return Model(
            parts.encoder, parts.preprocessing, classifier=parts.classifier, classes=parts.classes,
            progress=parts.progress,
        ).to(device)  # fmt: skip
    folder = path / "encoder" if (path / "encoder" / "config.json").is_file() else path
    try:
        values = read_json(folder / "config.json")
        _require_format(values, folder)
        return _restore(values, folder).to(device)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} holds no encoder (config.json and model.safetensors); give the folder of a run that has "
            "saved a checkpoint, or of an exported encoder, or a file that `simclr export` wrote."
        ) from None
    except OSError as error:
        raise UserError(f"The encoder in {folder} cannot be read: {reason_of(error, folder)}.") from None


class Model:
    """A loaded encoder with its preprocessing, and with the head and the classifier that were saved with it.

    Attributes:
        encoder: The module; (n, C, S, S) in [0, 1] -> (n, F).
        preprocessing: "google" or "torchvision".
        head: The projection head, (n, F) -> (n, D); None where none was saved.
        classifier: Encoder, head and linear classifier as one network, (n, C, S, S) -> (n, K) logits; None for an
            encoder that was not fine-tuned. A `Classifier`, or what onnxruntime computes.
        classes: Names of the K classes; empty without a classifier.
        progress: How far the training of these weights had come, `progress.step` of `progress.total_steps`; None where
            that is unknown, as of imported weights.
    """

    def __init__(
        self,
        encoder: Encoder,
        preprocessing: AugmentationPreset,
        *,
        head: ProjectionHead | None = None,
        classifier: nn.Module | None = None,
        classes: Sequence[str] = (),
        progress: TrainingProgress | None = None,
    ) -> None:
        self.encoder = encoder
        self.preprocessing = preprocessing
        self.head = head
        self.classifier = classifier
        self.classes = list(classes)
        self.progress = progress

    @property
    def finished(self) -> bool | None:
        """Whether the training of these weights reached its end; None where that is unknown."""
        return None if self.progress is None else self.progress.finished

    def to(self, device: str | torch.device) -> "Model":
        """Move all parts to a device, named as in `load`; itself is returned."""
        device = find_device(device)
        for part in (self.encoder, self.head, self.classifier):
            if part is not None:
                part.to(device)
        return self

    def embed(self, images: ImagesLike, *, batch_size: int = 256) -> np.ndarray:
        """Features of images of any size.

        The encoder's own preprocessing takes the central square and resizes it to the encoder's size, whatever the
        size of the image. Gray images are shown in colour to an encoder of colour; the reverse is refused.

        Args:
            images: A path, a PIL image, an array (H, W, C) or a sequence of them, mixed as they come (arrays in a
                sequence may be (H, W), tensors are (C, H, W)); an array (n, H, W) or (n, H, W, C); a tensor
                (n, C, H, W); or opened `Images`. Numbers are integers in 0..255 or floats in [0, 1], rounded to
                bytes. Files are read a batch at a time.
            batch_size: Images at a time.

        Returns:
            (n, F) float32; n is 1 for a single image.

        Raises:
            UserError: There is no image, one is unreadable, has other channels than the encoder, or numbers beyond
                that range; or the encoder gives NaN or infinite features.
        """
        return self._outputs(self.encoder, images, self.encoder.num_features, batch_size)

    def classify(self, images: ImagesLike, *, batch_size: int = 256) -> list[str]:
        """The likeliest class of each image, by name.

        Arguments and errors are those of `probabilities`.
        """
        return [self.classes[best] for best in self.probabilities(images, batch_size=batch_size).argmax(axis=1)]

    def probabilities(self, images: ImagesLike, *, batch_size: int = 256) -> np.ndarray:
        """How likely each class is for each image.

        Args:
            images: As `embed` takes them.
            batch_size: Images at a time.

        Returns:
            (n, K) float32, rows that sum to 1; the columns are `classes`.

        Raises:
            UserError: As `embed`, or the encoder has no classifier.
        """
        if self.classifier is None:
            raise UserError("This encoder has no classifier; fine-tune it on labelled images, then load the result.")
        logits = self._outputs(self.classifier, images, len(self.classes), batch_size)
        return probabilities_of(torch.from_numpy(logits))

    def _outputs(self, network: nn.Module, images: ImagesLike, width: int, batch_size: int) -> np.ndarray:
        if batch_size < 1:
            raise UserError(f"batch_size was {batch_size}; it must be at least 1.")
        size, channels = self.encoder.config.size, self.encoder.config.channels
        fitting = fit_channels(images, channels) if isinstance(images, Images) else Pixels(images, channels=channels)
        return outputs(network, fitting, width, size=size, preset=self.preprocessing, batch_size=batch_size)


def _describe(
    encoder: Encoder, head: ProjectionHead | None, preprocessing: AugmentationPreset, progress: TrainingProgress | None
) -> dict[str, Any]:
    described = {
        "format": FORMAT,
        "encoder": encoder.config.to_dict(),
        "input": {"range": [0.0, 1.0], "layout": "NCHW", "preprocessing": preprocessing},
        "num_features": encoder.num_features,
    }
    if progress is not None:
        described |= progress.to_dict()
    return described if head is None else described | {"head": head.to_dict()}


def _save(
    folder: Path, encoder: Encoder, head: nn.Module | None, linear: nn.Module | None, described: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(encoder.state_dict())
    for prefix, part in ((_HEAD, head), (_CLASSIFIER, linear)):
        if part is not None:
            weights |= {prefix + name: tensor for name, tensor in part.state_dict().items()}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = save_tensors(weights, metadata={"described": _digest(described)})
    write_atomically(folder / "model.safetensors", content)
    # last: a folder without it is known to be unfinished, and after a kill between the two it states too few steps
    write_atomically(folder / "config.json", (json.dumps(described, indent=2) + "\n").encode())


def _require_format(values: dict[str, Any], folder: Path) -> None:
    """Refuse another version's record.

    Raises:
        UserError: A newer version of simclr wrote it.
        FileNotFoundError: It is no encoder's: the config.json of a run that has saved no checkpoint yet, for instance.
    """
    format = values.get("format")
    if not isinstance(format, str) or not format.startswith("simclr-encoder-"):
        raise FileNotFoundError
    if format != FORMAT:
        raise UserError(
            f"The encoder in {folder} has the format '{shown(format)}', and this version of simclr reads {FORMAT}; "
            "install a newer one."
        )


def _restore(values: dict[str, Any], folder: Path) -> "Model":
    """The parts that config.json describes, with their weights from model.safetensors."""
    record = validated(EncoderRecord, values, f"{folder / 'config.json'}")
    classes = record.classifier.classes if record.classifier else []
    require_class_names(classes, f"{folder / 'config.json'}")
    with open_safetensors(folder / "model.safetensors") as stored:
        digest = stored.metadata.get("described")
        if digest is not None and digest != _digest(values):  # folders of old have none
            raise UserError(
                f"The encoder in {folder} cannot be loaded, its files do not fit together: config.json is not the one "
                "that model.safetensors was written with."
            )
        encoder = sketch_encoder(record.config)
        if record.num_features != encoder.num_features:
            raise UserError(
                f"{folder / 'config.json'} does not fit: num_features is {record.num_features}, and its encoder has "
                f"{encoder.num_features}."
            )
        head_reads = record.head.reads if record.head else None
        below = encoder if head_reads is None else sketch_encoder(replace(record.config, feature=head_reads))
        with torch.device("meta"):
            head = ProjectionHead(below.num_features, **record.head.model_dump()) if record.head else None
            head_layer = record.classifier.head_layer if record.classifier else 0
            network = Classifier(encoder, head, len(classes), head_layer=head_layer) if classes else None
        linear = None if network is None else network.linear
        expected = encoder.state_dict()
        for prefix, part in ((_HEAD, head), (_CLASSIFIER, linear)):
            expected |= {} if part is None else {prefix + name: value for name, value in part.state_dict().items()}
        require_same(expected, stored.tensors, folder / "model.safetensors")
        encoder = restore_encoder(encoder, stored.get_tensor)
        for prefix, part in ((_HEAD, head), (_CLASSIFIER, linear)):
            if part is not None:
                part.load_state_dict(
                    {name: stored.get_tensor(prefix + name) for name in part.state_dict()}, assign=True
                )
                part.eval()
    if network is not None:
        network.encoder = encoder
        network.eval()
    return Model(
        encoder, record.input.preprocessing, head=head, classifier=network, classes=classes, progress=record.progress
    )


def digest_of(network: nn.Module) -> str:
    """SHA-256 (hexadecimal) of all weights and buffers, and their names."""
    digest = sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(described: dict[str, Any]) -> str:
    """Digest of what gives the tensors their meaning.

    Not of where they come from, which is free to be edited, nor of how far the training had come, which changes from
    checkpoint to checkpoint.
    """
    meaning = {key: value for key, value in described.items() if key not in ("origin", "step", "total_steps")}
    return sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
