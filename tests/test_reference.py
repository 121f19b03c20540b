"""Every ingredient against numbers from the authors' own code (google-research/simclr, commit 383d414).

The folder is tests/reference, or the one that SIMCLR_REFERENCE names: any counts, sizes and values of that format.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from helpers import known
from simclr.config.schedule import learning_rate, peak_lr, warmup_steps
from simclr.losses import contrastive_accuracy_and_entropy, nt_xent, nt_xent_dense
from simclr.losses.nt_xent import nt_xent_streamed
from simclr.training.optim import Lars, set_lr
from simclr.views.params import draw
from simclr.views.policy import Policy
from simclr.views.reference import color_jitter, gaussian_blur, grayscale
from simclr.views.resize import crop_resize
from simclr.views.views import eval_images

EXEMPT = ("batch_normalization", "bias", "head_supervised")  # what the authors' regular expressions look for


@pytest.mark.parametrize("loss", [nt_xent, nt_xent_dense, nt_xent_streamed])
def test_loss_and_gradient(reference, loss):
    """Theirs is the mean over first views plus the mean over second views: twice ours."""
    data = np.load(reference / "ntxent.npz")
    for k in range(int(data["count"])):
        z = torch.tensor(data[f"z{k}"], requires_grad=True)
        value = 2 * loss(*z.chunk(2), float(data[f"temperature{k}"]), bool(data[f"normalize{k}"]))
        value.backward()
        assert value.item() == pytest.approx(float(data[f"loss{k}"]), rel=1e-5), k
        expected = torch.tensor(data[f"grad{k}"])
        assert (known(z.grad) - expected).norm() <= 1e-5 * expected.norm(), k
        assert (known(z.grad) - expected).abs().max() <= 1e-5 * expected.abs().max(), k


def test_contrastive_accuracy_and_entropy(reference):
    data = np.load(reference / "ntxent.npz")
    for k in range(int(data["count"])):
        views = torch.tensor(data[f"z{k}"]).chunk(2)
        settings = float(data[f"temperature{k}"]), bool(data[f"normalize{k}"])
        accuracy, entropy = contrastive_accuracy_and_entropy(views[0], views[1], *settings)
        assert accuracy.item() == pytest.approx(float(data[f"contrast_acc{k}"]), abs=1e-6), k
        assert entropy.item() == pytest.approx(float(data[f"contrast_entropy{k}"]), rel=1e-5, abs=1e-6), k


def test_lars(reference):
    data = np.load(reference / "lars.npz")
    exempt = [any(part in name for part in EXEMPT) for name in data["names"]]
    for c, case in enumerate(json.loads(str(text)) for text in data["cases"]):
        params = [torch.tensor(data[f"init{i}"], requires_grad=True) for i in range(len(exempt))]
        adapted = [param for param, out in zip(params, exempt, strict=True) if not out]
        others = [param for param, out in zip(params, exempt, strict=True) if out]
        optimizer = Lars(
            [
                {"params": adapted, "weight_decay": float(data["weight_decay"])},
                {"params": others, "weight_decay": 0.0, "adapt": False},
            ],
            lr=0.0,
            momentum=float(data["momentum"]),
            trust_coefficient=float(data["eeta"]),
            classic_momentum=case["classic_momentum"],
            nesterov=case["use_nesterov"],
        )
        for t, lr in enumerate(data["lrs"]):
            set_lr(optimizer, float(lr))
            for i, param in enumerate(params):
                param.grad = torch.tensor(data[f"grad{i}_{t}"])
            optimizer.step()
            for i, param in enumerate(params):
                expected = data[f"case{c}_param{i}_{t}"]
                np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_learning_rate(reference):
    data = np.load(reference / "lr_schedule.npz")
    for k in range(int(data["count"])):
        config = json.loads(str(data[f"config{k}"]))
        num_examples, batch_size = config["num_examples"], config["batch_size"]
        peak = peak_lr(config["base_lr"], batch_size, config["scaling"])
        warmup = warmup_steps(num_examples, config["warmup_epochs"], batch_size)
        rates = [
            learning_rate(int(step), peak=peak, warmup_steps=warmup, total_steps=config["total_steps"])
            for step in data[f"step{k}"]
        ]
        # Theirs are fp32, so the error is of the order of the peak and not of the rate.
        np.testing.assert_allclose(rates, data[f"lr{k}"], rtol=1e-6, atol=1e-6 * max(peak, 1.0))


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
    if not rows.any():
        pytest.skip(f"no vector with impl_is_v2 = {is_v2}")
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
