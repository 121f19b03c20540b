"""Transfer: metrics, choices on validation images only, resumption, and the table."""

import json
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from helpers import known
from simclr.config.encoder import EncoderConfig
from simclr.data.images import array_images
from simclr.data.presets import TransferSet
from simclr.distributed import DistributedContext
from simclr.errors import Diverged, UserError
from simclr.evaluation import grid as grid_module
from simclr.evaluation import protocols
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.finetune import finetune
from simclr.evaluation.grid import (
    PAPER_GRID,
    PAPER_GRID_FROM_SCRATCH,
    Cell,
    Grid,
    choose_and_test,
    finetune_transfer,
    settings,
)
from simclr.evaluation.knn import knn
from simclr.evaluation.measure import EvaluationContext, train_subject
from simclr.evaluation.protocols import transfer_results
from simclr.evaluation.results import About, Result, ResultStore
from simclr.evaluation.subjects import EvaluatedModel, open_subject
from simclr.evaluation.transfer import differences, linear_transfer, score_and_credits, transfer, true_labels
from simclr.methods.supervised import many_classes, share_right
from simclr.models.encoder import Encoder, build_encoder
from simclr.models.inference import extract, pixels_of
from simclr.reports.transfer import transfer_scores, transfer_summary, transfer_text


@dataclass
class Standin:
    """A subject; without an encoder its features are the pixels."""

    name: str = "pixels"
    encoder: Encoder | None = None
    noise: float = 0.0
    head: None = None
    preprocessing: str = "google"
    size: int = 8
    channels: int = 1
    world: DistributedContext = field(default_factory=DistributedContext)
    calls: int = 0
    layer: None = None

    head_weights: None = None

    @property
    def model(self) -> dict:
        return {"weights": f"{self.name} {self.noise}"}

    def learnt_from(self, images, *, seed):
        return self

    def features(self, images, *, crop=None):
        self.calls += 1
        found = pixels_of(images, size=8, crop=crop) if self.encoder is None else extract(self.encoder, images)
        return (found + self.noise * np.random.default_rng(len(images)).normal(size=found.shape)).astype(np.float32)


def standin(*values: Any, **fields: Any) -> Any:
    """A stand-in where the types ask for an `EvaluatedModel`."""
    return Standin(*values, **fields)


def refuse(subject: EvaluatedModel, data: TransferSet) -> Result:
    raise AssertionError(f"{subject} was measured on {data}")


def picture_set(metric: Any = "top-1", channels: Any = "1", sizes=(40, 20, 50), name="bars"):
    """Images with a bright row (class 0), column (1) or nothing (2); the classes are of unequal size."""
    random = np.random.default_rng(0)
    n = sum(sizes)
    labels = random.choice(3, n, p=[0.6, 0.3, 0.1])
    for begin in (0, sizes[0], sizes[0] + sizes[1]):
        labels[begin : begin + 3] = [0, 1, 2]
    pixels = random.integers(0, 60, (n, 8, 8), dtype=np.uint8)
    pixels[labels == 0, 3] += 90
    pixels[labels == 1, :, 4] += 90
    images = array_images(
        pixels,
        labels,
        name=name,
        split="train",
        has_own_split=False,
        classes=["row", "column", "none"],
        channels=channels,
    )
    if metric == "11-point mAP":
        targets = np.stack([labels == 0, labels == 1, labels != 2], axis=1).astype(np.int8)
        targets[random.random(targets.shape) < 0.1] = -1
        images = replace(images, labels=None, targets=targets)
    ends = np.cumsum(sizes)
    train, validation, test = (images.subset(np.arange(end - size, end)) for end, size in zip(ends, sizes, strict=True))
    return TransferSet(name=name, train=train, validation=validation, test=test, metric=metric, how="")


def poisoned(data):
    """Another answer for every test image."""
    test = data.test
    if test.targets is not None:
        test = replace(test, targets=np.where(test.targets >= 0, 1 - test.targets, -1).astype(np.int8))
    else:
        test = replace(test, labels=(test.labels + 1) % 3)
    return replace(data, test=replace(test, contents="poisoned"))


def tiny_encoder():
    return build_encoder(EncoderConfig(name="small", size=8, channels=1, width=0.25), seed=0)


# ---- metrics


def test_scores_and_credits_by_hand():
    truth, classes = np.array([4, 4, 4, 7, 7]), np.array([4, 7])
    scores = np.array([[1, 0], [2, 1], [0, 1], [0, 1], [3, 1]], dtype=float)  # told: 4 4 7 7 4
    score, credits = score_and_credits(scores, classes, truth, "top-1")
    assert score == 3 / 5 and credits == [1, 1, 0, 1, 0]
    score, credits = score_and_credits(scores, classes, truth, "mean per class")
    assert score == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert np.mean(credits) == pytest.approx(score)
    assert credits == pytest.approx([5 / 6, 5 / 6, 0, 5 / 4, 0])


def test_score_of_several_classes_leaves_out_what_is_unknown():
    truth = np.array([[1, 0], [0, -1], [-1, 1]], dtype=np.int8)
    score, credits = score_and_credits(
        np.array([[2.0, 1.0], [-1.0, 5.0], [9.0, 3.0]]), np.arange(2), truth, "11-point mAP"
    )
    assert credits == [0.5, 1.0, 1.0]
    assert score == 1.0  # in each class the only image that shows it ranks first among those that are known


@pytest.mark.parametrize("metric", ["top-1", "mean per class", "11-point mAP"])
def test_poisoned_test_labels_change_the_score_alone(metric):
    data, subject = picture_set(metric), standin()
    clean, bad = (linear_transfer(subject, one, seed=0) for one in (data, poisoned(data)))
    assert clean.data["metric"] == metric and clean.value("score") > bad.value("score") + 0.2
    assert (bad.metrics["validation"], bad.details["chosen"]) == (clean.metrics["validation"], clean.details["chosen"])


@pytest.mark.parametrize("metric", ["top-1", "mean per class", "11-point mAP"])
def test_linear_transfer_takes_the_best_strength_on_validation_by_the_metric(metric):
    """Of strengths one by one, judged by scikit-learn on validation; then both parts are fitted together."""
    data, subject = picture_set(metric, sizes=(60, 40, 80)), standin(noise=1.0)
    strengths = (10.0, 1.0, 0.1, 0.01, 1e-3)
    train, validation, test = (subject.features(part) for part in (data.train, data.validation, data.test))

    def fitted(features, labels, l2):
        if labels.ndim == 2:
            columns = [fitted(features[y >= 0], y[y >= 0], l2) for y in labels.T]
            return lambda rows: np.stack([column(rows) for column in columns], axis=1)
        two = len(np.unique(labels)) == 2
        strength = 2 if two and metric != "11-point mAP" else 1
        model = LogisticRegression(C=strength / (len(labels) * l2), max_iter=5000, tol=1e-7).fit(features, labels)
        return model.decision_function

    def judged(model, part, rows):
        return score_and_credits(model(rows), np.arange(3), true_labels(part), metric)[0]

    on_validation = [
        judged(fitted(train, true_labels(data.train), l2), data.validation, validation) for l2 in strengths
    ]
    best = strengths[int(np.argmax(on_validation))]
    whole = fitted(
        np.concatenate([train, validation]),
        np.concatenate([true_labels(data.train), true_labels(known(data.validation))]),
        best,
    )
    found = linear_transfer(subject, data, seed=0, l2_values=strengths)
    assert found.details["chosen"] == {"l2": best} and found.details["converged"]
    assert found.metrics["validation"] == pytest.approx(max(on_validation))
    assert found.metrics["score"] == pytest.approx(judged(whole, data.test, test))


def test_linear_transfer_is_looked_up(tmp_path):
    data, subject = picture_set(), standin()
    first = linear_transfer(subject, data, seed=0, store=ResultStore(tmp_path / "cells.jsonl"))
    assert subject.calls == 3
    again = linear_transfer(subject, data, seed=0, store=ResultStore(tmp_path / "cells.jsonl"))
    assert again == first and subject.calls == 3
    linear_transfer(subject, poisoned(data), seed=0, store=ResultStore(tmp_path / "cells.jsonl"))
    assert subject.calls == 6


def test_linear_transfer_sees_the_border():
    """What tells the classes apart lies outside the central 0.875 that other protocols show above 32 pixels."""
    random = np.random.default_rng(0)
    labels = np.arange(60) % 2
    pixels = random.integers(0, 60, (60, 48, 48), dtype=np.uint8)
    pixels[labels == 1, :2] += 90
    images = array_images(
        pixels, labels, name="frames", split="train", has_own_split=False, classes=["no", "yes"], channels="1"
    )
    parts = [images.subset(np.arange(begin, begin + 20)) for begin in (0, 20, 40)]
    data = TransferSet(name="frames", train=parts[0], validation=parts[1], test=parts[2], metric="top-1", how="")
    config = EncoderConfig("small", channels=1, size=40)
    pixels_only = open_subject(
        "pixels", like=config, preprocessing="google", seed=0, cache=FeatureCache(None), world=DistributedContext()
    )
    assert linear_transfer(pixels_only, data, seed=0, l2_values=(0.01,)).metrics["score"] == 1
    cropped = [pixels_only.features(part) for part in parts[::2]]
    assert (knn(cropped[0], known(parts[0].labels), cropped[1], k=5) == parts[2].labels).mean() < 0.9


# ---- the table and the permutation test


def one(subject, data, score, credits=(1.0,), seed=0):
    return Result(
        protocol="linear transfer", version={}, model={}, data={"metric": "top-1"}, settings={}, seed=seed,
        metrics={"score": score, "validation": None}, subject=subject, data_name=data,
        details={"chosen": {}, "credits": list(credits), "converged": True},
    )  # fmt: skip


def test_rows_have_a_value_a_seed_and_a_mean():
    results = [
        one(s, d, score, seed=seed)
        for (seed, s, d), score in zip(product((0, 1), "ab", ("x", "y")), np.arange(8) / 10, strict=True)
    ]
    table = transfer_scores(results[:-1])
    assert list(table) == ["a", "b"] and list(table["a"]) == ["x", "y", "mean"]
    assert table["a"]["x"] == [0.0, 0.4] and table["a"]["mean"] == pytest.approx([0.05, 0.45])
    assert table["b"] == {"x": [0.2, 0.6], "y": [0.3]}  # measured on x only with seed 1: no mean


def test_transfer_measures_every_subject_on_every_set():
    said = []
    sets = [picture_set(name="x"), picture_set("mean per class", name="y")]
    subjects = [standin(), standin("noisy", noise=2.0)]
    results = transfer(subjects, sets, lambda s, d: linear_transfer(s, d, seed=0), progress=said.append)
    assert [(r.data_name, r.subject, r.data["metric"]) for r in results] == [
        ("x", "pixels", "top-1"), ("x", "noisy", "top-1"),
        ("y", "pixels", "mean per class"), ("y", "noisy", "mean per class"),
    ]  # fmt: skip
    assert said == ["x: pixels", "x: noisy", "y: pixels", "y: noisy"]
    found = json.loads(json.dumps(transfer_summary(results, differences(results))))
    assert found["table"]["pixels"]["mean"][0] == pytest.approx(
        (results[0].value("score") + results[2].value("score")) / 2
    )
    assert [d["data"] for d in found["differences"]] == ["x", "y"]
    assert all(d["difference"] > 0.2 and d["p"] < 0.01 for d in found["differences"])
    assert set(found["results"][0]) == {
        "subject", "data", "metric", "score", "validation", "chosen", "seed", "converged",
    }  # fmt: skip
    assert "x: top-1; y: mean per class" in transfer_text(results, differences(results))


def test_permutation_test_by_brute_force_and_both_ways():
    random = np.random.default_rng(1)
    first, second = random.random(9), random.random(9)
    tosses = [abs(np.dot(signs, first - second)) for signs in product((1, -1), repeat=9)]
    expected = np.mean(np.array(tosses) >= abs((first - second).sum()) - 1e-12)
    there = differences([one("a", "x", 0.5, first), one("b", "x", 0.4, second)])
    back = differences([one("b", "x", 0.4, second), one("a", "x", 0.5, first)])
    assert there[0].how == "100,000 samples" and there[0].p == back[0].p
    assert there[0].p == pytest.approx(expected, abs=0.005)  # 3.6 standard errors
    assert there[0].difference == pytest.approx(0.1) == -back[0].difference


def test_only_results_on_the_same_images_are_compared():
    results = [one("a", "x", 0.5), one("b", "y", 0.5), one("b", "x", 0.5, seed=1), one("b", "x", 0.5)]
    assert [(d.first, d.second, d.data, d.seed) for d in differences(results)] == [("a", "b", "x", 0)]


def test_names_that_one_table_cannot_tell_apart_are_refused():
    with pytest.raises(UserError, match="Two data sets are called bars"):
        transfer([standin()], [picture_set(), picture_set()], refuse, progress=print)
    with pytest.raises(UserError, match="Two subjects are called pixels"):
        transfer([standin(), standin()], [picture_set()], refuse, progress=print)


# ---- the grid


class FakeTraining:
    """A trainer whose logits are right for a share of the images that depends on the cell."""

    def __init__(self, right, diverges=()):
        self.right, self.diverges, self.calls = right, diverges, []

    def __call__(self, cell, learn, judged):
        self.calls.append((cell, len(learn), len(judged)))
        if cell in self.diverges:
            raise Diverged("no longer finite")
        told = np.where(np.arange(len(judged)) < self.right[cell] * len(judged), judged.labels, (judged.labels + 1) % 3)
        return np.eye(3)[told], np.arange(3)


SMALL = Grid(steps=3, rates=(0.01, 0.1), decays=(0.0, 1e-3), batch_size=8)
RIGHT = dict(zip(SMALL.cells, (0.2, 0.6, 0.9, 0.9), strict=True))


def search(train, data=None, file=None):
    key = {"protocol": "by test", "version": {}, "model": {}, "settings": {}, "seed": 0}
    return choose_and_test(
        data or picture_set(), SMALL, train, store=ResultStore(file), key=key, about=About(), say=lambda _: None
    )


def test_grid_takes_the_best_on_validation_and_trains_on_both():
    train = FakeTraining(RIGHT)
    found = search(train)
    assert found.details["chosen"] == {"rate": 0.1, "decay": 0.0}  # the first of two equal ones
    assert found.metrics == {"validation": 0.9, "score": 0.9}
    assert train.calls == [*((cell, 40, 20) for cell in SMALL.cells), (Cell(0.1, 0.0), 60, 50)]


def test_grid_chooses_by_the_metric_of_the_set():
    data = picture_set("mean per class")
    rare = np.flatnonzero(known(data.validation).labels != 0)

    def train(cell, learn, judged):
        told = np.zeros(len(judged), int)  # always the common class: top-1 likes it
        if cell.rate == 0.1:
            told[:] = judged.labels
            told[judged.labels == 0] = 1  # the common class never, the others always
        return np.eye(3)[told], np.arange(3)

    assert len(rare) < len(known(data.validation)) / 2
    assert search(train, data).details["chosen"]["rate"] == 0.1
    assert search(train, replace(data, metric="top-1")).details["chosen"]["rate"] == 0.01


def test_poisoned_test_labels_change_no_choice():
    clean, bad = FakeTraining(RIGHT), FakeTraining(RIGHT)
    data = picture_set()
    found, other = search(clean, data), search(bad, poisoned(data))
    assert other.details["chosen"] == found.details["chosen"]
    assert other.metrics["validation"] == found.metrics["validation"]
    assert bad.calls == clean.calls


def test_what_is_done_is_not_done_again(tmp_path):
    file = tmp_path / "results" / "cells.jsonl"

    class Killed(Exception):
        pass

    class Dying(FakeTraining):
        def __call__(self, cell, learn, judged):
            if len(self.calls) == 2:
                raise Killed
            return super().__call__(cell, learn, judged)

    with pytest.raises(Killed):
        search(Dying(RIGHT), file=file)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 4])  # a line that was cut short
    rest = FakeTraining(RIGHT)
    found = search(rest, file=file)
    assert [call[0] for call in rest.calls] == [*SMALL.cells[2:], Cell(0.1, 0.0)]
    assert found == search(FakeTraining(RIGHT))
    nothing = FakeTraining(RIGHT)
    assert search(nothing, file=file) == found and nothing.calls == []
    other = FakeTraining(RIGHT)
    search(other, picture_set(sizes=(39, 21, 50)), file=file)  # other images: all anew
    assert len(other.calls) == 5


def test_cells_that_diverge_are_passed_over(tmp_path):
    file = tmp_path / "cells.jsonl"
    assert (
        search(FakeTraining(RIGHT, diverges=SMALL.cells[2:]), file=file).details["chosen"] == SMALL.cells[1]._asdict()
    )
    again = FakeTraining(RIGHT)
    assert search(again, file=file).details["chosen"] == SMALL.cells[1]._asdict() and again.calls == []
    with pytest.raises(UserError, match="Every training of the grid on bars diverged"):
        search(FakeTraining(RIGHT, diverges=SMALL.cells))


def test_papers_grids():
    """As appendix B.8 describes them in words: 7 x 8 cells each."""
    assert len(PAPER_GRID.cells) == len(PAPER_GRID_FROM_SCRATCH.cells) == 56
    assert PAPER_GRID.rates == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1])
    assert PAPER_GRID.decays == pytest.approx([0, 1e-6, 10**-5.5, 1e-5, 10**-4.5, 1e-4, 10**-3.5, 1e-3])
    assert PAPER_GRID_FROM_SCRATCH.rates[::6] == pytest.approx([1e-3, 1])
    assert PAPER_GRID_FROM_SCRATCH.decays == pytest.approx(10 ** np.arange(-5, -1.4, 0.5))
    assert (PAPER_GRID.steps, PAPER_GRID_FROM_SCRATCH.steps, PAPER_GRID.batch_size) == (20_000, 40_000, 256)


@pytest.mark.parametrize(
    ("num_images", "decay"), [(256 * 50, 0.9), (75_750, 1 - 2560 / 75_750), (100, 0.9), (2560, 0.9)]
)
def test_settings_of_a_cell(num_images, decay):
    config = settings(Cell(0.01, 1e-4), PAPER_GRID, num_images)
    assert config.batch_norm_decay == pytest.approx(decay)
    assert config.weight_decay == pytest.approx(1e-2)  # divided by the rate
    assert (config.lr, config.lr_scaling, config.optimizer, config.momentum) == (0.01, "none", "sgd", 0.9)
    assert (config.min_steps, config.warmup_epochs) == (20_000, 0)


# ---- with real training


@pytest.mark.parametrize("metric", ["top-1", "11-point mAP"])
def test_finetune_transfer_trains_and_resumes(tmp_path, monkeypatch, metric):
    subject = standin("tiny", tiny_encoder())
    before = {name: tensor.clone() for name, tensor in subject.encoder.state_dict().items()}
    data, small = picture_set(metric), Grid(steps=8, rates=(1e-4, 0.05), decays=(0.0,), batch_size=20)
    said, steps = [], []
    found = finetune_transfer(
        subject, data, grid=small, seed=0, folder=tmp_path, progress=said.append, steps=lambda *now: steps.append(now)
    )
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    chosen = found.details["chosen"]
    assert [line["settings"]["rate"] for line in cells] == [1e-4, 0.05, chosen["rate"]]
    assert found.metrics["validation"] == max(line["metrics"]["score"] for line in cells[:2])
    assert len(said) == 3 and steps[-1] == (8, 8)
    assert all(torch.equal(before[name], tensor) for name, tensor in subject.encoder.state_dict().items())
    assert not list((tmp_path / "unfinished").iterdir())
    config = settings(Cell(chosen["rate"], 0.0), small, len(data.learn))
    scores = finetune(subject.encoder, None, data.learn, data.test, config, seed=0).scores
    assert (found.metrics["score"], found.details["credits"]) == score_and_credits(
        scores, np.arange(3), true_labels(data.test), metric
    )
    bad = finetune_transfer(subject, poisoned(data), grid=small, seed=0)
    assert (bad.details["chosen"], bad.metrics["validation"]) == (chosen, found.metrics["validation"])
    assert bad.details["credits"] != found.details["credits"]
    monkeypatch.setattr(grid_module, "train_subject", None)  # nothing is trained any more
    assert finetune_transfer(subject, data, grid=small, seed=0, folder=tmp_path) == found


def test_a_cell_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """Stopped in the middle of a training: the checkpoints are there, and the end is the same."""
    subject, small = standin("tiny", tiny_encoder()), Grid(steps=6, rates=(0.05,), decays=(0.0,), batch_size=20)
    undisturbed = finetune_transfer(subject, picture_set(), grid=small, seed=0)

    def killed_at_the_end(*arguments, **options):
        train_subject(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(grid_module, "train_subject", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        finetune_transfer(subject, picture_set(), grid=small, seed=0, folder=tmp_path)
    assert len(list((tmp_path / "unfinished").iterdir())) == 1
    steps = []
    monkeypatch.setattr(grid_module, "train_subject", train_subject)
    found = finetune_transfer(
        subject, picture_set(), grid=small, seed=0, folder=tmp_path, steps=lambda done, _: steps.append(done)
    )
    assert found == undisturbed
    assert steps.count(6) <= 2 and len(steps) <= 7  # only the training on all is done: six steps and its record


def test_from_scratch_is_shared_by_encoders_of_one_shape(tmp_path, monkeypatch):
    small = Grid(steps=2, rates=(0.1,), decays=(1e-4,), batch_size=20, from_scratch=True)
    one_of_them = finetune_transfer(standin("a", tiny_encoder()), picture_set(), grid=small, seed=0, folder=tmp_path)
    monkeypatch.setattr(grid_module, "train_subject", None)
    other = finetune_transfer(standin("b", tiny_encoder()), picture_set(), grid=small, seed=0, folder=tmp_path)
    assert replace(other, subject="a") == one_of_them


def test_transfer_from_scratch_trains_the_network_of_the_first_alone(monkeypatch):
    """By default over the paper's grid for random weights: 40,000 steps, 7 rates to 1, 8 decays to 10^-1.5."""
    trained = []

    def note(subject, data, *, grid, seed, folder, progress):
        trained.append((subject.name, grid))
        return finetune_transfer(subject, data, grid=replace(grid, steps=2, rates=(0.1,), decays=(1e-4,)), seed=seed)

    monkeypatch.setattr(protocols, "finetune_transfer", note)
    subjects = [standin("a", tiny_encoder()), standin("b", tiny_encoder())]
    context = EvaluationContext(store=ResultStore(None))
    results = transfer_results(subjects, [picture_set()], 0, grid=PAPER_GRID_FROM_SCRATCH, context=context)
    assert [result.subject for result in results] == ["from scratch"]
    ((name, grid),) = trained
    assert name == "a" and grid.from_scratch and grid.steps == 40_000 and len(grid.cells) == 56
    assert (grid.rates[0], grid.rates[-1]) == pytest.approx((1e-3, 1.0))
    assert (grid.decays[0], grid.decays[-1]) == pytest.approx((1e-5, 10**-1.5))


def test_losses_of_several_classes_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], dtype=torch.float64)
    targets = torch.tensor([[1, 0, -1], [0, -1, 1]], dtype=torch.int8)
    minus_log = lambda p: -np.log(p)  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    first = minus_log(sigmoid(2)) + minus_log(1 - sigmoid(-1))
    second = minus_log(1 - sigmoid(0)) + minus_log(sigmoid(-2))
    assert float(many_classes(logits, targets)) == pytest.approx((first + second) / 2)
    assert float(share_right(logits, targets)) == 3 / 4


@pytest.mark.parametrize(
    ("subject", "data", "match"),
    [
        (standin(), picture_set(), "no network to fine-tune"),
        (standin("tiny", tiny_encoder()), replace(picture_set(), validation=None), "no image to spare"),
        (standin("tiny", tiny_encoder()), picture_set(channels="3"), "expects 1-channel images"),
    ],
)
def test_what_cannot_be_finetuned_is_refused(subject, data, match):
    with pytest.raises(UserError, match=match):
        finetune_transfer(subject, data, grid=SMALL, seed=0)


@pytest.mark.parametrize("wrong", [{"rates": ()}, {"decays": (-1.0,)}, {"rates": (0.0,)}, {"steps": 0}])
def test_grids_that_cannot_be_run_are_refused(wrong):
    with pytest.raises(UserError, match="cannot be run"):
        Grid(**wrong)
