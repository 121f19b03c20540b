"""The google preset against vectors of the authors' own code (tests/reference/README.md describes the files).

The folder is tests/reference or the one that SIMCLR_REFERENCE names: any counts, sizes and values.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from simclr.augment.params import draw
from simclr.augment.policy import Policy
from simclr.augment.reference import color_jitter, gaussian_blur, grayscale
from simclr.augment.resize import crop_resize
from simclr.augment.views import eval_images


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)  # (B, C, H, W)


def assert_pixels(ours: torch.Tensor, theirs: np.ndarray) -> None:
    difference = np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs)
    assert difference.max() < 1e-3 and difference.mean() < 1e-4


@pytest.mark.parametrize(("is_v2", "mode"), [(0, "add"), (1, "multiply")])
def test_color_jitter(reference: Path, is_v2: int, mode: str):
    data = np.load(reference / "color_jitter.npz")
    factors = np.column_stack([data[name] for name in ("brightness", "contrast", "saturation", "hue")])
    rows = data["impl_is_v2"] == is_v2
    ours = color_jitter(
        to_torch(data["x"][rows]), data["order"][rows], factors[rows].astype(np.float32), brightness_mode=mode
    )
    assert_pixels(ours, data["y"][rows])


def test_grayscale(reference: Path):
    data = np.load(reference / "color_jitter.npz")
    assert_pixels(grayscale(to_torch(data["x"])).expand(-1, 3, -1, -1), np.broadcast_to(data["gray"], data["x"].shape))


def test_gaussian_blur(reference: Path):
    data = np.load(reference / "gaussian_blur.npz")
    sizes = [name.removeprefix("sigma") for name in data.files if name.startswith("sigma")]
    assert sizes
    for size in sizes:
        assert_pixels(gaussian_blur(to_torch(data[f"x{size}"]), data[f"sigma{size}"]), data[f"y{size}"])


def test_crop_and_resize(reference: Path):
    data = np.load(reference / "crop_resize.npz")
    for k in range(int(data["count"])):
        theirs = data[f"y{k}"]
        ours = crop_resize([data[f"x{k}"]], data[f"box{k}"][None], theirs.shape[0], "google")
        assert_pixels(ours.clamp(0, 1), theirs[None])


def test_evaluation_preprocessing(reference: Path):
    data = np.load(reference / "crop_resize.npz")
    for k in range(int(data["count"])):
        theirs = data[f"eval{k}"]
        # the vectors crop at every size; the authors' data pipeline asks for no crop at 32 pixels and below
        assert_pixels(eval_images([data[f"x{k}"]], theirs.shape[0], crop=0.875), theirs[None])


def test_crop_boxes_have_the_same_distribution(reference: Path):
    data = np.load(reference / "crop_boxes.npz")
    num_draws = 100_000
    for name in data.files:
        theirs = data[name].astype(np.float64)
        sizes = np.tile([int(side) for side in name.split("x")], (num_draws, 1))
        params = draw(Policy.google(32), sizes, seed=0, epoch=0, indices=np.arange(num_draws), view=0)
        for what, ours_1d, theirs_1d in zip(
            ("area", "aspect", "y", "x"), measures(params.box), measures(theirs), strict=True
        ):
            distance = ks_2samp(ours_1d, theirs_1d, method="asymp").statistic
            assert distance < 0.02, f"{what} of crops of {name}: {distance:.4f}"


def measures(box: np.ndarray) -> tuple[np.ndarray, ...]:
    y, x, height, width = box.T
    return height * width, width / height, y, x
