"""The settings of a pretraining run: frozen, typed, each with its meaning and its source.

A run saves the settings that it resolved as `RUN/config.json`; that file is itself a recipe
(`simclr pretrain DATA --recipe RUN/config.json`). Nothing here imports torch.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal

from simclr.config.deprecated import FIELDS, rename_settings
from simclr.config.encoder import Feature, Scaling
from simclr.config.training import FREE_ON_RESUME, TrainingConfig
from simclr.errors import UserError
from simclr.files import write_atomically

MAX_SEED = 2**64 - 1
"""Philox, which draws order and views, has keys of 64 bits."""

MIN_SIZE = 4
"""Height and width of the smallest views, in pixels."""

MAX_VIEWS = 999
"""Views of an image, and small crops of one, that a step may have."""

OPERATIONS = ("equalise", "solarise", "sobel", "motion_blur", "rotation", "cutout", "noise")
"""Settings, and fields of a view's policy: probabilities of the operations beyond those of the authors' code, in the
order in which they are applied."""

LossName = Literal["nt-xent", "dcl", "nt-logistic", "margin", "generalised", "supcon"]
Prior = Literal["logsumexp", "normal", "uniform"]

QUEUE_LOSSES: tuple[LossName, ...] = ("nt-xent", "dcl")
"""Losses that take keys of earlier batches."""

MULTI_VIEW_LOSSES: tuple[LossName, ...] = (*QUEUE_LOSSES, "supcon")
"""Losses that take more than two views of an image."""

_SMALL_CROPS = re.compile(r"[1-9][0-9]{0,2}:([4-9]|[1-9][0-9]{1,3})")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """How an encoder is pretrained. The defaults are the SimCLR v1 paper's where a small machine can follow."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # an unknown key in a saved file is an error

    # ---- method
    method: str = "simclr"
    """simclr, moco, supervised (cross-entropy on labels), or MODULE:CLASS of a method of your own (docs/methods.md)."""

    queue: int = 0
    """Projections of earlier batches, made by a momentum encoder, that are further negatives: MoCo's queue, or the
    memory of SimCLR v2; 0: none."""

    ema: float = 0.999
    """With a queue: share of its own weights that the momentum encoder keeps at each step."""

    symmetric: bool = False
    """MoCo: each view is query and key in turn; else the first is the query and the second the key."""

    bn_splits: int = 8
    """MoCo: parts of the batch, over all processes, that batch norm normalises apart, as MoCo's 8 GPUs do."""

    # ---- images
    size: int = 32
    """Height and width of a view, in pixels."""

    channels: Literal["auto", "1", "3"] = "auto"
    """Channels of the encoder's input; auto: 1 where every image is gray, else 3."""

    # ---- views (paper section 3 and appendix A)
    views_per_image: int = 2
    """Views of each image in a step; with more than two, each pair of an image's views is a positive pair (SimCLR)."""

    small_crops: str | None = None
    """Further, smaller views of each image, as N:SIZE in pixels, such as 4:16 (multi-crop of SwAV, arXiv:2006.09882);
    SimCLR only, unset: none."""

    small_crop_min: float = 0.05
    """Smallest share of the image's area that a small crop may take (SwAV)."""

    small_crop_max: float = 0.14
    """Largest share of the image's area that a small crop may take (SwAV, whose other crops take no less)."""

    augmentation: Literal["google", "torchvision"] = "google"
    """Implementation of the augmentation: that of the authors (TensorFlow) or of torchvision."""

    strength: float = 1.0
    """Strength s of the colour distortion: 1.0 for ImageNet, 0.5 for CIFAR (appendix A, B.9)."""

    jitter: float = 0.8
    """Probability of the colour distortion."""

    hue: float | None = None
    """Largest hue shift, in turns of the colour circle; unset: 0.2 x strength."""

    grayscale: float = 0.2
    """Probability of dropping colour."""

    blur: float | None = None
    """Probability of the Gaussian blur; unset: 0.5 above 32 pixels, none at 32 and below (B.9)."""

    brightness: Literal["multiply", "add"] = "multiply"
    """Brightness as in SimCLR v2 (multiply) or v1 (add); the authors' code, data_util.py."""

    cutout: float = 0.0
    """Probability of a black square of half the view's side; this and the next six are those of section 3.2 and
    appendix B.2, with parameters of our own (docs/views.md)."""

    rotation: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees."""

    sobel: float = 0.0
    """Probability of a Sobel filter."""

    noise: float = 0.0
    """Probability of Gaussian noise, of standard deviation 0.1."""

    equalise: float = 0.0
    """Probability of flattening the histogram of each channel."""

    solarise: float = 0.0
    """Probability of inverting values from 0.5 on."""

    motion_blur: float = 0.0
    """Probability of a motion blur."""

    augment: str | None = None
    """The only operations of the views, with commas between: crop, flip, colour, blur, cutout, rotation, sobel, noise,
    equalise, solarise, motion-blur. One whose probability is 0 gets 1; unset: those of the settings above."""

    branch_b: str = "same"
    """The second view: same, drawn as the first; identity, the whole image; or its operations, named as above."""

    shared_crop: bool = False
    """Cut one random crop first that both views share, as figure 5 of the paper does; theirs are cut from it."""

    # ---- encoder and projection head
    init: str | None = None
    """Weights to begin from: a run, an encoder's folder, timm/NAME or torchvision/NAME (with their pretrained weights);
    unset: random ones. The architecture is that of these weights, and so are size (224 for timm and torchvision),
    --feature and --head-reads unless flags give them. A projection head beside them is kept if it has the shape that
    the settings ask for; otherwise a new one begins."""

    encoder: str = "resnet18"
    """resnet18/34/50/101/152/200, resnet10, small (for CPUs), timm/NAME or torchvision/NAME."""

    width: float = 1.0
    """Multiplier on every channel count of a ResNet."""

    stem: Literal["auto", "cifar", "strided", "imagenet"] = "auto"
    """First layers of a ResNet: 3x3 (cifar), 3x3/2 (strided: a quarter of the work), or 7x7/2 with max-pool (imagenet);
    auto: cifar up to 32 pixels, else imagenet."""

    sk: bool = False
    """Selective kernels, and ResNet-D's stem and shortcuts, as in SimCLR v2; ResNets only."""

    feature: Feature = "h"
    """What the encoder returns: h, the average over the image as in the paper, or feature maps of stage4, stages3-4 or
    stages1-4 on grids of at most 4 x 4, which keep positions; our ResNets only."""

    head_reads: Feature | None = None
    """What the projection head reads in training, one of the same; unset: what the encoder returns."""

    scaling: Scaling = "none"
    """Scaling of the features that the encoder returns: none, standardised by the training images, or whitened, which
    also shrinks the largest principal components. Training is the same."""

    head: Literal["none", "linear", "nonlinear"] = "nonlinear"
    """Projection head between the encoder and the loss (section 4.2)."""

    head_layers: int = 2
    """Layers of the nonlinear head: 2 in SimCLR v1, 3 in v2."""

    head_dim: int = 128
    """Width of the projection z."""

    head_norm: bool = True
    """Batch norm in the projection head; MoCo has none."""

    # ---- loss
    loss: LossName = "nt-xent"
    """Loss: NT-Xent of the paper; DCL, which leaves the positive out of the denominator (arXiv:2110.06848); NT-Logistic
    and margin triplet, those of the paper's table 4; the generalised contrastive loss (arXiv:2011.02803); or SupCon,
    whose positives are all views of an image's class, for images with labels (arXiv:2004.11362)."""

    temperature: float = 0.1
    """Temperature of the loss: 0.1 for ImageNet, 0.5 for CIFAR (table 5, B.9); none in the margin triplet loss."""

    normalize: bool = True
    """Whether the loss compares projections of unit length (cosines), as do contrastive accuracy and entropy; table 5
    has it without. The recorded alignment and uniformity are those of unit length either way."""

    negatives: Literal["all", "semi-hard"] = "all"
    """With --loss nt-logistic or margin: all other images, or the closest of those farther than the positive."""

    margin: float = 0.8
    """With --loss margin: how much more similar the positive has to be; table 4 tries 0, 0.4, 0.8 and 1.6."""

    prior: Prior = "logsumexp"
    """With --loss generalised: what pushes views apart, log-sum-exp, or the sliced Wasserstein distance to a normal
    distribution (which is the uniform hypersphere while projections are normalised) or, with --no-normalize, to the
    uniform hypercube."""

    prior_weight: float = 1.0
    """With --loss generalised: lambda, the weight of that part (arXiv:2011.02803: 0.1 for logsumexp at temperature 1,
    5 for sliced Wasserstein, second-hand)."""

    loss_scale: float = 2.0
    """Factor on the loss: the authors' code optimises twice the paper's mean over 2N."""

    probe: bool = False
    """Train a linear classifier of the images' labels beside, on the features of the views and without a gradient to
    the encoder (B.6); its accuracy on the views is recorded. SimCLR only, and every image needs a label."""

    # ---- optimiser and schedule
    optimizer: Literal["lars", "sgd", "adamw", "muon"] = "lars"
    lr: float = 0.3
    warmup_epochs: float = 10.0
    weight_decay: float = 1e-6

    decay_all: bool = False
    """Weight decay on batch-norm parameters and biases too, as in MoCo; SimCLR exempts them."""

    # ---- amount
    epochs: int = 100
    batch_size: int = 512
    """Images per step over all processes; each gives two views, or as many as are asked for."""

    seed: int = 0
    """Seed of the initial weights, the order of the images and every view."""

    global_bn: bool = True
    """Batch-norm statistics over all processes, as in the authors' code; no effect with one process."""

    # ---- machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: a GPU if there is one."""

    memory: Literal["auto", "plain", "checkpointing", "grad-cache"] = "auto"
    """Memory strategy: plain, activation checkpointing (same result), or gradient caching over chunks of the batch
    (batch norm then has the statistics of a chunk); auto: the first that fits."""

    chunk: int = 0
    """With --memory grad-cache: images per chunk and process, a divisor of its batch; 0: as many as fit."""

    cuda_graph: bool = False
    """Replay updates from a CUDA graph where the method allows it: the same weights with fewer launches, for small
    networks on one GPU; needs the memory of an update twice."""

    # ---- record
    log_every: int = 20

    knn_every: float = 10.0
    """Epochs between two kNN checks, where the images have labels; 0: never."""

    def __post_init__(self) -> None:
        """Say in one sentence what is wrong with a value."""
        super().__post_init__()
        for name, minimum in (
            ("size", MIN_SIZE), ("head_layers", 1), ("head_dim", 1), ("epochs", 1), ("chunk", 0), ("queue", 0),
            ("bn_splits", 1),
        ):  # fmt: skip
            self._require_min(name, minimum)
        for name in ("temperature", "width", "loss_scale", "prior_weight"):
            self._require_positive(name)
        for name in ("strength", "knn_every"):
            self._require_min(name, 0)
        for name in ("jitter", "grayscale", *(["blur"] if self.blur is not None else []), *OPERATIONS):
            self._require_probability(name)
        require_seed(self.seed)
        self._require("chunk", self.chunk == 0 or self.memory == "grad-cache", "0, unless --memory is grad-cache")
        self._require("ema", 0 <= self.ema <= 1, "in [0, 1]")
        self._require("views_per_image", 2 <= self.views_per_image <= MAX_VIEWS, f"from 2 to {MAX_VIEWS}")
        self._require(
            "small_crops", self.small_crops is None or _SMALL_CROPS.fullmatch(self.small_crops) is not None,
            f"N:SIZE, for N (1 to {MAX_VIEWS}) further views of SIZE (at least {MIN_SIZE}) pixels, such as 4:16",
        )  # fmt: skip
        self._require("small_crop_max", 0 < self.small_crop_max <= 1, "an area share in (0, 1]")
        self._require(
            "small_crop_min", 0 < self.small_crop_min <= self.small_crop_max,
            f"an area share above 0 and at most --small-crop-max, {self.small_crop_max}",
        )  # fmt: skip
        self._require("hue", self.hue is None or 0 <= self.hue <= 0.5, "in [0, 0.5]")
        self._check_loss()

    def _check_loss(self) -> None:
        """Refuse settings that the chosen loss cannot take, or that are another loss's."""
        self._require("margin", 0 <= self.margin < inf, "0 or more")
        for name, losses in (
            ("negatives", ("nt-logistic", "margin")), ("margin", ("margin",)), ("prior", ("generalised",)),
            ("prior_weight", ("generalised",)),
        ):  # fmt: skip
            default = getattr(type(self), name)
            is_used = self.loss in losses
            self._require(
                name, is_used or getattr(self, name) == default, f"{default}, unless --loss is {' or '.join(losses)}"
            )
        if self.prior == "uniform" and self.normalize:
            raise UserError(
                "--prior uniform is a hypercube, which projections of unit length cannot fill; give --no-normalize "
                "too, or --prior normal for the uniform hypersphere."
            )
        if self.queue and not self.normalize:
            raise UserError(
                f"--no-normalize was given, but the keys of a queue (--queue is {self.queue}) have unit length; leave "
                "it out, or give --queue 0."
            )
        if self.queue and self.loss not in QUEUE_LOSSES:
            raise UserError(
                f"--loss was {self.loss}, which takes no queue of keys (--queue is {self.queue}); "
                f"give --loss {' or '.join(QUEUE_LOSSES)}, or --queue 0."
            )
        if len(self.view_sizes) > 2 and self.loss not in MULTI_VIEW_LOSSES:
            name = "--small-crops" if self.small_crops else "--views-per-image"
            raise UserError(
                f"{name} was given, and --loss {self.loss} takes two views of each image; leave it out, or give --loss "
                f"{', '.join(MULTI_VIEW_LOSSES[:-1])} or {MULTI_VIEW_LOSSES[-1]}."
            )

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """Height and width, in pixels, of each view of an image: first the full ones, then the small crops."""
        count, size = map(int, self.small_crops.split(":")) if self.small_crops is not None else (0, 0)
        return (self.size,) * self.views_per_image + (size,) * count

    def save(self, path: Path) -> None:
        """Write the settings as JSON: a recipe."""
        from simclr.config.records import versioned

        write_atomically(path, versioned(asdict(self)))


def refuse_unused_head_settings(given: Mapping[str, Any], config: PretrainConfig) -> None:
    """Refuse settings of a projection head that the chosen head does not have.

    Those of a recipe have no effect then, and are allowed.

    Args:
        given: Settings that a user gives on top of a recipe, by name.
        config: The settings with these.
    """
    given = rename_settings(given)
    if config.head == "none" and "head_dim" in given:
        raise UserError(
            f"--head-dim was {config.head_dim}, and --head is none, which leaves projections as wide as the features; "
            "leave --head-dim out, or give --head linear or nonlinear."
        )
    layers = {"none": None, "linear": 1, "nonlinear": config.head_layers}[config.head]
    if "head_layers" in given and config.head_layers != layers:
        raise UserError(
            f"--head-layers was {config.head_layers}, and --head is {config.head}, which has "
            f"{'no layer' if layers is None else 'one layer'}; leave --head-layers out, or give --head nonlinear."
        )


def require_seed(seed: int, *, count: int = 1, name: str = "--seed") -> None:
    """Refuse a seed that the random numbers (Philox) cannot take.

    Args:
        count: Seeds that are used: `seed` and those after it.
        name: What the user calls it.
    """
    if not 0 <= seed <= MAX_SEED - (count - 1):
        after = "" if count == 1 else f", less the {count - 1} that follow it"
        raise UserError(f"{name} was {seed}; it must be a whole number from 0 to {MAX_SEED} (2**64 - 1){after}.")


def load_config(path: Path) -> PretrainConfig:
    """Read the settings of a run (config.json); an unknown or mistyped one is an error that names it."""
    from pydantic import TypeAdapter, ValidationError

    from simclr.config.records import first_error, read_json

    values = read_json(path, remedy="restore it, or start a new run")
    values.pop("schema_version", None)
    values = rename_settings(values)
    try:
        return TypeAdapter(PretrainConfig).validate_json(json.dumps(values), strict=True)
    except (ValidationError, RecursionError) as error:
        what = first_error(error) if isinstance(error, ValidationError) else "they are nested too deeply"
        raise UserError(f"The settings {path} do not fit: {what}.") from None


def settings_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of those settings, as they are saved, that determine a run's result."""
    free = {"schema_version", *FREE_ON_RESUME, *(old for old, new in FIELDS.items() if new in FREE_ON_RESUME)}
    kept = {name: value for name, value in values.items() if name not in free}
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def changed_on_resume(saved: PretrainConfig, given: PretrainConfig) -> list[str]:
    """Names of the settings that differ and would change the run's result."""
    return [
        f.name
        for f in fields(PretrainConfig)
        if f.name not in FREE_ON_RESUME and getattr(saved, f.name) != getattr(given, f.name)
    ]
