"""The scikit-learn face: `simclr.SimCLR().fit(X).transform(X)`, images in, features h out.

`fit` is `simclr pretrain`: the same recipes, bent to the images in the same way, the same loop, the same weights bit
for bit. The run's folder is a temporary one; what stays is the encoder. (The module that the loop trains is
`simclr.methods.simclr.SimCLR`; this one is for pipelines and cross-validation.)

Shapes: n images, H x W pixels, C = 1 (gray) or 3 (RGB) channels, F features.
"""

import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields
from numbers import Number
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_random_state  # pyrefly: ignore
from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore
from torch import Tensor

from simclr.config.overrides import Overrides
from simclr.config.pretrain import PretrainConfig, refuse_unused_head_settings, require_seed
from simclr.config.recipes import find_recipe, settings_for
from simclr.data.forms import ROUNDING, ImagesLike, open_images
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import Stopped, UserError
from simclr.tasks import pretrain_images as pretraining
from simclr.tasks.api import in_python_words
from simclr.tasks.initial import open_initial
from simclr.training.device import find_device
from simclr.training.progress import hushed, say
from simclr.training.run import RunFolder
from simclr.weights.folder import load

_SETTINGS = ("epochs", "batch_size", "size", "encoder", "width", "temperature")  # parameters that are settings too
_ELSEWHERE = {"seed": "random_state", "device": "device"}  # settings that parameters of their own decide


class SimCLR(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features of images, learned from the images without labels (Chen et al. 2020, arXiv:2002.05709).

    Args:
        recipe: One of `simclr recipes`, or the path of a config.json; None: chosen by the images, as the command does.
        epochs: Passes over the images; None, here and below: the recipe's.
        batch_size: Images per step; each gives two views, unless `settings` has "views_per_image" or "small_crops".
        size: Height and width of a view, in pixels.
        encoder: resnet18/34/50/101/152/200, resnet10, small (for CPUs), timm/NAME or torchvision/NAME.
        width: Multiplier on every channel count of a ResNet.
        temperature: Of the loss.
        settings: Any other setting of `simclr pretrain` by its name, such as {"lr": 1e-3, "method": "moco"} or
            {"init": "timm/resnet18"}, which goes on from these weights.
        image_shape: What a row of a 2-D X is: (H, W) or (H, W, C), of which one may be -1, as for NumPy's reshape.
            None: a square gray image, where a row's length is a square number (no square colour image's is).
        pixel_range: The numbers that mean black and white in arrays, such as (0, 16). None: floats in [0, 1], integers
            in 0..255.
        pretrained: Folder of a run or of an encoder: `fit` then trains nothing, and `transform` gives its features.
        random_state: The seed of weights, order and views: an integer gives the weights of `simclr pretrain --seed`,
            the same bit for bit on the same machine with as many threads. None: another seed each time.
        device: "cpu", "cuda", "cuda:1", ..., or "auto": a GPU where there is one.
        verbose: Show progress on standard error.

    Attributes:
        embedder_: The encoder with its preprocessing (`simclr.weights.folder.Model`).
        config_: All settings of the training; None with `pretrained`.
        history_: What training recorded, oldest first: step, loss and the signs of health. Empty with `pretrained`.
        n_features_in_: Numbers in an image, where X was an array.
        feature_names_in_: Names of X's columns, where it had any.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> import simclr
        >>> X, y = load_digits(return_X_y=True)
        >>> simclr.SimCLR(epochs=5, random_state=0).fit_transform(X / 16).shape  # doctest: +SKIP
        (1797, 128)
    """

    def __init__(
        self,
        recipe: str | None = None,
        *,
        epochs: int | None = None,
        batch_size: int | None = None,
        size: int | None = None,
        encoder: str | None = None,
        width: float | None = None,
        temperature: float | None = None,
        settings: Mapping[str, Any] | None = None,
        image_shape: Sequence[int] | None = None,
        pixel_range: tuple[float, float] | None = None,
        pretrained: str | PathLike[str] | None = None,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        verbose: bool = False,
    ) -> None:
        self.recipe = recipe
        self.epochs = epochs
        self.batch_size = batch_size
        self.size = size
        self.encoder = encoder
        self.width = width
        self.temperature = temperature
        self.settings = settings
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.pretrained = pretrained
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: ImagesLike, y: Any = None) -> Self:
        """Pretrain an encoder on the images of X, or load the one that `pretrained` names.

        Args:
            X: Rows of numbers (n, H*W*C), an array, DataFrame or nested list (see `image_shape`); an array (n, H, W) or
                (n, H, W, C); a tensor (n, C, H, W); a sequence of paths, PIL images or arrays of any sizes; or
                `Images` (`simclr.data.open_data`), whose pixels need not fit the memory. Numbers are rounded to bytes.
            y: Not used.

        Raises:
            UserError: A ValueError: what was given, what is allowed, what to try.
        """
        with in_python_words():
            given = self._given_settings()
            images = self._images(X, fitting=True)
            if self.pretrained is not None:
                self.embedder_, self.config_, self.history_ = load(self.pretrained), None, []
                return self
            return self._train(images, given)

    def transform(self, X: ImagesLike) -> np.ndarray:
        """Features h of each image of X, in its order.

        Args:
            X: In any form that `fit` takes. Images of other sizes than those of `fit` are resized by the encoder's
                preprocessing; rows of numbers need the same length.

        Returns:
            (n, F) float32.

        Raises:
            UserError: X is not what the encoder was made for.
        """
        check_is_fitted(self)
        with in_python_words():
            device = find_device(self.device)
            return self.embedder_.to(device).embed(self._images(X, fitting=False))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()  # pyrefly: ignore
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = []  # always float32
        tags.non_deterministic = self.random_state is None and self.pretrained is None
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: weights on the CPU, so that a machine without a GPU can read them."""
        state = super().__getstate__()
        if "embedder_" in state:
            state["embedder_"] = deepcopy(self.embedder_).to("cpu")
        return state

    @property
    def _n_features_out(self) -> int:
        return self.embedder_.encoder.num_features

    def _given_settings(self) -> dict[str, Any]:
        """What the user set, by the names of the settings."""
        given = {name: getattr(self, name) for name in _SETTINGS if getattr(self, name) is not None}
        more = dict(self.settings or {})
        known = {field.name for field in fields(PretrainConfig)}
        for name in more:
            if name in _ELSEWHERE:
                raise UserError(f"settings has {name!r}; give the parameter {_ELSEWHERE[name]} instead.")
            if name in given:
                raise UserError(f"{name} was given twice, as a parameter and in settings; give it once.")
            if name not in known:
                raise UserError(f"settings has {name!r}, which is none; there are {', '.join(sorted(known))}.")
        given |= more
        if self.pretrained is not None and (given or self.recipe is not None):
            unused = ", ".join([*given, *(["recipe"] if self.recipe is not None else [])])
            raise UserError(f"With pretrained, no encoder is trained, and {unused} has no effect; leave it out.")
        return given

    def _train(self, given_images: ImagesLike, given: Mapping[str, Any]) -> Self:
        seed = self.random_state
        if seed is None or not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31)
        require_seed(int(seed), name="random_state")
        world = DistributedContext(device=find_device(self.device))
        given = {**given, "seed": seed, "device": world.device.type}
        recipe = find_recipe(self.recipe) if self.recipe is not None else None

        overrides = Overrides(given)
        settings = overrides(recipe.config if recipe else PretrainConfig())
        refuse_unused_head_settings(given, settings)
        with nullcontext() if self.verbose else hushed():
            initial, overrides = open_initial(settings, overrides)
        pretraining.check_settings(overrides(settings), world)
        images = open_images(given_images, channels=overrides.values.get("channels", "auto"))
        gpus = [world.device] if world.device.type == "cuda" else []
        with (
            nullcontext() if self.verbose else hushed(),
            TemporaryDirectory(prefix="simclr-") as folder,
            torch.random.fork_rng(gpus),  # the loop seeds torch's generator, which is the user's
        ):
            config = settings_for(recipe, images, overrides, on_gpu=bool(gpus), say=say)
            run = RunFolder(Path(folder), how_to_resume="a new fit", lasting=False)
            manifest = pretraining.manifest_of(images, images.name, {}, config.method)
            try:
                outcome = pretraining.pretrain_images(images, config, run, world, manifest=manifest, initial=initial)
            except Stopped as stop:  # a saved run could go on; an interrupted fit cannot
                raise (KeyboardInterrupt if stop.signal == signal.SIGINT else SystemExit(128 + stop.signal)) from None
            for sentence in outcome.warnings:
                warnings.warn(sentence, ConvergenceWarning, stacklevel=3)
            self.embedder_, self.config_, self.history_ = load(folder), run.config, run.read_metrics()
        return self

    def _images(self, X: Any, *, fitting: bool) -> ImagesLike:
        """X with its numbers in the ranges that images have, and its rows as images."""
        if fitting:
            for name in ("n_features_in_", "feature_names_in_"):
                self.__dict__.pop(name, None)
        if _is_table(X):
            least = 2 if fitting and self.pretrained is None else 1
            rows = validate_data(self, X, reset=fitting, ensure_min_samples=least)
            return self._in_range(rows).reshape(len(rows), *self._shape_of_row(rows.shape[1]))
        if isinstance(X, np.ndarray) and X.ndim in (3, 4):
            if fitting:
                self.n_features_in_ = int(np.prod(X.shape[1:]))
            return self._in_range(X if X.ndim == 4 else X[..., None])
        if self.pixel_range is not None:
            raise UserError(
                f"pixel_range goes with rows or one array of numbers, and X is a {type(X).__name__}; leave it out."
            )
        return X

    def _in_range(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers as pixels have them: integers in 0..255, or floats in [0, 1]."""
        if numbers.size == 0 or (self.pixel_range is None and numbers.dtype.kind != "f"):
            return numbers
        low, high = float(numbers.min()), float(numbers.max())
        if self.pixel_range is None:
            if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # false for NaN too
                raise UserError(
                    f"Pixels lie in [{low:.6g}, {high:.6g}]; give floats in [0, 1] (divide by the number that means "
                    "white), integers in 0..255, or say by pixel_range what black and white are."
                )
            return numbers
        try:
            black, white = map(float, self.pixel_range)
        except (TypeError, ValueError):
            black = white = 0.0
        if not black < white:
            raise UserError(f"pixel_range was {self.pixel_range!r}; it must be two numbers, (black, white).")
        if not (black <= low and high <= white):
            raise UserError(f"Pixels lie in [{low:.6g}, {high:.6g}], beyond pixel_range=({black:g}, {white:g}).")
        return (numbers.astype(np.float32) - black) / (white - black)

    def _shape_of_row(self, length: int) -> tuple[int, ...]:
        """(H, W, C) of a row of so many numbers."""
        if self.image_shape is None:
            side = round(length**0.5)
            if side * side != length:
                raise UserError(
                    f"A row of X has {length} numbers, which make no square gray image; say image_shape=(H, W) or "
                    "(H, W, C)."
                )
            return side, side, 1
        try:
            shape = np.empty(length, np.bool_).reshape(tuple(self.image_shape)).shape
        except (TypeError, ValueError):
            shape = ()
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
            raise UserError(
                f"image_shape was {self.image_shape!r}, and a row of X has {length} numbers; give (H, W) or (H, W, C) "
                "whose product that is, with 1 or 3 channels C."
            )
        return (*shape, 1) if len(shape) == 2 else shape


def _is_table(X: Any) -> bool:
    """Whether X is for scikit-learn to check: rows of numbers, or nothing that could be images."""
    if isinstance(X, Images | Image.Image | Tensor | str | PathLike | Iterator):
        return False
    if isinstance(X, list | tuple):
        return len(X) > 0 and _is_row(X[0])
    if getattr(X, "ndim", 2) == 1 and hasattr(X, "tolist"):  # a column, of NumPy or pandas
        return not len(X) or _is_row(X.tolist()[0])
    return not (isinstance(X, np.ndarray) and X.ndim in (3, 4))


def _is_row(item: Any) -> bool:
    return isinstance(item, Number | list | tuple) or getattr(item, "ndim", 0) == 1
