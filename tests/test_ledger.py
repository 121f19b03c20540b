"""Result store: only intact lines count, nothing that is computed is lost, and processes do not tear lines."""

import json
import multiprocessing
import os

import pytest

from simclr.evaluation.results import ResultStore, append_line, read_results

KEY, VALUE = {"protocol": "knn", "seed": 0, "version": {"knn": 1}}, {"figures": {"top1": 0.913}, "how": "so"}


def refuse():
    raise AssertionError("computed again")


def test_a_result_is_read_back_with_what_is_said_about_it(tmp_path):
    file = tmp_path / "deep" / "results.jsonl"
    assert ResultStore(file).get(KEY, lambda: VALUE, about={"subject": "mine"}) == VALUE
    again = ResultStore(file)
    assert again.get(dict(reversed(KEY.items())), refuse) == VALUE and again.reused == 1
    ((record,), others) = read_results(file)
    assert others == 0 and record["about"]["subject"] == "mine" and {"torch", "numpy"} <= set(record["about"])
    with pytest.raises(AssertionError, match="computed again"):
        again.get(KEY | {"version": {"knn": 2}}, refuse)


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
    ],
)
def test_a_line_that_is_not_intact_is_counted_and_not_used(tmp_path, damage, capsys):
    file = tmp_path / "results.jsonl"
    ResultStore(file).get(KEY, lambda: VALUE)
    ResultStore(file).get({"other": 1}, lambda: {"fine": 1})
    first, second = file.read_bytes().splitlines()
    file.write_bytes(damage(first) + b"\n" + second + b"\n")
    again = ResultStore(file)
    assert "1 line is damaged or of another version" in capsys.readouterr().err
    assert again.get({"other": 1}, refuse) == {"fine": 1}
    with pytest.raises(AssertionError, match="computed again"):
        again.get(KEY | {"seed": 1}, refuse)
    assert again.get(KEY, lambda: {"new": 1}) == {"new": 1} and ResultStore(file).get(KEY, refuse) == {"new": 1}


def test_a_line_behind_one_that_was_cut_short(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_bytes(b'{"key": {"protocol"')
    ResultStore(file).get(KEY, lambda: VALUE)
    assert ResultStore(file).get(KEY, refuse) == VALUE
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
        assert store.get({"seed": seed}, lambda: VALUE) == VALUE
        assert store.get({"seed": seed}, refuse) == VALUE
    assert capsys.readouterr().err.count("Results cannot be kept in") == 1


def append_many(file, letter, barrier):
    store = ResultStore(file)
    barrier.wait()
    for i in range(100):
        store.get({"by": letter, "i": i}, lambda: {"credits": [0.5] * 400})


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
    records, others = read_results(file)
    assert len(records) == 200 and others == 0
    assert len({json.dumps(record["key"]) for record in records}) == 200


def test_a_disk_that_takes_a_part_of_a_line_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("simclr.evaluation.results.os.write", lambda descriptor, line: len(line) - 1)
    with pytest.raises(OSError, match="only a part"):
        append_line(tmp_path / "results.jsonl", b"{}")


def test_what_another_process_kept_meanwhile_is_not_kept_twice(tmp_path):
    file = tmp_path / "results.jsonl"

    def make():
        ResultStore(file).get(KEY, lambda: VALUE)  # while this one computes
        return VALUE

    assert ResultStore(file).get(KEY, make) == VALUE
    assert len(file.read_text().splitlines()) == 1
