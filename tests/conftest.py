"""Fixtures that several test files share."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small tensors, and other processes beside us

from collections import Counter
from pathlib import Path

import pytest
import torch

from simclr.cli.main import main
from simclr.errors import Stopped
from skips import counted, violations

pytest.register_assert_rewrite("helpers")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU


def _let_interpreter_index() -> None:
    """Triton 3.6 (torch 2.11) makes an int of an array of one element, which NumPy 2.4 refuses; later ones squeeze."""
    try:
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor
    except (ImportError, AttributeError):
        return

    def patch_and_squeeze(tensor, scope):
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_and_squeeze


if os.environ.get("TRITON_INTERPRET") == "1":
    _let_interpreter_index()


UNIT_FILES = (
    "test_baselines.py", "test_cache.py", "test_checkpoint.py", "test_config.py", "test_data.py", "test_deprecated.py",
    "test_distillation.py", "test_evaluation_table.py", "test_files.py", "test_forms.py", "test_identity.py",
    "test_knn.py", "test_label_free.py", "test_label_lists.py", "test_layout.py", "test_logistic.py",
    "test_loss_metrics.py", "test_metrics.py", "test_nt_xent.py", "test_optim.py", "test_records.py",
    "test_reference.py", "test_reports.py", "test_results.py", "test_retrieval.py", "test_schedule.py",
    "test_verdict.py", "test_views.py",
)  # fmt: skip
"""Files of the tier `unit`: together under a minute on two cores, and no test takes more than a few seconds."""

ANY_TORCH_FILES = (
    "test_benchmark_loss.py", "test_benchmarks.py", "test_cache.py", "test_choose_settings.py", "test_config.py",
    "test_curve.py", "test_data.py", "test_deprecated.py", "test_drill_cache.py", "test_drills.py",
    "test_evaluation_table.py", "test_files.py",
    "test_hostile_archives.py", "test_hub.py", "test_identity.py", "test_label_lists.py", "test_layout.py",
    "test_pack.py", "test_records.py", "test_reports.py", "test_retrieval.py", "test_schedule.py", "test_skips.py",
    "test_source.py",
)  # fmt: skip
"""Files whose tests do not depend on the release of torch: readers, settings, records, reports, drills of the disk.

CI runs them with the newest torch alone (marker `any_torch`), and every file that is not listed with the oldest too.
"""


def pytest_configure():
    listed = {*UNIT_FILES, *ANY_TORCH_FILES}
    missing = sorted(name for name in listed if not (Path(__file__).parent / name).exists())
    if missing:
        raise pytest.UsageError(f"tests/conftest.py lists files that do not exist: {', '.join(missing)}")


def pytest_ignore_collect(collection_path, config):
    """With -m unit other test files are not even imported, nor with -m "not any_torch" those that carry it."""
    if not collection_path.name.startswith("test_"):
        return None
    match config.option.markexpr:
        case "unit":
            return collection_path.name not in UNIT_FILES or None
        case "not any_torch":
            return collection_path.name in ANY_TORCH_FILES or None
    return None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in UNIT_FILES and not item.get_closest_marker("multiprocess"):
            item.add_marker("unit")
        if item.path.name in ANY_TORCH_FILES:
            item.add_marker("any_torch")


def pytest_exception_interact(node, call):
    """End the session where a training was stopped that no test has stopped.

    While a training runs, SIGTERM asks it to save and stop. One that was meant for pytest, such as that of `timeout`,
    would fail the test with `Stopped`, and pytest would go on.
    """
    if call.excinfo is not None and isinstance(call.excinfo.value, Stopped):
        node.session.shouldstop = f"signal {call.excinfo.value.signal} came from outside during {node.nodeid}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """With CI=true, a skip that is not allowed fails the run (skips.py)."""
    if os.environ.get("CI") == "true" and list(violations(_skips(session.config))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """Every reason to skip, with its number of tests, and what CI would not accept."""
    skips = _skips(config)
    for reason, count in skips.items():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    if os.environ.get("CI") == "true":
        for sentence in violations(skips):
            terminalreporter.write_line(f"FAILED, {sentence}", red=True)


def _skips(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return counted(reporter.stats.get("skipped", ())) if reporter is not None else Counter()


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of vectors computed by the authors' own code; SIMCLR_REFERENCE names another of the same format."""
    return Path(os.environ.get("SIMCLR_REFERENCE", Path(__file__).parent / "reference"))


@pytest.fixture
def simclr(monkeypatch, capsys):
    """Run a command in this process; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["simclr", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
