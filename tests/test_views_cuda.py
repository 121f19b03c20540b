"""The Triton kernels against the definition of a view; without a GPU Triton interprets them (conftest.py says so)."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from simclr.config.pretrain import PretrainConfig
from simclr.data.images import MemoryStore, array_images
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.tasks.pretrain_images import _make_inputs
from simclr.training import batches
from simclr.views import reference, resize
from simclr.views.device_images import DeviceImages
from simclr.views.params import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams, draw
from simclr.views.policy import Policy
from simclr.views.views import eval_images, make_view, make_views
from skips import NEEDS_GPU

pytest.importorskip("triton")
cuda = pytest.importorskip("simclr.views.cuda")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
PRESETS = [Policy.google, Policy.torchvision]
pytestmark = pytest.mark.gpu
MIXED = [(40, 30), (1, 1), (3, 50), (33, 24)]
LAST_BITS = 2e-6  # the mean that contrast needs is added up in another order
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=NEEDS_GPU)


def test_further_operations_follow_the_kernels():
    policy = replace(Policy.google(8), sobel=0.5, rotation=0.5, cutout=0.5, noise=0.5, motion_blur=0.5)
    images = random_images([(10, 12)] * 4)
    options: dict[str, Any] = {"seed": 1, "epoch": 0, "indices": np.arange(4)}
    expected = make_views(images, policy, backend="reference", **options)
    on_device = DeviceImages.upload(images, 3, DEVICE)
    for got, wanted in zip(make_views(on_device, policy, **options), expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=5e-6)
    (rounded, _) = make_views(on_device, policy, dtype=torch.bfloat16, **options)
    assert rounded.dtype == torch.bfloat16


@pytest.fixture(autouse=True)
def larger_tiles(monkeypatch):
    """The interpreter takes as long for a small tile as for a large one."""
    if not ON_GPU:
        monkeypatch.setattr(cuda, "_MOST_PIXELS", 4096)
        monkeypatch.setattr(cuda, "_BLUR_FLOATS", 8192)


def random_images(sizes: list[tuple[int, int]], channels: int = 3) -> list[np.ndarray]:
    """Noise, half of some images flat: the edges of every clip and of the colour circle."""
    rng = np.random.default_rng(len(sizes))
    images = [rng.integers(0, 256, (h, w, channels), dtype=np.uint8) for h, w in sizes]
    for value, image in zip((0, 255, 128), images[3:], strict=False):
        image[: len(image) // 2] = value
    return images


def draws(policy: Policy, images: list[np.ndarray]) -> ViewParams:
    """With every operation that the policy has in some of the views and not in others."""
    row = np.arange(len(images))
    drawn = draw(policy, resize.image_sizes(images), seed=3, epoch=1, indices=row, view=0)
    return replace(
        drawn,
        blur=(row % 2 == 0) & (policy.blur > 0),
        flip=row % 4 < 2,
        gray=(row % 4 == 3) & (policy.gray > 0),
        jitter=(row != 1) & (policy.jitter > 0),
    )


def rendered(
    images: list[np.ndarray], params: ViewParams, policy: Policy, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return cuda.render(DeviceImages.upload(images, policy.channels, DEVICE), [params], policy, dtype)[0].cpu()


def assert_is_the_reference(images: list[np.ndarray], params: ViewParams, policy: Policy) -> None:
    ours, theirs = rendered(images, params, policy), reference.render(images, params, policy)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.contiguous(), theirs, rtol=0, atol=LAST_BITS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("channels", "size"), [(3, 16), (3, 33), (1, 28)])
def test_views_are_those_of_the_reference(preset, channels, size):
    images = random_images(MIXED, channels)
    policy = preset(size, channels=channels, blur=0.5)
    assert_is_the_reference(images, draws(policy, images), policy)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_pixel(preset):
    images = random_images([(3, 5), (1, 1)])
    assert_is_the_reference(images, draws(preset(1), images), preset(1))


@pytest.mark.parametrize("preset", PRESETS)
def test_views_of_several_tiles(preset, monkeypatch):
    monkeypatch.setattr(cuda, "_MOST_PIXELS", 512)
    monkeypatch.setattr(cuda, "_BLUR_FLOATS", 512)
    images = random_images([(30, 40)])
    policy = preset(41, blur=1.0, jitter=1.0)
    assert_is_the_reference(images, replace(draws(policy, images), sigma=np.array([2], np.float32)), policy)


@needs_gpu
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [96, 131, 224, 512])
def test_large_views_are_those_of_the_reference(preset, channels, size):
    images = random_images([(256, 256), (375, 500), (60, 90), (1100, 900), (40, 2500)] * 4, channels)
    policy = preset(size, channels=channels)
    assert_is_the_reference(images, draws(policy, images), policy)


@pytest.mark.parametrize("preset", PRESETS)
def test_far_larger_images_too(preset):
    images = random_images([(2, 150), (60, 50)])
    policy = preset(9, jitter=0)
    whole = replace(draws(policy, images), box=np.array([[0, 0, 2, 150], [0, 0, 60, 50]]))
    assert_is_the_reference(images, whole, policy)


@pytest.mark.parametrize("policy", [Policy.google(21, strength=1.25), Policy.torchvision(21, strength=2.5)])
def test_extreme_factors_and_sigmas(policy):
    images = random_images([(9, 9)] * 6)  # enlarged noise overshoots [0, 1]
    strongest = 3.5 if policy.preset == "torchvision" else 2.0
    params = replace(
        draws(policy, images),
        blur=np.ones(6, bool),
        jitter=np.ones(6, bool),
        contrast=np.array([0, strongest, 0.3, 1.2, 1, 0], np.float32),
        saturation=np.array([strongest, 0, 0, strongest, 1.7, 1], np.float32),
        hue=np.array([0.5, -0.5, 0.25, -0.2, 0.5, -0.01], np.float32),
        sigma=np.array([0.01, 50, 0.1, 1, 2, 0.3], np.float32),
    )
    assert_is_the_reference(images, params, policy)


@pytest.mark.parametrize("preset", PRESETS)
def test_operations_in_every_place_and_at_their_neutral_values(preset):
    images = random_images([(9, 9)] * 8)
    policy = preset(12)
    orders = [np.roll([BRIGHTNESS, CONTRAST, SATURATION, HUE], k) for k in range(4)] * 2
    drawn = draws(policy, images)
    neutral = np.arange(8) >= 4  # the rows of the first operation at its neutral value
    factors: dict[str, Any] = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}
    for number, (name, value) in enumerate(factors.items()):
        idle = neutral & (np.array(orders)[:, 0] == number)
        factors[name] = np.where(idle, np.float32(value), getattr(drawn, name))
    params = replace(drawn, jitter=np.ones(8, bool), order=np.array(orders), **factors)
    assert_is_the_reference(images, params, policy)
    nothing: dict[str, Any] = {name: np.full_like(drawn.hue, name != "hue") for name in factors}
    assert_is_the_reference(images[:2], replace(params, **nothing)[:2], policy)


def test_brightness_can_be_added():
    images = random_images(MIXED)
    policy = Policy.google(12, brightness_mode="add", jitter=1.0)
    drawn = draws(policy, images)
    drawn.brightness[::3] = 0  # the neutral value of this mode
    assert_is_the_reference(images, drawn, policy)


def test_bfloat16_is_the_rounded_float32():
    images = random_images(MIXED)
    policy = Policy.google(20, blur=0.5)
    params = draws(policy, images)
    exact, ours = rendered(images, params, policy), rendered(images, params, policy, torch.bfloat16)
    if ON_GPU:
        expected = exact.to(torch.bfloat16)
    else:  # Triton's interpreter cuts off what it should round
        expected = (exact.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_view_is_the_same_bits_in_any_batch(preset):
    images = random_images(MIXED)
    policy = preset(25, blur=0.5)
    params = draws(policy, images)
    whole = rendered(images, params, policy)
    rows = np.random.default_rng(0).permutation(len(images))
    assert torch.equal(rendered([images[row] for row in rows], params[rows], policy), whole[rows])
    assert torch.equal(rendered(images[3:4], params[[3]], policy), whole[3:4])


# --- the public functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_back_ends_of_make_views_and_eval_images_agree(preset):
    images = random_images(MIXED)
    policy = preset(18)
    where: dict[str, Any] = {"seed": 1, "epoch": 2, "indices": np.arange(len(images)), "device": DEVICE}
    ours = make_views(images, policy, **where, backend="cuda")
    for a, b in zip(ours, make_views(images, policy, **where, backend="reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=LAST_BITS, check_stride=False)
        assert a.is_contiguous(memory_format=torch.channels_last)
    for size, crop in ((18, None), (9, 0.5)):
        fixed = eval_images(images, size, policy.preset, crop=crop, device=DEVICE, backend="cuda")
        defined = eval_images(images, size, policy.preset, crop=crop, device=DEVICE, backend="reference")
        assert torch.equal(fixed, defined)


def test_each_view_may_have_its_own_policy(monkeypatch):
    images = random_images(MIXED)
    policies = [
        Policy.google(18),
        Policy.google(18),
        replace(Policy.google(7, crop_area=(0.05, 0.14)), min_covered=0.0),
    ]
    sent = []
    upload = DeviceImages.upload
    monkeypatch.setattr(DeviceImages, "upload", lambda *args: sent.append(1) or upload(*args))
    where: dict[str, Any] = {"seed": 1, "epoch": 2, "indices": np.arange(len(images)), "views": range(3)}
    ours = make_views(images, policies, **where, device=DEVICE, backend="cuda")
    assert len(sent) == 1 and ours[2].shape == (len(images), 3, 7, 7)
    for a, b in zip(ours, make_views(images, policies, **where, backend="reference"), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=LAST_BITS, check_stride=False)


def test_no_images_make_no_views():
    nothing = np.empty((0, 8, 8, 3), np.uint8)
    first, second = make_views(
        nothing, Policy.google(8), seed=0, epoch=0, indices=np.arange(0), device=DEVICE, backend="cuda"
    )
    assert first.shape == second.shape == (0, 3, 8, 8)


def test_resident_images_make_the_views_of_the_same_images_streamed():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 10, 3), dtype=np.uint8)
    data = array_images(
        pixels, None, name="noise", split="all", has_own_split=False, classes=None, channels="auto"
    )  # fmt: skip
    ragged = random_images([(14, 9), (5, 30), (20, 20)])
    policy, rows = Policy.google(10), np.array([7, 0, 7])
    where: dict[str, Any] = {"seed": 1, "epoch": 2, "indices": rows, "device": DEVICE, "backend": "cuda"}
    resident = DeviceImages.of(data, DEVICE)
    for a, b in zip(
        make_views(resident[rows], policy, **where), make_views(data.read(rows), policy, **where), strict=True
    ):
        assert torch.equal(a, b)
    some, rows = DeviceImages.upload(ragged, 3, DEVICE), np.array([2, 1])
    where["indices"] = rows
    for a, b in zip(
        make_views(some[rows], policy, **where), make_views([ragged[2], ragged[1]], policy, **where), strict=True
    ):
        assert torch.equal(a, b)


def test_a_data_set_is_sent_in_shares(monkeypatch):
    images = random_images([(5, 4), (100, 90), (1, 1), (30, 30), (2, 9)])
    sizes = resize.image_sizes(images)
    data = array_images(
        np.zeros((5, 2, 2, 3), np.uint8), None, name="mixed", split="all", has_own_split=False, classes=None,
        channels="auto",
    )  # fmt: skip
    data = replace(data, sizes=sizes, store=MemoryStore(images))
    monkeypatch.setattr("simclr.views.device_images._SHARE_BYTES", 1000)
    resident = DeviceImages.of(data, DEVICE)
    assert torch.equal(resident.pixels.cpu(), torch.from_numpy(np.concatenate([image.ravel() for image in images])))


def test_images_may_lie_beyond_four_gigabytes():
    image = random_images([(9, 11)])[0]
    begin = 2**32 + 2**31 + 5
    pixels = torch.empty(begin + image.size, dtype=torch.uint8, device=DEVICE)  # the pages before it stay untouched
    pixels[begin:] = torch.from_numpy(image.ravel())
    far = DeviceImages(pixels, np.array([begin]), np.array([[9, 11]]), 3)
    policy = Policy.google(8)
    params = draws(policy, [image])
    assert torch.equal(cuda.render(far, [params], policy, torch.float32)[0].cpu(), rendered([image], params, policy))


def test_training_takes_its_views_from_images_that_stay_on_the_device(monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    data = array_images(
        pixels, None, name="noise", split="all", has_own_split=False, classes=None, channels="auto"
    )  # fmt: skip
    config = PretrainConfig(size=8, batch_size=4, precision="fp32")

    def batches_of(world):
        inputs = _make_inputs(data, config, world, (8, 8))
        return batches.make_batches(data, inputs, batch_size=4, seed=config.seed, world=world, verbose=True)

    expected = batches_of(DistributedContext())(1)  # straddles two epochs
    monkeypatch.setattr(batches, "has_kernels", lambda device: True)
    for free, said in ((10_000, "stay there"), (100, "is sent there")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        batch = batches_of(DistributedContext(device=DEVICE))
        assert said in capsys.readouterr().err
        for ours, theirs in zip(batch(1), expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=LAST_BITS, check_stride=False)


def test_one_view_alone_is_that_of_the_pair():
    images = DeviceImages.upload(random_images([(12, 9)] * 3), 3, DEVICE)
    draw = {"policy": Policy.google(8), "seed": 1, "epoch": 2, "indices": np.arange(3)}
    assert torch.equal(make_view(images, view=1, **draw), make_views(images, **draw)[1])


def test_what_does_not_fit_is_refused(monkeypatch):
    images = DeviceImages.upload(random_images([(8, 8)] * 2), 3, DEVICE)
    where = {"seed": 0, "epoch": 0, "indices": np.arange(2)}
    with pytest.raises(UserError, match="images of 3 channels and a policy of 1"):
        make_views(images, Policy.google(8, channels=1), **where)
    with pytest.raises(UserError, match="only 'cuda'"):
        make_views(images, Policy.google(8), **where, backend="cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="give a GPU"):
        make_views(random_images([(8, 8)] * 2), Policy.google(8), **where, backend="cuda")


# --- without interpreter ----------------------------------------------------------------------------------------------

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from simclr.views import cuda, triton_kernels

POINTERS = {"pixels": "*u8", "views": "*i32", "keys": "*fp32", "planes": "*fp32", "out": "*bf16"}
for google in (True, False):
    constants = {"SIZE": 40, "CHANNELS": 3, "GOOGLE": google, "WORDS": cuda._view_type(40).itemsize // 4}
    for kernel, more in (
        (triton_kernels.make_kernel, {"ADD": False, "BLOCK": 512}), (triton_kernels.blur_kernel, {"BLOCK": 512})
    ):
        names, values = kernel.arg_names, constants | more
        source = ASTSource(
            kernel,
            {name: POINTERS.get(name, "constexpr") for name in names},
            {(names.index(name),): value for name, value in values.items()},
        )
        options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert len(made.asm["cubin"]) > 1000
        assert not re.search(r"\\bfma\\.", made.asm["ptx"]) and "div.full" not in made.asm["ptx"]
"""


def test_kernels_compile_for_a_gpu_without_fused_multiply_adds(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = tmp_path / "program.py"
    program.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_views_are_imported_without_triton():
    code = "import sys, simclr.views.views, simclr.cli.main; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
