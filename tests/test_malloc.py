"""Freed memory is used again without page faults: counted by the kernel, in a process of its own."""

import platform
import subprocess
import sys

import pytest

from skips import OTHER_LIBC

COUNT = """
import resource, sys
import torch
from simclr.training.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def rounds(n):
    for _ in range(n):
        blocks = [torch.ones(12_000_000) for _ in range(2)]  # 48 MB each, more than glibc keeps by itself
        del blocks
rounds(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason=OTHER_LIBC)
def test_a_second_step_needs_no_new_pages() -> None:
    faults = {}
    for mode in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", COUNT, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    assert faults["keep"] < faults["default"] / 2
