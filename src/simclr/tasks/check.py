"""`simclr check DATA`: decode every image and name the damaged files."""

import os
import sys
from typing import TYPE_CHECKING

from simclr.data.opening import open_whole
from simclr.data.readers.store import Reading
from simclr.training.progress import counting, say

if TYPE_CHECKING:
    from simclr.tasks.options.using import Check


def check(options: "Check") -> None:
    """Print a line "key: reason" for each file that cannot be used; exit code 1 where there are any.

    Raises:
        UserError: There is nothing at DATA, or an archive cannot be read at all.
    """
    reading = Reading(workers=os.cpu_count() or 1, memory_budget=0, allow_empty=True, say=say, counting=counting)
    images = open_whole(options.data, reading)
    with counting("Checking images", lines=True, unit="image") as progress:
        damaged = sorted([*images.skipped, *images.check(progress)])
    for item in damaged:
        print(f"{item.key if item.key.isprintable() else ascii(item.key)}: {item.reason}")
    total = len(images) + len(images.skipped)
    if damaged:
        say(f"{len(damaged):,} of {total:,} files cannot be used.")
        sys.exit(1)
    say(f"All {total:,} images can be decoded.")
