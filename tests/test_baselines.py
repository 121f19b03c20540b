"""Baselines made by hand: HOG held to scikit-image, k-means patches to a formula over single patches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.feature import hog

from simclr.config.encoder import EncoderConfig
from simclr.data.forms import open_images
from simclr.data.opening import open_data
from simclr.data.presets import TransferSet
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation import patches as patches_module
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.hog import HogFeatures
from simclr.evaluation.keys import features_key
from simclr.evaluation.patches import PatchFeatures
from simclr.evaluation.split import split_data
from simclr.evaluation.subjects import EvaluatedModel, open_subject
from simclr.evaluation.transfer import linear_transfer
from simclr.models.inference import pixels_of
from simclr.tasks.evaluate import evaluate
from simclr.tasks.options.labels import Evaluate

ALONE = DistributedContext()


@pytest.fixture(scope="module")
def digits():
    """Scikit-learn's digits, 8 x 8: 200 to learn from and 100 to test."""
    return open_data("digits").subset(np.arange(200)), open_data("digits", split="test").subset(np.arange(100))


@pytest.fixture
def few_patches(monkeypatch):
    monkeypatch.setattr(patches_module, "FIT_PATCHES", 2_000)
    monkeypatch.setattr(patches_module, "CENTROIDS", 12)


def opened(name: str, *, size: int = 8, channels: int = 1, cache: FeatureCache | None = None) -> EvaluatedModel:
    shape = EncoderConfig("small", channels=channels, size=size)
    return open_subject(
        name, like=shape, preprocessing="google", seed=0, cache=cache or FeatureCache(None), world=ALONE
    )


@pytest.mark.parametrize(
    ("size", "channels", "cell"),
    [(28, 1, 4), (32, 3, 4), (30, 3, 4), (8, 1, 4), (48, 3, 6), (100, 1, 13), (224, 3, 28)],
)
def test_hog_equals_scikit_image(size, channels, cell):
    images = np.random.default_rng(size).integers(0, 256, (3, size, size, channels)) / 256  # differences are exact
    features = HogFeatures(size)
    ours = features.network(ALONE)(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    theirs = [
        hog(
            image if channels == 3 else image[..., 0], orientations=8, pixels_per_cell=(cell, cell),
            cells_per_block=(2, 2), channel_axis=-1 if channels == 3 else None,
        )
        for image in images
    ]  # fmt: skip
    np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-6)
    assert features.cell == cell and ours.shape == (3, features.num_features)
    assert features.num_features <= 1_568


def test_hog_of_a_flat_image_is_zero():
    assert not HogFeatures(28).network(ALONE)(torch.full((2, 1, 28, 28), 0.3)).any()


def test_patches_equal_a_formula_over_single_patches(digits, few_patches):
    """Contrast, whitening, triangle activation, sums over quadrants and standardising, one patch after the other."""
    train, test = digits
    features = PatchFeatures(size=8, preset="google", images=train, seed=3)
    network = features.network(ALONE)
    mean, whitening, centroids = (getattr(network, name).numpy() for name in ("mean", "whitening", "centroids"))
    assert centroids.shape == (12, 36) and features.num_features == 48

    def described(image: np.ndarray) -> np.ndarray:
        sums = np.zeros((2, 2, 12))
        for row in range(3):
            for column in range(3):
                patch = image[row : row + 6, column : column + 6].flatten() * 255
                patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 10)
                patch = whitening.T @ (patch - mean)
                distances = np.array([np.linalg.norm(patch - centroid) for centroid in centroids])
                sums[row // 2, column // 2] += np.maximum(0, distances.mean() - distances)
        return sums.flatten()

    def images_of(part) -> np.ndarray:
        return pixels_of(part, size=8).reshape(-1, 8, 8).astype(np.float64)

    plain = np.stack([described(image) for image in images_of(train)])
    expected = (np.stack([described(image) for image in images_of(test)]) - plain.mean(0)) / (plain.std(0) + 0.01)
    ours = network(torch.from_numpy(images_of(test)).float()[:, None]).numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_zca_whitens_all_but_small_directions():
    rows = torch.randn(5_000, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([10.0, 5, 3, 2, 1, 0.01])
    )
    rows = rows @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0] + 4
    mean, whitening = patches_module.zca(rows)
    white = (rows - mean) @ whitening
    values = torch.linalg.eigvalsh(torch.cov(white.T, correction=0)).numpy()
    spectrum = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).numpy()
    np.testing.assert_allclose(values, np.sort(spectrum / (spectrum + 0.1)), rtol=1e-3, atol=1e-4)
    assert torch.equal(whitening, whitening.T) or torch.allclose(whitening, whitening.T, atol=1e-6)


def test_patches_are_learnt_from_training_images_without_labels_by_a_seed(digits, few_patches):
    train, test = digits
    patches = opened("patches")
    first = patches.learnt_from(train, seed=0)
    features = first.features(test)
    again = patches.learnt_from(replace(train, labels=None, classes=None), seed=0)
    assert np.array_equal(again.features(test), features)
    for other in (patches.learnt_from(train, seed=1), patches.learnt_from(train.subset(np.arange(150)), seed=0)):
        assert not np.allclose(other.features(test), features)
        assert features_key(other, test, None) != features_key(first, test, None)
    train_features = first.features(train)
    np.testing.assert_allclose(train_features.mean(0), 0, atol=1e-4)
    assert np.all(train_features.std(0) <= 1)


def test_features_made_by_hand_are_kept_under_all_that_determines_them(digits, few_patches, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path)
    hog_features = opened("hog", cache=cache).features(digits[1])
    patch_features = opened("patches", cache=cache).learnt_from(digits[0], seed=0).features(digits[1])
    assert len(list(tmp_path.iterdir())) == 2

    def never(*_args, **_options):
        raise AssertionError("made again")

    monkeypatch.setattr("simclr.evaluation.subjects.outputs", never)
    monkeypatch.setattr(PatchFeatures, "network", never)
    assert np.array_equal(opened("hog", cache=cache).features(digits[1]), hog_features)
    kept = opened("patches", cache=cache).learnt_from(digits[0], seed=0)
    assert np.array_equal(kept.features(digits[1]), patch_features)
    with pytest.raises(AssertionError):
        opened("hog", cache=cache).features(digits[0])
    monkeypatch.setattr("simclr.evaluation.hog.HOG_VERSION", 2)
    with pytest.raises(AssertionError):
        opened("hog", cache=cache).features(digits[1])
    monkeypatch.setattr("simclr.evaluation.patches.PATCHES_VERSION", 2)
    with pytest.raises(AssertionError):
        opened("patches", cache=cache).learnt_from(digits[0], seed=0).features(digits[1])


def test_pixels_keep_the_key_of_earlier_versions():
    """Stored results of raw pixels are found again: hand-made features alone have a further field."""
    assert set(opened("pixels").model) == {"weights", "network", "preprocessing", "size", "channels", "device"}


@pytest.mark.parametrize(("name", "size", "channels", "seen"), [("hog", 100, 3, 100), ("patches", 100, 3, 32)])
def test_large_colour_images(name, size, channels, seen, few_patches):
    images = np.random.default_rng(0).integers(0, 256, (20, size, size + 10, channels), dtype=np.uint8)
    data = open_images(images)
    subject = opened(name, size=size, channels=channels).learnt_from(data, seed=0)
    features = subject.features(data)
    assert subject.size == seen and np.isfinite(features).all() and len(features) == 20
    assert f"{seen} x {seen} pixels" in subject.description


@pytest.mark.parametrize(("name", "size"), [("hog", 7), ("patches", 6)])
def test_images_too_small_for_the_cells_are_refused(digits, name, size):
    with pytest.raises(UserError, match=f"{name} needs images of at least .* evaluated at {size} x {size}"):
        opened(name, size=size).learnt_from(digits[0], seed=0)


def test_images_too_small_for_hog_are_evaluated_without_it(simclr, tmp_path):
    """Where nobody asked for it: hog is among the rows of an evaluation without --compare."""
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "tiny.npz", x=draw.integers(0, 256, (40, 6, 6), dtype=np.uint8), y=np.arange(40) % 2)
    code, table, said = simclr("evaluate", "random", tmp_path / "tiny.npz", "--protocol", "knn", "--cache", "off")
    assert code == 0 and "hog is left out" in said and "pixels (baseline)" in table and "hog" not in table


def test_images_of_one_colour_have_patches_too(few_patches):
    data = open_images(np.full((5, 8, 8), 7, np.uint8))
    assert np.isfinite(opened("patches").learnt_from(data, seed=0).features(data)).all()


def test_an_evaluation_beside_them(simclr, digits, few_patches, tmp_path):
    """By the command, with commas between names."""
    few = digits[0].subset(np.flatnonzero(digits[0].labels < 3))
    data = tmp_path / "data.npz"
    np.savez(data, x=few.read(np.arange(len(few))), y=few.labels)
    code, table, said = simclr(
        "evaluate", "hog", data, "--compare", "patches,pixels", "--seeds", 2, "--labels", "5/class", "--protocol",
        "knn,linear", "--out", tmp_path / "out", "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert code == 0, said
    rows = [line.split()[0] for line in table.splitlines()[1:4]]
    assert rows[0] == "hog" and set(rows) == {"hog", "patches", "pixels"}
    assert "knn of hog" in table and "12 centroids" in table and "pretraining" not in table
    code, table, said = simclr(
        "evaluate", "pixels", data, "--compare", "hog", "patches", "--protocol", "curve,label-free",
        "--counts", 2, "--out", tmp_path / "out", "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert code == 0, said
    assert table.count("patches (baseline)") >= 2


def test_transfer_learns_patches_from_the_training_images_of_each_set(digits, few_patches):
    learn, validation = digits[0].subset(np.arange(150)), digits[0].subset(np.arange(150, 200))
    data = TransferSet(name="digits", train=learn, validation=validation, test=digits[1], metric="top-1", how="")
    plain, seeded = (
        linear_transfer(subject, data, seed=2, l2_values=(1e-3, 1e-2))
        for subject in (opened("patches"), opened("patches").learnt_from(learn, seed=2))
    )
    assert plain.key == seeded.key and plain.metrics == seeded.metrics and plain.value("score") > 0.5


def test_patches_see_no_image_that_is_tested_on(digits, few_patches, tmp_path, monkeypatch):
    """Where the data has no split of its own, the fifth that is tested on differs by seed."""
    np.savez(tmp_path / "data.npz", x=digits[0].read(np.arange(200)), y=digits[0].labels)
    seen = []
    real = EvaluatedModel.learnt_from

    def record(self, images, *, seed):
        seen.append((seed, images))
        return real(self, images, seed=seed)

    monkeypatch.setattr(EvaluatedModel, "learnt_from", record)
    options = Evaluate(
        run="pixels", data=(str(tmp_path / "data.npz"),), compare=("patches",), seeds=2, protocol="knn", cache="off"
    )
    evaluate(options, lambda config: config)
    everything = open_data(tmp_path / "data.npz")
    assert [seed for seed, _ in seen] == [0, 1]
    for seed, images in seen:
        split = split_data(everything, None, seed=seed)
        assert images.keys == split.train.keys and not set(images.keys) & set(split.test.keys)
