"""Run commands two at a time on one run, one pack, one cache and one output, and compare with one after the other.

    python benchmarks/drill_pairs.py --points 6

The first command of a pair stops before a chosen event (drilling.py says what an event is), the second runs until it
ends or waits, then the first goes on: the interleavings are the same in every run. Each command has to succeed or to
end with one sentence and exit code 2. Then those that were refused are run again, and the files must be those of the
two commands run one after the other, in either order, bit for bit. Exit code 1 where anything was found.
(The test suite holds a short form: tests/test_drills.py.)
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path

import drilling
from drilling import STEPS, VERBS, Ended, Findings, Verb

ON_A_RUN = [
    Verb("embed run", ["embed", "run", "{inputs}/images", "--out", "embedded.npz", "--pack", "off"], before=("run",)),
    Verb("evaluate run", ["evaluate", "run", "{inputs}/images", "--protocol", "knn", "--compare", "--cache", "cache",
                          "--pack", "off"], before=("run",)),
    Verb("finetune run", ["finetune", "run", "{inputs}/images", "--out", "classifier", "--pack", "off", *STEPS],
         before=("run",)),
    Verb("export run", ["export", "run", "--format", "safetensors", "--out", "exported"], before=("run",)),
]  # fmt: skip
"""Commands that read a run, which may be going on: what they write depends on its newest checkpoint."""
FOLDERS = ("pretrain", "evaluate", "finetune", "distill", "import", "export safetensors", "export hub-folder")
"""Commands that write a folder, to be given one and the same."""
WAITS = 3.0
"""Seconds after which a command that has not ended counts as waiting for the one that is stopped."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=6, help="events before which the first command stops, per pair")
    parser.add_argument("--only", nargs="*", default=[], help="pairs with one of these commands; all by default")
    parser.add_argument("--all", action="store_true", help="also pairs that share nothing")
    args = parser.parse_args()
    drilling.warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs"
        drilling.make_inputs(inputs)
        findings = Findings()
        for first, second in pairs(everything=args.all):
            if args.only and not {first.name, second.name} & set(args.only):
                continue
            drill(first, second, inputs, Path(scratch) / "place", findings, points=args.points)
            print(f"{first.name} + {second.name}", flush=True)
    print(findings.table("commands at once"))
    sys.exit(1 if findings.found else 0)


def pairs(*, everything: bool = False) -> list[tuple[Verb, Verb]]:
    """Pairs of commands that share a run, a pack, a cache or an output."""
    found = [(a, b) for a, b in combinations_with_replacement(VERBS, 2) if everything or shared(a) & shared(b)]
    found += [(drilling.find("resume"), verb) for verb in ON_A_RUN]
    folders = [into_folder(drilling.find(name)) for name in FOLDERS]
    return found + [(a, b) for a, b in combinations_with_replacement(folders, 2) if a is not b]


def shared(verb: Verb) -> set[str]:
    """The names in its place that a command uses."""
    return {verb.output, *(name for name in ("cache", "packs", "run") if name in verb.command)}


def into_folder(verb: Verb) -> Verb:
    """The same command with its output in the folder `shared`."""
    command = ["shared" if argument == verb.output else argument for argument in verb.command]
    return replace(verb, name=f"{verb.name} to one folder", command=command, output="shared", again=None)


def drill(first: Verb, second: Verb, inputs: Path, place: Path, findings: Findings, *, points: int) -> None:
    """One pair, with the first command stopped before each of `points` events."""
    pair = f"{first.name} + {second.name}"
    allowed = [_serial(order, inputs, place) for order in ((first, second), (second, first))]
    _fresh(place, first, second, inputs)
    events = drilling.run(first.arguments(inputs), place).events
    chosen = sorted({1 + round(i * (events - 1) / max(points - 1, 1)) for i in range(min(points, events))})
    for at in chosen:
        _fresh(place, first, second, inputs)
        ends = _interleaved(first, second, inputs, place, at)
        problem = next((problem for ended in ends if (problem := ended.problem()) is not None), None)
        for verb, ended in zip((first, second), ends, strict=True):
            if problem is None and ended.code:
                problem = drilling.run(verb.arguments(inputs), place).problem()
        found = _compared(drilling.contents(place), second)
        differences = [drilling.difference(expected, found) for expected in allowed]
        if problem is None and None not in differences:
            problem = f"after one another: {differences[0]}"
        findings.count(pair)
        if problem is not None:
            findings.add(f"{pair}, first stopped at event {at} of {events}", problem)


def _serial(order: Sequence[Verb], inputs: Path, place: Path) -> dict[str, str]:
    """The files that two commands leave one after the other; the later one may be refused."""
    _fresh(place, order[0], order[1], inputs)
    for verb in order:
        ended = drilling.run(verb.arguments(inputs), place)
        if ended.problem() is not None:
            raise SystemExit(f"{verb.name} fails after {order[0].name}: {ended.text[-2000:]}")
    return _compared(drilling.contents(place), next((verb for verb in order if verb in ON_A_RUN), order[1]))


def _interleaved(first: Verb, second: Verb, inputs: Path, place: Path, at: int) -> tuple[Ended, Ended]:
    """The first stops before an event, the second runs, the first goes on."""
    stopped = drilling.run(first.arguments(inputs), place, at=at, action=signal.SIGSTOP)
    pid = drilling.start(second.arguments(inputs), place)
    other = drilling.wait_for(pid, WAITS) if stopped.stopped else drilling.wait(pid)
    if stopped.stopped:
        os.kill(stopped.pid, signal.SIGCONT)
        stopped = drilling.wait(stopped.pid)
    return stopped, other if other is not None else drilling.wait(pid)


def _fresh(place: Path, first: Verb, second: Verb, inputs: Path) -> None:
    drilling.fresh(place, first, inputs)
    drilling.copy_before(place, replace(second, before=tuple(set(second.before) - set(first.before))), inputs)


def _compared(files: dict[str, str], verb: Verb) -> dict[str, str]:
    """What must be equal: all files, or the run itself where the other command reads it at some moment."""
    if verb not in ON_A_RUN:
        return files
    return {name: digest for name, digest in files.items() if name.startswith("run/") and "/evaluation/" not in name}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
