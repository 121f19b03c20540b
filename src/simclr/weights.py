"""A trained encoder as a folder, and back: `simclr.load(PATH).embed(images)`.

The folder holds `model.safetensors` and a `config.json` that states what the encoder expects: size, channels,
range, preprocessing, and where the features are taken. So a saved encoder cannot be fed wrongly without an error.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from simclr.augment.policy import Semantics
from simclr.augment.views import eval_images
from simclr.checkpoint import write_atomically
from simclr.data.decode import decode_image
from simclr.data.images import Images
from simclr.errors import UserError
from simclr.features import extract, inference
from simclr.models.config import EncoderConfig
from simclr.models.encoder import Encoder, build_encoder

FORMAT = "simclr-encoder-1"

ImagesLike = Images | np.ndarray | Tensor | Image.Image | str | Path | Sequence[Any]


def save_encoder(encoder: Encoder, folder: Path, *, preprocessing: Semantics, origin: dict[str, Any]) -> None:
    """Write the encoder's folder; each file appears whole or not at all.

    Args:
        preprocessing: Whose evaluation preprocessing belongs to it: "google" or "torchvision".
        origin: Free facts about where the weights come from, kept in config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "format": FORMAT,
        "encoder": encoder.config.to_dict(),
        "input": {"range": [0.0, 1.0], "layout": "NCHW", "preprocessing": preprocessing},
        "num_features": encoder.num_features,
        "origin": origin,
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    write_atomically(folder / "config.json", (json.dumps(described, indent=2) + "\n").encode())
    write_atomically(folder / "model.safetensors", save_tensors(weights))


def load(path: str | Path, *, device: str = "cpu") -> "Embedder":
    """Load an encoder from a run's folder or an encoder's folder.

    Example:
        >>> import simclr
        >>> encoder = simclr.load("runs/digits")          # doctest: +SKIP
        >>> features = encoder.embed(["a.png", "b.png"])  # doctest: +SKIP

    Raises:
        UserError: There is no encoder at `path`, or its files do not fit together.
    """
    path = Path(path)
    folder = path / "encoder" if (path / "encoder" / "config.json").is_file() else path
    try:
        described = json.loads((folder / "config.json").read_bytes())
        if described.get("format") != FORMAT:
            raise FileNotFoundError  # the config.json of a run that has saved no checkpoint yet, for instance
        config = EncoderConfig.from_dict(described["encoder"])
        encoder = build_encoder(config)
        encoder.load_state_dict(load_tensors((folder / "model.safetensors").read_bytes()))
        preprocessing = described["input"]["preprocessing"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} holds no encoder (config.json and model.safetensors); give the folder of a run that has "
            "saved a checkpoint, or of an exported encoder."
        ) from None
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        what = " ".join(line.strip() for line in str(error).splitlines()[:2])  # torch lists every tensor
        raise UserError(f"The encoder in {folder} cannot be loaded, its files do not fit together: {what}") from None
    return Embedder(encoder.to(device).eval(), preprocessing)


class Embedder:
    """A loaded encoder with its preprocessing.

    Attributes:
        encoder: The module; (n, C, S, S) in [0, 1] -> (n, F).
        preprocessing: "google" or "torchvision".
    """

    def __init__(self, encoder: Encoder, preprocessing: Semantics) -> None:
        self.encoder = encoder
        self.preprocessing = preprocessing

    def to(self, device: str) -> "Embedder":
        """Move the encoder."""
        self.encoder.to(device)
        return self

    def embed(self, images: ImagesLike, *, batch_size: int = 256) -> np.ndarray:
        """Features of images of any size.

        Args:
            images: Paths, PIL images or arrays (one or a sequence); an array (n, H, W), (n, H, W, C) or (H, W, C),
                uint8, or floats in [0, 1]; a tensor (n, C, H, W), uint8 or floats in [0, 1]; or opened `Images`.
            batch_size: Images at a time.

        Returns:
            (n, F) float32; n is 1 for a single image.

        Raises:
            UserError: An image is unreadable, has other channels than the encoder, or floats outside [0, 1].
        """
        if isinstance(images, Images):
            return extract(self.encoder, images, semantics=self.preprocessing, batch_size=batch_size)
        config = self.encoder.config
        arrays = [self._fit_channels(array) for array in _arrays(images)]
        device = next(self.encoder.parameters()).device
        features = np.empty((len(arrays), self.encoder.num_features), dtype=np.float32)
        with inference(self.encoder):
            for begin in range(0, len(arrays), batch_size):
                chunk = arrays[begin : begin + batch_size]
                pixels = eval_images(chunk, config.size, self.preprocessing, device=device)  # (B, C, S, S)
                features[begin : begin + len(chunk)] = self.encoder(pixels).float().cpu().numpy()
        return features

    def _fit_channels(self, image: np.ndarray) -> np.ndarray:
        wanted, given = self.encoder.config.channels, image.shape[2]
        if given == wanted:
            return image
        if given not in (1, 3):
            raise UserError(f"An image has shape {image.shape}; give height, width and 1 or 3 channels, in that order.")
        if given == 1:
            return image.repeat(wanted, axis=2)  # gray shown in colour loses nothing
        raise UserError(
            f"The encoder was trained on {wanted}-channel images and was given one with {given} channels; "
            "convert it first (gray: PIL's convert('L'))."
        )


def _arrays(images: Any) -> list[np.ndarray]:
    """Any accepted form as a list of (H, W, C) uint8 arrays."""
    if isinstance(images, str | Path | Image.Image):
        return [_one(images)]
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise UserError(f"A tensor of images has shape {tuple(images.shape)}; give (n, channels, height, width).")
        images = _numpy(images).transpose(0, 2, 3, 1)  # (n, H, W, C)
    if isinstance(images, np.ndarray):
        if images.ndim == 3:
            images = images[None] if images.shape[2] in (1, 3) else images[..., None]
        if images.ndim != 4:
            raise UserError(f"An array of images has shape {images.shape}; give (n, H, W) or (n, H, W, C).")
        return list(_bytes(images))
    return [_one(image) for image in images]


def _one(image: Any) -> np.ndarray:
    if isinstance(image, str | Path):
        return decode_image(Path(image))
    if isinstance(image, Image.Image):
        return decode_image(image)
    if isinstance(image, Tensor):
        image = _numpy(image).transpose(1, 2, 0) if image.ndim == 3 else _numpy(image)
    image = np.asarray(image)
    if image.ndim not in (2, 3):
        raise UserError(f"An image has shape {image.shape}; give (H, W) or (H, W, C).")
    return _bytes(image if image.ndim == 3 else image[..., None])


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _bytes(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating) and pixels.dtype != np.bool_:
        raise UserError(f"Pixels have type {pixels.dtype}; give uint8, or floats in [0, 1].")
    if pixels.size == 0:
        raise UserError(f"There are no pixels in an array of shape {pixels.shape}; give at least one image.")
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(
            f"Pixels lie in [{pixels.min():.3g}, {pixels.max():.3g}]; give uint8, or floats in [0, 1] that are not "
            "normalised (the encoder does that itself)."
        )
    return np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
