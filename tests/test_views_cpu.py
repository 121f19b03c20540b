"""The compiled kernels against the definition of a view: the same pixels, bit for bit.

The definition itself is held to torchvision in test_views.py and to the authors' vectors in test_reference.py.
"""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simclr
from simclr.views import cpu, reference, resize
from simclr.views.params import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams, draw
from simclr.views.policy import Policy
from simclr.views.views import eval_images, make_views

PRESETS = [Policy.google, Policy.torchvision]
MIXED = [(40, 30), (1, 1), (3, 120), (33, 64), (200, 150), (32, 32), (7, 90), (64, 64), (1, 7), (375, 500)]
OPERATIONS = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}


def random_images(sizes: list[tuple[int, int]], channels: int = 3) -> list[np.ndarray]:
    """Noise, with black, white and flat colours in some: the edges of every clip and of the colour circle."""
    rng = np.random.default_rng(len(sizes))
    images = [rng.integers(0, 256, (h, w, channels), dtype=np.uint8) for h, w in sizes]
    for value, image in zip((0, 255, 128), images[3::2], strict=False):
        image[: len(image) // 2] = value
    return images


def draws(policy: Policy, images: list[np.ndarray], view: int = 0) -> ViewParams:
    return draw(policy, resize.image_sizes(images), seed=3, epoch=1, indices=np.arange(len(images)), view=view)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
    np.testing.assert_array_equal(
        ours.contiguous().numpy().view(np.uint32), theirs.contiguous().numpy().view(np.uint32)
    )


def assert_is_the_reference(images: list[np.ndarray], params: ViewParams, policy: Policy) -> None:
    assert_same_bits(cpu.render(images, [params], policy)[0], reference.render(images, params, policy))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 8, 16, 20, 28, 32, 33, 47, 96])
def test_views_are_those_of_the_reference(preset, channels, size):
    images = random_images(MIXED * 4, channels)
    policy = preset(size, channels=channels, blur=0.5)
    for view in (0, 1):
        assert_is_the_reference(images, draws(policy, images, view), policy)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("size", "images"), [(224, [(256, 256), (375, 500), (60, 90)]), (512, [(500, 375)])])
def test_large_views_are_those_of_the_reference(preset, size, images):
    images = random_images(images * 2)
    policy = preset(size)
    assert_is_the_reference(images, draws(policy, images), policy)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(1100, 900), (40, 2500), (2500, 40)])
def test_far_larger_images_too(preset, size):
    # torchvision's antialiased filter has dozens of taps here
    images = random_images([size])
    policy = preset(24, crop_area=(0.9, 1))
    whole = replace(draws(policy, images), box=np.array([[0, 0, *size]]))
    assert_is_the_reference(images, whole, policy)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["none", *OPERATIONS, "gray", "blur", "flip"])
def test_each_operation_alone(preset, channels, name):
    images = random_images(MIXED, channels)
    policy = preset(41, channels=channels)
    drawn, off, on = draws(policy, images), np.zeros(len(images), bool), np.ones(len(images), bool)
    switches: dict[str, Any] = {switch: on if name == switch else off for switch in ("flip", "gray", "blur")}
    neutral: dict[str, Any] = {
        other: np.full_like(drawn.hue, other == "hue") * 0 + (other != "hue") for other in OPERATIONS
    }
    if name in OPERATIONS:
        neutral[name] = getattr(drawn, name)
    alone = replace(drawn, **switches, **neutral, jitter=on if name in OPERATIONS else off)
    assert_is_the_reference(images, alone, policy)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("first", OPERATIONS)
def test_a_neutral_operation_still_clips(preset, first):
    images = random_images([(9, 9)] * 6)  # enlarged noise overshoots [0, 1]
    policy = preset(30, flip=0)
    drawn = draws(policy, images)
    order = np.array([OPERATIONS[first], *(number for name, number in OPERATIONS.items() if name != first)])
    neutral: dict[str, Any] = {first: np.full(6, first != "hue", np.float32)}
    params = replace(drawn, jitter=np.ones(6, bool), order=np.tile(order, (6, 1)), **neutral)
    assert_is_the_reference(images, params, policy)


def test_brightness_can_be_added():
    images = random_images(MIXED)
    policy = Policy.google(32, brightness_mode="add")
    drawn = draws(policy, images)
    drawn.brightness[::3] = 0  # the neutral value of this mode
    assert_is_the_reference(images, drawn, policy)


def test_extreme_factors_and_sigmas():
    images = random_images([(30, 30)] * 24)
    for policy in (Policy.google(64, strength=1.25), Policy.torchvision(64, strength=2.5)):
        drawn = draws(replace(policy, blur_sigma=(0.01, 50.0), blur=1.0, jitter=1.0), images)
        assert_is_the_reference(images, drawn, policy)


# --- independence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_view_is_the_same_bits_in_any_batch_and_on_any_number_of_threads(preset):
    images = random_images(MIXED * 3)
    policy = preset(45, blur=0.5)
    params = draws(policy, images)
    whole = cpu.render(images, [params], policy, threads=1)[0]
    for threads in (2, 3, 7):
        assert_same_bits(cpu.render(images, [params], policy, threads=threads)[0], whole)
    rows = np.random.default_rng(0).permutation(len(images))
    assert_same_bits(cpu.render([images[row] for row in rows], [params[rows]], policy)[0], whole[rows])
    for row in rows[:8]:
        assert_same_bits(cpu.render(images[row : row + 1], [params[[row]]], policy)[0], whole[row : row + 1])


def test_calls_from_many_threads_do_not_disturb_each_other():
    images = random_images([(50, 40)] * 16)
    policy = Policy.google(40)
    expected = make_views(images, policy, seed=0, epoch=0, indices=np.arange(16))
    results = {}

    def work(name: int) -> None:
        results[name] = [make_views(images, policy, seed=0, epoch=0, indices=np.arange(16)) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for made in results.values():
        for views in made:
            assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_may_lie_in_memory_as_they_like(channels):
    policy = Policy.google(33, channels=channels)
    wide = np.random.default_rng(0).integers(0, 256, (6, 40, 50, channels), dtype=np.uint8)
    layouts = {
        "array": wide[:, 3:39, 5:45],
        "every second image": wide.repeat(2, axis=0)[::2, 3:39, 5:45],
        "mirrored twice": wide[:, ::-1, ::-1].copy()[:, ::-1, ::-1][:, 3:39, 5:45],
        "channels first": wide.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)[:, 3:39, 5:45],
        "windows": [image[3:39, 5:45] for image in wide],
        "read-only": [np.frombuffer(image[3:39, 5:45].tobytes(), np.uint8).reshape(36, 40, channels) for image in wide],
        "columns first": [np.asfortranarray(image[3:39, 5:45]) for image in wide],
        "padded channels": [np.pad(image, ((0, 0), (0, 0), (0, 1)))[3:39, 5:45, :channels] for image in wide],
    }
    params = draws(policy, list(layouts["array"]))
    expected = reference.render(np.ascontiguousarray(layouts["array"]), params, policy)
    for images in layouts.values():
        assert_same_bits(cpu.render(images, [params], policy)[0], expected)
        before = eval_images(images, 20, backend="reference")
        assert_same_bits(eval_images(images, 20), before)


# --- the public functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_both_back_ends_of_make_views_and_eval_images_agree(preset):
    images = random_images(MIXED)
    policy = preset(36)
    where = {"seed": 1, "epoch": 2, "indices": np.arange(len(images))}
    for a, b in zip(
        make_views(images, policy, **where), make_views(images, policy, **where, backend="reference"), strict=True
    ):
        assert_same_bits(a, b)
        assert a.is_contiguous(memory_format=torch.channels_last)
    for size, crop in ((36, None), (32, None), (17, 0.5)):
        fixed = eval_images(images, size, policy.preset, crop=crop)
        assert_same_bits(fixed, eval_images(images, size, policy.preset, crop=crop, backend="reference"))
        assert fixed.is_contiguous(memory_format=torch.channels_last)


def test_the_authors_crops(reference: Path):
    data = np.load(reference / "crop_resize.npz")
    for k in range(int(data["count"])):
        theirs = data[f"y{k}"]
        ours = cpu.crop_resize([data[f"x{k}"]], data[f"box{k}"][None], theirs.shape[0], "google")
        difference = np.abs(ours[0].permute(1, 2, 0).numpy() - theirs)
        assert difference.max() < 1e-3 and difference.mean() < 1e-4


PROGRAM = """
import numpy as np
from simclr.views.policy import Policy
from simclr.views.views import make_views
first, _ = make_views(np.full((2, 9, 9, 1), 7, np.uint8), Policy.google(8, channels=1), seed=0, epoch=0, indices=[0, 1])
from simclr.views import kernels
print(first.shape, kernels.render_views.stats.cache_path)
"""


def test_without_a_folder_for_the_cache_kernels_compile_all_the_same(tmp_path):
    """As for a package installed read-only by another user: every folder that Numba would try is a file."""
    package = tmp_path / "simclr"
    source = Path(simclr.__file__).parent
    for path in source.rglob("*.py"):
        copied = package / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    (package / "views" / "__pycache__").touch()
    (tmp_path / "file").touch()
    blocked = str(tmp_path / "file" / "folder")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HOME": blocked, "XDG_CACHE_HOME": blocked}
    environment |= {"NUMBA_CACHE_DIR": blocked, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("]) ")[1].strip() == "None"


def test_the_command_line_starts_without_numba():
    code = "import sys, simclr.views.views, simclr.cli.main; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
