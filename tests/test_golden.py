"""Golden runs: losses, weights and accuracies that a change of structure must leave identical (golden/runs.py)."""

import pytest

from golden.runs import differences, load_record, run_all
from skips import NO_GOLDEN


def test_nothing_moved(tmp_path):
    recorded = load_record()
    if recorded is None:
        pytest.skip(NO_GOLDEN)
    assert differences(run_all(tmp_path), recorded) == []
