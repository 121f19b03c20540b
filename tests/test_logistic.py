"""Logistic regression, held to scikit-learn, to the conditions of an optimum, and to invariances."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from simclr.data.splits import split_indices
from simclr.errors import UserError
from simclr.evaluation import lbfgs
from simclr.evaluation.logistic import L2_PATH, FitOptions, fit, linear_probe, logistic_probe, path
from simclr.evaluation.metrics import accuracy, mean_per_class

NUM_CLASSES = 4


@pytest.fixture(scope="module")
def clouds():
    """Overlapping classes of unequal size, features of unequal spread and mean: 400 of width 10, and their labels."""
    draw = np.random.default_rng(0)
    labels = draw.choice(NUM_CLASSES, 400, p=[0.4, 0.3, 0.2, 0.1])
    features = draw.normal(size=(NUM_CLASSES, 10))[labels] + 1.3 * draw.normal(size=(400, 10))
    return (features * np.linspace(0.3, 2, 10) + np.linspace(-3, 3, 10)).astype(np.float32), labels


@pytest.fixture(scope="module")
def several():
    """Several labels an image: features and (300, 3) targets of 1, 0 and -1."""
    draw = np.random.default_rng(1)
    features = draw.normal(size=(300, 8)).astype(np.float32)
    scores = features @ draw.normal(size=(8, 3)) + draw.normal(size=(300, 3)) - [0, 1, 2]
    return features, np.where(draw.random((300, 3)) < 0.15, -1, scores > 0).astype(np.int64)


def scikit_learn(features, labels, l2, factor=1):
    """The optimum by Newton's method, which shares nothing with ours."""
    return LogisticRegression(C=factor / (len(features) * l2), solver="newton-cholesky", tol=1e-10).fit(
        features.astype(np.float64), labels
    )


@pytest.mark.parametrize("l2", [10.0, 0.1, 1e-3])
def test_coefficients_equal_scikit_learns(clouds, l2):
    features, labels = clouds
    ours, other = fit(features, labels, NUM_CLASSES, l2=l2, tol=1e-9), scikit_learn(features, labels, l2)
    assert ours.converged
    np.testing.assert_allclose(ours.coefficients, other.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.intercepts, other.intercept_ - other.intercept_.mean(), atol=1e-5)


def test_two_classes_are_a_softmax(clouds):
    features, labels = clouds
    ours, other = fit(features, labels % 2, 2, l2=0.01, tol=1e-9), scikit_learn(features, labels % 2, 0.01, factor=2)
    np.testing.assert_allclose(ours.coefficients[1] - ours.coefficients[0], other.coef_[0], atol=1e-6)
    np.testing.assert_allclose(ours.scores(features) @ [-1, 1], other.decision_function(features), atol=1e-5)


@pytest.mark.parametrize(("rows", "limit"), [(400, 4096), (30, 4096), (400, 0), (30, 0)])
def test_every_basis_finds_the_same_optimum(clouds, monkeypatch, rows, limit):
    """With more features than rows and with fewer, and where the decomposition would take too long."""
    monkeypatch.setattr(lbfgs, "EIGEN_LIMIT", limit)
    features = np.concatenate([clouds[0], clouds[0] ** 2, np.sin(clouds[0]), np.abs(clouds[0])], 1)[:rows]  # (rows, 40)
    ours, other = (
        fit(features, clouds[1][:rows], NUM_CLASSES, l2=0.05, tol=1e-9),
        scikit_learn(features, clouds[1][:rows], 0.05),
    )
    np.testing.assert_allclose(ours.coefficients, other.coef_, atol=1e-6)


def test_the_path_is_the_solution_at_each_l2(clouds):
    features, labels = clouds
    found = list(path(features, labels, NUM_CLASSES, tol=1e-6))
    assert [weights.l2 for weights in found] == sorted(L2_PATH, reverse=True) and len(L2_PATH) == 45
    assert (max(L2_PATH), min(L2_PATH)) == (pytest.approx(1e5), pytest.approx(1e-6))
    assert all(weights.converged for weights in found)
    for weights in found[8::9]:
        alone = fit(features, labels, NUM_CLASSES, l2=weights.l2, tol=1e-9)
        np.testing.assert_allclose(weights.coefficients, alone.coefficients, atol=2e-6 / weights.l2)
        other = scikit_learn(features, labels, weights.l2)
        assert accuracy(weights.scores(features).argmax(1), labels) == other.score(features, labels)


def test_the_gradient_vanishes_where_classes_can_be_separated():
    """The hard end of the path: more features than rows, next to no penalty."""
    draw = np.random.default_rng(2)
    x, y = draw.normal(size=(60, 90)), np.arange(60) % 3
    *_, weights = path(x, y, 3)
    scores = weights.scores(x)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    gradient = (p - np.eye(3)[y]).T @ (x - x.mean(0)) / 60 + weights.l2 * weights.coefficients
    assert weights.converged and np.linalg.norm(gradient) <= 1e-5
    assert (scores.argmax(1) == y).all()


def test_a_problem_that_stops_early_says_so(clouds, monkeypatch):
    monkeypatch.setattr(lbfgs, "MAX_STEPS", 2)
    assert not fit(clouds[0], clouds[1], NUM_CLASSES, l2=1e-4).converged
    assert not logistic_probe(clouds[0], clouds[1], clouds[0], seed=0, l2_values=[1e-4, 1e-3]).converged


def test_permuted_classes_permute_the_coefficients(clouds):
    features, labels = clouds
    order = np.array([2, 0, 3, 1])
    ours, permuted = (fit(features, y, NUM_CLASSES, l2=0.01, tol=1e-9) for y in (labels, order[labels]))
    np.testing.assert_allclose(permuted.coefficients[order], ours.coefficients, atol=1e-7)
    np.testing.assert_allclose(permuted.intercepts[order], ours.intercepts, atol=1e-7)


def test_a_class_without_training_rows_scores_lowest(clouds):
    features, labels = clouds
    gap = labels + (labels >= 2)  # class 2 is empty
    ours, dense = fit(features, gap, 6, l2=0.01, tol=1e-9), fit(features, labels, NUM_CLASSES, l2=0.01, tol=1e-9)
    scores = ours.scores(features)
    assert np.isneginf(scores[:, [2, 5]]).all()
    np.testing.assert_allclose(scores[:, [0, 1, 3, 4]], dense.scores(features), atol=1e-6)
    refit = fit(features, np.resize(np.arange(6), 400), 6, l2=0.01, start=ours)  # the start's -inf does no harm
    assert np.isfinite(refit.intercepts).all() and refit.converged


@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_several_labels_equal_a_regression_per_class(several, l2):
    features, targets = several
    ours = fit(features, targets, 3, l2=l2, tol=1e-9)
    for k in range(3):
        known = targets[:, k] >= 0
        other = scikit_learn(features[known], targets[known, k], l2)
        np.testing.assert_allclose(ours.coefficients[k], other.coef_[0], atol=1e-6)
        np.testing.assert_allclose(ours.intercepts[k], other.intercept_[0], atol=1e-6)


def test_a_label_that_all_images_have_or_none(several):
    features, targets = several
    extended = np.concatenate([targets, np.zeros((300, 1), int), np.ones((300, 1), int), -np.ones((300, 1), int)], 1)
    ours, plain = fit(features, extended, 6, l2=0.1, tol=1e-9), fit(features, targets, 3, l2=0.1, tol=1e-9)
    assert ours.intercepts[3:].tolist() == [-np.inf, np.inf, -np.inf]
    np.testing.assert_allclose(ours.coefficients[:3], plain.coefficients, atol=1e-7)
    probe = logistic_probe(features[:200], extended[:200], features[200:], seed=0, l2_values=[1.0, 0.1, 0.01])
    assert probe.scores.shape == (100, 6) and set(probe.validation_scores) == {1.0, 0.1, 0.01}


def test_the_protocol_equals_scikit_learns(clouds):
    """Choose on the validation rows, the largest l2 of equals; then fit all rows again."""
    features, labels = (x[:300] for x in clouds)
    test, l2_values = clouds[0][300:], [1e2, 1.0, 1e-1, 1e-2, 1e-3, 1e-4]

    def predict(rows, l2, queries):
        return scikit_learn(features[rows], labels[rows], l2).predict(queries)

    learn, validate = split_indices(labels, fraction=0.2, seed=3)
    scores = [mean_per_class(predict(learn, l2, features[validate]), labels[validate]) for l2 in l2_values]
    chosen = l2_values[int(np.argmax(scores))]
    probe = logistic_probe(
        features, labels, test, seed=3, l2_values=l2_values,
        metric=lambda scores, truth: mean_per_class(scores.argmax(1), truth),
    )  # fmt: skip
    assert [probe.validation_scores[l2] for l2 in l2_values] == pytest.approx(scores)
    assert probe.l2 == chosen and probe.converged
    assert np.array_equal(probe.predicted, predict(np.arange(300), chosen, test))


def test_given_validation_rows_are_used_and_then_learnt_from(clouds):
    features, labels = clouds
    told = []
    validation = (features[200:300][labels[200:300] != 3], labels[200:300][labels[200:300] != 3])  # class 3 is absent
    probe = logistic_probe(
        features[:200], labels[:200], features[300:], validation=validation, seed=0, l2_values=[1.0, 1e-2],
        options=FitOptions(progress=lambda *done: told.append(done)),
    )  # fmt: skip
    assert told == sorted(told) and told[-1] == (3000, 3000) and {(1000, 3000), (2000, 3000)} <= set(told)
    assert len(told) > 6  # within the fits too
    x, y = (np.concatenate(z) for z in zip((features[:200], labels[:200]), validation, strict=True))
    alone = logistic_probe(x, y, features[300:], seed=9, l2_values=[probe.l2])
    assert alone.validation_scores == {}
    np.testing.assert_allclose(alone.scores, probe.scores, atol=1e-2)
    assert np.array_equal(alone.predicted, probe.predicted)


def test_the_linear_probe_of_two_oddly_labelled_classes(clouds):
    features, labels = clouds
    odd = np.where(labels % 2, 7, -3)
    scaler = StandardScaler().fit(features[:300])
    other = LogisticRegression(C=0.1, max_iter=1000, tol=1e-9).fit(scaler.transform(features[:300]), odd[:300])
    probe = linear_probe(features[:300], odd[:300], features[300:], seed=0, l2_values=(10.0,))
    assert probe.classes.tolist() == [-3, 7]
    np.testing.assert_allclose(
        probe.scores @ [-1, 1], other.decision_function(scaler.transform(features[300:])), atol=1e-3
    )


def test_one_image_of_each_class_leaves_nothing_to_choose_with(clouds):
    features, labels = clouds
    first = np.unique(labels, return_index=True)[1]
    probe = linear_probe(features[first], labels[first], features, seed=0)
    assert probe.l2 == 1.0 and probe.validation_scores == {}
    with pytest.raises(UserError, match="of a single label per class none can be"):
        logistic_probe(features[first], labels[first], features, seed=0)


def test_bad_input_is_said(clouds, several):
    features, labels = clouds
    broken = features.copy()
    broken[0, 0] = np.inf
    one_class = np.zeros(400, int)
    for probe in (logistic_probe, linear_probe):
        with pytest.raises(UserError, match="training features contain NaN or infinite numbers, in 1 of 400"):
            probe(broken, labels, features, seed=0)
        with pytest.raises(UserError, match="test features contain NaN"):
            probe(features, labels, broken, seed=0)
        with pytest.raises(UserError, match="single class"):
            probe(features, one_class, features, seed=0)
    with pytest.raises(UserError, match="validation features contain NaN"):
        logistic_probe(features, labels, features, validation=(broken, labels), seed=0)
    with pytest.raises(UserError, match="400 rows to learn from have no label"):
        logistic_probe(features, one_class - 1, features, seed=0)
    with pytest.raises(UserError, match="No class has images with it and images without it"):
        logistic_probe(several[0], np.ones_like(several[1]), several[0], seed=0)
