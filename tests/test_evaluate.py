"""Evaluation, held to scikit-learn and to the promise that nothing of the test side touches a choice."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from helpers import known
from simclr.config.encoder import EncoderConfig
from simclr.data.opening import open_data
from simclr.errors import UserError
from simclr.evaluation.knn import knn
from simclr.evaluation.logistic import linear_probe
from simclr.evaluation.metrics import accuracy
from simclr.evaluation.split import split_data
from simclr.evaluation.subjects import random_encoder
from simclr.models.encoder import build_encoder
from simclr.models.inference import extract, pixels_of


@pytest.fixture(scope="module")
def digits():
    return open_data("digits"), open_data("digits", split="test")


@pytest.fixture(scope="module")
def features(digits):
    """Real, labelled features with no ties: pixels with a little noise."""
    noise = np.random.default_rng(0)
    train, test = (pixels_of(part, size=8) for part in digits)
    return tuple((part + 0.01 * noise.normal(size=part.shape)).astype(np.float32) for part in (train, test))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (5, 1.0)])
def test_knn_equals_scikit_learn(digits, features, k, temperature, monkeypatch):
    monkeypatch.setattr("simclr.evaluation.knn.CHUNK", 100)
    train, test = features
    labels = digits[0].labels
    other = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.astype(np.float64), labels)
    ours = knn(train, labels, test, k=k, temperature=temperature)
    assert np.array_equal(ours, other.predict(test.astype(np.float64)))


def test_knn_with_fewer_rows_than_neighbours_and_odd_labels():
    train = np.eye(3, dtype=np.float32)
    labels = np.array([7, -3, 7])
    assert knn(train, labels, train, k=50, temperature=0.01).tolist() == [7, -3, 7]


def test_linear_probe_equals_scikit_learn(digits, features):
    train, test = features
    labels = digits[0].labels
    scaler = StandardScaler().fit(train)
    other = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(train), labels)
    ours = linear_probe(train, labels, test, seed=0, l2_values=(10.0,)).predicted
    assert np.array_equal(ours, other.predict(scaler.transform(test)))


def test_no_test_row_touches_another_ones_prediction(digits, features):
    train, test = features
    labels = digits[0].labels
    for classify in (
        lambda rows: knn(train, labels, rows),
        lambda rows: linear_probe(train, labels, rows, seed=0).predicted,
    ):
        assert np.array_equal(classify(test)[:7], classify(test[:7]))


def test_features_do_not_depend_on_the_batch(digits):
    encoder = build_encoder(EncoderConfig("small", channels=1, size=8), seed=0)
    whole = extract(encoder, digits[1])
    np.testing.assert_allclose(extract(encoder, digits[1], batch_size=7), whole, atol=1e-5)


def test_split_is_stratified_seeded_and_the_labels_are_counted(digits):
    every = open_data("digits", split="all")
    split = split_data(every, None, seed=1)
    counts = np.bincount(known(split.test.labels)) / np.bincount(known(every.labels))
    assert np.abs(counts - 0.2).max() < 0.01
    assert not set(split.train.keys) & set(split.test.keys)
    assert split_data(every, None, seed=1).test.keys == split.test.keys
    assert split_data(every, None, seed=2).test.keys != split.test.keys
    few = split_data(*digits, seed=0, labels="2/class")
    assert np.bincount(known(few.train.labels)).tolist() == [2] * 10 and len(few.test) == len(digits[1])


def test_what_cannot_be_evaluated_is_said(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "unlabelled.npz", x=pixels)
    with pytest.raises(UserError, match="no labels"):
        split_data(open_data(tmp_path / "unlabelled.npz"), None, seed=0)
    np.savez(tmp_path / "one.npz", x=pixels, y=np.zeros(20, int))
    with pytest.raises(UserError, match="single class"):
        split_data(open_data(tmp_path / "one.npz"), None, seed=0)
    encoder = build_encoder(EncoderConfig("small", channels=3, size=8), seed=0)
    with pytest.raises(UserError, match="expects 3-channel"):
        extract(encoder, open_data(tmp_path / "one.npz"))


def test_accuracy():
    assert accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 0])) == 0.5


def test_the_random_baseline_is_no_straw_man(digits):
    """With its residual branches on, a random encoder is far better than what training begins from."""
    config = EncoderConfig("small", channels=1, size=8)
    train, test = digits
    scores = []
    for encoder in (build_encoder(config, seed=0), random_encoder(config, seed=0)):
        features = [extract(encoder, part) for part in (train, test)]
        scores.append(accuracy(knn(features[0], train.labels, features[1]), test.labels))
    assert scores[1] > scores[0] + 0.3
