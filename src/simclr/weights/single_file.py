"""An encoder as one file that other libraries read: torchvision's or timm's state dict, or ONNX.

The description is JSON: what the encoder expects of its input, how others load the file, and the names of the classes
if it classifies. It lies in the file's metadata under `simclr` where there is metadata, and beside it as FILE.json
always; a .pth has only that one, which knows the file's SHA-256.

A state dict read back is our network again, not torchvision's: the max-pool is the one that the weights were trained
with.
"""

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from simclr.config.encoder import TIMM, TORCHVISION
from simclr.errors import UserError, shown
from simclr.files import MAX_RECORD_BYTES, open_regular, read_regular, reason_of, write_atomically
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder
from simclr.models.external.onnx_bridge import LOGITS, OnnxEncoder, OnnxNetwork, metadata_of
from simclr.models.external.torchvision_names import import_state
from simclr.models.restoring import require_same
from simclr.models.safetensors_file import TensorInfo, open_safetensors
from simclr.views.policy import AugmentationPreset
from simclr.weights.importers.torch_file import TorchFile
from simclr.weights.record import ExportRecord, parse_json, require_class_names, validated
from simclr.weights.training_progress import TrainingProgress

KEY = "simclr"
VERSION = "simclr-export-1"
SUFFIXES = {"torchvision": (".safetensors", ".pth"), "timm": (".safetensors", ".pth"), "onnx": (".onnx",)}
"""Endings of each format's files, the usual one first."""

Described = dict[str, Any]


class Parts(NamedTuple):
    """What such a file holds."""

    encoder: Encoder
    preprocessing: AugmentationPreset
    classifier: nn.Module | None
    """(B, C, S, S) -> (B, K) logits."""
    classes: list[str]
    progress: TrainingProgress | None
    """How far the training had come; None: unknown."""


def write_state(path: Path, state: Mapping[str, Tensor], described: Described) -> None:
    """Write a state dict by the ending of `path`, with its description."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if path.suffix == ".pth":
        buffer = BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getvalue()
    else:
        content = save_tensors(tensors, metadata={"format": "pt", KEY: json.dumps(described)})
    write_described(path, content, described)


def write_described(path: Path, content: bytes, described: Described) -> None:
    """Write the file, and FILE.json beside it; each appears whole or not at all."""
    beside = described | {"file": path.name, "sha256": sha256(content).hexdigest()}
    write_atomically(path, content)
    write_atomically(description_of(path), (json.dumps(beside, indent=2, ensure_ascii=False) + "\n").encode())


def description_of(path: Path) -> Path:
    """FILE.json."""
    return path.with_name(path.name + ".json")


def read_file(path: Path) -> Parts:
    """What `simclr export` wrote.

    Raises:
        UserError: The file is damaged, is not one of ours, or needs a package that is missing.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
        record = _record(path, content)
        return _from_onnx(content, record) if path.suffix == ".onnx" else _from_state(path, record)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error, path)}.") from None


def _record(path: Path, content: bytes) -> ExportRecord:
    foreign = UserError(
        f"{path} was not written by `simclr export` (it has no description of its input); give the folder of a run or "
        "of an encoder, or turn it into one with `simclr import`."
    )
    if path.suffix == ".onnx":
        text = metadata_of(content).get(KEY)
    elif path.suffix == ".safetensors":
        with open_safetensors(path) as stored:
            text = stored.metadata.get(KEY)
    else:
        beside = description_of(path)
        text = read_regular(beside, MAX_RECORD_BYTES) if os.path.lexists(beside) else None
    if text is None:
        raise foreign
    name = f"The description of {path}"
    values = parse_json(text, name)
    if values.get("format") != VERSION:
        raise UserError(f"{name} has another format than {VERSION}; a newer version of simclr may have written it.")
    record = validated(ExportRecord, values, name)
    require_class_names(record.classes, name)
    if record.sha256 not in ("", sha256(content).hexdigest()):
        raise UserError(f"{description_of(path)} describes another file than {path}; export it again.")
    return record


def _from_onnx(content: bytes, record: ExportRecord) -> Parts:
    encoder = OnnxEncoder(record.config, content, record.num_features).eval()
    encoder.network.session()  # a damaged graph is named now, not at the first image
    classifier = OnnxNetwork(content, LOGITS).eval() if record.classes else None
    return Parts(encoder, record.preprocessing.preset, classifier, record.classes, record.progress)


def _from_state(path: Path, record: ExportRecord) -> Parts:
    if path.suffix == ".safetensors":
        with open_safetensors(path) as stored:
            state = {name: stored.get_tensor(name) for name in stored.tensors}
    else:
        file = TorchFile(path)
        state = dict(file.read(file.shapes))
    if record.library is None:
        raise UserError(f"The description of {path} does not name the library that its weights are for.")
    classes, layer = record.classes, record.classifier
    names = {name: f"{layer}.{name}" for name in ("weight", "bias")} if classes else {}
    missing = [name for name in names.values() if name not in state]
    if missing:
        raise UserError(f"{path} names {len(classes)} classes and lacks the weights {shown(', '.join(missing))}.")
    linear = {name: state.pop(place) for name, place in names.items()}
    encoder = import_state(state, record.config, TORCHVISION if record.library == "torchvision" else TIMM)
    classifier = None
    if classes:
        with torch.device("meta"):
            classifier = Classifier(encoder, None, len(classes))
        stored = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in linear.items()}
        require_same(classifier.linear.state_dict(), stored, f"The classifier of {path}")
        classifier.linear.load_state_dict(linear, assign=True)
        classifier.eval()
    return Parts(encoder, record.preprocessing.preset, classifier, classes, record.progress)
