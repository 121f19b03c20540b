"""Fixtures that several test files share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small tensors, and other processes beside us

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of vectors computed by the authors' own code; SIMCLR_REFERENCE names another of the same format."""
    return Path(os.environ.get("SIMCLR_REFERENCE", Path(__file__).parent / "reference"))
