"""Pseudo-labels: propagation against a dense inverse, and what a training on them sees."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.preprocessing import StandardScaler, normalize

from helpers import known
from simclr import UserError
from simclr.config.encoder import EncoderConfig
from simclr.config.finetune import FINETUNE_RECIPES
from simclr.data.images import array_images
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.evaluation import measure as measure_module
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.keys import accuracy_key
from simclr.evaluation.knn import knn
from simclr.evaluation.logistic import linear_probe
from simclr.evaluation.measure import EvaluationContext, Settings, measure_one, pseudo_labels_source
from simclr.evaluation.propagation import ALPHA, GAMMA, NEIGHBOURS, certainty, propagate
from simclr.evaluation.pseudo_labels import pseudo_labels, same_steps
from simclr.evaluation.results import ResultStore
from simclr.evaluation.split import Split, split_data
from simclr.evaluation.subjects import EvaluatedModel, open_subject
from simclr.models.encoder import build_encoder
from simclr.weights.folder import save_encoder

SHAPE = EncoderConfig("small", channels=1, size=8, width=0.5)


@pytest.fixture(scope="module")
def digits() -> Split:
    return split_data(open_data("digits"), open_data("digits", split="test"), seed=0, labels="10/class")


@pytest.fixture(scope="module")
def pixels() -> EvaluatedModel:
    return subject("pixels")


def subject(name: str) -> EvaluatedModel:
    return open_subject(
        name, like=SHAPE, preprocessing="google", seed=0, cache=FeatureCache(None), world=DistributedContext()
    )


def dense_propagation(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Equation by equation, with an inverse."""
    rows = normalize(StandardScaler().fit_transform(features.astype(np.float64)))
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -np.inf)
    affinity = np.zeros_like(cosine)
    for i, row in enumerate(cosine):
        nearest = np.argsort(-row)[:NEIGHBOURS]
        affinity[i, nearest] = np.maximum(row[nearest], 0) ** GAMMA
    weights = affinity + affinity.T
    root = np.diag(1 / np.sqrt(weights.sum(1)))
    classes = np.unique(labels[labels >= 0])
    seeds = np.stack([(labels == label) / (labels == label).sum() for label in classes], axis=1)
    scores = np.linalg.inv(np.eye(len(rows)) - ALPHA * root @ weights @ root) @ seeds
    return scores / scores.sum(1, keepdims=True)


def test_propagation_equals_the_dense_inverse():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(80, 6)).astype(np.float32)
    labels = np.where(draw.random(80) < 0.2, draw.integers(0, 3, 80) * 4 + 1, -1)
    assert sorted(set(labels)) == [-1, 1, 5, 9]
    propagated = propagate(features, labels)
    expected = dense_propagation(features, labels)
    np.testing.assert_allclose(propagated.probabilities, expected, atol=1e-4)
    assert propagated.classes.tolist() == [1, 5, 9]
    assert np.array_equal(propagated.labels, np.array([1, 5, 9])[expected.argmax(1)])


def test_a_label_spreads_along_its_chain():
    """Two arcs side by side, labelled at opposite ends: the nearest label of half of the images is the wrong one."""
    angle = np.tile(np.linspace(0, np.pi, 200), 2)
    chain = np.repeat([0, 1], 200)
    features = np.stack([np.cos(angle), np.sin(angle), 0.5 * chain - 0.25], axis=1).astype(np.float32)
    labels = np.full(400, -1)
    labels[0], labels[-1] = 0, 1
    assert (knn(features[[0, -1]], labels[[0, -1]], features, k=1) == chain).mean() < 0.6
    assert (propagate(features, labels).labels == chain).all()


def test_an_image_that_no_label_reaches_is_uncertain():
    draw = np.random.default_rng(0)
    features = 0.01 * draw.normal(size=(40, 4)) + np.repeat([[1.0], [-1.0]], 20, axis=0)
    labels = np.full(40, -1)
    labels[:2] = 0, 1
    propagated = propagate(features.astype(np.float32), labels)
    np.testing.assert_allclose(propagated.probabilities[20:], 0.5)
    np.testing.assert_allclose(propagated.certainty[20:], 0, atol=1e-12)


def test_certainty_runs_from_equal_shares_to_a_single_class():
    rows = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(certainty(rows), [0, 1, 0.5], atol=1e-12)


def test_pseudo_labels_are_those_of_images_without_a_label_and_mostly_right(digits, pixels):
    made = pseudo_labels(digits, pixels, seed=0)
    truth = known(open_data("digits").labels)
    assert made.pool.labels is None and len(made.pool) == len(truth) == 1438
    assert made.given.sum() == 100 and np.array_equal(made.labels[made.given], truth[made.given])
    assert made.count == 1338 and made.description == "1,338 pseudo-labels beside 100 labels"
    right, sure = (made.labels == truth)[~made.given], made.certainty[~made.given]
    assert right.mean() > 0.85 and right[sure > np.median(sure)].mean() > right.mean() + 0.03
    assert (made.certainty[made.given] == 1).all() and (sure >= 0).all() and (sure < 1 + 1e-9).all()


def test_probabilities_are_propagations_times_the_linear_probes(digits, pixels):
    made, features = pseudo_labels(digits, pixels, seed=4), pixels.features(known(digits.pool))
    rows, labels = known(digits.pool_rows), known(digits.train.labels)
    seeds = np.full(len(features), -1)
    seeds[rows] = labels
    logits = linear_probe(features[rows], labels, features, seed=4).scores
    product = propagate(features, seeds).probabilities * softmax(logits, axis=1)
    product /= product.sum(1, keepdims=True)
    assert np.array_equal(made.labels[~made.given], product.argmax(1)[~made.given])
    np.testing.assert_allclose(
        made.certainty[~made.given], 1 - entropy(product[~made.given], axis=1) / np.log(10), atol=1e-6
    )


def test_a_training_sees_labels_as_often_as_pseudo_labels(digits, pixels):
    made = pseudo_labels(digits, pixels, seed=0)
    images = made.images
    labels, keys = known(images.labels), np.array(images.keys)
    given = np.isin(keys, np.array(made.pool.keys)[made.given])
    assert abs(given.sum() - (~given).sum()) <= 50 and set(keys) == set(made.pool.keys)
    by_key = dict(zip(made.pool.keys, made.labels.tolist(), strict=True))
    assert labels.tolist() == [by_key[key] for key in images.keys]
    pixels_seen, first = images.read([0, len(images) - 1]), made.pool.read([list(made.pool.keys).index(keys[0])])
    assert np.array_equal(pixels_seen[0], first[0])


def test_hidden_and_test_labels_change_nothing(digits, pixels):
    """Labels beside those that may be used are not read, and neither are those of the test part."""
    every, test = open_data("digits"), open_data("digits", split="test")
    hidden = np.full(len(every), -1)
    rows = known(digits.pool_rows)
    hidden[rows] = known(every.labels)[rows]
    honest = pseudo_labels(digits, pixels, seed=0)
    poisoned = split_data(replace(every, labels=hidden), replace(test, labels=known(test.labels)[::-1].copy()), seed=0)
    assert np.array_equal(known(poisoned.pool_rows), rows)
    again = pseudo_labels(poisoned, pixels, seed=0)
    assert np.array_equal(again.labels, honest.labels) and np.array_equal(again.certainty, honest.certainty)


def test_the_pool_has_all_images_but_those_that_are_tested():
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1, -1], 20)
    images = array_images(
        draw.integers(0, 255, (60, 8, 8), dtype=np.uint8), labels, name="photos", split="all", has_own_split=False,
        classes=["a", "b"], channels="auto",
    )  # fmt: skip
    split = split_data(images, None, seed=3, labels="5/class")
    pool, rows = known(split.pool), known(split.pool_rows)
    assert [pool.keys[row] for row in rows] == list(split.train.keys) and len(rows) == 10
    assert set(pool.keys) | set(split.test.keys) == set(images.keys) and not set(pool.keys) & set(split.test.keys)
    assert pool.labels is None and len(pool) == 60 - len(split.test)


def test_the_steps_are_those_of_a_training_on_the_labels_alone():
    for name in ("small", "v1-10%", "small-supervised-adamw", "supervised-adamw"):
        config = FINETUNE_RECIPES[name]
        same = same_steps(config, 600, 50_000)
        assert same.steps(50_000) == config.steps(600)
        rates, expected = same.learning_rate(50_000), config.learning_rate(600)
        assert [rates(step) for step in range(0, 200, 20)] == pytest.approx(
            [expected(step) for step in range(0, 200, 20)], rel=1e-6
        )


def test_images_that_all_have_a_label_are_refused(digits, pixels):
    every = split_data(open_data("digits"), open_data("digits", split="test"), seed=0)
    for split in (every, split_data(open_data("digits"), None, seed=0, leave_one_out=True)):
        with pytest.raises(UserError, match="all 1,438 images of digits to learn from have one"):
            pseudo_labels(split, pixels, seed=0)


def test_a_result_is_keyed_by_what_gives_the_pseudo_labels(digits, pixels, monkeypatch):
    network, config = subject("random"), FINETUNE_RECIPES["small"]
    keys = [accuracy_key("supervised", network, digits, 0, config, by) for by in (None, pixels, network)]
    more = split_data(open_data("digits"), open_data("digits", split="test"), seed=0, labels="10/class")
    same, fewer = (replace(more, pool=part) for part in (more.pool, known(more.pool).subset(np.arange(1400))))
    keys.append(accuracy_key("supervised", network, fewer, 0, config, pixels))
    assert accuracy_key("supervised", network, same, 0, config, pixels) == keys[1]
    monkeypatch.setattr("simclr.evaluation.propagation.ALPHA", 0.5)
    keys.append(accuracy_key("supervised", network, digits, 0, config, pixels))
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def test_the_baseline_from_scratch_gets_those_of_pixels(digits, monkeypatch):
    quick = replace(FINETUNE_RECIPES["small"], epochs=0, min_steps=2, batch_size=8)
    for name in ("small", "small-supervised"):
        monkeypatch.setitem(FINETUNE_RECIPES, name, quick)
    sources = []
    real = measure_module.pseudo_labels

    def watch(split, source, *, seed):
        sources.append(source.name)
        return real(split, source, seed=seed)

    monkeypatch.setattr(measure_module, "pseudo_labels", watch)
    network, context = replace(subject("random"), name="encoder"), EvaluationContext(store=ResultStore(None))
    settings = Settings(pseudo_labels=True)
    for protocol in ("knn", "supervised", "finetune"):
        result = measure_one(protocol, network, digits, 0, settings, context)
        assert result.num_train == 100 and ("pseudo-labels beside 100 labels" in result.description) is (
            protocol != "knn"
        )
    assert sources == ["pixels", "encoder"]
    assert pseudo_labels_source(network, from_scratch=True).name == "pixels"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(build_encoder(SHAPE, seed=3), folder, preprocessing="google", origin={})
    return folder


def test_the_command_trains_on_them_and_writes_them(simclr, encoder, tmp_path):
    quick = ["--labels", "10/class", "--pseudo-labels", "--epochs", 0, "--min-steps", 6, "--workers", 0]
    code, table, said = simclr("finetune", encoder, "digits", "--out", tmp_path / "out", *quick)
    assert code == 0, said
    assert "6 steps" in said and "pseudo-labels beside 100 labels" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    with open(tmp_path / "out" / "pseudo_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1338 and {row["class"] for row in rows} <= set("0123456789")
    assert summary["pseudo_labels"] == 1338 and "100 labels and 1,338 pseudo-labels" in table
    assert (summary["images"], summary["steps"]) == (100, 6)
    assert simclr("finetune", encoder, "digits", "--out", tmp_path / "out", *quick)[1] == table, "done: told again"
    code, _, said = simclr("finetune", encoder, "digits", "--out", tmp_path / "all", "--pseudo-labels")
    assert code == 2 and "give fewer --labels" in said and not (tmp_path / "all" / "run.json").exists()
    code, _, said = simclr("evaluate", encoder, "digits", "--pseudo-labels", "--labels", "10/class")
    assert code == 2 and "about the protocols finetune and supervised" in said
