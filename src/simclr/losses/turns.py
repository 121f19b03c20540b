"""Rows of tiles shared by threads that each compute alone, to the bits that one thread would give.

torch shares out every operation, and at its end all threads wait for the last, which beside other programs is seldom
running. Here a thread computes whole tiles by itself, and waits, asleep, only where sums would mix.

Tile (r, c) adds to the sums of rows r and of columns c, and one thread would go through r = 0, 1, ..., each with
c = r, r + 1, ... So every sum has its order: a tile adds once the row above has passed its column. Rows follow each
other at a distance of one tile, however many threads take them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Condition

import torch

__all__ = ["Turns", "in_threads"]


class Turns:
    """Who computes which row, and how many of each row's tiles have been added.

    Args:
        rows: How many rows of tiles there are.
    """

    def __init__(self, rows: int) -> None:
        self._added, self._taken, self._broken = [0] * rows, 0, False
        self._changed = Condition()

    def rows(self) -> Iterator[int]:
        """Rows for the thread that asks, each to one thread; in order, so that what a row waits for is under way."""
        while True:
            with self._changed:
                if self._broken or self._taken == len(self._added):
                    return
                row = self._taken
                self._taken += 1
            yield row

    def wait(self, row: int, tiles: int) -> None:
        """Sleep until that many tiles of the row have been added.

        Raises:
            RuntimeError: Another thread has failed, and they never will be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._broken or self._added[row] >= tiles)
            if self._broken:
                raise RuntimeError("another thread failed")

    def added(self, row: int) -> None:
        """One more tile of the row has been added."""
        with self._changed:
            self._added[row] += 1
            self._changed.notify_all()

    def fail(self) -> None:
        """Let no thread wait for what will not come."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()


def in_threads(work: Callable[[], None], turns: Turns, threads: int) -> None:
    """Call `work`, which takes its rows from `turns`, in this thread and in as many more, each with torch's one thread.

    Gradients are not recorded. The first error of a thread is raised here.
    """
    if threads == 1:
        work()
        return
    inference, before, errors = torch.is_inference_mode_enabled(), torch.get_num_threads(), []

    def work_or_fail() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():  # these are each thread's own
                work()
        except BaseException as error:
            errors.append(error)  # before those that only waited for this thread
            turns.fail()

    torch.set_num_threads(1)  # of this thread, and of those that begin now
    try:
        with ThreadPoolExecutor(threads - 1, thread_name_prefix="tiles") as pool:
            for _ in range(threads - 1):
                pool.submit(work_or_fail)
            work_or_fail()
    finally:
        torch.set_num_threads(before)
    if errors:
        raise errors[0]
