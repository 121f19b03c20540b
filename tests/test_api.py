"""The Python API: the commands as functions, and the example that shows the method as a plain loop."""

import runpy
from pathlib import Path

import numpy as np
import pytest

import simclr

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = {"recipe": "digits", "epochs": 1, "batch_size": 64, "width": 0.5, "workers": 0}


@pytest.fixture
def simclr_cli(request):
    return request.getfixturevalue("simclr")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simclr.pretrain("digits", out=str(tmp_path_factory.mktemp("api") / "run"), **QUICK)


def test_a_run_trains_evaluates_and_embeds_as_the_commands_do(simclr_cli, run, tmp_path):
    assert run.metrics()[-1]["step"] == 23 and run.path.is_dir()
    results = run.evaluate("digits", protocol=("knn",), compare=(run,), cache="off")
    (result,) = [result for result in results if result.protocol == "knn"]
    assert all(0 < value <= 1 for value in result.metrics.values()) and result.metrics and result.data
    features = run.embed("digits")
    assert np.array_equal(features, run.load().embed(simclr.open_data("digits", split="all")))
    assert simclr_cli("embed", run.path, "digits", "--out", tmp_path / "f.npz")[0] == 0
    assert np.array_equal(np.load(tmp_path / "f.npz")["features"], features)


def test_weights_are_those_of_the_command(simclr_cli, run, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    assert simclr_cli("pretrain", "digits", "--out", tmp_path / "run", *flags)[0] == 0
    ours, theirs = (path / "encoder" / "model.safetensors" for path in (run.path, tmp_path / "run"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_finetune_and_distill_give_runs(run, tmp_path):
    quick = {"labels": "5/class", "epochs": 0, "min_steps": 3, "workers": 0}
    teacher = run.finetune("digits", out=tmp_path / "teacher", **quick)
    assert set(teacher.load().classes) == set("0123456789")
    student = simclr.distill(
        teacher, "digits", out=tmp_path / "student", epochs=0, min_steps=2, batch_size=16, workers=0
    )
    assert student.load().classify(simclr.open_data("digits").subset(np.arange(3)))
    assert simclr.resume(student).path == student.path  # finished: nothing is done


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda out: simclr.pretrain("digits", out=out, epoch=3),
            "There is no setting 'epoch'; perhaps epochs is meant",
        ),
        (lambda out: simclr.pretrain("digits", out=out, epochs="many"), "epochs was 'many'"),
        (lambda out: simclr.pretrain("digits", out=out, batch_size=1), "batch_size was 1"),
        (lambda out: simclr.pretrain("no/such/place", out=out), "no/such/place"),
        (lambda out: simclr.evaluate("random", "digits", protocl="knn"), "There is no option 'protocl'|no setting"),
        (lambda out: simclr.evaluate(out, "digits"), "holds no encoder"),
    ],
)
def test_a_mistake_is_one_sentence_in_pythons_words(tmp_path, call, sentence):
    with pytest.raises(simclr.UserError, match=sentence) as caught:
        call(tmp_path / "out")
    assert "--" not in str(caught.value) and not (tmp_path / "out").exists()


def test_every_public_name_is_there_and_documented():
    for name in simclr.__all__:
        assert name == "__version__" or getattr(simclr, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = simclr.pretrian


def test_the_plain_loop_of_the_examples_learns(capsys):
    module = runpy.run_path(str(EXAMPLES / "simclr_in_70_lines.py"))
    assert module["main"]("digits", 3, 256) > 0.6
    assert "kNN accuracy" in capsys.readouterr().out
    assert len((EXAMPLES / "simclr_in_70_lines.py").read_text().splitlines()) <= 75
