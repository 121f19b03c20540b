"""An ONNX file in the place of a network: onnxruntime computes, on the CPU, and inference is all that it can do.

The file is the one that `simclr export --format onnx` writes: normalisation is inside, and its description is in the
metadata. Shapes: B images, C channels, S x S pixels, F features, K classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr.config.encoder import EncoderConfig
from simclr.errors import UserError, first_line, shown
from simclr.models.encoder import Encoder
from simclr.models.external.onnx_check import check_onnx
from simclr.models.external.protobuf import Malformed

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
        try:
            (output,) = session.run([self.output], {IMAGES: images})
        except Exception as error:  # onnxruntime has a class for each mishap, and no common one
            raise UserError(f"onnxruntime cannot compute the ONNX file: {_reason(error)}.") from None
        if output.dtype != np.float32 or output.ndim != 2 or len(output) != len(images):
            raise UserError(
                f"The ONNX file's {self.output} have shape {output.shape} and the type {output.dtype}; for "
                f"{len(images)} images there should be as many rows of float32."
            )
        return torch.from_numpy(output).to(x.device)

    def session(self) -> Any:
        """onnxruntime's, made on first use.

        Raises:
            UserError: There is no onnxruntime, or it cannot read the file, or that has another input or output.
        """
        if self._session is None:
            session = _open(self.file.cpu().numpy().tobytes())
            if [value.name for value in session.get_inputs()] != [IMAGES]:
                raise UserError(f"The ONNX file does not take one input, {IMAGES}; export it again.")
            if self.output not in [value.name for value in session.get_outputs()]:
                raise UserError(f"The ONNX file does not give {self.output}; export it again.")
            self._session = session
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        """A session cannot be copied; a copy makes its own."""
        return self.__dict__ | {"_session": None}


class OnnxEncoder(Encoder):
    """An `Encoder` whose backbone, normalisation included, is an ONNX file."""

    def __init__(self, config: EncoderConfig, content: bytes, num_features: int) -> None:
        super().__init__(config, OnnxNetwork(content), num_features)

    @property
    def network(self) -> OnnxNetwork:
        """The backbone."""
        assert isinstance(self.backbone, OnnxNetwork)
        return self.backbone

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) floats in [0, 1] -> (B, F)."""
        self._check(x)
        return self.backbone(x)


def metadata_of(content: bytes) -> dict[str, str]:
    """What the file says of itself.

    Raises:
        UserError: The file is no ONNX file, or more than a graph with its weights.
    """
    try:
        return check_onnx(content)
    except Malformed as error:
        raise UserError(f"The ONNX file was not run: {error}; `simclr export` writes no such files.") from None


def _open(content: bytes) -> Any:
    """Onnxruntime's session for a file that was checked.

    Raises:
        UserError: The file is more than a graph with its weights, or onnxruntime is missing or cannot read it.
    """
    metadata_of(content)
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"ONNX files need the package onnxruntime; {EXTRA}.") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # fatal errors alone; others are raised too
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"onnxruntime cannot read the ONNX file: {_reason(error)}.") from None


def _reason(error: Exception) -> str:
    return shown(first_line(error), 300)
