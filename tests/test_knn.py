"""kNN, held to scikit-learn, to a naive loop, and to invariances (test_evaluate.py has it on digits)."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from simclr.errors import UserError
from simclr.evaluation.knn import KNN_TEMPERATURE, knn, knn_votes


@pytest.fixture(scope="module")
def clouds():
    """Overlapping classes with odd labels: (train, labels, test), 300 and 90 rows of width 12."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(4, 12))
    which = draw.integers(0, 4, 390)
    rows = (centres[which] + 1.2 * draw.normal(size=(390, 12))).astype(np.float32)
    return rows[:300], np.array([5, -2, 11, 8])[which[:300]], rows[300:]


def naive_scores(train, labels, row, k, temperature):
    """Each class's share of the weight, by the formula."""
    cosine = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
    nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:k]
    votes = dict.fromkeys(sorted(set(labels)), 0.0)
    for i in nearest:
        votes[labels[i]] += np.exp(cosine[i] / temperature)
    return np.array(list(votes.values())) / sum(votes.values())


@pytest.mark.parametrize("k", [1, 7, 20])
def test_scores_equal_scikit_learns(clouds, k, monkeypatch):
    monkeypatch.setattr("simclr.evaluation.knn.CHUNK", 32)
    train, labels, test = (x.astype(np.float64) if x.dtype == np.float32 else x for x in clouds)
    other = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / KNN_TEMPERATURE)
    ).fit(train, labels)
    votes = knn_votes(train, labels, test, k=k)
    assert np.array_equal(votes.classes, other.classes_)
    np.testing.assert_allclose(votes.scores, other.predict_proba(test), atol=1e-9)
    assert np.array_equal(votes.predicted, other.predict(test))
    assert np.array_equal(knn(*clouds, k=k), other.predict(test))  # float32 features


def test_leave_one_out_equals_asking_the_rest(clouds, monkeypatch):
    monkeypatch.setattr("simclr.evaluation.knn.CHUNK", 7)
    train, labels, _ = clouds
    train = train[:100].copy()
    train[1] = train[0]  # a duplicate votes, and with the largest weight
    labels = labels[:100]
    votes = knn_votes(train, labels, train, leave_one_out=True, k=9)
    for i in range(100):
        rest = np.delete(np.arange(100), i)
        np.testing.assert_allclose(
            votes.scores[i], naive_scores(train[rest], labels[rest], train[i], 9, 0.07), atol=1e-5
        )
    assert knn(train, labels, train, leave_one_out=True, k=1)[1] == labels[0]
    assert not np.array_equal(votes.scores, knn_votes(train, labels, train, k=9).scores)


def test_lengths_of_rows_order_and_names_of_classes_do_not_matter(clouds):
    train, labels, test = clouds
    expected = knn(train, labels, test)
    lengths = np.float32(2.0) ** np.arange(-8, 8)
    assert np.array_equal(
        knn(train * np.resize(lengths, (300, 1)), labels, test * np.resize(lengths, (90, 1))), expected
    )
    order = np.random.default_rng(1).permutation(300)
    assert np.array_equal(knn(train[order], labels[order], test), expected)
    assert np.array_equal(knn(train, 100 - labels, test), 100 - expected)


def test_ties_go_to_the_smaller_label():
    train = np.eye(2, dtype=np.float32)
    query = np.array([[1.0, 1.0]], np.float32)
    for labels in ([4, 9], [9, 4]):
        assert knn(train, np.array(labels), query).tolist() == [4]


def test_a_low_temperature_does_not_overflow():
    train = np.array([[1, 0], [0, 1]], np.float32)
    votes = knn_votes(train, np.array([0, 1]), np.array([[-1, 0.5], [1, 0.9]], np.float32), temperature=1e-4)
    np.testing.assert_allclose(votes.scores, [[0, 1], [1, 0]], atol=1e-12)


def test_fewer_rows_than_neighbours_is_said(clouds):
    train, labels, test = clouds
    assert knn_votes(train[:6], labels[:6], test, k=20).k == 6
    assert knn_votes(train[:6], labels[:6], train[:6], k=20, leave_one_out=True).k == 5
    assert knn_votes(train, labels, test[:0]).predicted.shape == (0,)


def test_bad_input_is_said(clouds):
    train, labels, test = clouds
    broken = test.copy()
    broken[3, 0] = np.nan
    with pytest.raises(UserError, match="test features contain NaN or infinite numbers, in 1 of 90 rows"):
        knn(train, labels, broken)
    with pytest.raises(UserError, match="training features contain NaN"):
        knn(broken, labels[:90], test)
    with pytest.raises(UserError, match="no labelled row"):
        knn(train[:1], labels[:1], train[:1], leave_one_out=True)
    with pytest.raises(UserError, match="must be positive"):
        knn(train, labels, test, k=0)
    read_only = test.copy()
    read_only.flags.writeable = False  # such as a memory-mapped cache: torch warns of these, and warnings are errors
    assert np.array_equal(knn(train, labels, read_only), knn(train, labels, test))


@pytest.mark.parametrize(("labels", "test", "leave_one_out"), [(4, 5, False), (6, 5, False), (5, 4, True)])
def test_lengths_that_do_not_go_together_are_said(labels, test, leave_one_out):
    with pytest.raises(UserError, match=f"5 training rows, {labels} labels and {test} test rows"):
        knn(np.eye(5), np.arange(labels), np.eye(5)[:test], leave_one_out=leave_one_out)


def test_progress_counts_the_rows_that_are_classified(monkeypatch):
    monkeypatch.setattr("simclr.evaluation.knn.CHUNK", 4)
    rows, told = np.eye(10, dtype=np.float32), []
    knn_votes(rows, np.arange(10), rows, progress=lambda *done: told.append(done))
    assert told == [(4, 10), (8, 10), (10, 10)]
