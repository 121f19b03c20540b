"""Kill every command that writes, rerun it, and compare its files with those of an undisturbed run, bit for bit.

    python benchmarks/drill_kill.py --kills 200

Half of the kills (SIGKILL) come before a chosen event: each time that a command makes, opens for writing, renames,
removes or flushes a file, in turn, so that every moment between two changes of the disk is hit. The other half come
at a random time of the command's life (--seed). Every third rerun is killed as well. Times of the machine (timing.jsonl
and the fields in drilling.WALL_TIME) are left out of the comparison. Exit code 1 where anything was found.
(The test suite holds a short form: tests/test_drills.py.)
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import drilling
from drilling import VERBS, Ended, Findings, Undisturbed, Verb

MAX_RERUNS = 4  # a rerun that is killed again and again is let go after so many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills of each command")
    parser.add_argument("--only", nargs="*", help="names of commands; all by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    drilling.warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs"
        drilling.make_inputs(inputs)
        findings = Findings()
        for verb in VERBS:
            if args.only and verb.name not in args.only:
                continue
            begun = time.monotonic()
            drill(verb, inputs, Path(scratch) / "place", findings, kills=args.kills, seed=args.seed)
            print(f"{verb.name}: {findings.cases[verb.name]} kills, {time.monotonic() - begun:.0f} s", flush=True)
    print(findings.table("command killed"))
    sys.exit(1 if findings.found else 0)


def drill(
    verb: Verb, inputs: Path, place: Path, findings: Findings, *, kills: int, seed: int = 0, timed: bool = True
) -> None:
    """Kill one command `kills` times and compare what its reruns leave.

    Args:
        place: Where it works; anything in it is removed.
        timed: Whether half of the kills come at random times; else all come before events.
    """
    generator = random.Random(f"{seed} {verb.name}")
    whole = drilling.undisturbed(verb, place, inputs)
    events = list(range(1, whole.events + 1))
    if kills < len(events):
        events = sorted(generator.sample(events, kills))
    done = chosen = 0
    while done < kills:
        drilling.fresh(place, verb, inputs)
        by_time = timed and done % 2 == 1
        at = None if by_time else events[chosen % len(events)]
        chosen += not by_time
        when = f"{generator.uniform(0, whole.seconds):.3f} s" if by_time else f"event {at} of {whole.events}"
        ended = kill(verb.arguments(inputs), place, at, when)
        done += 1
        findings.count(verb.name)
        ended, again = _rerun(verb, inputs, place, whole, generator if timed else None)
        done += again
        findings.count(verb.name, again)
        problem = ended.problem() or drilling.difference(whole.files, drilling.contents(place))
        if problem is not None and ended.sentence:  # a rerun of what was finished may be refused; then nothing is amiss
            problem = f"{problem}; refused: {ended.text.strip()[-200:]}"
        if problem is not None:
            findings.add(f"{verb.name}, killed at {when}{f' and {again} more times' * bool(again)}", problem)


def kill(arguments: list[str], place: Path, at: int | None, when: str) -> Ended:
    """Start a command and kill it before an event, or after a time such as "0.120 s"."""
    pid = drilling.start(arguments, place, at=at)
    if at is None:
        time.sleep(float(when.split()[0]))
        os.kill(pid, signal.SIGKILL)
    return drilling.wait(pid)


def _rerun(
    verb: Verb, inputs: Path, place: Path, whole: Undisturbed, generator: random.Random | None
) -> tuple[Ended, int]:
    """Go on until the command ends by itself; its end, and how often it was killed again on the way."""
    kills = 0
    while True:
        at = None
        if generator is not None and kills < MAX_RERUNS and generator.random() < 1 / 3:
            at = generator.randint(1, whole.events)
        ended = drilling.run(verb.to_go_on(place, inputs), place, at=at)
        if ended.code is not None:
            return ended, kills
        kills += 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
