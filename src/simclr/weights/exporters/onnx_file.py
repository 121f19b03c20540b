"""An encoder as an ONNX file, run by onnxruntime at two batch sizes before it is written.

Input `images`: (B, C, S, S) floats in [0, 1], B free; normalisation is inside. Output `features`: (B, F), and `logits`,
(B, K), if the network classifies.
"""

import json
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from simclr.errors import UserError, first_line
from simclr.models.classifier import Classifier
from simclr.models.encoder import Encoder
from simclr.models.external.onnx_bridge import EXTRA, FEATURES, IMAGES, LOGITS, OnnxNetwork
from simclr.models.inference import inference
from simclr.weights.exporters.libraries import TOLERANCE, relative, trial_images
from simclr.weights.single_file import KEY

MOST_BYTES = 2**31 - 2**24  # what one protobuf message may hold, less the graph
BATCHES = (1, 5)  # that it is checked at


def to_onnx(encoder: Encoder, classifier: Classifier | None, described: dict[str, Any]) -> bytes:
    """The file's content.

    Args:
        described: What goes into its metadata, as JSON under `simclr` and key by key.

    Raises:
        UserError: A package is missing, the network is too large for one file or cannot be expressed, or onnxruntime
            computes something else than we do.
    """
    network = _Network(encoder, classifier)
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > MOST_BYTES:
        raise UserError(f"The network has {size / 1e9:.1f} GB of weights and an ONNX file holds 2; take safetensors.")
    program = _export(network)
    properties = program.model.metadata_props
    properties[KEY] = json.dumps(described)
    for key in ("preprocessing", "classes"):
        properties[key] = json.dumps(described[key], ensure_ascii=False)
    content = program.model_proto.SerializeToString()
    check(network, content)
    return content


def check(network: "_Network", content: bytes) -> None:
    """Hold the file to the network, at two batch sizes.

    Raises:
        UserError: Features or logits differ by more than 1e-5 (relative L2).
    """
    for count in BATCHES:
        x = trial_images(network.encoder.config, count)
        with inference(network):
            expected = network(x)
            for output, wanted in zip((FEATURES, LOGITS), expected, strict=False):
                difference = relative(OnnxNetwork(content, output).eval()(x), wanted)
                if not difference <= TOLERANCE:
                    raise UserError(
                        f"onnxruntime gives other {output} than this encoder for {count} images (relative difference "
                        f"{difference:.1e}); nothing was written. Take another version of torch or onnxruntime."
                    )


class _Network(nn.Module):
    """(B, C, S, S) -> features (B, F) and, with a classifier, logits (B, K)."""

    def __init__(self, encoder: Encoder, classifier: Classifier | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = None if classifier is None else classifier.head
        self.head_layer = 0 if classifier is None else classifier.head_layer
        self.linear = None if classifier is None else classifier.linear

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        h = self.encoder(images)
        if self.linear is None:
            return (h,)
        return h, self.linear(h if self.head is None else self.head.first_layers(h, self.head_layer))


def _export(network: _Network) -> Any:
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise UserError(f"--format onnx needs the packages {', '.join(missing)}; {EXTRA}.")
    names = [FEATURES] if network.linear is None else [FEATURES, LOGITS]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter about itself, other ones in each version
            return torch.onnx.export(
                network.eval(), (trial_images(network.encoder.config, 2),), dynamo=True, verbose=False,
                input_names=[IMAGES], output_names=names, dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    except Exception as error:  # the exporter meets every operation of any model of timm
        raise UserError(
            f"{network.encoder.config.name} cannot be expressed in ONNX by torch {torch.__version__}: "
            f"{first_line(error)}."
        ) from error
