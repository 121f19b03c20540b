"""An encoder as one file that other libraries read: torchvision's or timm's state dict, or ONNX.

The description is JSON: what the encoder expects of its input, how others load the file, and the names of the classes
if it classifies. It lies in the file's metadata under `simclr` where there is metadata, and beside it as FILE.json
always; a .pth has only that one, which knows the file's SHA-256.

A state dict read back is our network again, not torchvision's: the max-pool is the one that the weights were trained
with.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from simclr.augment.policy import Semantics
from simclr.errors import UserError
from simclr.files import write_atomically
from simclr.models.classifier import Classifier
from simclr.models.config import EncoderConfig
from simclr.models.encoder import Encoder
from simclr.models.onnx_bridge import LOGITS, OnnxEncoder, OnnxNetwork, metadata_of
from simclr.models.torchvision_names import from_timm, from_torchvision
from simclr.training_progress import TrainingProgress

KEY = "simclr"
VERSION = "simclr-export-1"
SUFFIXES = {"torchvision": (".safetensors", ".pth"), "timm": (".safetensors", ".pth"), "onnx": (".onnx",)}
"""Endings of each format's files, the usual one first."""

Described = dict[str, Any]


class Parts(NamedTuple):
    """What such a file holds."""

    encoder: Encoder
    preprocessing: Semantics
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
        content = path.read_bytes()
        described = _description(path, content)
        if described["format"] != VERSION:
            raise KeyError(f"format {described['format']!r}")
        return _from_onnx(content, described) if path.suffix == ".onnx" else _from_state(path, content, described)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (
        KeyError, TypeError, ValueError, AttributeError, RuntimeError, EOFError, UnpicklingError, SafetensorError
    ) as error:  # fmt: skip
        if isinstance(error, UserError):
            raise
        what = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch lists every tensor
        raise UserError(f"{path} cannot be loaded, it is damaged or of another network: {what}") from None


def _description(path: Path, content: bytes) -> Described:
    foreign = UserError(
        f"{path} was not written by `simclr export` (it has no description of its input); give the folder of a run or "
        "of an encoder, or turn it into one with `simclr import`."
    )
    if path.suffix == ".onnx":
        text = metadata_of(content).get(KEY)
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as stored:
            text = (stored.metadata() or {}).get(KEY)
    else:
        text = description_of(path).read_text() if description_of(path).is_file() else None
    if text is None:
        raise foreign
    described = json.loads(text)
    if described.get("sha256", "") not in ("", sha256(content).hexdigest()):
        raise UserError(f"{description_of(path)} describes another file than {path}; export it again.")
    return described


def _from_onnx(content: bytes, described: Described) -> Parts:
    config = EncoderConfig.from_dict(described["encoder"])
    encoder = OnnxEncoder(config, content, described["num_features"]).eval()
    classes = described["classes"]
    classifier = OnnxNetwork(content, LOGITS).eval() if classes else None
    return Parts(
        encoder, described["preprocessing"]["semantics"], classifier, classes, TrainingProgress.from_dict(described)
    )


def _from_state(path: Path, content: bytes, described: Described) -> Parts:
    if path.suffix == ".safetensors":
        state = load_tensors(content)
    else:
        state = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    layer, classes = described["classifier"], described["classes"]
    linear = {name: state.pop(f"{layer}.{name}") for name in ("weight", "bias")} if classes else {}
    read = {"torchvision": from_torchvision, "timm": from_timm}[described["library"]]
    encoder = read(state, EncoderConfig.from_dict(described["encoder"]))
    classifier = None
    if classes:
        classifier = Classifier(encoder, None, len(classes))
        classifier.linear.load_state_dict(linear)
        classifier.eval()
    return Parts(
        encoder, described["preprocessing"]["semantics"], classifier, classes, TrainingProgress.from_dict(described)
    )
