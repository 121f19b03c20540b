"""A changed algorithm or constant raises the version that its results are kept under, or fails here.

Where a test fails because of a change that moves results: raise the version that it names, then take over the new
values below. Where results do not move (a chunk size, a name), only take them over.
"""

from hashlib import sha256

import numpy as np
import pytest
import torch

from helpers import known
from simclr.config.finetune import FinetuneConfig
from simclr.data.opening import open_data
from simclr.evaluation import (
    curve,
    duplicates,
    finetune,
    grid,
    hog,
    knn,
    label_free,
    lbfgs,
    logistic,
    metrics,
    patches,
    probe,
    propagation,
    registration,
    selection,
    transfer,
)  # fmt: skip
from simclr.models import EncoderConfig, build_encoder
from simclr.models import inference as features
from simclr.models.inference import pixels_of
from simclr.views import views

CONSTANTS = {
    "KNN_VERSION": [knn],
    "LOGISTIC_VERSION": [logistic, lbfgs],
    "METRICS_VERSION": [metrics],
    "PROBE_VERSION": [probe],
    "CURVE_VERSION": [curve],
    "TRANSFER_VERSION": [transfer],
    "LABEL_FREE_VERSION": [label_free, duplicates, registration],
    "HOG_VERSION": [hog],
    "PATCHES_VERSION": [patches],
    "PROPAGATION_VERSION": [propagation],
    "SELECTION_VERSION": [selection],
}
"""Version -> modules whose constants decide its results."""


def constants(module):
    """Numbers, texts and collections of them that a module names in capitals."""
    plain = int | float | str | tuple | dict | list | np.ndarray
    return {
        name: rounded(np.asarray(value).tolist() if isinstance(value, np.ndarray) else value)
        for name, value in sorted(vars(module).items())
        if name.isupper()
        and isinstance(value, plain)
        and not name.endswith("_VERSION")
        and name != "TYPE_CHECKING"
        and "simclr" not in repr(value)
    }


def rounded(value):
    """Floats to nine digits: powers differ in the last bit between machines."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, tuple | list):
        return [rounded(item) for item in value]
    return value


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_changed_constant_raises_its_version(name):
    modules = CONSTANTS[name]
    found = [constants(module) for module in modules]
    version = next(vars(module)[name] for module in modules if name in vars(module))
    assert (version, sha256(repr(found).encode()).hexdigest()[:8]) == EXPECTED[name], found


@pytest.fixture(scope="module")
def digits():
    train, test = open_data("digits"), open_data("digits", split="test")
    rows = np.arange(0, len(train), 4)
    return pixels_of(train.subset(rows), size=8), known(train.labels)[rows], pixels_of(test, size=8), test.labels


def test_changed_features_raise_their_version(digits):
    """Mean of the features of a network whose weights are all given, so that initialisation plays no part."""
    encoder = build_encoder(EncoderConfig("small", channels=1, size=8, width=0.25))
    with torch.no_grad():
        for i, parameter in enumerate(encoder.parameters()):
            parameter.copy_(torch.linspace(-0.5, 1, parameter.numel()).view_as(parameter).roll(i))
    mean = float(features.extract(encoder, open_data("digits", split="test")).mean(dtype=np.float64))
    assert [views.eval_crop(size) for size in (8, 32, 33, 224)] == [1, 1, 0.875, 0.875]
    assert (features.FEATURES_VERSION, mean) == (1, pytest.approx(FEATURES_MEAN, rel=1e-3))


def test_changed_classifiers_raise_their_version(digits):
    """Correct answers among 359 test images, on the pixels of a quarter of the digits."""
    train, labels, test, truth = digits
    right = {
        "KNN_VERSION": (knn.KNN_VERSION, int((knn.knn(train, labels, test) == truth).sum())),
        "LOGISTIC_VERSION": (
            logistic.LOGISTIC_VERSION,
            int((logistic.linear_probe(train, labels, test, seed=0).predicted == truth).sum()),
        ),
    }
    assert right == ANSWERS


def test_a_changed_training_raises_its_version():
    """Mean size of the scores after a few steps, from weights that NumPy draws: torch's depend on its release."""
    images = open_data("digits").subset(np.arange(60))
    config = FinetuneConfig(epochs=0, min_steps=4, batch_size=16, lr=0.05, lr_scaling="none", workers=0)
    encoder, numbers = (
        build_encoder(EncoderConfig("small", channels=1, size=8, width=0.25), seed=0),
        np.random.default_rng(3),
    )
    with torch.no_grad():
        for weight in (parameter for parameter in encoder.parameters() if parameter.ndim > 1):
            scale = (2 / weight[0].numel()) ** 0.5
            weight.copy_(torch.from_numpy(scale * numbers.standard_normal(weight.shape)))
    scores = finetune.finetune(encoder, None, images, images, config, seed=3).scores
    size = float(np.abs(scores).mean(dtype=np.float64))
    assert (finetune.TRAINING_VERSION, size) == (1, pytest.approx(SCORE_SIZE, rel=1e-2))


def test_a_changed_grid_raises_its_version():
    config = grid.settings(grid.Cell(0.01, 1e-4), grid.PAPER_GRID, 75_750)
    plain = {name: rounded(value) for name, value in config.result_fields().items()}
    digest = sha256(repr(sorted(plain.items())).encode()).hexdigest()[:8]
    assert (grid.GRID_VERSION, digest) == EXPECTED["GRID_VERSION"], plain


EXPECTED = {
    "KNN_VERSION": (1, "09428867"),
    "LOGISTIC_VERSION": (1, "8d704c85"),
    "METRICS_VERSION": (1, "638cc75d"),
    "PROBE_VERSION": (1, "f97300d4"),
    "CURVE_VERSION": (1, "caf1170c"),
    "TRANSFER_VERSION": (1, "66045eb7"),
    "GRID_VERSION": (1, "b19c7a66"),
    "LABEL_FREE_VERSION": (1, "1e88435f"),
    "HOG_VERSION": (1, "834ab7bf"),
    "PATCHES_VERSION": (1, "c16c5f6e"),
    "PROPAGATION_VERSION": (1, "4661f5c8"),
    "SELECTION_VERSION": (1, "34ec08d2"),
}
ANSWERS = {"KNN_VERSION": (1, 341), "LOGISTIC_VERSION": (1, 342)}
FEATURES_MEAN = 13590.9
SCORE_SIZE = 0.00953884
