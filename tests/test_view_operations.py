"""Further operations on views: against Pillow, scipy and plain loops; the compiled loops against the definition."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import ndimage, stats

from simclr import UserError
from simclr.config.pretrain import OPERATIONS, PretrainConfig
from simclr.methods.moco import MoCo
from simclr.methods.simclr import SimCLR
from simclr.tasks.pretrain_views import check_views, policies_of
from simclr.views import params
from simclr.views.operations import cut_out, cutout_ends, equalise, motion_blur, motion_reach, sobel
from simclr.views.params import draw
from simclr.views.policy import Policy
from simclr.views.views import Backend, make_views

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 24, 20, 3), dtype=np.uint8)
PLAIN = Policy.google(16, strength=0.5)
SIZES = np.tile([24, 20], (12, 1))


def views_of(policy: Policy, backend: Backend = "reference") -> torch.Tensor:
    images = IMAGES[..., : policy.channels]
    return make_views(images, policy, seed=3, epoch=5, indices=np.arange(12), views=(1,), backend=backend)[0]


def having(policy: Policy, names: Sequence[str], probability: float) -> Policy:
    values: dict[str, Any] = dict.fromkeys(names, probability)
    return replace(policy, **values)


def as_bytes(x: torch.Tensor) -> np.ndarray:
    return (x * 255).round().byte().numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_loops_equal_the_definition(name, channels):
    policy = Policy.google(16, strength=0.5, channels=channels, flip=0.0)
    policy = having(policy, [name], 0.7)
    assert torch.equal(views_of(policy, "cpu"), views_of(policy))
    untouched = having(policy, [name], 0.0)
    assert not torch.equal(views_of(policy), views_of(untouched))


@pytest.mark.parametrize("preset", ["google", "torchvision"])
@pytest.mark.parametrize("size", [16, 47, 48, 96])
def test_all_together_and_other_sizes(preset, size):
    make = Policy.google if preset == "google" else Policy.torchvision
    policy = having(make(size), OPERATIONS, 0.5)
    views = views_of(policy)
    assert torch.equal(views_of(policy, "cpu"), views)
    assert views.min() >= 0 and views.max() <= 1


def test_a_view_does_not_depend_on_its_batch():
    always = having(PLAIN, OPERATIONS, 1.0)
    whole = views_of(always)
    alone = make_views(IMAGES[4:5], always, seed=3, epoch=5, indices=np.array([4]), views=(1,), backend="reference")[0]
    assert torch.equal(alone[0], whole[4])


@pytest.mark.parametrize("blocks", [1, 400, 2**20])
def test_noise_does_not_depend_on_how_many_views_are_drawn_at_a_time(blocks, monkeypatch):
    drawn = draw(replace(PLAIN, noise=1.0), SIZES, seed=3, epoch=5, indices=np.arange(12), view=1).operations
    assert drawn is not None
    alone = [drawn.normals(np.array([row]), 3, 9)[0] for row in range(12)]  # 61 blocks each
    monkeypatch.setattr(params, "_NOISE_BLOCKS", blocks)
    np.testing.assert_array_equal(drawn.normals(np.arange(12), 3, 9), np.stack(alone))


def test_an_operation_changes_no_draw_of_another():
    """With one more operation on, all parameters stay but its own."""
    common = {"seed": 3, "epoch": 5, "indices": np.arange(12), "view": 1}
    before = draw(replace(PLAIN, noise=0.5), SIZES, **common)
    after = draw(replace(PLAIN, noise=0.5, sobel=1.0, rotation=1.0, cutout=1.0), SIZES, **common)
    for name in ("box", "flip", "jitter", "order", "brightness", "hue", "gray", "blur", "sigma"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert before.operations is not None and after.operations is not None
    np.testing.assert_array_equal(before.operations.noise, after.operations.noise)
    np.testing.assert_array_equal(before.operations.equalise, after.operations.equalise)
    assert after.operations.sobel.all() and not before.operations.sobel.any()
    assert draw(PLAIN, SIZES, **common).operations is None


def test_probabilities_and_choices():
    n = 4000
    policy = having(PLAIN, OPERATIONS, 0.3)
    drawn = draw(policy, np.tile([24, 20], (n, 1)), seed=0, epoch=0, indices=np.arange(n), view=0).operations
    assert drawn is not None
    flags = {name: getattr(drawn, name) for name in OPERATIONS if name != "rotation"} | {"rotation": drawn.turns > 0}
    for name, on in flags.items():
        assert stats.binomtest(int(on.sum()), n, 0.3).pvalue > 1e-3, name
    independent = np.corrcoef(np.stack(list(flags.values())).astype(float)) - np.eye(len(flags))
    assert np.abs(independent).max() < 0.06
    turned = np.bincount(drawn.turns)[1:]
    assert len(turned) == 3 and stats.chisquare(turned).pvalue > 1e-3
    assert stats.chisquare(np.bincount(drawn.direction)).pvalue > 1e-3
    for axis in range(2):
        assert stats.kstest(drawn.centre[:, axis], "uniform").pvalue > 1e-3


def test_equalise_and_solarise_are_pillows():
    views = views_of(PLAIN)
    grey_ramp = torch.linspace(0, 1, 256).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    few_values = torch.zeros(1, 3, 16, 16)
    few_values[:, :, :2] = 1.0
    for x in (views, grey_ramp, few_values):
        for before, after in zip(as_bytes(x), as_bytes(equalise(x)), strict=True):
            picture = Image.fromarray(before.transpose(1, 2, 0))
            np.testing.assert_array_equal(after.transpose(1, 2, 0), np.asarray(ImageOps.equalize(picture)))
    quantised = views_of(PLAIN).mul(255).round().div(255)
    policy = replace(PLAIN, crop=False, flip=0.0, jitter=0.0, gray=0.0, blur=0.0, solarise=1.0)
    images = (quantised * 255).round().byte().permute(0, 2, 3, 1).numpy()
    (solarised,) = make_views(images, policy, seed=0, epoch=0, indices=np.arange(12), views=(0,), backend="reference")
    for before, after in zip(images, as_bytes(solarised), strict=True):
        np.testing.assert_array_equal(
            after.transpose(1, 2, 0), np.asarray(ImageOps.solarize(Image.fromarray(before), 128))
        )


def test_sobel_is_scipys():
    x = views_of(PLAIN)
    for plane, edges in zip(x.flatten(0, 1).double().numpy(), sobel(x).flatten(0, 1).numpy(), strict=True):
        expected = np.hypot(*(ndimage.sobel(plane, axis, mode="nearest") for axis in (0, 1))) / 4
        np.testing.assert_allclose(edges, np.minimum(expected, 1), atol=1e-6)


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1)])
@pytest.mark.parametrize("size", [16, 96])
def test_motion_blur_is_a_convolution_with_a_line(step, size):
    x = torch.from_numpy(RNG.random((1, 2, size, size), np.float32))
    reach = motion_reach(size)
    line = np.zeros((2 * reach + 1, 2 * reach + 1))
    for k in range(-reach, reach + 1):
        line[reach + k * step[0], reach + k * step[1]] = 1 / (2 * reach + 1)
    expected = [ndimage.correlate(plane, line, mode="nearest") for plane in x[0].double().numpy()]
    np.testing.assert_allclose(motion_blur(x, *step)[0].numpy(), expected, atol=1e-6)


def test_rotation_turns_the_finished_view():
    policy = replace(PLAIN, rotation=1.0)
    drawn = draw(policy, SIZES, seed=3, epoch=5, indices=np.arange(12), view=1).operations
    assert drawn is not None
    for before, after, turns in zip(views_of(PLAIN), views_of(policy), drawn.turns, strict=True):
        np.testing.assert_array_equal(after.numpy(), np.rot90(before.numpy(), turns, (1, 2)))


def test_cutout_is_a_square_within_the_view():
    centre = np.array([[0.0, 0.0], [0.5, 0.5], [0.99, 0.2]], np.float32)
    first, last = cutout_ends(centre, 0.5, 16)
    np.testing.assert_array_equal(first, [[0, 0], [4, 4], [11, 0]])
    np.testing.assert_array_equal(last, [[4, 4], [12, 12], [16, 7]])
    cut = cut_out(torch.ones(3, 1, 16, 16), centre, 0.5)
    assert (cut == 0).sum((1, 2, 3)).tolist() == [16, 64, 35]
    assert not cut[1, 0, 4:12, 4:12].any() and cut[1, 0, :4].all()


def test_noise_is_normal_and_another_at_every_place():
    policy = replace(Policy.google(32, strength=0.0), jitter=0.0, gray=0.0, noise=1.0, noise_sigma=0.02)
    flat = np.full((40, 32, 32, 3), 128, np.uint8)
    views = make_views(flat, policy, seed=0, epoch=0, indices=np.arange(40), views=(0, 1), backend="reference")
    numbers = ((torch.stack(views) - 128 / 255) / 0.02).double().numpy()
    assert stats.kstest(numbers.ravel()[::7], "norm").pvalue > 1e-3
    assert abs(numbers.mean()) < 0.01 and abs(numbers.std() - 1) < 0.01
    apart = np.corrcoef(numbers.reshape(80, -1)) - np.eye(80)
    assert np.abs(apart).max() < 0.09
    assert np.abs(np.corrcoef(numbers.reshape(-1, 2).T)[0, 1]) < 0.01


def test_views_without_a_crop_are_the_whole_image():
    policy = replace(PLAIN, crop=False, flip=0.0, jitter=0.0, gray=0.0, blur=0.0)
    square = RNG.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    (views,) = make_views(square, policy, seed=0, epoch=0, indices=np.arange(5), views=(0,), backend="cpu")
    np.testing.assert_array_equal(as_bytes(views).transpose(0, 2, 3, 1), square)


@pytest.mark.parametrize("preset", ["google", "torchvision"])
def test_a_shared_crop_is_the_same_for_both_views_and_holds_theirs(preset):
    policy = replace(Policy(preset=preset, size=16), shared_crop=True)
    common = {"seed": 0, "epoch": 2, "indices": np.arange(200)}
    sizes = np.tile([60, 80], (200, 1))
    outer = [draw(replace(policy, crop=False), sizes, view=view, **common).box for view in (0, 1)]
    np.testing.assert_array_equal(outer[0], outer[1])
    inner = [draw(policy, sizes, view=view, **common).box for view in (0, 1)]
    assert (inner[0] != inner[1]).any(axis=1).mean() > 0.9
    for box in inner:
        assert (box[:, :2] >= outer[0][:, :2]).all()
        assert (box[:, :2] + box[:, 2:] <= outer[0][:, :2] + outer[0][:, 2:]).all()
    assert len(np.unique(outer[0], axis=0)) > 150


def test_settings_name_the_operations_of_each_branch():
    settings = PretrainConfig(size=32, augment="colour, sobel", branch_b="identity", shared_crop=True, flip=0.5)
    first, second = policies_of(settings, 3, settings.view_sizes)
    assert (first.crop, first.flip, first.jitter, first.gray, first.sobel, first.cutout) == (False, 0, 0.8, 0.2, 1, 0)
    assert (second.crop, second.flip, second.jitter, second.gray, second.sobel) == (False, 0, 0, 0, 0)
    assert first.shared_crop and second.shared_crop
    settings = PretrainConfig(size=32, branch_b="crop,motion-blur", noise=0.3)
    first, second = policies_of(settings, 3, settings.view_sizes)
    assert first == replace(Policy.google(32), noise=0.3)
    assert (second.crop, second.motion_blur, second.jitter, second.noise, second.blur) == (True, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("settings", "method", "sentence"),
    [
        ({"augment": "crop,color"}, SimCLR, "no operation 'color'"),
        ({"branch_b": "cropp"}, SimCLR, "--branch-b was cropp"),
        ({"augment": "crop", "cutout": 0.5}, SimCLR, "--augment does not name cutout"),
        ({"branch_b": "identity", "views_per_image": 3}, SimCLR, "second of two views"),
        ({"branch_b": "identity", "small_crops": "2:16"}, SimCLR, "second of two views"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, method, sentence):
    with pytest.raises(UserError, match=sentence):
        check_views(PretrainConfig(**settings), method)
    check_views(PretrainConfig(method="moco", branch_b="identity", augment="crop"), MoCo)


def test_values_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"--sobel was 1\.5"):
        PretrainConfig(sobel=1.5)
    with pytest.raises(UserError, match="cutout_side"):
        replace(PLAIN, cutout_side=0.0)
    with pytest.raises(UserError, match="noise_sigma"):
        replace(PLAIN, noise_sigma=0.0)
