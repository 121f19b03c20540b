"""Studies: arms that can be trained, what a study trains and keeps, and its table, against hand-made numbers."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import known
from simclr import UserError
from simclr.config.distill import DistillConfig
from simclr.config.finetune import FinetuneConfig
from simclr.config.overrides import Overrides
from simclr.data.opening import open_data
from simclr.errors import Diverged, Stopped
from simclr.evaluation.results import Result, read_results
from simclr.evaluation.split import split_data
from simclr.studies import command, distillation, run
from simclr.studies.catalogue import STUDIES, find_study
from simclr.studies.command import check_arm, command_of, study
from simclr.studies.options import Study as StudyOptions
from simclr.studies.run import Measurement, run_study, trained
from simclr.studies.study import Arm, Distillation, DrawnClasses, Study
from simclr.studies.tables import draw, rank_agreement, report, table
from simclr.tasks.options.labels import Distill
from simclr.training import loop
from simclr.training.run import RunFolder

PAPERS = Path(__file__).parents[1] / "docs" / "papers.md"

WIDTHS = Study(
    name="widths",
    title="width",
    source="nowhere",
    claim="none",
    settings={"recipe": "digits", "batch_size": 16, "knn_every": 1, "epochs": 1},
    arms=[
        Arm(series="small", point="half", settings={"width": 0.5}, paper=50.0),
        Arm(series="small", point="whole", settings={"width": 1.0}, paper=60.0),
    ],
    evaluation={"protocol": "knn"},
)


@pytest.fixture
def digits(tmp_path) -> str:
    images = open_data("digits").subset(np.arange(120))
    pixels = np.stack([np.asarray(image) for image in images.read(np.arange(120))])
    labels = known(images.labels)
    np.savez(
        tmp_path / "a.npz", x_train=pixels[:80], y_train=labels[:80], x_test=pixels[80:], y_test=labels[80:]
    )  # fmt: skip
    return str(tmp_path / "a.npz")


@pytest.fixture
def count_trainings(monkeypatch) -> list[Mapping[str, Any]]:
    made, real = [], run.pretrain
    monkeypatch.setattr(run, "pretrain", lambda *args, **kwargs: made.append(kwargs) or real(*args, **kwargs))
    return made


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_has_settings_that_its_method_takes(name, scale):
    if scale == "paper" and name not in PAPER_SCALE:
        with pytest.raises(UserError, match="leave --scale out"):
            find_study(name, scale)
        return
    found = find_study(name, scale)
    assert found.name == name
    assert len(found.arms) > 1 and len({arm.name for arm in found.arms}) == len(found.arms)
    seen = [
        (check_arm(arm, training), str((arm.evaluation, arm.distillation, arm.drawn_classes)))
        for arm in found.arms
        for training in found.trainings(arm)
    ]
    assert len(set(seen)) == len(seen)
    for arm in found.arms:
        assert arm in found.selected(arm.name), "a name that --points would split"
    for arm in found.arms:
        FinetuneConfig(**{**found.evaluation, **arm.evaluation}.get("finetune", {}))
        if arm.distillation is not None and arm.distillation.student is not None:
            known = {f.name for kind in (Distill, DistillConfig) for f in fields(kind)}
            assert set(arm.distillation.student) <= known


PAPER_SCALE = [name for name in STUDIES if not name.startswith("moco") and name != "v2-memory"]


def test_the_papers_values_stand_at_their_settings():
    """Spot checks against the tables of the papers."""
    batch = {arm.name: arm for arm in find_study("table-b.1", "paper").arms}
    assert batch["square root / batch 256 for 100 epochs"].paper == 62.8
    assert batch["linear / batch 8192 for 400 epochs"].paper == 67.8
    strength = {arm.name: arm for arm in find_study("table-1", "paper").arms}
    assert strength["SimCLR / 1 + blur"].paper == 64.5 and strength["SimCLR / 1 + blur"].settings["blur"] == 0.5
    assert strength["SimCLR / 1/8"].paper == 59.6 and strength["SimCLR / 1/8"].settings["strength"] == 1 / 8
    sizes = {arm.name: arm for arm in find_study("v2-table-1", "paper").arms}
    taught = {arm.name: arm for arm in find_study("v2-table-2", "paper").arms}
    assert taught["1% / labels and teacher on labelled images"].paper == 23.6
    assert taught["10% / teacher on all images"].paper == 74.3 and taught["10% / the teacher"].paper == 77.0
    assert sizes["resnet152 3x SK / 10%"].paper == 80.1 and sizes["resnet50 1x / 1%"].paper == 57.9


def test_a_section_of_the_appendix_names_its_study():
    assert find_study("b.1", "cpu").name == "table-b.1" and find_study("b.9", "cpu").name == "figure-b.7"


def test_points_are_chosen_by_pattern():
    figure = find_study("figure-9", "cpu")
    assert [arm.name for arm in figure.selected("batch 32 / *,batch 64 / 2 epochs")] == [
        "batch 32 / 2 epochs", "batch 32 / 4 epochs", "batch 32 / 8 epochs", "batch 64 / 2 epochs"
    ]  # fmt: skip
    assert figure.selected(None) == figure.arms
    with pytest.raises(UserError, match="no point 'batch 33'"):
        figure.selected("batch 33")


def test_equal_trainings_are_made_once_and_a_second_call_makes_none(tmp_path, digits, count_trainings):
    def measure(study: Study) -> list[Measurement]:
        return [one for of_seed in run_study(study, digits, out=tmp_path, seeds=[0, 1]) for one in of_seed]

    first = measure(WIDTHS)
    assert len(count_trainings) == 4
    twice = replace(WIDTHS, arms=[Arm(point="again", settings={"width": 0.5}), *WIDTHS.arms])
    again = measure(twice)
    assert len(count_trainings) == 4
    halves = [one.results[0].metrics for one in first if one.arm == "small / half"]
    assert [one.results[0].metrics for one in again if one.arm == "again"] == halves
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))


def test_changed_images_under_the_same_name_are_refused(tmp_path, digits):
    settings = {**WIDTHS.settings, "seed": 0}
    assert trained(digits, tmp_path, settings) == trained(digits, tmp_path, settings)
    with np.load(digits) as arrays:
        np.savez(digits, **{name: 15 - values if name == "x_train" else values for name, values in arrays.items()})
    with pytest.raises(UserError, match="no longer holds the images"):
        trained(digits, tmp_path, settings)


def test_what_was_stopped_gives_the_same_table(tmp_path, digits, monkeypatch):
    """Stopped in the middle of the second training, which is then resumed; the first is not made again."""
    real, calls, stop_at = loop.take_step, [], 0

    def counts(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "take_step", counts)
    whole = [one for of_seed in run_study(WIDTHS, digits, out=tmp_path / "a", seeds=[0]) for one in of_seed]
    stop_at = len(calls) - 2
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        list(run_study(WIDTHS, digits, out=tmp_path / "b", seeds=[0]))
    stop_at = 0
    runs = [RunFolder(path) for path in (tmp_path / "b" / "runs").iterdir()]
    (unfinished,) = [one.path for one in runs if not one.is_finished]
    assert len(runs) == 2
    resumed: list[Any] = []
    real_resume = run.resume
    monkeypatch.setattr(run, "resume", lambda folder: resumed.append(folder) or real_resume(folder))
    monkeypatch.setattr(run, "pretrain", None)
    parts = [one for of_seed in run_study(WIDTHS, digits, out=tmp_path / "b", seeds=[0]) for one in of_seed]
    assert resumed == [unfinished]
    assert table(WIDTHS, WIDTHS.arms, parts) == table(WIDTHS, WIDTHS.arms, whole)
    assert [one.results[0].weights for one in parts] == [one.results[0].weights for one in whole]


def test_candidates_are_chosen_by_accuracy_within_the_training_images(tmp_path, digits, count_trainings):
    candidates = [{"lr": 1e-9}, {"lr": 2e-3}]
    arm = Arm(point="best", settings={"epochs": 20}, candidates=candidates)
    searched = replace(WIDTHS, arms=[arm], settings={**WIDTHS.settings, "knn_every": 20})
    measured = [one for of_seed in run_study(searched, digits, out=tmp_path, seeds=[0, 1]) for one in of_seed]
    knn = [
        json.loads((tmp_path / "runs" / path.parent.name / "summary.json").read_text())["final"]["knn"]
        for path in sorted(tmp_path.glob("runs/*/config.json"))
        if json.loads(path.read_text())["seed"] == 0
    ]
    rates = [
        json.loads(path.read_text())["lr"]
        for path in sorted(tmp_path.glob("runs/*/config.json"))
        if json.loads(path.read_text())["seed"] == 0
    ]
    assert len(count_trainings) == 3  # both on the first seed, the better one on the second
    assert {one.settings["lr"] for one in measured} == {rates[int(np.argmax(knn))]}


def test_a_training_that_diverges_is_recorded_and_the_rest_goes_on(tmp_path, digits, monkeypatch):
    real, calls = run.pretrain, []

    def diverges(data, **settings):
        calls.append(settings)
        if settings["width"] == 0.5:
            raise Diverged("the loss is no longer finite")
        return real(data, **settings)

    monkeypatch.setattr(run, "pretrain", diverges)
    (measured,) = run_study(WIDTHS, digits, out=tmp_path, seeds=[0])
    assert [bool(one.diverged) for one in measured] == [True, False]
    lines = table(WIDTHS, WIDTHS.arms, measured).splitlines()
    assert lines[2] == "| small / half | diverged | 50.0 |"
    assert "Diverged with one seed or more: small / half." in report(WIDTHS, WIDTHS.arms, measured, "how")
    assert trained(digits, tmp_path, {**WIDTHS.settings, "width": 0.5, "seed": 0}) == "the loss is no longer finite"
    assert len(calls) == 2  # it is not tried again


def measurement(arm: str, seed: int, top1: float) -> Measurement:
    result = Result(
        protocol="knn", version={"knn": 1}, model={}, data={}, settings={}, seed=seed, metrics={"top1": top1}
    )  # fmt: skip
    return Measurement(arm=arm, seed=seed, settings={}, results=[result])


def test_the_table_and_the_order_of_hand_made_numbers():
    arms = [Arm(point=float(k), paper=paper) for k, paper in enumerate((10.0, 20.0, 30.0, 40.0))]
    made = replace(WIDTHS, arms=arms, second_hand=True)
    accuracies = {"0": (0.1, 0.2), "1": (0.4, 0.4), "2": (0.3, 0.3), "3": (0.9, 0.7)}
    measured = [measurement(arm, seed, top1) for arm, values in accuracies.items() for seed, top1 in enumerate(values)]
    assert table(made, arms, measured).splitlines() == [
        "| width | knn | paper |", "|---|---|---|", "| 0 | 15.0 ± 7.1 | 10.0* |", "| 1 | 40.0 ± 0.0 | 20.0* |",
        "| 2 | 30.0 ± 0.0 | 30.0* |", "| 3 | 80.0 ± 14.1 | 40.0* |",
    ]  # fmt: skip
    assert rank_agreement(made, arms, measured) == pytest.approx(0.8)  # 1 - 6 (1 + 1) / (4 x 15)
    assert "(Spearman): 0.80." in report(made, arms, measured, "how")
    worse = [replace(arm, series="worse", paper=arm.paper and arm.paper / 100) for arm in arms]
    both = [*(replace(arm, series="better") for arm in arms), *worse]
    of_both = [replace(one, arm=f"better / {one.arm}") for one in measured]
    of_both += [measurement(arm.name, 0, 0.05 - 0.01 * k) for k, arm in enumerate(worse)]
    expected = spearmanr([15, 40, 30, 80, 5, 4, 3, 2], [10, 20, 30, 40, 0.1, 0.2, 0.3, 0.4]).statistic
    said = f"(Spearman): {expected:.2f}, 0.80 within better, -1.00 within worse."
    assert said in report(made, both, of_both, "how")
    for shape in ("bars", "lines", "matrix"):
        picture = draw(replace(made, shape=shape), arms, measured)
        assert picture.startswith(b"\x89PNG")


def test_the_command_writes_table_picture_and_record(tmp_path, digits, monkeypatch, capsys):
    monkeypatch.setitem(command.STUDIES, "widths", lambda _scale: WIDTHS)
    options = StudyOptions(item="widths", data=digits, out=tmp_path / "out", seeds=2, images=60)
    measured = study(options, Overrides({"epochs": 2}))
    assert len(measured) == 4
    page = (tmp_path / "out" / "widths.md").read_text()
    assert page in capsys.readouterr().out
    assert "--images 60 --seeds 2 --epochs 2`: 2 seeds" in page and "| small / whole |" in page
    assert (tmp_path / "out" / "widths.png").exists()
    record = json.loads((tmp_path / "out" / "widths.json").read_text())
    assert [one["arm"] for one in record["measurements"]] == ["small / half", "small / whole"] * 2
    assert record["measurements"][0]["results"][0]["num_train"] == 60


def test_a_study_that_is_stopped_says_how_it_goes_on(tmp_path, digits, monkeypatch):
    def stops(*args, **kwargs):
        raise Stopped("simclr resume continues it", 2)

    monkeypatch.setitem(command.STUDIES, "widths", lambda _scale: WIDTHS)
    monkeypatch.setattr(run, "pretrain", stops)
    with pytest.raises(Stopped, match="the same command goes on") as stopped:
        study(StudyOptions(item="widths", data=digits, out=tmp_path), Overrides({}))
    assert stopped.value.signal == 2


def test_a_dry_run_counts_and_trains_nothing(tmp_path, digits, monkeypatch, capsys, count_trainings):
    searched = Arm(point="searched", candidates=[{"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3}])
    made = replace(WIDTHS, arms=[*WIDTHS.arms, searched])
    monkeypatch.setitem(command.STUDIES, "widths", lambda _scale: made)
    monkeypatch.setattr(command, "_seconds_of_a_step", lambda data, settings: 2.0)
    study(StudyOptions(item="widths", data=digits, out=tmp_path / "out", dry_run=True), Overrides({}))
    # 80 images at a batch of 16: 6 steps of 2 seconds; 2 x 3 trainings, and 3 + 2 where there is a choice
    said = capsys.readouterr().out
    assert (
        "3 points, 3 seeds: 11 trainings on 80 images, about 2:12" in said and "9 evaluations, 0 of which train" in said
    )
    assert not count_trainings


def test_a_dry_run_counts_shared_and_finished_trainings_once(tmp_path, digits, monkeypatch, capsys):
    shared = Arm(point="again", settings={"width": 0.5}, evaluation={"labels": "5/class"})
    of_two_bases = Arm(point="other", distillation=Distillation(teacher={}, student={}, start="another base"))
    made = replace(WIDTHS, arms=[WIDTHS.arms[0], shared, of_two_bases])
    monkeypatch.setitem(command.STUDIES, "widths", lambda _scale: made)
    monkeypatch.setattr(command, "_seconds_of_a_step", lambda data, settings: 2.0)
    options = StudyOptions(item="widths", data=digits, out=tmp_path, seeds=2, dry_run=True)
    study(options, Overrides({}))
    said = capsys.readouterr().out
    assert "6 evaluations, 2 of which train" in said  # the distillation
    assert "2 seeds: 5 trainings" in said  # half wide: seeds 0 and 1; of two bases: 0, 1 and 2
    list(run_study(replace(made, arms=made.arms[:1]), digits, out=tmp_path, seeds=[0]))
    capsys.readouterr()
    study(options, Overrides({}))
    assert "2 seeds: 4 trainings" in capsys.readouterr().out


def test_students_that_learn_from_labels_have_all_of_the_teachers(tmp_path, capsys):
    arms = find_study("v2-table-2", "cpu").arms
    short = {"epochs": 0, "min_steps": 1, "batch_size": 16}
    for arm in arms:
        if "label" not in arm.name or arm.distillation is None or arm.distillation.student is None:
            continue
        share = {name: "10%" if value == "1%" else value for name, value in arm.distillation.student.items()}
        teacher = {"labels": "10%", "finetune_recipe": "small", **short}
        plan = Distillation(teacher=teacher, student={**share, **short})
        made = replace(
            WIDTHS,
            settings={**WIDTHS.settings, "knn_every": 0, "batch_size": 128},
            arms=[Arm(point="x", distillation=plan)],
        )
        list(run_study(made, "digits", out=tmp_path, seeds=[0]))
        said = re.search(r"Labels of ([\d,]+) images", capsys.readouterr().err)
        assert ("labels" in share) == (said is not None)
        labelled = said is None or abs(int(known(said)[1]) - 0.1 * len(open_data("digits", split="train"))) <= 5
        assert labelled, arm.name


def test_accuracy_on_drawn_classes_is_that_of_a_probe_by_scikit_learn(tmp_path):
    """On all classes, where nothing is drawn; on two classes chance is 50 %, so kappa is 2 a - 1."""
    subjects = [DrawnClasses(count=None, subject="pixels"), DrawnClasses(count=2, subject="pixels")]
    arms = [Arm(point=str(k), drawn_classes=plan) for k, plan in enumerate(subjects)]
    made = replace(WIDTHS, settings={**WIDTHS.settings, "knn_every": 0, "batch_size": 512}, arms=arms)
    ((of_all, of_two),) = run_study(made, "digits", out=tmp_path, seeds=[0])
    split = split_data(open_data("digits"), open_data("digits", split="test"), seed=0, labels="20/class")
    images = [
        np.stack([np.asarray(image) for image in part.read(np.arange(len(part)))]) for part in (split.train, split.test)
    ]
    learn, test = (part.reshape(len(part), -1) for part in images)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(learn, split.train.labels)
    expected = balanced_accuracy_score(known(split.test.labels), classifier.predict(test))
    (result,) = of_all.results
    assert result.value("top1") == pytest.approx(expected, abs=0.03)  # the probe chooses its l2
    assert result.value("kappa") == pytest.approx((result.value("top1") - 0.1) / 0.9)
    assert of_two.results[0].value("kappa") == pytest.approx(2 * of_two.results[0].value("top1") - 1)
    with pytest.raises(UserError, match="has 10 classes, and 11 were asked for"):
        list(
            run_study(
                replace(made, arms=[Arm(point="11", drawn_classes=DrawnClasses(count=11))]),
                "digits",
                out=tmp_path,
                seeds=[0],
            )
        )


def test_a_student_is_measured_and_made_once(tmp_path, digits, monkeypatch):
    """Teacher and student as their own commands report them; the student of its own base begins at that encoder."""
    teacher = {"labels": "4/class", "finetune_recipe": "small", "min_steps": 3, "epochs": 0}
    student = {"epochs": 0, "min_steps": 3, "temperature": 1.0, "head_layer": 0}
    starts = ("new weights", "own base", "another base")
    arms = [
        Arm(point="teacher", distillation=Distillation(teacher=teacher)),
        *(
            Arm(point=start, distillation=Distillation(teacher=teacher, student=student, start=start))
            for start in starts
        ),
    ]
    made = replace(WIDTHS, arms=arms, evaluation={"protocol": "classifier"})
    (first,) = run_study(made, digits, out=tmp_path, seeds=[0])
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("runs/student-*/summary.json")]
    assert len(summaries) == 3 and len(list(tmp_path.glob("runs/teacher-*"))) == 1
    students = sorted(summary["test_accuracy"]["student"] for summary in summaries)
    assert sorted(one.results[0].value("top1") for one in first[1:]) == students
    assert {summary["test_accuracy"]["teacher"] for summary in summaries} == {first[0].results[0].value("top1")}
    starts_at = {
        json.loads((path / "run.json").read_text())["inputs"]["student"] for path in tmp_path.glob("runs/student-*")
    }
    assert len(starts_at) == 3
    kept, others = read_results(tmp_path / "results.jsonl")
    assert {result.value("top1") for result in kept} == {one.results[0].value("top1") for one in first} and not others
    monkeypatch.setattr(distillation, "distill", None)
    monkeypatch.setattr(distillation, "finetune", None)
    (again,) = run_study(made, digits, out=tmp_path, seeds=[0])
    assert table(made, arms, again) == table(made, arms, first)


@pytest.mark.parametrize(
    ("options", "settings", "sentence"),
    [
        ({"item": "figure-99"}, {}, "no study 'figure-99'"),
        ({"item": "figure-9"}, {}, "needs DATA"),
        ({"item": "figure-9", "data": "digits", "seeds": 0}, {}, "--seeds was 0"),
        ({"item": "figure-9", "data": "digits", "points": "batch 7"}, {}, "no point 'batch 7'"),
        ({"item": "table-4", "data": "digits"}, {"views_per_image": 4}, "Point margin: --views-per-image"),
        ({"item": "table-4", "data": "digits"}, {"knn_every": 0}, "Point margin: .* --knn-every 0"),
        ({"item": "figure-9", "data": "digits"}, {"epochs": 3}, "--epochs was given, and figure-9 compares"),
        ({"item": "moco-head", "data": "digits", "scale": "paper"}, {}, "leave --scale out"),
    ],
)
def test_mistakes_end_before_an_image_is_read(options, settings, sentence, monkeypatch):
    monkeypatch.setattr(command, "open_data", None)
    with pytest.raises(UserError, match=sentence):
        study(StudyOptions(**options), Overrides(settings))


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_of_the_papers_has_the_cost_of_each_study(name):
    rows = [line for line in PAPERS.read_text().splitlines() if f"`simclr study {name} " in line]
    assert len(rows) == 1, name
    here, paper = (cell.strip() for cell in rows[0].strip("|").split("|")[3:5])
    for scale, cell in (("cpu", here), ("paper", paper)):
        if scale == "paper" and name not in PAPER_SCALE:
            assert not cell
            continue
        made = find_study(name, scale)
        epochs = {
            json.dumps(training, sort_keys=True): check_arm(arm, training).epochs
            for arm in made.arms
            for training in made.trainings(arm)
        }
        trainings = f"{len(epochs)} training" + "s" * (len(epochs) > 1)
        assert cell == f"{trainings}, {sum(epochs.values()):,g} epochs", name


def test_the_page_has_the_command_that_makes_it_again():
    """Read back by the command line, it gives the same options and settings."""
    options = StudyOptions(item="figure-9", data="my data", points="batch 32 / *", images=500)
    given = {"normalize": False, "temperature": 0.5}
    words = shlex.split(command_of(options, given, 3))
    assert words[:2] == ["simclr", "study"]
    read = tyro.cli(StudyOptions, args=words[2:])
    assert replace(read, config=options.config) == options
    assert (read.config.normalize, read.config.temperature, read.config.seed) == (False, 0.5, 3)


def test_without_an_item_all_are_listed(capsys):
    study(StudyOptions(), Overrides({}))
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(STUDIES)
