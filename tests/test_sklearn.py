"""The scikit-learn face: its checks, the command's own weights, pipelines, and sentences for what X is not."""

import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

import simclr
from helpers import known
from simclr import SimCLR, UserError
from simclr.cli.main import main
from simclr.data import open_data
from simclr.training.run import RunFolder

DOCS = Path(__file__).parents[1] / "docs" / "scikit-learn.md"
TINY: dict[str, Any] = {"epochs": 1, "size": 4, "width": 0.25, "random_state": 0}
TINY["settings"] = {"head_dim": 8, "memory": "plain", "workers": 0}
DIGITS: Any = load_digits()
GRAY = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (12, 6, 10, 3), dtype=np.uint8)


EACH_CHECK: Any = parametrize_with_checks([SimCLR("digits", image_shape=(1, -1), pixel_range=(-10, 110), **TINY)])


@EACH_CHECK
def test_every_check_of_scikit_learn_on_tables_that_pass_for_images(estimator, check):
    check(estimator)


def test_the_exceptions_of_the_defaults_are_those_that_the_docs_list():
    block = next(block for block in python_blocks() if "EXPECTED_FAILED_CHECKS" in block)
    listed: dict[str, Any] = {}
    exec(block, listed)
    listed = listed["EXPECTED_FAILED_CHECKS"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        check: Any = check_estimator  # its stub is of an earlier release
        results = check(SimCLR("digits", **TINY), expected_failed_checks=listed, on_fail=None)
    xfailed = {r["check_name"] for r in results if r["status"] == "xfail"}
    assert xfailed == set(listed) & {r["check_name"] for r in results}  # what other versions do not have cannot fail
    assert not [r for r in results if r["status"] == "failed"]
    assert sum(r["status"] == "passed" for r in results) >= 20


def python_blocks():
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)


def test_the_pipelines_of_the_docs_run():
    namespace = {}
    for block in python_blocks():
        exec(
            block.replace("epochs=20", "epochs=1").replace("X[:600]", "X[:90]").replace("y[:600]", "y[:90]"), namespace
        )
        assert "scores" not in namespace or (namespace["scores"] > 0).all()


def weights(path_or_estimator):
    model = getattr(path_or_estimator, "embedder_", None) or simclr.load(path_or_estimator)
    return {**model.encoder.state_dict(), **{f"head.{k}": v for k, v in known(model.head).state_dict().items()}}


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_weights_are_those_of_the_command(tmp_path, monkeypatch, capsys):
    run = RunFolder(tmp_path / "run")
    flags = ["--epochs=2", "--batch-size=256", "--width=0.25", "--seed=3", "--temperature=0.3", "--head-dim=16"]
    monkeypatch.setattr(sys, "argv", ["simclr", "pretrain", "digits", *flags, f"--out={run.path}"])
    main()
    capsys.readouterr()
    images = open_data("digits")
    rows = DIGITS.data[[int(key) for key in images.keys]] / 16
    fitted = SimCLR(
        epochs=2, batch_size=256, width=0.25, temperature=0.3, random_state=3, settings={"head_dim": 16, "workers": 0}
    )
    assert_same_weights(run.path, fitted.fit(rows))
    assert not capsys.readouterr().err  # quiet, unless asked
    expected = simclr.load(run.path).embed(images)
    np.testing.assert_array_equal(fitted.transform(rows), expected)
    np.testing.assert_array_equal(fitted.transform(rows.reshape(-1, 8, 8)), expected)
    assert fitted.config_ == replace(run.config, workers=0, device="cpu")
    recorded = [{key: value for key, value in record.items() if key != "knn"} for record in run.read_metrics()]
    assert fitted.history_ == recorded  # but for kNN's accuracy, which needs labels
    again = SimCLR(pretrained=run.path).fit(rows[:1])
    np.testing.assert_array_equal(again.transform(rows), expected)


def test_a_seed_decides_everything_and_no_seed_is_another_each_time():
    generator_before = torch.get_rng_state()
    once, twice, other = (SimCLR(**(TINY | {"random_state": seed})).fit(GRAY) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), generator_before)  # the user's generator is left alone
    assert_same_weights(once, twice)
    assert not np.array_equal(once.transform(GRAY), other.transform(GRAY))
    unseeded = SimCLR(**(TINY | {"random_state": None}))
    assert not np.array_equal(unseeded.fit_transform(GRAY), unseeded.fit_transform(GRAY))
    states = [SimCLR(**(TINY | {"random_state": np.random.RandomState(7)})) for _ in range(2)]
    first, second = (estimator.fit_transform(GRAY) for estimator in states)
    np.testing.assert_array_equal(first, second)


def test_a_fitted_estimator_is_kept_by_joblib_and_cloned_without_its_weights(tmp_path):
    fitted = SimCLR(**TINY).fit(COLOUR)
    joblib.dump(fitted, tmp_path / "encoder.joblib")
    np.testing.assert_array_equal(joblib.load(tmp_path / "encoder.joblib").transform(COLOUR), fitted.transform(COLOUR))
    with pytest.raises(NotFittedError):
        clone(fitted).transform(COLOUR)
    assert clone(fitted).get_params() == fitted.get_params()


def test_every_form_of_the_images_gives_the_same(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(len(COLOUR))]
    for pixels, path in zip(COLOUR, paths, strict=True):
        Image.fromarray(pixels).save(path)
    rows = COLOUR.reshape(len(COLOUR), -1)
    shaped = SimCLR(image_shape=(6, -1, 3), **TINY)
    expected = shaped.fit_transform(rows)
    assert expected.shape == (12, len(shaped.get_feature_names_out())) and expected.dtype == np.float32
    tensor = torch.from_numpy(COLOUR).permute(0, 3, 1, 2)
    column = np.array([str(path) for path in paths])
    for form in (COLOUR, COLOUR / 255, paths, column, list(COLOUR), [Image.open(path) for path in paths], tensor):
        np.testing.assert_array_equal(SimCLR(**TINY).fit_transform(form), expected)
    np.testing.assert_array_equal(shaped.transform(rows.tolist()), expected)
    scaled = SimCLR(image_shape=(6, 10, 3), pixel_range=(-1, 1), **TINY).fit_transform(rows / 127.5 - 1)
    np.testing.assert_array_equal(scaled, expected)


def test_settings_are_searched_like_any_other():
    y = np.arange(12) % 2
    model = make_pipeline(SimCLR(**TINY), LogisticRegression())
    search = GridSearchCV(model, {"simclr__temperature": np.array([0.1, 0.5]), "simclr__epochs": np.array([1])}, cv=2)
    assert search.fit(GRAY, y).best_estimator_[0].config_.temperature in (0.1, 0.5)
    assert search.predict(GRAY).shape == (12,)


def test_names_reach_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(GRAY.reshape(12, 64), columns=[f"pixel{i}" for i in range(64)])
    estimator: Any = SimCLR(**TINY).set_output(transform="pandas")
    table = estimator.fit(frame).transform(frame)
    assert list(table.columns[:2]) == ["simclr0", "simclr1"] and len(table) == 12


@pytest.mark.parametrize(
    ("parameters", "X", "said"),
    [
        ({}, DIGITS.data, r"lie in \[0, 16\]; give floats in \[0, 1\] \(divide"),
        ({}, DIGITS.images, r"lie in \[0, 16\]; give floats in \[0, 1\] \(divide"),
        ({}, np.zeros((9, 12)), "image_shape="),
        ({"image_shape": (5, 7)}, np.zeros((9, 64)), r"image_shape was \(5, 7\), and a row of X has 64 numbers"),
        ({"image_shape": (16, 4, 2)}, np.zeros((9, 128)), "1 or 3 channels"),
        ({"image_shape": 8}, np.zeros((9, 64)), "image_shape was 8"),
        ({"pixel_range": (0, 8)}, DIGITS.data, r"beyond pixel_range=\(0, 8\)"),
        ({"pixel_range": (0, 16)}, list(GRAY), "goes with rows or one array"),
        ({"pixel_range": (1, 0)}, GRAY, "black, white"),
        ({}, np.full((9, 8, 8), np.nan), "nan"),
        ({}, GRAY[:1], "at least two"),
        ({}, GRAY[0].reshape(1, 64), "minimum of 2"),
        ({}, [], "no images"),
        ({}, Image.fromarray(GRAY[0]), "at least two"),
        ({}, np.zeros((0, 8, 8)), "at least one"),
        ({"batch_size": 64}, GRAY, "^batch_size was 64, more than the 12 images"),
        ({"epochs": 0}, GRAY, "^epochs was 0"),
        ({"epochs": "many"}, GRAY, "epochs was 'many'"),
        ({"encoder": "resnet19"}, GRAY, "resnet18"),
        ({"recipe": "digit"}, GRAY, "no recipe"),
        ({"device": "gpu"}, GRAY, "device was 'gpu'"),
        ({"settings": {"learning_rate": 1}}, GRAY, "'learning_rate', which is none; there are .*lr"),
        ({"settings": {"seed": 1}}, GRAY, "parameter random_state"),
        ({"settings": {"epochs": 3}}, GRAY, "given twice"),
        ({"pretrained": "no/such/run"}, GRAY, "epochs"),
        (dict.fromkeys(TINY) | {"pretrained": "no/such/run"}, GRAY, "no encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence_in_the_words_of_python(parameters, X, said):
    with pytest.raises(ValueError, match=said) as caught:
        SimCLR(**(TINY | parameters)).fit(X)
    if isinstance(caught.value, UserError):  # else scikit-learn's own
        assert len(str(caught.value).splitlines()) == 1 and "--" not in str(caught.value)


def test_an_encoder_of_gray_refuses_colour_and_takes_other_sizes():
    fitted = SimCLR(**TINY).fit(GRAY)
    with pytest.raises(UserError, match="1-channel images and what was given is in colour"):
        fitted.transform(COLOUR)
    assert fitted.transform(np.zeros((2, 30, 20))).shape == fitted.transform(GRAY[:2]).shape
    assert SimCLR(**TINY).fit(COLOUR).transform(GRAY).shape[0] == 12
