"""An ONNX file in the place of a network: onnxruntime computes, on the CPU, and inference is all that it can do.

The file is the one that `simclr export --format onnx` writes: normalisation is inside, and its description is in the
metadata. Shapes: B images, C channels, S x S pixels, F features, K classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr.errors import UserError
from simclr.models.config import EncoderConfig
from simclr.models.encoder import Encoder
from simclr.models.timm_bridge import first_line

IMAGES, FEATURES, LOGITS = "images", "features", "logits"
EXTRA = "install it with pip install 'simclr-torch[onnx]'"


class OnnxNetwork(nn.Module):
    """(B, C, S, S) floats in [0, 1] -> one of the file's outputs, on the device of the input.

    The file's bytes are its only buffer, so what tells two encoders apart by their state tells these apart too.

    Args:
        content: The file's.
        output: "features", (B, F), or "logits", (B, K).
    """

    file: Tensor

    def __init__(self, content: bytes, output: str = FEATURES) -> None:
        super().__init__()
        self.output = output
        self.register_buffer("file", torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self._session: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """As the class says.

        Raises:
            UserError: In training mode, or the images' size is not the file's.
        """
        if self.training:
            raise UserError(
                "An ONNX file gives features and cannot be trained; fine-tune the run or the encoder's folder that it "
                "was exported from."
            )
        session = self.session()
        wanted = session.get_inputs()[0].shape[1:]
        if list(x.shape[1:]) != wanted:
            raise UserError(f"This ONNX file takes images of shape {wanted} and was given {list(x.shape[1:])}.")
        images = np.ascontiguousarray(x.detach().cpu().float().numpy())
        return torch.from_numpy(session.run([self.output], {IMAGES: images})[0]).to(x.device)

    def session(self) -> Any:
        """onnxruntime's, made on first use.

        Raises:
            UserError: There is no onnxruntime, or it cannot read the file.
        """
        if self._session is None:
            self._session = _open(self.file.cpu().numpy().tobytes())
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        """A session cannot be copied; a copy makes its own."""
        return self.__dict__ | {"_session": None}


class OnnxEncoder(Encoder):
    """An `Encoder` whose backbone, normalisation included, is an ONNX file."""

    def __init__(self, config: EncoderConfig, content: bytes, num_features: int) -> None:
        super().__init__(config, OnnxNetwork(content), num_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) floats in [0, 1] -> (B, F)."""
        self._check(x)
        return self.backbone(x)


def metadata_of(content: bytes) -> dict[str, str]:
    """What the file says of itself.

    Raises:
        UserError: As `OnnxNetwork.session`.
    """
    return _open(content).get_modelmeta().custom_metadata_map


def _open(content: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"ONNX files need the package onnxruntime; {EXTRA}.") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each mishap, and no common one
        raise UserError(f"onnxruntime cannot read the ONNX file: {first_line(error)}.") from None
