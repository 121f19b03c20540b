"""Golden runs: losses, weights and accuracies that a change of structure must leave identical (golden/runs.py)."""

import pytest

from golden.runs import differences, load_record, run_all


def test_nothing_moved(tmp_path):
    recorded = load_record()
    if recorded is None:
        pytest.skip("no golden runs are recorded for this release of torch")
    assert differences(run_all(tmp_path), recorded) == []
