"""What a person sees of a long job: a bar on a terminal, plain lines in a file, nothing from other processes."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

_HUSHED: ContextVar[bool] = ContextVar("hushed", default=False)


@contextmanager
def hushed() -> Iterator[None]:
    """Say nothing and show no bar: a library's caller, unlike a command's, reads what is returned."""
    token = _HUSHED.set(True)
    try:
        yield
    finally:
        _HUSHED.reset(token)


def say(sentence: str, *, main: bool = True) -> None:
    """One line to the person, on standard error, so that standard output stays for results."""
    if main and not _HUSHED.get():
        print(sentence, file=sys.stderr, flush=True)


@dataclass
class Outcome:
    """How a call of the training loop ended, or how far it has come."""

    step: int
    finished: bool
    signal: int | None = None
    """The signal that asked to stop, if one did."""
    seconds: float = 0.0
    wait_seconds: float = 0.0
    """Of these: spent waiting for batches."""
    steps_run: int = 0
    """By this call."""
    steps_replayed: int = 0
    """Of these: replayed from a CUDA graph."""
    last: dict[str, float] = field(default_factory=dict)
    """The last record."""
    warnings: list[str] = field(default_factory=list)


class ProgressCallback(Protocol):
    """What the loop calls as training goes on; `Progress` shows it to a person."""

    def step(self, done: int) -> None:
        """A step ended."""

    def record(self, record: dict[str, float], outcome: Outcome) -> None:
        """A record was written; `step` is not called for its step."""


class StepCallback:
    """A function of (done, total) steps as `ProgressCallback`."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self._progress, self._total = progress, total

    def step(self, done: int) -> None:
        """A step ended."""
        self._progress(done, self._total)

    def record(self, record: dict[str, float], outcome: Outcome) -> None:
        """A record was written."""
        self.step(outcome.step)


class Progress:
    """Progress of training: a bar with views per second, time left and waiting share, or a line per record.

    Args:
        total_steps: Where training ends.
        start_step: Where this call begins.
        views_per_step: Over all processes.
        formats: How metrics print: name -> format, such as {"accuracy": "accuracy {:.1%}"}.
        main: False on all processes but one: they stay silent.
    """

    def __init__(
        self, total_steps: int, start_step: int, views_per_step: int, *, formats: Mapping[str, str], main: bool
    ) -> None:
        self._total, self._start, self._views = total_steps, start_step, views_per_step
        self._formats = {**formats, "knn": "kNN {:.1%}"}
        self._main = main and not _HUSHED.get()
        self._begun = time.perf_counter()
        self._bar: Any = None
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        if self._main and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.fields[text]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._row = self._bar.add_task("", total=self._total, completed=self._start, text="starting")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int) -> None:
        """A step ended."""
        if self._bar is not None:
            self._bar.update(self._row, completed=done)

    def record(self, record: dict[str, float], outcome: Outcome) -> None:
        """A record was written: show it."""
        if not self._main:
            return
        done = int(record["step"])
        rate = outcome.steps_run / outcome.seconds
        parts = [f"loss {record['loss']:.4f}"]
        parts += [text.format(record[name]) for name, text in self._formats.items() if name in record]
        parts.append(f"{rate * self._views:,.0f} views/s")
        parts.append(f"waiting {outcome.wait_seconds / outcome.seconds:.0%}")
        text = ", ".join(parts)
        for warning in outcome.warnings:
            if warning.split(":")[0] not in self._warned:
                self._warned.add(warning.split(":")[0])
                self._print(f"Warning: {warning}")
        if self._bar is not None:
            self._bar.update(self._row, completed=done, text=text)
            if "knn" in record:
                self._print(f"step {done}: {text}")
        else:
            left = (self._total - done) / rate
            say(f"step {done}/{self._total}: {text}, {duration(left)} left")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            say(line)


def duration(seconds: float) -> str:
    """1:02 for 62 seconds, 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def counting(
    what: str, *, main: bool = True, lines: bool = False, unit: str = "step", after: float = 0
) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (done, total) that shows a bar on a terminal; elsewhere silence (None), or a line at every tenth.

    Args:
        unit: What is counted, for the lines.
        after: Seconds until the first line: shorter work has none.
    """
    if not (main and sys.stderr.isatty()):
        yield _tenths(what, unit, after) if main and lines else None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def _tenths(what: str, unit: str, after: float) -> Callable[[int, int], None]:
    begun, shown = time.perf_counter(), 0

    def tell(done: int, total: int) -> None:
        nonlocal shown
        seconds = time.perf_counter() - begun
        if 10 * done // total > shown and seconds >= after:
            shown = 10 * done // total
            say(f"    {what}: {unit} {done:,} of {total:,}, {duration(seconds / done * (total - done))} left")

    return tell
