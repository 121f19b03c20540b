"""Records of a run that are damaged, of another version, or not files at all: one sentence each (records.py)."""

import json
import os

import pytest

from simclr.config.finetune import FinetuneConfig
from simclr.config.pretrain import PretrainConfig, load_config
from simclr.config.records import RunRecord
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.training.lock import hold
from simclr.training.run import RunFolder, claim, create_run, open_run

ORIGIN = {
    "data": {
        "source": "caf\udce9", "options": {"pack": "auto", "side": None}, "name": "digits", "images": 9, "channels": 1,
        "classes": ["0", "1"], "left_out": [{"key": "a", "reason": "b"}], "fingerprint": "0",
    },
    "machine": {"cpu_threads": 1, "command": ["simclr"], "gpu": None},
}  # fmt: skip
FINETUNING = {"method": "supervised", "inputs": {"seed": 0, "images": "a"}, "machine": {"cpu_threads": 2}}


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run", PretrainConfig(), ORIGIN)


DAMAGE = {
    "empty": b"",
    "cut": b'{"data": {',
    "not Unicode": b'{"data": "\xff\xfe"}',
    "a list": b"[]",
    "nested": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "NaN": b'{"seed": NaN}',
    "infinite": b'{"seed": -Infinity}',
    "a key twice": b'{"seed": 1, "seed": 2}',
    "5,000 digits": b'{"seed": ' + b"7" * 5_000 + b"}",
    "a name of 5,000 digits": b'{"' + b"7" * 5_000 + b'": 1}',
    "huge": b'{"seed": 1e999, "size": 1e999, "schema_version": 1e999}',
    "unknown": b'{"colour": "\\u001b[31m"}',
    "null": b"null",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_one_short_sentence(run, content):
    for name in ("run.json", "config.json", "summary.json"):
        (run.path / name).write_bytes(content)
    for read in (
        lambda: run.origin,
        lambda: run.config,
        lambda: run.is_finished,
        lambda: claim(run, PretrainConfig(), ORIGIN),
    ):
        with pytest.raises(UserError, match=r"is damaged: |do not fit: ") as caught:
            read()
        assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("data", "images"), "9", "data.images"),
        (("data", "images"), True, "data.images"),
        (("data", "images"), -1, "data.images"),
        (("data", "options"), None, "data.options"),
        (("data", "options", "side"), 1.5, "data.options.side"),
        (("data", "source"), 3, "data.source"),
        (("data", "classes"), [1], "data.classes.0"),
        (("machine", "cpu_threads"), 10**30, "machine.cpu_threads"),
        (("machine",), [], "machine"),
        (("schema_version",), "1", "schema_version"),
        (("more",), 1, "more"),
    ],
)
def test_a_field_that_does_not_fit_is_named(run, place, value, said):
    record = json.loads((run.path / "run.json").read_bytes())
    inner = record
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (run.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"run\.json is damaged: {said}: .*; restore it, or start a new run"):
        _ = run.origin


def test_a_missing_field_is_named_and_a_free_one_is_free(run):
    record = json.loads((run.path / "run.json").read_bytes())
    assert run.origin["data"] == ORIGIN["data"] and run.origin["machine"] == ORIGIN["machine"]
    del record["data"]["fingerprint"]
    (run.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"data\.fingerprint: Field required"):
        _ = run.origin


def test_records_without_a_version_are_read_and_later_ones_refused(run):
    for name, read in (("run.json", lambda: run.origin["data"]), ("config.json", lambda: run.config)):
        record, now = json.loads((run.path / name).read_bytes()), read()
        assert record.pop("schema_version") == 2
        (run.path / name).write_text(json.dumps(record))
        assert read() == now
        (run.path / name).write_text(json.dumps(record | {"schema_version": 3, "novel": []}))
        with pytest.raises(UserError, match="written by a newer simclr; upgrade simclr"):
            read()


def test_a_record_must_be_a_file_of_bounded_size(run):
    path = run.path / "run.json"
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: no such file"):
        _ = run.origin
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        _ = run.origin
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="such a file has at most"):
        _ = run.origin


def test_settings_that_were_edited_are_refused_and_those_that_decide_nothing_are_free(simclr, run):
    path = run.path / "config.json"
    settings = json.loads(path.read_bytes())
    path.write_text(json.dumps(settings | {"workers": 0, "max_checkpoints": 7}))
    run.refuse_changed_settings()
    path.write_text(json.dumps(settings | {"lr": 0.5}))
    code, _, err = simclr("resume", run.path)
    assert code == 2 and "config.json was changed after the run began" in err


def test_strict_settings(tmp_path):
    for text in ('{"size": "32"}', '{"size": 32.5}', '{"sk": 1}', '{"lr": "0.1"}', '{"flip": null}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="do not fit"):
            load_config(tmp_path / "config.json")


def test_damaged_lines_of_metrics_are_left_out_and_a_pipe_is_refused(run):
    good = b'{"step": 3, "loss": 1.0}'
    bad = [b"[" * 100_000, b'{"step": "3"}', b'{"step": ' + b"9" * 5_000 + b"}", b"\xff", b"3", b'{"step": 4']
    run.metrics.write_bytes(b"\n".join([bad[0], good, *bad[1:]]))
    assert run.read_metrics() == [{"step": 3, "loss": 1.0}]
    run.rewind(9)
    assert run.metrics.read_bytes() == good + b"\n"
    run.metrics.unlink()
    os.mkfifo(run.metrics)
    with pytest.raises(UserError, match="not a regular file"):
        run.rewind(9)


def test_a_folder_is_claimed_by_the_same_training_alone(tmp_path):
    folder = RunFolder(tmp_path / "out")
    config = FinetuneConfig(lr=0.1)
    with hold(folder.path, DistributedContext()):
        claim(folder, config, FINETUNING)
        claim(folder, FinetuneConfig(lr=0.1, workers=0), FINETUNING | {"task": None, "machine": {"cpu_threads": 9}})
        for other, manifest in (
            (FinetuneConfig(lr=0.2), FINETUNING),
            (config, FINETUNING | {"inputs": {"seed": 1, "images": "a"}}),
            (config, FINETUNING | {"method": "distill"}),
        ):
            with pytest.raises(UserError, match="another folder"):
                claim(folder, other, manifest)
    assert folder.method == "supervised" and folder.cpu_threads == 2 and not folder.is_pretraining
    assert RunRecord.model_validate(ORIGIN).settings is None


def test_a_fine_tuning_of_an_earlier_version_is_named(tmp_path):
    (tmp_path / "finetune.json").write_text("{}")
    with pytest.raises(UserError, match="earlier version of `simclr finetune`; start again in another folder"):
        open_run(tmp_path)
