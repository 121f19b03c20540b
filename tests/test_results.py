"""Results and their store: only intact lines count, nothing computed is lost, and processes do not tear lines."""

import json
import multiprocessing
import os
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from pydantic import ValidationError

from simclr.evaluation.results import (
    KEY_FIELDS,
    About,
    Measured,
    Result,
    ResultStore,
    append_line,
    name_of,
    read_results,
)

KEY = {
    "protocol": "knn",
    "version": {"knn": 1},
    "model": {"weights": "ab" * 32, "network": {"name": "small"}},
    "data": {"train": "cd" * 32, "test": "ef" * 32},
    "settings": {"k": 20, "temperature": 0.07},
    "seed": 0,
}
MEASURED = Measured(metrics={"top1": 0.913, "l2": None}, description="k 20", details={"rows": (1, 2)})
ABOUT = About(subject="mine", data_name="digits", split="80/20", num_train=80, num_test=20, num_classes=10)


def key_of(**changes):
    return KEY | changes


def refuse():
    raise AssertionError("computed again")


def line_of_first_schema(key, value, about):
    """As version 0.1 wrote it before results had a schema version."""
    record = {"key": key, "value": value, "about": about}
    check = sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    return json.dumps(record | {"check": check}).encode() + b"\n"


def test_a_result_is_read_back_with_everything_that_is_known_of_it(tmp_path):
    file = tmp_path / "deep" / "results.jsonl"
    first = ResultStore(file).get(KEY, lambda: MEASURED, ABOUT)
    assert first.key == KEY and set(KEY) == set(KEY_FIELDS) and first.weights == "ab" * 32
    assert (first.metrics, first.description, first.details) == ({"top1": 0.913, "l2": None}, "k 20", {"rows": [1, 2]})
    assert (first.subject, first.data_name, first.split, first.num_test) == ("mine", "digits", "80/20", 20)
    assert {"simclr", "torch", "numpy"} <= set(first.software)
    assert read_results(file) == ([first], 0)
    (line,) = file.read_text().splitlines()
    values = json.loads(line)
    assert values.pop("check") and Result(**values) == first and values["schema_version"] == 2

    again = ResultStore(file)
    assert again.get(dict(reversed(KEY.items())), refuse, ABOUT) == first and again.reused == 1
    assert again.get(KEY, refuse, replace(ABOUT, subject="yours")) == replace(first, subject="yours")
    with pytest.raises(AssertionError, match="computed again"):
        again.get(key_of(version={"knn": 2}), refuse)


@pytest.mark.parametrize("field", KEY_FIELDS)
def test_each_field_of_the_key_determines_a_result(tmp_path, field):
    store = ResultStore(tmp_path / "results.jsonl")
    store.get(KEY, lambda: MEASURED)
    other = {"protocol": "linear", "seed": 1}.get(field, {"other": 1})
    with pytest.raises(AssertionError, match="computed again"):
        store.get(key_of(**{field: other}), refuse)


@pytest.mark.parametrize(
    "wrong",
    [
        {"metrics": {"top1": "0.9"}}, {"metrics": {"top1": float("nan")}}, {"metrics": {"top1": True}}, {"seed": "0"},
        {"protocol": 1}, {"model": None}, {"version": {"knn": 1.5}}, {"unknown": 1},
    ],
)  # fmt: skip
def test_a_result_of_wrong_types_cannot_be(wrong):
    assert Result(**KEY, metrics={"top1": 1.0}).value("top1") == 1.0
    with pytest.raises(ValidationError):
        values: dict[str, Any] = {**KEY, "metrics": {"top1": 1.0}, **wrong}
        Result(**values)


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b"0.913", b"0.931"),
        lambda line: line.replace(b'"seed": 0', b'"seed": 1'),
        lambda line: line[: len(line) // 2],
        lambda line: b"[]",
        lambda line: b'"text"',
        lambda line: b"\xff\x00",
        lambda line: b"[" * 100_000,
        lambda line: b'{"key": {"protocol": "knn"}, "value": {"figures": {}}}',  # of an earlier version
        lambda line: line_of_first_schema({"claim": "depth"}, {"accuracy": 0.5}, {}).strip(),  # of a benchmark then
        lambda line: rewritten(line, schema_version=3),
        lambda line: rewritten(line, metrics={"top1": "high"}),
    ],
)
def test_a_line_that_is_not_intact_is_counted_and_not_used(tmp_path, damage, capsys):
    file = tmp_path / "results.jsonl"
    ResultStore(file).get(KEY, lambda: MEASURED)
    ResultStore(file).get(key_of(seed=7), lambda: Measured(metrics={"fine": 1.0}))
    first, second = file.read_bytes().splitlines()
    file.write_bytes(damage(first) + b"\n" + second + b"\n")
    again = ResultStore(file)
    assert "1 line is damaged or of another version" in capsys.readouterr().err
    assert again.get(key_of(seed=7), refuse).metrics == {"fine": 1}
    with pytest.raises(AssertionError, match="computed again"):
        again.get(key_of(seed=1), refuse)
    new = Measured(metrics={"new": 1.0})
    assert again.get(KEY, lambda: new).metrics == {"new": 1} == ResultStore(file).get(KEY, refuse).metrics
    assert file.read_bytes().startswith(damage(first))  # left alone


def rewritten(line, **changes):
    """The line with other values, under a right checksum."""
    record = json.loads(line) | changes
    del record["check"]
    check = sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    return json.dumps(record | {"check": check}).encode()


PROBES = {"table": {"h": {"rotation": 0.75}, "z": {"rotation": 0.25}}, "chance": {"rotation": 0.25}, "notes": []}
GRID = {"steps": 3, "batch_size": 8}


@pytest.mark.parametrize(
    ("old_key", "value", "key", "metrics", "details"),
    [
        (KEY, {"figures": {"top1": 0.9, "top5": 1.0}, "how": "k 20"}, KEY, {"top1": 0.9, "top5": 1.0}, {}),
        (key_of(protocol="curve"), {"accuracy": 0.5}, key_of(protocol="curve"), {"top1": 0.5}, {}),
        (
            key_of(protocol="probe"), PROBES, key_of(protocol="probe"), {"h/rotation": 0.75, "z/rotation": 0.25},
            {"chance": {"rotation": 0.25}, "notes": []},
        ),
        (
            key_of(protocol="linear transfer"),
            {"score": 0.5, "validation": 0.75, "chosen": {"l2": 1.0}, "credits": [0.0, 1.0], "converged": True},
            key_of(protocol="linear transfer"), {"score": 0.5, "validation": 0.75},
            {"chosen": {"l2": 1.0}, "credits": [0.0, 1.0], "converged": True},
        ),
        (
            key_of(protocol="fine-tuning", settings=GRID, cell={"rate": 0.1, "decay": 0.0}), {"score": None},
            key_of(protocol="fine-tuning", settings=GRID | {"rate": 0.1, "decay": 0.0}), {"score": None}, {},
        ),
    ],
    ids=["accuracy", "curve", "probe", "linear transfer", "cell"],
)  # fmt: skip
def test_results_of_the_first_schema_are_still_used(tmp_path, old_key, value, key, metrics, details):
    file = tmp_path / "results.jsonl"
    about = {"subject": "encoder", "images": "digits", "split": "80/20", "torch": "2.11"}
    file.write_bytes(line_of_first_schema(old_key, value, about))
    (result,), others = read_results(file)
    assert others == 0 and (result.subject, result.data_name, result.split) == ("encoder", "digits", "80/20")
    assert result.software == {"torch": "2.11"}
    kept = ResultStore(file).get(key, refuse, ABOUT)
    assert (kept.metrics, kept.details, kept.num_test) == (metrics, details, 20)


def test_a_line_behind_one_that_was_cut_short(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_bytes(b'{"key": {"protocol"')
    first = ResultStore(file).get(KEY, lambda: MEASURED)
    assert ResultStore(file).get(KEY, refuse) == first
    assert len(file.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("obstacle", ["file for folder", "folder", "fifo"])
def test_a_file_that_cannot_be_used_costs_a_warning_and_no_result(tmp_path, obstacle, capsys):
    file = tmp_path / "evaluation" / "results.jsonl"
    if obstacle == "file for folder":
        file.parent.write_bytes(b"")
    else:
        file.parent.mkdir()
        (file.mkdir if obstacle == "folder" else lambda: os.mkfifo(file))()
    store = ResultStore(file)
    for seed in range(3):
        first = store.get(key_of(seed=seed), lambda: MEASURED)
        assert first.metrics == MEASURED.metrics and store.get(key_of(seed=seed), refuse) == first
    assert capsys.readouterr().err.count("Results cannot be kept in") == 1


def test_names_that_are_no_unicode(tmp_path):
    """A path may hold any bytes, which Python keeps as lone surrogates."""
    file = tmp_path / "results.jsonl"
    first = ResultStore(file).get(KEY, lambda: MEASURED, About(subject="\udcff", data_name="\ud800"))
    assert read_results(file) == ([first], 0) and first.subject == "\udcff"


def append_many(file, letter, barrier):
    store = ResultStore(file)
    barrier.wait()
    for i in range(100):
        credits = Measured(metrics={}, details={"credits": [0.5] * 400})
        store.get(key_of(settings={"by": letter, "i": i}), lambda credits=credits: credits)


def test_two_processes_append_at_once(tmp_path):
    file = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=append_many, args=(file, letter, barrier)) for letter in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    results, others = read_results(file)
    assert len(results) == 200 and others == 0
    assert len({name_of(result.key) for result in results}) == 200


def test_a_disk_that_takes_a_part_of_a_line_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("simclr.evaluation.results.os.write", lambda descriptor, line: len(line) - 1)
    with pytest.raises(OSError, match="only a part"):
        append_line(tmp_path / "results.jsonl", b"{}")


def test_what_another_process_kept_meanwhile_is_not_kept_twice(tmp_path):
    file = tmp_path / "results.jsonl"

    def make():
        ResultStore(file).get(KEY, lambda: MEASURED)  # while this one computes
        return MEASURED

    ResultStore(file).get(KEY, make)
    assert len(file.read_text().splitlines()) == 1
