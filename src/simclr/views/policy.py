"""What a view may look like: crop, flip, colour distortion, blur (paper section 3 and appendix A).

`Policy.google` follows the authors' code (google-research/simclr, tf2/data_util.py), `Policy.torchvision` what
most other implementations use. The two differ in nearly every operation: params.py and reference.py say how.
"""

from dataclasses import dataclass, replace
from typing import Literal

from simclr.config.pretrain import OPERATIONS
from simclr.errors import UserError

AugmentationPreset = Literal["google", "torchvision"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Ranges and probabilities of every augmentation. An operation of strength or probability 0 is off."""

    preset: AugmentationPreset
    """Whose samplers, resizing and colour operations: the authors' or torchvision's."""

    size: int
    """Height and width of a view, in pixels."""

    channels: int = 3
    """3 (red, green, blue) or 1 (gray: no saturation, no hue, no grayscale)."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest crop, as a share of the image's area (google: never below `min_covered`)."""

    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""

    min_covered: float = 0.1
    """google: smallest share of the object that a crop covers (min_object_covered of TensorFlow's sampler). For the
    authors the object is the whole image, so no crop is below a tenth of it; 0 where smaller crops are wanted."""

    flip: float = 0.5
    """Probability of a horizontal flip. Set 0 where left and right differ in meaning, as in digits."""

    jitter: float = 0.8
    """Probability of colour jitter: brightness, contrast, saturation and hue, in random order."""

    brightness: float = 0.8
    """Brightness factor is uniform in [max(0, 1 - b), 1 + b]; with brightness_mode "add", shift in [-b, b]."""

    contrast: float = 0.8
    """Contrast factor is uniform in [1 - c, 1 + c]."""

    saturation: float = 0.8
    """Saturation factor is uniform in [1 - s, 1 + s]."""

    hue: float = 0.2
    """Hue shift is uniform in [-h, h], in turns of the colour circle."""

    brightness_mode: Literal["multiply", "add"] = "multiply"
    """"multiply" as in SimCLR v2 and the authors' last code, "add" as in v1."""

    gray: float = 0.2
    """Probability that the three channels become equal."""

    blur: float = 0.5
    """Probability of a Gaussian blur."""

    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, uniform in this range, in pixels of the view."""

    crop: bool = True
    """Whether a view is a random crop; else it is the whole image, resized."""

    shared_crop: bool = False
    """Whether one random crop is cut first that all views of the image share; theirs are then cut from it."""

    # ---- further operations, on the finished view, in this order; off unless asked for
    equalise: float = 0.0
    """Probability that each channel's histogram becomes flat."""

    solarise: float = 0.0
    """Probability that values from 0.5 on are inverted."""

    sobel: float = 0.0
    """Probability that a view becomes the size of its gradient."""

    motion_blur: float = 0.0
    """Probability of an average along a short line in one of four directions."""

    rotation: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees."""

    cutout: float = 0.0
    """Probability that a square becomes black."""

    noise: float = 0.0
    """Probability of Gaussian noise."""

    cutout_side: float = 0.5
    """Side of the black square, as a share of the view's; its centre may be any pixel."""

    noise_sigma: float = 0.1
    """Standard deviation of the noise."""

    @property
    def operates(self) -> bool:
        """Whether any of the further operations can occur."""
        return any(getattr(self, name) > 0 for name in OPERATIONS)

    @classmethod
    def google(
        cls,
        size: int,
        *,
        strength: float = 1.0,
        channels: int = 3,
        crop_area: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
        jitter: float = 0.8,
        brightness_mode: Literal["multiply", "add"] = "multiply",
        gray: float | None = None,
        blur: float | None = None,
    ) -> "Policy":
        """The authors' policy. The paper uses strength 1.0 for ImageNet and 0.5 for CIFAR-10 (appendix B.9).

        Args:
            strength: s of 0.8 s brightness, contrast and saturation and 0.2 s hue; 0 (off) to 1.25.
            gray: None means 0.2 for colour images and 0 for gray ones.
            blur: None means 0.5 above 32 pixels and 0 at 32 and below, as in the paper.
        """
        if not 0 <= strength <= 1.25:
            raise UserError(
                f"colour strength {strength}: the google preset allows 0 to 1.25, above which a factor could be "
                "negative; the paper uses 1.0 for ImageNet and 0.5 for CIFAR."
            )
        policy = cls._preset("google", size, strength, channels, gray, blur)
        return replace(policy, crop_area=crop_area, flip=flip, jitter=jitter, brightness_mode=brightness_mode)

    @classmethod
    def torchvision(
        cls,
        size: int,
        *,
        strength: float = 1.0,
        channels: int = 3,
        crop_area: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
        jitter: float = 0.8,
        gray: float | None = None,
        blur: float | None = None,
    ) -> "Policy":
        """Torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale, GaussianBlur.

        Args:
            strength: as in `google`; 0 to 2.5, because a hue shift is at most half a turn.
            gray, blur: as in `google`.
        """
        if not 0 <= strength <= 2.5:
            raise UserError(f"colour strength {strength}: the torchvision preset allows 0 to 2.5; try 1.0.")
        policy = cls._preset("torchvision", size, strength, channels, gray, blur)
        return replace(policy, crop_area=crop_area, flip=flip, jitter=jitter)

    @classmethod
    def _preset(
        cls,
        preset: AugmentationPreset,
        size: int,
        strength: float,
        channels: int,
        gray: float | None,
        blur: float | None,
    ) -> "Policy":
        """Strengths and probabilities of the paper (appendix A), less what images of this kind cannot have."""
        coloured = channels == 3
        return cls(
            preset=preset,
            size=size,
            channels=channels,
            brightness=0.8 * strength,
            contrast=0.8 * strength,
            saturation=0.8 * strength * coloured,
            hue=0.2 * strength * coloured,
            gray=0.2 * coloured if gray is None else gray,
            blur=0.5 * (size > 32) if blur is None else blur,
        )

    def __post_init__(self) -> None:
        if self.preset not in ("google", "torchvision"):
            raise UserError(f"augmentation preset {self.preset!r}: choose 'google' or 'torchvision'.")
        if self.size < 1:
            raise UserError(f"view size {self.size}: must be at least 1 pixel; try 32 or 224.")
        if self.channels not in (1, 3):
            raise UserError(f"{self.channels} channels: views have 1 (gray) or 3 (colour).")
        for name in ("flip", "jitter", "gray", "blur", *OPERATIONS):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}: it is a probability, from 0 to 1.")
        if not 0 < self.cutout_side <= 1:
            raise UserError(f"cutout_side {self.cutout_side}: it is a share of the view's side, above 0 and up to 1.")
        if not self.noise_sigma > 0:
            raise UserError(f"noise_sigma {self.noise_sigma}: a standard deviation is above 0; try 0.1.")
        if not 0 <= self.min_covered <= 1:
            raise UserError(f"min_covered {self.min_covered}: it is a share of the image, from 0 to 1.")
        for name, most in (("crop_area", 1.0), ("crop_aspect", float("inf")), ("blur_sigma", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise UserError(f"{name} ({low}, {high}): give smallest and largest, above 0 and up to {most}.")
        self._check_colour()

    def _check_colour(self) -> None:
        for name in ("brightness", "contrast", "saturation", "hue"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}: a strength is 0 (off) or above.")
        for name in ("contrast", "saturation"):
            if self.preset == "google" and getattr(self, name) > 1:
                raise UserError(f"{name} {getattr(self, name)}: google preset allow 0 to 1; try 0.8.")
        if self.hue > 0.5:
            raise UserError(f"hue {self.hue}: a shift is at most 0.5, half a turn of the circle; try 0.2.")
        if self.brightness_mode not in ("multiply", "add"):
            raise UserError(f"brightness_mode {self.brightness_mode!r}: choose 'multiply' or 'add'.")
        if self.preset == "torchvision" and self.brightness_mode == "add":
            raise UserError("brightness_mode 'add': torchvision only multiplies; choose google preset to add.")
        if self.channels == 1 and (self.saturation or self.hue or self.gray):
            raise UserError(
                f"saturation {self.saturation}, hue {self.hue}, gray {self.gray}: "
                "images of one channel have no colour; set all three to 0."
            )


def crop_and_flip(preset: AugmentationPreset, size: int, *, channels: int, crop_min: float, flip: float) -> Policy:
    """What training on labels and distillation see: random crops and flips, nothing else (SimCLR B.5, SimCLR v2).

    Args:
        crop_min: Smallest share of the image's area that a crop may take.
        flip: Probability of a horizontal flip.
    """
    make_policy = Policy.google if preset == "google" else Policy.torchvision
    return make_policy(
        size, strength=0.0, channels=channels, crop_area=(crop_min, 1.0), flip=flip, jitter=0.0, gray=0.0, blur=0.0
    )
