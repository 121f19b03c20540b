"""Which tests may be skipped, and where: every reason is printed, and with CI=true any that does not hold is a failure.

A skip is allowed for a reason whose condition holds on this machine now, and for a number of tests at most. So a guess
that has become wrong, a package that the project's files no longer install, or a growing pile of skips is noticed.
"""

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

NEEDS_GPU = "minutes in the interpreter"
NO_PIPES = "needs named pipes"
ROOT = "root may read everything"
OTHER_LIBC = "another C library"
NO_ARRAY_API = "SCIPY_ARRAY_API is not set: not checking array_api input"  # of scikit-learn's own checks
NO_GOLDEN = "no golden runs are recorded for this release of torch"
GOLDEN_RELEASES = ("2.11", "2.14")  # those of golden/golden.json


class Allowed(NamedTuple):
    """When a reason holds, and how many tests it may skip."""

    holds: Callable[[], bool]
    max_tests: int


ALLOWED = {
    NEEDS_GPU: Allowed(lambda: not torch.cuda.is_available(), 16),
    NO_PIPES: Allowed(lambda: not hasattr(os, "mkfifo"), 4),
    ROOT: Allowed(lambda: hasattr(os, "geteuid") and os.geteuid() == 0, 1),
    OTHER_LIBC: Allowed(lambda: platform.libc_ver()[0] != "glibc", 2),
    NO_ARRAY_API: Allowed(lambda: "SCIPY_ARRAY_API" not in os.environ, 2),
    NO_GOLDEN: Allowed(lambda: not torch.__version__.startswith(GOLDEN_RELEASES), 1),
}


def counted(reports: Iterable[object]) -> Counter[str]:
    """Reason -> skipped tests, of pytest's reports."""
    reasons = (report.longrepr for report in reports)  # pyrefly: ignore[missing-attribute]
    return Counter(str(found[2] if isinstance(found, tuple) else found).removeprefix("Skipped: ") for found in reasons)


def violations(skips: Counter[str]) -> Iterator[str]:
    """A sentence for each reason that is not allowed here, or skips more tests than it may."""
    for reason, count in skips.items():
        allowed = ALLOWED.get(reason)
        if allowed is None:
            yield f"skipped {count} for a reason that is not allowed: {reason}"
        elif not allowed.holds():
            yield f"skipped {count} for a reason that does not hold here: {reason}"
        elif count > allowed.max_tests:
            yield f"skipped {count}, at most {allowed.max_tests} are allowed: {reason}"
