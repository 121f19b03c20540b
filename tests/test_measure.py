"""The table of an evaluation: what makes sense for whom, what is remembered, and that no test label leaks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import known
from simclr.config.encoder import EncoderConfig
from simclr.config.finetune import FINETUNE_RECIPES, FinetuneConfig, find_finetune_recipe
from simclr.config.overrides import Overrides
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation import measure as measure_module
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.knn import knn
from simclr.evaluation.measure import (
    EvaluationContext,
    Protocol,
    Settings,
    choose_finetune_config,
    measure,
    supervised_recipe,
)
from simclr.evaluation.results import Measured, ResultStore
from simclr.evaluation.split import Split, split_data
from simclr.evaluation.subjects import EvaluatedModel, open_subject
from simclr.models.encoder import build_encoder
from simclr.models.heads import ProjectionHead
from simclr.weights.folder import save_encoder
from simclr.weights.training_progress import TrainingProgress

SHAPE = EncoderConfig("small", channels=1, size=8, width=0.5)
QUICK = Settings(recipe="small", overrides=lambda config: replace(config, min_steps=3, epochs=0, batch_size=16))


@pytest.fixture(autouse=True)
def quick_baseline(monkeypatch):
    monkeypatch.setitem(FINETUNE_RECIPES, "small-supervised", QUICK.overrides(FINETUNE_RECIPES["small-supervised"]))


PROTOCOLS = ("knn", "linear", "logistic", "finetune", "supervised")


@pytest.fixture(scope="module")
def digits() -> Split:
    return split_data(open_data("digits"), open_data("digits", split="test"), seed=0, labels="5/class")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An encoder's folder, with its head."""
    place = tmp_path_factory.mktemp("encoder")
    encoder = build_encoder(SHAPE, seed=5)
    save_encoder(encoder, place, head=ProjectionHead(encoder.num_features), preprocessing="google", origin={})
    return place


def subjects(*names: str, cache: FeatureCache | None = None) -> list[EvaluatedModel]:
    keep = cache or FeatureCache(None)
    return [
        open_subject(str(name), like=SHAPE, preprocessing="google", seed=0, cache=keep, world=DistributedContext())
        for name in names
    ]


def raising(_what: str, error: UserError):
    raise error


def run(
    split: Split,
    opened: list[EvaluatedModel],
    protocols: Sequence[Protocol] = PROTOCOLS,
    *,
    store=None,
    folder=None,
    settings=QUICK,
    failed=raising,
):
    return list(
        measure(
            protocols, [0], subjects_of=lambda _: opened, split_of=lambda _: split, settings=settings,
            context=EvaluationContext(store=store or ResultStore(None), folder=folder), failed=failed,
        )
    )  # fmt: skip


def test_leave_one_out_equals_leaving_out_one_by_one(digits):
    images = digits.test.subset(np.arange(60))
    split = split_data(images, None, seed=0, leave_one_out=True)
    (found,) = run(split, subjects("pixels"), ["knn"])
    features = subjects("pixels")[0].features(images)
    right = []
    for left_out in range(60):
        others = np.delete(np.arange(60), left_out)
        (predicted,) = knn(features[others], images.labels[others], features[[left_out]])
        right.append(predicted == images.labels[left_out])
    assert found.metrics["top1"] == pytest.approx(np.mean(right), abs=1e-12)
    assert "leave-one-out" in found.description


def test_who_is_measured_how(digits, folder):
    found = run(digits, subjects(folder, "random", "pixels"))
    measured = [(one.subject, one.protocol) for one in found]
    assert measured == [
        *[(str(folder), protocol) for protocol in ("knn", "linear", "logistic", "finetune")],
        ("supervised", "supervised"),
        *[("random", protocol) for protocol in ("knn", "linear", "logistic")],
        *[("pixels", protocol) for protocol in ("knn", "linear", "logistic")],
    ]
    for one in found:
        assert 0 <= one.value("top1") <= one.value("top5") <= 1 and 0 <= one.value("mean_per_class") <= 1
        assert (one.data_name, one.num_train, one.num_test, one.num_classes) == ("digits", 50, len(digits.test), 10)
    pixels = {one.protocol: one.value("top1") for one in found if one.subject == "pixels"}
    assert min(pixels.values()) > 0.8  # scikit-learn's digits are easy


def test_what_cannot_be_measured_leaves_the_rest():
    one_each = split_data(open_data("digits"), open_data("digits", split="test"), seed=0, labels="1/class")
    failures = []
    found = run(one_each, subjects("pixels"), ["logistic", "knn"], failed=lambda *failure: failures.append(failure))
    assert [one.protocol for one in found] == ["knn"]
    ((what, error),) = failures
    assert what == "pixels: logistic, seed 0" and "two labels per class" in str(error)


def test_nothing_is_measured_twice(digits, folder, tmp_path):
    place = tmp_path / "results.jsonl"
    first = run(digits, subjects(folder, "pixels"), store=ResultStore(place), folder=tmp_path)
    assert len(place.read_text().splitlines()) == len(first)
    with open(place, "a") as file:
        file.write('{"key": {"protocol": "kn')  # a kill in the middle of a line
    again = ResultStore(place)
    assert run(digits, subjects(folder, "pixels"), store=again, folder=tmp_path) == first
    assert again.reused == len(first)
    other_labels = replace(digits, train=digits.train.subset(np.arange(0, len(digits.train), 2)))
    run(other_labels, subjects("pixels"), ("knn",), store=again)
    assert again.reused == len(first)
    assert [json.loads(line)["protocol"] for line in place.read_text().splitlines()[-1:]] == ["knn"]


def test_no_test_label_touches_a_prediction(digits, folder, monkeypatch):
    """With other test labels all scores stay, bit for bit; accuracies are those of the scores, counted by hand."""
    shifted = (digits.test.labels + 1) % 10
    recorded: list[tuple[np.ndarray, np.ndarray]] = []
    real = measure_module.accuracies

    def record(scores, classes, labels):
        recorded.append((scores.copy(), classes[scores.argmax(1)]))
        return real(scores, classes, labels)

    monkeypatch.setattr(measure_module, "accuracies", record)
    results = {}
    for name, labels in (("true", digits.test.labels), ("shifted", shifted)):
        split = replace(digits, test=replace(digits.test, labels=labels))
        results[name] = run(split, subjects(folder))
        assert [result.protocol for result in results[name]] == list(PROTOCOLS)
        for result, (_, predicted) in zip(results[name], recorded[-len(PROTOCOLS) :], strict=True):
            assert result.metrics["top1"] == pytest.approx(np.mean(predicted == labels), abs=1e-12), result.protocol
    for i, protocol in enumerate(PROTOCOLS):
        assert np.array_equal(recorded[i][0], recorded[i + len(PROTOCOLS)][0]), protocol
        assert results["true"][i].metrics.get("l2") == results["shifted"][i].metrics.get("l2"), protocol


def test_features_are_made_once(digits, folder, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path / "features")
    first = subjects(folder, cache=cache)[0].features(digits.test)
    kept = list(known(cache.folder).iterdir())
    assert len(kept) == 1

    def never(*_args, **_kwargs):
        raise AssertionError("extracted again")

    with monkeypatch.context() as patched:
        patched.setattr("simclr.evaluation.subjects.extract", never)
        assert np.array_equal(subjects(folder, cache=cache)[0].features(digits.test), first)
        with pytest.raises(AssertionError):  # other images
            subjects(folder, cache=cache)[0].features(digits.train)
        with pytest.raises(AssertionError):  # other weights
            subjects("random", cache=cache)[0].features(digits.test)


def test_features_that_are_not_numbers_are_refused(digits):
    random = subjects("random")[0]
    with torch.no_grad():
        next(known(random.encoder).parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="features contain NaN"):
        random.features(digits.test)


def test_a_class_that_nothing_teaches_is_named():
    train, test = open_data("digits"), open_data("digits", split="test")
    with pytest.raises(UserError, match="test images of 1 classes of which none is there to learn from"):
        split_data(train.subset(np.flatnonzero(train.labels != 3)), test, seed=0)


def test_labels_from_a_list(tmp_path):
    train, test = open_data("digits"), open_data("digits", split="test")
    keys = [train.keys[i] for i in (5, 3, 100, 200, 300)]
    (tmp_path / "list.txt").write_text("\n".join(keys))
    with pytest.raises(UserError, match="of which none is there to learn from"):
        split_data(train, test, seed=0, labels=str(tmp_path / "list.txt"))
    every = [train.keys[i] for i in range(0, len(train), 3)]
    (tmp_path / "list.txt").write_text("\n".join(every))
    assert list(split_data(train, test, seed=0, labels=str(tmp_path / "list.txt")).train.keys) == every


def model_of(*, layers: int = 0, width: float = 0.5, sk: bool = False, trained_here: bool = True) -> EvaluatedModel:
    """An encoder with a projection head of so many layers, as a run leaves it, or as an import."""
    shape = EncoderConfig("resnet50" if sk else "small", channels=1, size=8, width=width, sk=sk)
    with torch.device("meta"):
        encoder = build_encoder(shape)
        head = ProjectionHead(encoder.num_features, layers=layers) if layers else None
    progress = TrainingProgress(10, 10) if trained_here else None
    return EvaluatedModel(name="RUN", encoder=encoder, head=head, size=8, channels=1, progress=progress)


def labels_of(num_labels: int, num_labelled: int) -> Split:
    """So many labels of a data set of that size; the choice of a recipe looks at no image."""
    images = open_data("digits")
    return Split(images.subset(np.zeros(num_labels, dtype=int)), images, "", num_labelled)


IMAGENET = 1_281_167


@pytest.mark.parametrize(
    ("subject", "num_labels", "num_labelled", "recipe"),
    [
        ({"layers": 2}, 12_811, IMAGENET, "v1-1%"),  # ImageNet's lists of 1 and 10 %, in the authors' repository
        ({"layers": 2}, 128_116, IMAGENET, "v1-10%"),
        ({"layers": 2}, IMAGENET, IMAGENET, "v1-100%"),
        ({"layers": 0}, 12_811, IMAGENET, "v1-1%"),  # the checkpoints of v1 have no head
        ({"layers": 2, "width": 4.0}, 12_811, IMAGENET, "v1-1%"),
        ({"layers": 3, "width": 1.0}, 12_811, IMAGENET, "v2-1%"),
        ({"layers": 3, "width": 1.0}, 128_116, IMAGENET, "v2-10%"),
        ({"layers": 3, "width": 1.0}, IMAGENET, IMAGENET, "v2-100%"),
        ({"layers": 3, "width": 2.0}, 12_811, IMAGENET, "v2-wide-1%"),
        ({"layers": 3, "width": 2.0}, 128_116, IMAGENET, "v2-wide-10%"),
        ({"layers": 3, "width": 2.0}, IMAGENET, IMAGENET, "v2-wide-100%"),
        ({"layers": 3, "width": 1.0, "sk": True}, 12_811, IMAGENET, "v2-wide-1%"),
        ({"layers": 3}, 600, 60_000, "small"),  # fashion-mnist
        ({"layers": 3}, 50_000, 50_000, "small"),  # CIFAR-10
        ({"layers": 2}, 1_000, 200_000, "v1-1%"),
    ],
)
def test_fine_tuning_takes_the_recipe_of_the_head_the_width_and_the_share_of_labels(
    subject, num_labels, num_labelled, recipe
):
    config, notes = choose_finetune_config(model_of(**subject), labels_of(num_labels, num_labelled), Settings())
    assert config == FINETUNE_RECIPES[recipe]
    assert notes[0].startswith(f"Recipe {recipe} (")
    if recipe != "small":
        assert f"{100 * num_labels / num_labelled:.3g} % of {num_labelled:,} labels" in notes[0]
        assert ("a projection head of" in notes[0]) == (subject["layers"] > 0)
    assert ("makes few updates" in "".join(notes)) == (num_labels == 1_000)


def test_few_labels_are_no_reason_to_warn_of_the_recipe_for_few_labels():
    for subject in (model_of(), replace(model_of(), name="random")):
        _, notes = choose_finetune_config(subject, labels_of(20, 1_438), Settings())
        assert len(notes) == 1 and notes[0].startswith("Recipe small")


@pytest.mark.parametrize(
    ("layers", "trained_here", "settings", "warned"),
    [
        (3, False, {"recipe": "small"}, True),
        (3, False, {"recipe": "v1-1%"}, True),
        (3, False, {}, False),  # v2-1%: LARS
        (3, False, {"overrides": Overrides({"optimizer": "sgd"})}, True),
        (3, False, {"recipe": "linear"}, False),  # no kernel is tuned
        (3, True, {"recipe": "small"}, False),
        (2, False, {"recipe": "small"}, False),
    ],
)
def test_sgd_on_an_imported_encoder_of_v2_is_warned_of(layers, trained_here, settings, warned):
    subject = model_of(layers=layers, width=1.0, trained_here=trained_here)
    _, notes = choose_finetune_config(subject, labels_of(12_811, IMAGENET), Settings(**settings))
    assert ("17 times smaller" in "".join(notes)) == warned


@pytest.mark.parametrize(
    ("num_labels", "size", "recipe"), [(50, 32, "small-linear"), (50_000, 32, "cifar-linear"), (50_000, 224, "linear")]
)
def test_the_linear_protocol_by_sgd_takes_the_recipe_of_the_size(num_labels, size, recipe, monkeypatch):
    """SGD on crops is not run; what it would be trained by is looked at."""
    taken = []
    monkeypatch.setattr(measure_module, "_train", lambda *args: taken.append(args[4]) or Measured(metrics={}))
    subject = replace(model_of(), size=size, encoder=build_encoder(SHAPE))
    run(labels_of(num_labels, num_labels), [subject], ["linear"], settings=Settings(linear="sgd"))
    assert taken == [FINETUNE_RECIPES[recipe]]


def test_an_unknown_recipe_is_named():
    assert isinstance(find_finetune_recipe("v1-1%"), FinetuneConfig)
    with pytest.raises(UserError, match="v1-1%, v1-10%"):
        find_finetune_recipe("v3")


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("small", "sgd"),
        ("torchvision/resnet18", "sgd"),
        ("timm/vit_tiny_patch16_224", "adamw"),
        ("torchvision/alexnet", "adamw"),
    ],
)
def test_networks_without_batch_norm_are_trained_from_scratch_by_adamw(name, optimizer):
    network = build_encoder(EncoderConfig(name, channels=3, size=64))
    few, many = (supervised_recipe(network, n, flip=0.0) for n in (600, 60_000))
    assert few.optimizer == many.optimizer == optimizer
    assert few.flip == many.flip == 0
    if optimizer == "adamw":  # the rate grows as the root of the batch
        assert few.peak == pytest.approx(3e-4) and many.peak == pytest.approx(
            3e-4 * (many.batch_size / few.batch_size) ** 0.5
        )
