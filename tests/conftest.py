"""Fixtures that several test files share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small tensors, and other processes beside us

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of vectors computed by the authors' own code; SIMCLR_REFERENCE names another of the same format."""
    return Path(os.environ.get("SIMCLR_REFERENCE", Path(__file__).parent / "reference"))
