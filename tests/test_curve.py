"""The labels-needed curve, held to direct calls on subsets chosen here and to a curve whose answer is known."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from simclr.data.images import Images, array_images
from simclr.data.splits import label_subset
from simclr.errors import UserError
from simclr.evaluation.curve import Count, Curve, labels_curve, labels_saved
from simclr.evaluation.results import Result
from simclr.evaluation.split import Split
from simclr.reports.curve import curve_table, draw_curve, needed_in_words, when_it_pays

NUM_CLASSES = 3


def images_of(sizes: list[int], seed: int, labels: np.ndarray | None = None) -> Images:
    """4 x 4 pixel images, brighter from class to class."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes)) if labels is None else labels
    pixels = np.clip(60 + 40 * labels[:, None, None] + generator.normal(0, 30, (len(labels), 4, 4)), 0, 255)
    return array_images(
        pixels.astype(np.uint8), labels, name="shades", split="all", has_own_split=False, classes=None, channels="auto"
    )


@pytest.fixture(scope="module")
def split() -> Split:
    return Split(images_of([12, 9, 15], seed=0), images_of([20, 20, 20], seed=1), "", 36)


def flat(images: Images) -> np.ndarray:
    return np.asarray(images.read(np.arange(len(images)))).reshape(len(images), -1).astype(np.float32)


def negative(images: Images) -> np.ndarray:
    return 255 - flat(images)[:, :3]


def nearest_mean(train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, seed: int) -> np.ndarray:
    means = np.stack([train[labels == label].mean(0) for label in range(NUM_CLASSES)])
    return ((test[:, None] - means) ** 2).sum(2).argmin(1)


class Recorder:
    """A classifier or supervised network that remembers what it was given."""

    def __init__(self) -> None:
        self.given = []

    def classify(self, train, labels, test, *, seed):
        self.given.append((train.copy(), labels.copy(), test.copy(), seed))
        return nearest_mean(train, labels, test, seed=seed)

    def supervised(self, train, test, seed):
        self.given.append((train.keys, train.labels.tolist(), len(test), seed))
        return len(train) / 100


def test_values_are_those_of_direct_calls_on_the_chosen_images(split):
    recorder = Recorder()
    curve = labels_curve(
        {"pixels": flat, "encoder": negative},
        split,
        seeds=(0, 4),
        classify=nearest_mean,
        supervised=recorder.supervised,
    )
    assert curve.counts == [1, 2, 5, "all"] and curve.sources == ["pixels", "encoder", "supervised"]
    labels = split.train.labels
    for seed in (0, 4):
        for count in (1, 2, 5, "all"):
            rows = np.arange(36) if count == "all" else label_subset(labels, f"{count}/class", seed=seed)
            for name, features_of in (("pixels", flat), ("encoder", negative)):
                train, test = features_of(split.train), features_of(split.test)
                right = nearest_mean(train[rows], labels[rows], test, seed=seed) == split.test.labels
                assert curve.results[name, count, seed] == right.mean()
            assert curve.results["supervised", count, seed] == len(rows) / 100
            assert ([split.train.keys[i] for i in rows], labels[rows].tolist(), 60, seed) in recorder.given
    assert 0.4 < curve.results["pixels", "all", 0] < 1  # neither trivial nor hopeless


def test_the_default_classifier_is_the_optimum_of_scikit_learn(split):
    """With one label per class none is left to choose l2 with: l2 of 1 on standardised features."""
    curve = labels_curve({"pixels": flat}, split, counts=[1], seeds=(0, 1, 2))
    for seed in (0, 1, 2):
        rows = label_subset(split.train.labels, "1/class", seed=seed)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000, tol=1e-8))
        model.fit(flat(split.train)[rows], split.train.labels[rows])
        assert curve.results["pixels", 1, seed] == model.score(flat(split.test), split.test.labels)


def test_the_labels_of_a_seed_are_nested_and_those_of_another_differ(split):
    recorder = Recorder()
    labels_curve({}, split, counts=[9, 1, 5, 2], seeds=(0, 1), classify=nearest_mean, supervised=recorder.supervised)
    chosen = {(seed, len(keys) // NUM_CLASSES): set(keys) for keys, _, _, seed in recorder.given}
    for seed in (0, 1):
        assert chosen[seed, 1] < chosen[seed, 2] < chosen[seed, 5] < chosen[seed, 9]
    assert chosen[0, 5] != chosen[1, 5]


def test_what_is_done_is_not_done_again(split):
    calls = []

    def counted(images):
        calls.append("features")
        return flat(images)

    def classify(*arrays, seed):
        calls.append("classify")
        return nearest_mean(*arrays, seed=seed)

    def run(done):
        def keep(key, make):
            recorded[key] = done[key] if key in done else make()
            return recorded[key]

        calls.clear()
        recorded.clear()
        return labels_curve(
            {"pixels": counted},
            split,
            counts=[1, 5, "all"],
            seeds=(0, 1),
            classify=classify,
            keep=keep,
        )

    recorded = {}
    whole = run({})
    assert (calls.count("features"), calls.count("classify")) == (2, 6)
    assert recorded == whole.results
    before = dict(recorded)
    assert run(before).results == whole.results and not calls
    missing = {key: value for key, value in before.items() if key != ("pixels", 5, 1)}
    assert run(missing).results == whole.results
    assert (calls.count("features"), calls.count("classify")) == (2, 1)
    assert run({**before, ("pixels", 5, 1): 0.123}).results["pixels", 5, 1] == 0.123


def test_poisoned_test_labels_change_only_the_figures(split):
    poisoned = replace(split, test=replace(split.test, labels=(split.test.labels + 1) % NUM_CLASSES))
    clean, other = Recorder(), Recorder()
    curves = [
        labels_curve({"pixels": flat}, data, seeds=(0,), classify=recorder.classify)
        for data, recorder in ((split, clean), (poisoned, other))
    ]
    for ours, theirs in zip(clean.given, other.given, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert curves[0].results != curves[1].results


def test_images_without_a_label_are_never_used(split):
    labels = np.where(np.arange(36) % 4 == 0, -1, split.train.labels)
    recorder = Recorder()
    some = replace(split, train=replace(split.train, labels=labels))
    curve = labels_curve({"pixels": flat}, some, seeds=(0,), classify=recorder.classify)
    assert all((used >= 0).all() for _, used, _, _ in recorder.given)
    assert len(recorder.given[-1][1]) == curve.num_labels == 27


def test_counts_end_at_the_smallest_class():
    def counts_of(sizes, asked=None):
        said = []
        data = Split(images_of(sizes, seed=0), images_of([1] * len(sizes), seed=1), "", sum(sizes))
        curve = labels_curve({"pixels": flat}, data, counts=asked, seeds=(0,), classify=zeros, progress=said.append)
        return curve, said

    def zeros(train, labels, test, *, seed):
        return np.zeros(len(test), int)

    assert counts_of([120, 130])[0].counts == [1, 2, 5, 10, 20, 50, 100, "all"]
    assert counts_of([20, 20])[0].counts == [1, 2, 5, 10, "all"]  # 20 of each are all
    assert counts_of([20, 21])[0].counts == [1, 2, 5, 10, 20, "all"]
    assert counts_of([1, 1])[0].counts == ["all"]
    curve, said = counts_of([6, 9], asked=[50, "all", 3, 7, 3])
    assert curve.counts == [3, "all"] and curve.labels_per_class("all") == 7.5
    note = "Left out: 7, 50 labels per class; the smallest class has 6 images."
    assert said[0] == note and note in curve_table(curve) and curve.notes == (note,)
    with pytest.raises(UserError, match=r"smallest class has 6 .* fewer than 10"):
        counts_of([6, 9], asked=[20, 10])
    with pytest.raises(UserError, match="1 and above"):
        counts_of([6, 9], asked=[0, 1])


def test_one_class_is_refused():
    data = Split(images_of([5], seed=0), images_of([5], seed=1), "", 5)
    with pytest.raises(UserError, match="shades has 1 of the two or more classes"):
        labels_curve({"pixels": flat}, data, seeds=(0,), classify=nearest_mean)


def constructed(lines: dict[str, list[float]], counts: Sequence[Count] = (1, 10, 100, "all"), seeds=(0, 1)) -> Curve:
    """4 classes of 1,000 labels; the mean over seeds is the line, seeds lie 0.01 beside it."""
    shift = {0: -0.01, 1: 0.01}
    results = {
        (name, count, seed): value + (shift[seed] if len(seeds) > 1 else 0)
        for name, values in lines.items()
        for count, value in zip(counts, values, strict=False)
        for seed in seeds
    }
    return Curve("made", 4, 4000, 500, results)


def test_labels_saved_where_the_answer_is_known():
    """Over decades the encoder gains 0.1 from 0.5, pixels 0.1 from 0.35: they need 10 ** 1.5 times the labels."""
    curve = constructed({"encoder": [0.5, 0.6, 0.7, 0.8], "pixels": [0.35, 0.45, 0.55, 0.65], "random": [0.1] * 4})
    saved = labels_saved(curve)
    assert [(s.baseline, s.count) for s in saved] == [("pixels", c) for c in (1, 10, 100, "all")]
    assert [s.needed for s in saved] == [pytest.approx(10**1.5), pytest.approx(10**2.5), None, None]
    assert [needed_in_words(s) for s in saved] == ["32", "316", "more than there are", "more than there are"]
    assert saved[0].accuracy == pytest.approx(0.5)
    behind = labels_saved(curve, source="pixels", baselines=["encoder"])
    assert [needed_in_words(s) for s in behind] == ["1 or fewer", "1 or fewer", "3.2", "32"]


def test_labels_saved_of_a_baseline_that_falls_and_that_was_not_tried_on_all():
    curve = constructed({"encoder": [0.3, 0.5, 0.6], "supervised": [0.2, 0.4, 0.1]}, counts=(1, 10, 100))
    assert [needed_in_words(s) for s in labels_saved(curve)] == ["3.2", "more than 100", "more than 100"]


def test_when_it_pays_counts_seeds_not_means():
    curve = constructed(
        {"encoder": [0.5, 0.6, 0.7, 0.8], "pixels": [0.35, 0.45, 0.55, 0.65], "supervised": [0.3, 0.6, 0.7, 0.9]}
    )
    worse = Curve("made", 4, 4000, 500, {**curve.results, ("pixels", 100, 1): 0.72})
    assert when_it_pays(worse) == (
        "encoder is ahead of pixels in every seed with 1, 10 and all labels per class, and of supervised in every seed "
        "with 1 label per class. With 10 labels per class it reaches 60.0%; for that the others need, in labels per "
        f"class: pixels {10 ** (1 + 0.15 / (0.63 - 0.45)):.0f}, supervised 10."
    )
    assert "ahead of pixels in every seed with 1 to all labels per class, and" in when_it_pays(curve)


def test_table_and_dictionary():
    curve = constructed({"encoder": [0.5, 0.6], "pixels": [0.35, 0.7]}, counts=(1, "all"))
    assert curve_table(curve).split("\n")[:3] == [
        "labels per class            1         all",
        "encoder            50.0 ± 1.4  60.0 ± 1.4",
        "pixels (baseline)  35.0 ± 1.4  70.0 ± 1.4",
    ]
    assert (
        "500 test images" in curve_table(curve)
        and "over 2 seeds" in curve_table(curve)
        and "4,000 labels" in curve_table(curve)
    )
    assert "| encoder | **50.0 ± 1.4** | 60.0 ± 1.4 |" in curve_table(curve, markdown=True)
    results = [
        Result(
            protocol="curve", version={"curve": 1}, model={}, data={}, settings={"labels_per_class": count}, seed=seed,
            metrics={"top1": value}, subject=source, data_name="made", num_train=4000, num_test=500, num_classes=4,
        )
        for (source, count, seed), value in curve.results.items()
    ]  # fmt: skip
    assert Curve.from_results(results) == curve
    assert curve.to_dict()["results"][0] == {
        "source": "encoder",
        "labels_a_class": 1,
        "seed": 0,
        "accuracy": pytest.approx(0.49),
    }


@pytest.mark.parametrize("counts", [("all",), (1, 10, 100, "all")])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_picture_opens(counts, seeds):
    """One point or several, with and without spread, with names that would lie on one another."""
    curve = constructed({name: [0.5, 0.6, 0.7, 0.8] for name in ("encoder", "pixels", "a", "b")}, counts, seeds)
    with Image.open(io.BytesIO(draw_curve(curve))) as picture:
        assert picture.format == "PNG"
        assert 600 < picture.width < 1500 and 350 < picture.height < 1000
        pixels = np.asarray(picture.convert("RGB"))
    assert math.prod(pixels.shape) and (pixels == np.array([0x2A, 0x6F, 0x97])).all(-1).any()  # the encoder's colour
