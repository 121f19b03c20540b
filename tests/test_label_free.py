"""Planted copies among real images, and measures of features against their formulas."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.metrics import silhouette_samples

from simclr.config.encoder import EncoderConfig
from simclr.data.images import Images, MemoryStore, array_images
from simclr.errors import UserError
from simclr.evaluation import duplicates as copies
from simclr.evaluation.duplicates import find_duplicates
from simclr.evaluation.label_free import LabelFree, label_free, view_features
from simclr.evaluation.registration import SMOOTHING, blurred
from simclr.models.encoder import build_encoder
from simclr.reports.pictures import draw_copies, draw_neighbours, draw_outliers
from simclr.views.policy import Policy

SIDE = 48


def scenes(n: int, seed: int, channels: int = 3) -> np.ndarray:
    """Pictures that are alike: the same bright disc in each, a texture and a tint of its own. (n, 48, 48, C) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    disc = 120.0 * (y**2 + x**2 < 0.6)[..., None]
    texture = gaussian_filter(rng.normal(size=(n, SIDE, SIDE, 1)), (0, 1.5, 1.5, 0))
    tint = rng.normal(size=(n, 1, 1, channels))
    return np.clip(80 + disc + 10 * tint + 25 * texture / texture.std(), 0, 255).astype(np.uint8)


def images_of(pixels: np.ndarray | list[np.ndarray], name: str = "scenes") -> Images:
    """`Images` of one size, or of several."""
    if isinstance(pixels, np.ndarray):
        channels = "3" if pixels.shape[-1] == 3 else "auto"
        return array_images(
            pixels, None, name=name, split="all", has_own_split=False, classes=None, channels=channels
        )  # fmt: skip
    base = images_of(np.zeros((len(pixels), 1, 1, pixels[0].shape[-1]), np.uint8), name)
    sizes = np.array([image.shape[:2] for image in pixels])
    return replace(base, sizes=sizes, store=MemoryStore(pixels))


def as_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def as_array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encoded(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    as_pil(image).save(buffer, "JPEG", quality=60)
    return as_array(Image.open(buffer))


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    side = round(SIDE * factor)
    return as_array(as_pil(image).resize((side, side), Image.Resampling.LANCZOS))


CHANGES = {
    "jpeg": encoded,
    "half": lambda image: resized(image, 0.5),
    "double": lambda image: resized(image, 2),
    "trimmed at a corner": lambda image: image[2:, 2:],
    "trimmed around": lambda image: image[1:-1, 1:-1],
    "brighter": lambda image: np.clip(image.astype(int) + 15, 0, 255).astype(np.uint8),
    "less contrast": lambda image: (image * 0.85).astype(np.uint8),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found_and_nothing_else(change, channels):
    train, test = scenes(120, 0, channels), scenes(40, 1, channels)
    planted = {3: 50, 17: 0, 30: 119}  # test row: training row
    mixed = [CHANGES[change](train[planted[row]]) if row in planted else test[row] for row in range(len(test))]
    found = find_duplicates(images_of(train), images_of(mixed, "test"))
    assert {pair.copy_row: pair.original_row for pair in found.pairs} == planted
    assert all(pair.kind == "near" and 0.97 < pair.similarity < 1 + 1e-6 for pair in found.pairs)
    assert (found.num_identical, found.num_near) == (0, 3)
    assert found.sentence.startswith("3 of 40 images of test are in scenes too, or nearly (0 identical, 3 near)")


def test_merely_alike_images_are_not_copies():
    found = find_duplicates(images_of(scenes(100, 0)), images_of(scenes(100, 1), "test"))
    assert found.pairs == [] and found.sentence == "0 of 100 images of test are in scenes too, or nearly."


def test_copies_within_a_set_are_counted_once_each():
    pixels = scenes(60, 2)
    pixels[40], pixels[41] = pixels[7], pixels[7]
    pixels[50] = encoded(pixels[20])
    found = find_duplicates(images_of(pixels))
    assert [(pair.original_row, pair.copy_row, pair.kind) for pair in found.pairs] == [
        (7, 40, "identical"), (7, 41, "identical"), (20, 50, "near"),
    ]  # fmt: skip
    assert found.sentence.startswith("3 of 60 images of scenes are copies of others of them, or nearly (2 identical, 1")
    assert json.loads(json.dumps(found.to_dict()))["pairs"][0]["copy"] == "40"


def test_blocks_change_nothing(monkeypatch):
    train, test = scenes(50, 3, 1), scenes(30, 4, 1)
    test[::7] = [encoded(image) for image in train[:5]]
    whole = find_duplicates(images_of(train), images_of(test))
    seen = []
    for name, size in (("QUERY_BLOCK", 7), ("ROW_BLOCK", 11), ("PAIR_BLOCK", 5)):
        monkeypatch.setattr(copies, name, size)
    blocked = find_duplicates(images_of(train), images_of(test), progress=lambda *done: seen.append(done))
    assert [(p.original_row, p.copy_row) for p in blocked.pairs] == [(p.original_row, p.copy_row) for p in whole.pairs]
    assert len(whole.pairs) == 5 and seen[0] == (7, 30) and seen[-1] == (30, 30)


def test_the_nearest_sketches_are_the_nearest():
    """Against the definition: what remains of a sketch after the best fit by the query and its tangents."""
    thumbnails = torch.from_numpy(scenes(40, 5, 1)[:, :32, :32]).permute(0, 3, 1, 2)
    sketches = copies._sketch(thumbnails)
    nearness, nearest = copies._nearest(thumbnails[:3], sketches, 5)
    assert nearest[:, 0].tolist() == [0, 1, 2]
    gray = blurred(thumbnails[:1, 0].float(), SMOOTHING)[0].numpy().astype(np.float64)
    down, right = np.gradient(gray)
    line = (np.arange(32) + 0.5) / 16 - 1
    span = [gray, right, down, right * line, down * line[:, None]]
    span = np.stack([s.reshape(8, 4, 8, 4).mean((1, 3)).ravel() for s in span], 1)
    span -= span.mean(0)
    for near, row in zip(nearness[0], nearest[0], strict=True):
        target = sketches[row].numpy().astype(np.float64)
        left = target - span @ np.linalg.lstsq(span, target, rcond=None)[0]
        assert near.item() == pytest.approx(1 - left @ left, abs=1e-4)


def test_blur_equals_scipy():
    x = torch.from_numpy(scenes(2, 0, 1)[:, :32, :32, 0].astype(np.float32))
    expected = gaussian_filter(x.numpy(), (0, 1.7, 1.7), mode="nearest", radius=(0, 5, 5))
    np.testing.assert_allclose(blurred(x, 1.7), expected, rtol=1e-5)


def test_flat_images_and_small_sets():
    flat = np.full((3, 20, 20, 1), 7, np.uint8)
    flat[1] = 9
    found = find_duplicates(images_of(flat))
    assert [(p.original_row, p.copy_row) for p in found.pairs] == [(0, 2)] and found.num_flat == 3
    assert find_duplicates(images_of(scenes(1, 0))).pairs == []
    with pytest.raises(UserError, match="channels"):
        find_duplicates(images_of(flat), images_of(scenes(2, 0)))


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(0)
    centres = 4 * rng.normal(size=(4, 12))
    features = (centres[np.arange(80) % 4] + rng.normal(size=(80, 12))).astype(np.float32)
    features[5] = centres[0] + centres[2]  # between two clusters
    views = features[:50], features[:50] + rng.normal(size=(50, 12)).astype(np.float32)
    images = images_of(scenes(80, 6, 1))
    return features, views, images, label_free(features, images, views=views, clusters=4, test=images)


def unit(features: np.ndarray) -> np.ndarray:
    return features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)


def test_geometry_equals_the_formulas(measured):
    features, views, _, result = measured
    a, b = map(unit, views)
    assert result.alignment == pytest.approx(((a - b) ** 2).sum(1).mean(), rel=1e-10)
    u = unit(features)
    squared = [((u[i] - u[j]) ** 2).sum() for i in range(80) for j in range(80) if i != j]
    assert result.uniformity == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(squared)))), rel=1e-9)
    s = np.linalg.svd(features, compute_uv=False)
    np.testing.assert_allclose(result.spectrum, s / s.sum(), rtol=1e-4)
    assert result.effective_rank == pytest.approx(np.exp(-(s / s.sum() * np.log(s / s.sum())).sum()), rel=1e-4)
    assert (result.alignment_rows, result.uniformity_rows, result.num_features) == (50, 80, 12)


def test_effective_rank_of_an_identity_covariance_is_the_width():
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 16)))[0] * 8  # columns of unit variance
    result = label_free(rows, images_of(scenes(64, 0, 1)), duplicates=False)
    assert result.effective_rank == pytest.approx(16, rel=1e-4)
    np.testing.assert_allclose(result.spectrum, 1 / 16, rtol=1e-4)
    assert result.within is None and result.alignment is None


def test_neighbours_and_misfits(measured):
    features, _, _, result = measured
    cosine = unit(features) @ unit(features).T
    for found in result.neighbours:
        expected = np.argsort(-cosine[found.query_row])[1:8]
        assert found.nearest_rows == expected.tolist()
        np.testing.assert_allclose(found.cosine, cosine[found.query_row, expected], atol=1e-4)
    assert result.outliers[0].row == 5  # the one between two clusters
    assert [m.silhouette for m in result.outliers] == sorted(m.silhouette for m in result.outliers)
    planted = np.arange(80) % 4  # what k-means must have found
    planted[5] = planted[[m.row for m in result.outliers if m.cluster == result.outliers[0].cluster][1]]
    expected = silhouette_samples(unit(features), planted, metric="cosine")
    assert result.silhouette == pytest.approx(expected.mean(), abs=1e-4)
    assert result.outliers[0].silhouette == pytest.approx(expected[5], abs=1e-3)


def test_copies_are_reported_and_all_is_json(measured):
    *_, result = measured
    assert result.within is not None and result.within.pairs == []
    assert result.across is not None and result.across.num_identical == 80
    plain = json.loads(json.dumps(result.metrics | result.details))
    assert plain["across"]["sentence"] == result.across.sentence
    assert LabelFree.from_plain(plain) == result


def test_pictures_show_what_was_found(measured):
    *_, images, result = measured
    for picture in (
        draw_neighbours(images, result.neighbours[:1]),
        draw_copies(replace(result.across, pairs=result.across.pairs[:3]), images, images),
        draw_copies(result.within, images),
        draw_outliers(images, result.outliers[:3]),
    ):
        assert min(Image.open(io.BytesIO(picture)).size) > 100


def test_view_features_are_those_of_one_image_and_deterministic():
    encoder = build_encoder(EncoderConfig("small", channels=3, size=16), seed=0).train()
    images = images_of(scenes(30, 7))
    first, second = view_features(encoder, images, seed=1)
    again, _ = view_features(encoder, images, seed=1, batch_size=7)
    np.testing.assert_allclose(first, again, atol=1e-5)
    assert encoder.training and first.shape == second.shape == (30, encoder.num_features)
    whole = Policy.google(16, channels=3, crop_area=(1, 1), flip=0, jitter=0, gray=0, blur=0)
    same, other = view_features(encoder, images, policy=replace(whole, crop_aspect=(1, 1)), rows=10)
    assert len(same) == 10
    np.testing.assert_allclose(same, other, atol=1e-5)  # nothing left to draw
    assert np.abs(first - second).max() > 1e-3


def test_what_cannot_be_measured_is_said():
    images = images_of(scenes(8, 0))
    broken = np.ones((8, 4))
    with pytest.raises(UserError, match="2 or more"):
        label_free(broken, images, clusters=8)
    with pytest.raises(UserError, match="zero"):
        label_free(0 * broken, images)
    broken[2, 1] = np.nan
    with pytest.raises(UserError, match="in 1 of 8 rows"):
        label_free(broken, images)
    with pytest.raises(UserError, match="too few"):
        label_free(broken[:2], images.subset([0, 1]))
