"""Images in any form: each holds to what Pillow or plain arithmetic says, and what could be misread is refused."""

import joblib
import numpy as np
import pytest
import torch
from PIL import Image

import simclr
from simclr import UserError
from simclr.config.encoder import EncoderConfig
from simclr.data.forms import Pixels, open_images, to_bytes
from simclr.data.images import array_images
from simclr.models.encoder import build_encoder
from simclr.weights.folder import save_encoder

RAMP = np.arange(240, dtype=np.uint8).reshape(12, 20)  # (H, W)
COLOUR = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Encoders for gray and for colour images, by their number of channels."""
    root = tmp_path_factory.mktemp("encoders")
    for channels in (1, 3):
        encoder = build_encoder(EncoderConfig("small", channels=channels, size=8, width=0.25), seed=1)
        save_encoder(encoder, root / str(channels), preprocessing="google", origin={})
    return {channels: simclr.load(root / str(channels)) for channels in (1, 3)}


def palette_image():
    image = Image.fromarray(COLOUR).quantize(16)
    return image, np.asarray(image.convert("RGB"))


def over_white():
    alpha = np.full((12, 20), 51, np.uint8)  # a fifth
    image = Image.fromarray(np.dstack([COLOUR, alpha]))
    return image, np.rint(COLOUR * 0.2 + 255 * 0.8).astype(np.uint8)


def gray_over_white():
    alpha = Image.fromarray(np.full((12, 20), 51, np.uint8))
    return Image.merge("LA", [Image.fromarray(RAMP), alpha]), np.rint(RAMP * 0.2 + 255 * 0.8).astype(np.uint8)


def sixteen_bits():
    return Image.fromarray(RAMP.astype(np.uint16) * 257), RAMP


def four_inks():
    image = Image.fromarray(COLOUR).convert("CMYK")
    return image, np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("made", [palette_image, over_white, gray_over_white, sixteen_bits, four_inks])
def test_pillow_images_of_every_mode(made):
    image, expected = made()
    np.testing.assert_array_equal(Pixels(image)[0].squeeze(), expected)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (RAMP.astype(np.int64), RAMP),
        (RAMP.tolist(), RAMP),
        (RAMP / 255, RAMP),
        ((RAMP / 255).astype(np.float16), RAMP),
        (RAMP / 255 * 1.0001, RAMP),  # as resizing overshoots
        (RAMP > 99, np.where(RAMP > 99, 255, 0)),
        (RAMP[::-1, ::-2], RAMP[::-1, ::-2]),
        (torch.from_numpy(RAMP).to(torch.bfloat16) / 256, RAMP),
        (torch.from_numpy(RAMP.astype(np.int64)), RAMP),
        (torch.from_numpy(COLOUR).permute(2, 0, 1).float().div(255).requires_grad_(), COLOUR),
    ],
)
def test_numbers_of_every_type(pixels, expected):
    found = Pixels([pixels])[0].squeeze()
    np.testing.assert_allclose(found, expected, atol=2 if str(getattr(pixels, "dtype", "")) == "torch.bfloat16" else 0)


def test_a_mixed_sequence_holds_what_its_members_hold(models, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "ramp.png")
    Image.fromarray(RAMP[:7]).save(tmp_path / "small.png")
    mixed = [
        tmp_path / "ramp.png", str(tmp_path / "small.png"), Image.fromarray(RAMP), RAMP, RAMP[..., None], RAMP / 255,
        torch.from_numpy(RAMP), torch.from_numpy(RAMP)[None],
    ]  # fmt: skip
    expected = models[1].embed(RAMP[None])
    for form in (mixed, tuple(mixed), iter(mixed), (item for item in mixed)):
        found = models[1].embed(form, batch_size=3)
        np.testing.assert_allclose(found[[0, 2, 3, 4, 5, 6, 7]], np.repeat(expected, 7, axis=0), atol=1e-5)
        np.testing.assert_allclose(found[[1]], models[1].embed(RAMP[None, :7]), atol=1e-5)
    column = np.array([str(tmp_path / "ramp.png")] * 2)  # as of a DataFrame
    np.testing.assert_allclose(models[1].embed(column), np.repeat(expected, 2, axis=0), atol=1e-5)
    in_colour = models[3].embed(np.repeat(RAMP[None, ..., None], 3, axis=-1))
    np.testing.assert_allclose(models[3].embed(mixed)[[0, 3]], np.repeat(in_colour, 2, axis=0), atol=1e-5)


def test_opened_gray_images_show_in_colour_too(models):
    images = array_images(
        RAMP[None], None, name="ramp", split="all", has_own_split=False, classes=None, channels="auto"
    )
    np.testing.assert_array_equal(models[3].embed(images), models[3].embed(RAMP[None]))
    with pytest.raises(UserError, match="1-channel images and the colours is in colour"):
        models[1].embed(
            array_images(
                COLOUR[None], None, name="the colours", split="all", has_own_split=False, classes=None, channels="auto"
            )
        )


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "at least one"),
        (None, "given as NoneType"),
        (7, "given as int"),
        ({"image": RAMP}, "given as dict"),
        (b"\x89PNG", "given as bytes"),
        ([None], "given as NoneType"),
        ([[[0, 1], [2]]], "given as list"),
        (RAMP, "one image"),
        (COLOUR.transpose(2, 0, 1)[None], "channels first"),
        ([COLOUR.transpose(2, 0, 1)], r"shape \(3, 12, 20\); give \(H, W\) or \(H, W, C\)"),
        (torch.from_numpy(COLOUR)[None], r"shape \(1, 12, 20, 3\); give \(n, C, H, W\)"),
        ([torch.from_numpy(COLOUR)], r"shape \(12, 20, 3\); give \(H, W\) or \(C, H, W\)"),
        ([np.dstack([COLOUR, RAMP])], "1 or 3 channels"),
        ([COLOUR[None]], "shape"),
        (RAMP[None].astype(np.uint16), "65535"),
        (RAMP[None].astype(np.int32) * 300, r"\[0, 71700\]"),
        (RAMP[None].astype(np.float64), r"floats in \[0, 1\]"),
        (RAMP[None] / 255 - 0.01, r"\[-0.01, "),
        (RAMP[None] / 238, r"\[0, 1\.0042"),
        (RAMP[None] * 1j, "complex"),
        ("no/such.png", "no file"),
    ],
)
def test_what_is_no_image_is_one_clear_sentence(models, images, said):
    with pytest.raises(UserError, match=said) as caught:
        models[3].embed(images)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_and_a_broken_file_say_what_to_do(models, tmp_path):
    with pytest.raises(UserError, match="open_data"):
        models[3].embed(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    Image.fromarray(RAMP).save(tmp_path / "good.png")
    names = [tmp_path / "good.png", tmp_path / "broken.png"]
    with pytest.raises(UserError, match=r"broken\.png cannot be used"):
        models[3].embed(names)
    with pytest.raises(UserError, match=r"1 of 2 files cannot be used, the first is .*broken\.png"):
        open_images(names)
    with pytest.raises(UserError, match="batch_size was 0"):
        models[3].embed(COLOUR, batch_size=0)


def test_images_to_train_on_are_those_given(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    Image.fromarray(COLOUR).save(tmp_path / "b.png")
    for given in ([tmp_path / "b.png", tmp_path / "a.png", tmp_path / "b.png"], [COLOUR, RAMP, COLOUR]):
        images = open_images(given)
        assert len(images) == 3 and images.channels == 3 and images.labels is None
        first, second, third = images.read([0, 1, 2])
        np.testing.assert_array_equal(first, COLOUR)
        np.testing.assert_array_equal(second, np.repeat(RAMP[..., None], 3, axis=-1))
        np.testing.assert_array_equal(third, COLOUR)
        for again in (given, images):
            gray = open_images(again, channels="1").read([0])[0].squeeze()
            np.testing.assert_array_equal(gray, np.asarray(Image.fromarray(COLOUR).convert("L")))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpux"])
def test_a_device_that_is_not_there_is_one_clear_sentence(models, name):
    with pytest.raises(UserError, match="device was"):
        models[1].to(name)


def test_a_loaded_encoder_travels_by_pickle_and_between_devices(models, tmp_path):
    joblib.dump(models[1], tmp_path / "model.joblib")
    again = joblib.load(tmp_path / "model.joblib").to("auto").to(torch.device("cpu"))
    np.testing.assert_array_equal(again.embed(RAMP[None]), models[1].embed(RAMP[None]))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_every_byte_comes_back(dtype):
    every = np.arange(256)
    numbers = every / 255 if dtype is np.float32 else every
    np.testing.assert_array_equal(to_bytes(numbers.astype(dtype)), every)
