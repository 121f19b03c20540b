"""Metrics, held to hand counts, scikit-learn, naive loops and brute force."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from simclr.errors import UserError
from simclr.evaluation.metrics import accuracy, mean_average_precision_11, mean_per_class, permutation_test, top_k


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_equals_scikit_learn(draw, k):
    scores, targets = draw.normal(size=(200, 7)), draw.integers(0, 7, 200)
    assert top_k(scores, targets, k) == pytest.approx(top_k_accuracy_score(targets, scores, k=k))


def test_top_1_of_equal_scores_is_what_argmax_takes(draw):
    scores, targets = draw.integers(0, 2, (300, 4)).astype(float), draw.integers(0, 4, 300)
    assert top_k(scores, targets, 1) == accuracy(scores.argmax(1), targets)


def test_a_class_that_the_scores_do_not_know_is_never_met():
    scores = np.array([[0.0, 1.0], [1.0, -np.inf]])
    assert top_k(scores, np.array([1, 5]), 2) == 0.5
    assert top_k(scores, np.array([-1, 0]), 2) == 0.5


def test_mean_per_class_by_hand_and_by_scikit_learn(draw):
    assert mean_per_class(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 2])) == 0.5  # 3/3 of class 0, 0/1 of class 2
    labels, predicted = draw.choice([3, 7, 9], 100, p=[0.8, 0.1, 0.1]), draw.choice([3, 7, 9], 100)
    assert mean_per_class(predicted, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_average_precision_by_hand():
    """Ranked: relevant, not, relevant, not, not, relevant: precision 1/1 up to recall 1/3, 2/3 to 2/3, 3/6 to 1.

    Recalls 0 .. 0.3 read 1, 0.4 .. 0.6 read 2/3, 0.7 .. 1 read 1/2: (4 + 3 * 2/3 + 4 * 1/2) / 11 = 8/11.
    """
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5], [0.4]])
    relevant = np.array([[1], [0], [1], [0], [0], [1]])
    assert mean_average_precision_11(scores, relevant) == pytest.approx(8 / 11)
    order = np.array([4, 0, 5, 2, 1, 3])
    assert mean_average_precision_11(scores[order], relevant[order]) == pytest.approx(8 / 11)


def test_recall_is_compared_exactly():
    """Ten relevant of eleven, the fourth rank wrong: recall is exactly 0.3 after three, where precision is still 1."""
    relevant = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])[:, None]
    expected = (4 * 1 + 7 * 10 / 11) / 11  # up to recall 0.3; from then on the best is at the end
    assert mean_average_precision_11(-np.arange(11.0)[:, None], relevant) == pytest.approx(expected)


def naive_map(scores, relevant):
    values = []
    for k in range(scores.shape[1]):
        rows = sorted((i for i in range(len(scores)) if relevant[i, k] >= 0), key=lambda i: -scores[i, k])
        total = sum(relevant[i, k] for i in rows)
        if not total:
            continue
        points = []  # (recall * total, precision)
        for rank in range(1, len(rows) + 1):
            found = sum(relevant[i, k] for i in rows[:rank])
            points.append((found, found / rank))
        values.append(sum(max(p for found, p in points if 10 * found >= j * total) for j in range(11)) / 11)
    return sum(values) / len(values)


def test_mean_average_precision_equals_loops(draw):
    scores, relevant = draw.normal(size=(60, 5)), draw.choice([-1, 0, 1], (60, 5), p=[0.2, 0.6, 0.2])
    relevant[:, 3] = np.minimum(relevant[:, 3], 0)  # a class that no image shows stays out
    assert mean_average_precision_11(scores, relevant) == pytest.approx(naive_map(scores, relevant))
    changed = np.where(relevant < 0, draw.normal(size=scores.shape) * 10, scores)
    assert mean_average_precision_11(changed, relevant) == mean_average_precision_11(scores, relevant)


def brute_force(a, b):
    """Share of all 2^n exchanges of outcomes with a difference of means at least as large."""
    seen = abs(np.mean(a) - np.mean(b))
    hits = 0
    for swaps in product([False, True], repeat=len(a)):
        hits += abs(np.mean(np.where(swaps, b, a)) - np.mean(np.where(swaps, a, b))) >= seen - 1e-12
    return hits / 2 ** len(a)


@pytest.mark.parametrize("seed", range(4))
def test_permutation_test_equals_brute_force(seed):
    draw = np.random.default_rng(seed)
    a, b = draw.random(10) < 0.8, draw.random(10) < 0.4
    p, how = permutation_test(a, b, seed=0)
    assert how == "exact" and p == pytest.approx(brute_force(a.astype(float), b.astype(float)))
    a, b = draw.normal(size=10) + 0.5, draw.normal(size=10)
    p, how = permutation_test(a, b, samples=20_000, seed=0)
    expected = brute_force(a, b)
    assert how == "20,000 samples"
    assert abs(p - expected) < 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1 / 20_000


def test_permutation_test_of_many_images(draw, monkeypatch):
    a, b = draw.random(5000) < 0.80, draw.random(5000) < 0.78
    p, _ = permutation_test(a, b, seed=0)
    assert p == pytest.approx(binomtest(int((a & ~b).sum()), int((a ^ b).sum())).pvalue)
    assert permutation_test(b, a, seed=0)[0] == p
    assert permutation_test(a, a, seed=0)[0] == 1
    scores = a + 0.01 * draw.normal(size=5000)
    monkeypatch.setattr("simclr.evaluation.metrics.CHUNK", 1 << 19)  # several chunks
    drawn, _ = permutation_test(scores, b.astype(float), samples=1000, seed=0)
    assert abs(drawn - p) < 5 * np.sqrt(p * (1 - p) / 1000)
    assert permutation_test(scores + 9, b.astype(float), samples=999, seed=0)[0] == 1 / 1000  # never 0


def test_what_cannot_be_judged_is_said(draw):
    broken, targets = np.array([[0.0, np.nan]]), np.array([0])
    for judge in (
        lambda: top_k(broken, targets, 1),
        lambda: mean_average_precision_11(broken, np.array([[1, 0]])),
        lambda: permutation_test(broken[0], broken[0], seed=0),
    ):
        with pytest.raises(UserError, match="NaN"):
            judge()
    with pytest.raises(UserError, match="no labelled image"):
        accuracy(targets[:0], targets[:0])
    with pytest.raises(UserError, match="same images"):
        permutation_test(np.ones(3), np.ones(4), seed=0)
    with pytest.raises(UserError, match="Top-0"):
        top_k(np.ones((1, 2)), targets, 0)
    with pytest.raises(UserError, match="No class has an image"):
        mean_average_precision_11(np.ones((2, 2)), np.array([[0, -1], [0, 0]]))
