"""Random numbers, view parameters and pixels: against known answers, torchvision and invariances.

The authors' own vectors are in test_reference.py.
"""

import colorsys
import doctest
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d
from scipy.stats import ks_1samp, ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from simclr.errors import UserError
from simclr.random import philox, shuffled, uniforms
from simclr.views import resize, views
from simclr.views.params import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams, draw
from simclr.views.policy import Policy
from simclr.views.reference import grayscale, render, scale_saturation, shift_hue, stretch_contrast
from simclr.views.resize import crop_resize
from simclr.views.views import eval_images, make_view, make_views

PRESETS = [Policy.google, Policy.torchvision]


def random_images(sizes: list[tuple[int, int]], channels: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(len(sizes))
    return [rng.integers(0, 256, (h, w, channels), dtype=np.uint8) for h, w in sizes]


def draws(policy: Policy, n: int, size: tuple[int, int] = (32, 32), **changed: int) -> ViewParams:
    where = {"seed": 7, "epoch": 2, "view": 0} | changed
    return draw(policy, np.tile(size, (n, 1)), indices=np.arange(n), **where)


def assert_same(a: ViewParams, b: ViewParams, *names: str) -> None:
    for name in names or [field.name for field in fields(ViewParams)]:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# --- random numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    assert " ".join(f"{int(word):08x}" for word in philox(tuple(counter), key)) == answer


def test_uniforms_are_uniform_and_below_one():
    u = uniforms(3, epoch=1, index=np.arange(5000), stream=0, block=0)
    assert u.shape == (5000, 4) and u.min() >= 0 and u.max() < 1
    assert all(ks_1samp(u[:, k], lambda x: x).pvalue > 1e-3 for k in range(4))
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.06


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(UserError, match="seed"):
        shuffled(10, seed=seed, epoch=0)


def test_shuffled_is_a_permutation_that_changes_with_seed_and_epoch():
    orders = [shuffled(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    agreement = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreement) < 0.02
    np.testing.assert_array_equal(orders[0], shuffled(1000, int(np.int64(0)), 0))
    assert len(shuffled(1, 0, 0)) == 1


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_draws_do_not_depend_on_the_batch(preset):
    policy = preset(64)
    rng = np.random.default_rng(0)
    sizes, indices, epochs = rng.integers(1, 400, (300, 2)), rng.permutation(10_000)[:300], rng.integers(0, 9, 300)
    full = draw(policy, sizes, seed=5, epoch=epochs, indices=indices, view=1)
    rows = rng.permutation(300)[:77]
    some = draw(policy, sizes[rows], seed=5, epoch=epochs[rows], indices=indices[rows], view=1)
    assert_same(full[rows], some)
    for row in rows[:5]:
        one = draw(policy, sizes[[row]], seed=5, epoch=int(epochs[row]), indices=indices[[row]], view=1)
        assert_same(full[[row]], one)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_operation_changes_the_draws_of_another(preset):
    full = draws(preset(64), 200)
    bare = draws(preset(64, flip=0, jitter=0, gray=0, blur=0), 200)
    assert not (bare.flip.any() or bare.jitter.any() or bare.gray.any() or bare.blur.any())
    assert_same(full, bare, "box", "order", "brightness", "contrast", "saturation", "hue", "sigma")
    other_crop = draws(preset(64, crop_area=(0.5, 1.0)), 200)
    assert_same(full, other_crop, *(field.name for field in fields(ViewParams) if field.name != "box"))
    gray_images = draws(preset(64, channels=1), 200)
    assert_same(full, gray_images, "box", "flip", "jitter", "order", "brightness", "contrast", "blur", "sigma")


@pytest.mark.parametrize("changed", [{"seed": 8}, {"epoch": 3}, {"view": 1}])
def test_seed_epoch_and_view_change_the_draws(changed):
    policy = Policy.google(64)
    a, b = draws(policy, 2000), draws(policy, 2000, **changed)
    assert abs(np.corrcoef(a.contrast, b.contrast)[0, 1]) < 0.08
    assert abs(np.mean(a.flip == b.flip) - 0.5) < 0.05


@pytest.mark.parametrize(
    ("policy", "brightness"),
    [
        (Policy.google(64, strength=0.5), (0.6, 1.4)),
        (Policy.google(64, strength=1.25), (0, 2)),
        (Policy.google(64, brightness_mode="add"), (-0.8, 0.8)),
        (Policy.torchvision(64, strength=2), (0, 2.6)),
    ],
)
def test_factors_and_switches_have_the_stated_distributions(policy, brightness):
    n = 20_000
    params = draws(policy, n)

    def is_uniform(values: np.ndarray, low: float, high: float) -> bool:
        return ks_1samp((values - low) / (high - low), lambda x: np.clip(x, 0, 1)).statistic < 0.015

    assert is_uniform(params.brightness, *brightness)
    assert is_uniform(params.contrast, max(1 - policy.contrast, 0), 1 + policy.contrast)
    assert is_uniform(params.saturation, max(1 - policy.saturation, 0), 1 + policy.saturation)
    assert is_uniform(params.hue, -policy.hue, policy.hue)
    assert is_uniform(params.sigma, 0.1, 2.0)
    for switch, probability in ((params.flip, 0.5), (params.jitter, 0.8), (params.gray, 0.2), (params.blur, 0.5)):
        assert abs(switch.mean() - probability) < 0.015
    _, counts = np.unique(params.order, axis=0, return_counts=True)
    assert len(counts) == 24 and np.abs(counts / n - 1 / 24).max() < 0.008


# 20,000 boxes of TensorFlow 2.15 (simclr-facts.md section 1.1): mean area, its 10, 50 and 90 per cent points
@pytest.mark.parametrize(
    ("size", "mean", "quantiles"),
    [
        ((375, 500), 0.387, (0.138, 0.354, 0.691)),
        ((32, 32), 0.432, (0.141, 0.404, 0.781)),
        ((224, 224), 0.421, (0.143, 0.386, 0.754)),
    ],
)
def test_google_crops_have_the_areas_of_tensorflow(size, mean, quantiles):
    box = draws(Policy.google(32), 40_000, size).box
    area = box[:, 2] * box[:, 3] / (size[0] * size[1])
    assert abs(area.mean() - mean) < 0.005
    assert np.abs(np.quantile(area, (0.1, 0.5, 0.9)) - quantiles).max() < 0.012
    assert area.min() >= 0.1


@pytest.mark.parametrize("size", [(32, 32), (120, 60), (40, 400)])
def test_torchvision_crops_have_the_distribution_of_torchvision(size):
    torch.manual_seed(0)
    sampler = v2.RandomResizedCrop(32)
    blank = torch.empty(3, *size)
    theirs = [sampler.make_params([blank]) for _ in range(6000)]
    theirs = np.array([(p["top"], p["left"], p["height"], p["width"]) for p in theirs], float)
    ours = draws(Policy.torchvision(32), 60_000, size).box.astype(float)
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert ks_2samp(measure(theirs), measure(ours), method="asymp").statistic < 0.03


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (3, 500), (500, 3), (17, 31)])
def test_boxes_lie_inside_the_image(preset, size):
    y, x, h, w = draws(preset(32), 500, size).box.T
    assert min(y.min(), x.min()) >= 0 and min(h.min(), w.min()) >= 1
    assert (y + h).max() <= size[0] and (x + w).max() <= size[1]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(375, 500), (28, 28)])
def test_small_crops_have_the_areas_that_are_asked_for(preset, size):
    policy = preset(16, crop_area=(0.05, 0.14))
    uncovered = draws(replace(policy, min_covered=0.0), 5_000, size).box
    area = uncovered[:, 2] * uncovered[:, 3] / (size[0] * size[1])
    rounding = 0 if preset == Policy.google else 2 / min(size)  # torchvision checks the area before it rounds the sides
    assert 0.05 - rounding <= area.min() < 0.06 and 0.13 < area.max() <= 0.14 + rounding
    covering = draws(policy, 5_000, size).box  # the authors' least cover, which is their sampler's alone
    assert ((covering[:, 2] * covering[:, 3]).min() >= 0.1 * size[0] * size[1]) == (preset == Policy.google)


def test_crops_of_a_very_long_image_fall_back():
    # no crop of the allowed aspect covers a tenth of 3 x 500: TensorFlow takes it whole, torchvision its centre
    assert (draws(Policy.google(32), 50, (3, 500)).box == [0, 0, 3, 500]).all()
    assert (draws(Policy.torchvision(32), 50, (3, 500)).box == [0, 248, 3, 4]).all()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Policy.google(32, strength=1.3), "1.25"),
        (lambda: Policy.google(32, strength=-1), "strength"),
        (lambda: Policy.torchvision(32, strength=2.6), "strength"),
        (lambda: Policy.google(0), "size"),
        (lambda: Policy.google(32, channels=4), "channels"),
        (lambda: Policy.google(32, flip=1.5), "flip"),
        (lambda: Policy.google(32, crop_area=(0, 1)), "crop_area"),
        (lambda: Policy.google(32, crop_area=(0.9, 0.2)), "crop_area"),
        (lambda: Policy.google(32, channels=1, gray=0.2), "one channel"),
        (lambda: replace(Policy.google(32), min_covered=1.5), "min_covered"),
        (lambda: replace(Policy.google(32), hue=0.6), "hue"),
        (lambda: replace(Policy.google(32), contrast=1.1), "contrast"),
        (lambda: replace(Policy.google(32), saturation=-0.1), "saturation"),
        (lambda: replace(Policy.google(32), preset="tf"), "preset"),  # pyrefly: ignore[bad-argument-type]
        (lambda: replace(Policy.google(32), brightness_mode="sub"), "brightness_mode"),  # pyrefly: ignore[bad-argument-type]
        (lambda: replace(Policy.torchvision(32), brightness_mode="add"), "brightness_mode"),
    ],
)
def test_an_impossible_policy_is_refused(make, word):
    with pytest.raises(UserError, match=word):
        make()


def test_presets_blur_only_above_32_pixels_and_leave_gray_images_gray():
    assert [Policy.google(size).blur for size in (32, 33)] == [0, 0.5]
    assert Policy.google(32, blur=0.3).blur == 0.3
    gray = Policy.torchvision(32, channels=1)
    assert (gray.hue, gray.saturation, gray.gray) == (0, 0, 0) and gray.contrast == 0.8


def test_policies_are_made_without_torch():
    code = "import sys, simclr.views.policy; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- pixels ---------------------------------------------------------------------------------------------------------

MIXED = [(40, 30), (1, 1), (3, 120), (33, 64), (200, 150), (32, 32), (7, 90), (64, 64)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [9, 32, 47, 96])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_view_is_the_same_bits_in_any_batch(preset, size, mixed, monkeypatch):
    images = random_images(MIXED * 3 if mixed else [(45, 37)] * 24)
    batch = images if mixed else np.stack(images)
    policy = preset(size, blur=0.5)
    indices = np.arange(100, 124)
    full = make_views(batch, policy, seed=1, epoch=2, indices=indices)
    rows = np.random.default_rng(size).permutation(24)[:11]
    some = make_views([images[row] for row in rows], policy, seed=1, epoch=2, indices=indices[rows])
    one = make_views(images[5:6], policy, seed=1, epoch=2, indices=indices[5:6])
    monkeypatch.setattr(resize, "_CPU_CHUNK_PIXELS", 2**22)
    whole = make_views(batch, policy, seed=1, epoch=2, indices=indices)
    for view in (0, 1):
        assert full[view].dtype == torch.float32 and full[view].shape == (24, 3, size, size)
        assert full[view].min() >= 0 and full[view].max() <= 1
        assert torch.equal(full[view][rows], some[view])
        assert torch.equal(full[view][5:6], one[view])
        assert torch.equal(full[view], whole[view])
    assert not torch.equal(full[0], full[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_view_alone_is_that_of_the_pair(backend):
    images, indices = random_images([(50, 40)] * 6), np.arange(6)
    draw = {"policy": Policy.google(36), "seed": 1, "epoch": 2, "indices": indices, "backend": backend}
    for view, expected in enumerate(make_views(images, **draw)):
        assert torch.equal(make_view(images, view=view, **draw), expected)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_each_view_may_have_its_own_policy(preset, backend):
    images, numbers = random_images([(50, 40), (33, 60), (28, 28)]), [1, 4, 0, 2]
    large, small = preset(20), replace(preset(9, crop_area=(0.05, 0.14)), min_covered=0.0)
    policies = [large, small, small, large]
    at = {"seed": 1, "epoch": 2, "indices": np.array([5, 0, 9])}
    made = make_views(images, policies, **at, views=numbers, backend=backend)
    for view, policy, ours in zip(numbers, policies, made, strict=True):
        expected = render(images, draw(policy, resize.image_sizes(images), **at, view=view), policy)
        assert ours.shape == (3, 3, policy.size, policy.size) and torch.equal(ours, expected)
    with pytest.raises(UserError, match="3 policies and 4 views"):
        make_views(images, policies[:3], **at, views=numbers)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_is_the_same_bits_on_any_number_of_threads(preset, channels, monkeypatch):
    monkeypatch.setattr(resize, "_CPU_CHUNK_PIXELS", 2**22)  # operations large enough for torch to split
    images = random_images([(300, 280)] * 3, channels)
    before = torch.get_num_threads()
    try:
        for batch in (images, images[:1]):
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                made = make_views(batch, preset(224, channels=channels), seed=0, epoch=0, indices=np.arange(len(batch)))
                results.append(torch.stack(made))
            assert torch.equal(results[0], results[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_flip_mirrors_the_view_and_nothing_else(preset):
    images = random_images([(50, 41)] * 6)
    params = draws(preset(33), 6, (50, 41))
    plain = render(images, replace(params, flip=np.zeros(6, bool)), preset(33))
    mirrored = render(images, replace(params, flip=np.ones(6, bool)), preset(33))
    # sums over the image run in another order, hence not the same bits
    torch.testing.assert_close(mirrored, plain.flip(3), atol=2e-6, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_gray_images_stay_gray(preset):
    images = random_images([(20, 30)] * 8, channels=1)
    first, _ = make_views(images, preset(40, channels=1), seed=0, epoch=0, indices=np.arange(8))
    assert first.shape == (8, 1, 40, 40)
    tripled = [image.repeat(3, axis=2) for image in images]
    in_colour = preset(40, gray=0)
    same, _ = make_views(tripled, in_colour, seed=0, epoch=0, indices=np.arange(8))
    assert (same - same[:, :1]).abs().max() < 1e-5  # colour operations leave gray pixels gray


@pytest.mark.parametrize("preset", PRESETS)
def test_grayscale_views_have_three_equal_channels(preset):
    policy = preset(32, gray=1.0)
    first, _ = make_views(random_images([(40, 40)] * 4), policy, seed=0, epoch=0, indices=np.arange(4))
    assert torch.equal(first, first[:, :1].expand_as(first))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_view_without_any_operation_is_the_image(preset):
    images = random_images([(24, 24)] * 3)
    policy = preset(24, crop_area=(1, 1), flip=0, jitter=0, gray=0, blur=0)
    params = replace(draws(policy, 3, (24, 24)), box=np.tile([0, 0, 24, 24], (3, 1)))
    expected = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) * torch.tensor(1 / 255)
    assert torch.equal(render(images, params, policy), expected)


def test_no_images_make_no_views():
    first, second = make_views([], Policy.google(32), seed=0, epoch=0, indices=np.arange(0))
    assert first.shape == second.shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_images_that_do_not_fit_are_refused(image):
    with pytest.raises(UserError, match="uint8"):
        make_views([image], Policy.google(32), seed=0, epoch=0, indices=np.arange(1))


@pytest.mark.parametrize("indices", [np.arange(3), np.array([0, -1]), np.array([0, 2**32])])
def test_indices_that_do_not_fit_are_refused(indices):
    with pytest.raises(UserError, match="ind"):
        make_views(random_images([(8, 8)] * 2), Policy.google(32), seed=0, epoch=0, indices=indices)


# Spot values of TensorFlow (simclr-facts.md section 6)
PIXELS = torch.tensor([[0.1, 0.5, 0.9], [0.8, 0.2, 0.3], [0.4, 0.4, 0.4], [1, 0, 0.25]]).T.view(1, 3, 2, 2)


@pytest.mark.parametrize(
    ("operation", "factor", "first_pixel"),
    [
        (stretch_contrast, 1.5, (-0.1375, 0.6125, 1.11875)),
        (scale_saturation, 1.5, (0, 0.45, 0.9)),
        (scale_saturation, 0.3, (0.66, 0.78, 0.9)),
        (shift_hue, 0.1, (0.18, 0.1, 0.9)),
    ],
)
def test_google_colour_operations_on_known_pixels(operation, factor, first_pixel):
    changed = operation(PIXELS, torch.tensor(factor).view(1, 1, 1, 1))
    torch.testing.assert_close(changed[0, :, 0, 0], torch.tensor(first_pixel), atol=1e-6, rtol=0)


def test_a_whole_turn_of_hue_changes_nothing():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    turns = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(4, 1, 1, 1)
    torch.testing.assert_close(shift_hue(x, turns), x, atol=2e-6, rtol=0)


def google_view(image: np.ndarray, params: ViewParams, policy: Policy) -> np.ndarray:
    """The one view of a one-row ViewParams, pixel by pixel; only the resize is ours (the vectors hold it)."""
    x = crop_resize([image], params.box, policy.size, "google")[0].permute(1, 2, 0).double().numpy()
    x = x[:, ::-1] if params.flip[0] else x

    def in_hsv(x: np.ndarray, change: Callable[[float, float, float], tuple[float, float, float]]) -> np.ndarray:
        pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in x.reshape(-1, 3)]
        return np.array(pixels).reshape(x.shape)

    add = policy.brightness_mode == "add"
    brightness, contrast, saturation, hue = (
        float(getattr(params, name)[0]) for name in ("brightness", "contrast", "saturation", "hue")
    )
    adjust = {
        BRIGHTNESS: lambda x: x + brightness if add else x * brightness,
        CONTRAST: lambda x: (x - x.mean((0, 1))) * contrast + x.mean((0, 1)),
        SATURATION: lambda x: in_hsv(x, lambda h, s, v: (h, min(max(s * saturation, 0), 1), v)),
        HUE: lambda x: in_hsv(x, lambda h, s, v: ((h + hue) % 1, s, v)),
    }
    if params.jitter[0]:
        for operation in params.order[0]:
            x = adjust[operation](x).clip(0, 1)
    if params.gray[0]:
        x = (x @ [0.2989, 0.587, 0.114])[:, :, None].repeat(3, axis=2)
    x = x.clip(0, 1)
    if params.blur[0]:
        offsets = np.arange(-(policy.size // 10 // 2), policy.size // 10 // 2 + 1)
        kernel = np.exp(-(offsets**2) / (2 * float(params.sigma[0]) ** 2))
        for axis in (0, 1):
            x = convolve1d(x, kernel / kernel.sum(), axis=axis, mode="constant")
    return x.clip(0, 1)


@pytest.mark.parametrize("mode", ["multiply", "add"])
def test_google_views_are_those_of_a_naive_chain(mode):
    sizes = [(20, 30), (60, 45), (11, 12)] * 5  # mostly enlarged noise: bicubic overshoots a lot
    images = random_images(sizes)
    policy = Policy.google(41, brightness_mode=mode, jitter=0.7, gray=0.4)
    params = draw(policy, np.array(sizes), seed=0, epoch=0, indices=np.arange(15), view=0)
    views = render(images, params, policy).permute(0, 2, 3, 1).numpy()
    for k, image in enumerate(images):
        np.testing.assert_allclose(views[k], google_view(image, params[[k]], policy), atol=1e-5)


# --- the torchvision preset against torchvision -----------------------------------------------------------------------


def torchvision_view(image: np.ndarray, params: ViewParams, size: int) -> torch.Tensor:
    """The one view of a one-row ViewParams, by torchvision's own functions on a float image."""
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    y0, x0, h, w = params.box[0].tolist()
    x = tv.resized_crop(x, y0, x0, h, w, [size, size], antialias=True)
    if params.flip[0]:
        x = tv.horizontal_flip(x)
    adjust = {
        BRIGHTNESS: lambda x: tv.adjust_brightness(x, float(params.brightness[0])),
        CONTRAST: lambda x: tv.adjust_contrast(x, float(params.contrast[0])),
        SATURATION: lambda x: tv.adjust_saturation(x, float(params.saturation[0])),
        HUE: lambda x: tv.adjust_hue(x, float(params.hue[0])),
    }
    if params.jitter[0]:
        for operation in params.order[0]:
            x = adjust[operation](x)
    if params.gray[0]:
        x = tv.rgb_to_grayscale(x, num_output_channels=len(x))
    kernel = size // 10 | 1  # a tenth of the image, made odd
    if params.blur[0] and kernel > 1:
        x = tv.gaussian_blur(x, [kernel, kernel], [float(params.sigma[0])] * 2)
    return x


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 32, 61, 96])
def test_torchvision_views_are_those_of_torchvision(size, channels):
    sizes = [(40, 30), (90, 200), (32, 32), (150, 61)] * 4
    images = random_images(sizes, channels)
    policy = Policy.torchvision(size, channels=channels, blur=0.5)
    params = draw(policy, np.array(sizes), seed=3, epoch=0, indices=np.arange(16), view=0)
    expected = torch.stack([torchvision_view(image, params[[k]], size) for k, image in enumerate(images)])
    torch.testing.assert_close(render(images, params, policy), expected, atol=2e-5, rtol=0)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "box"), [((375, 500), (24, 86, 328, 328)), ((500, 333), (105, 21, 291, 291))])
def test_evaluation_crops_where_the_authors_do(size, box):
    images = random_images([size])
    expected = crop_resize(images, np.array([box]), 64, "google").clamp(0, 1)
    assert torch.equal(eval_images(images, 64), expected)


@pytest.mark.parametrize("preset", ["google", "torchvision"])
def test_evaluation_uses_small_images_as_they_are(preset):
    images = np.stack(random_images([(32, 32)] * 3))
    expected = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(eval_images(images, 32, preset), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("size", [28, 56, 64, 112])
@pytest.mark.parametrize("shape", [(100, 140), (91, 60), (300, 33), (64, 64)])
def test_torchvision_evaluation_is_that_of_torchvision(size, shape):
    shorter = round(size / 0.875) if size > 32 else size
    image = random_images([shape])[0]
    chain = v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(size)])
    expected = chain(torch.from_numpy(image).permute(2, 0, 1).float() / 255)
    # torch computes its weights in float32, and those of 5,000 columns lose some digits
    torch.testing.assert_close(eval_images([image], size, "torchvision")[0], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("preset", ["google", "torchvision"])
@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_is_the_same_bits_in_any_batch(preset, channels):
    images = random_images(MIXED, channels)
    full = eval_images(images, 40, preset)
    assert full.shape == (len(MIXED), channels, 40, 40) and full.min() >= 0 and full.max() <= 1
    for k, image in enumerate(images):
        assert torch.equal(full[k : k + 1], eval_images([image], 40, preset))


def test_evaluation_refuses_nonsense():
    with pytest.raises(UserError, match="crop"):
        eval_images(random_images([(8, 8)]), 32, crop=1.5)
    with pytest.raises(UserError, match="no images"):
        eval_images([], 32)
    with pytest.raises(UserError, match="uint8"):
        eval_images([np.zeros((8, 8), np.uint8)], 32)


def test_grayscale_weighs_as_the_eye_does():
    torch.testing.assert_close(grayscale(PIXELS)[0, 0, 0, 0], torch.tensor(0.42599), atol=1e-6, rtol=0)


def test_the_example_in_the_documentation_runs():
    result = doctest.testmod(views)
    assert result.attempted and not result.failed
