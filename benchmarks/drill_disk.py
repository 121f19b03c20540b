"""Give every command that writes a disk that refuses: full, without inodes, read-only, somebody else's.

    python benchmarks/drill_disk.py                # needs Linux and the right to mount (root)

Each command writes into a small tmpfs of many sizes, then into one with few inodes, a read-only one, one that belongs
to another user than it (nobody), and with a cache that cannot be written. It has to succeed, or to end with one
sentence and exit code 2; no file may lie torn under its final name; and the same command with room (or the one that
goes on) must end with the files of an undisturbed run, bit for bit. Exit code 1 where anything was found.
(The test suite holds a short form: tests/test_drills.py.)
"""

import argparse
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import drilling
from drilling import VERBS, Findings, Undisturbed, Verb
from simclr.evaluation.cache import SUFFIX

ROOM = "64m"
NOBODY = 65534
GROWING = ("metrics.jsonl", "results.jsonl")
"""Files that grow line by line; a prefix of the undisturbed one is right. The others appear whole."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=24, help="sizes of the tmpfs, from one page to what is needed")
    parser.add_argument("--inodes", type=int, default=12, help="numbers of inodes, from 1 up")
    parser.add_argument("--only", nargs="*", help="names of commands; all by default")
    args = parser.parse_args()
    if (reason := cannot_mount()) is not None:
        raise SystemExit(reason)
    drilling.warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)  # the user nobody reads the inputs
        inputs = Path(scratch) / "inputs"
        drilling.make_inputs(inputs)
        findings = Findings()
        for verb in VERBS:
            if not args.only or verb.name in args.only:
                drill(verb, inputs, Path(scratch) / "place", findings, sizes=args.sizes, inodes=args.inodes)
                print(f"{verb.name}: {findings.cases[verb.name]} cases", flush=True)
    print(findings.table("command refused"))
    sys.exit(1 if findings.found else 0)


def cannot_mount() -> str | None:
    """Why no tmpfs can be mounted here; None where it can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with mounted(Path(folder), "size=64k"):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            return f"A tmpfs cannot be mounted here ({error}); this drill needs Linux and root."


@contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """A tmpfs at `place`, gone at the end."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, capture_output=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True, capture_output=True)


def drill(verb: Verb, inputs: Path, place: Path, findings: Findings, *, sizes: int, inodes: int) -> None:
    """Every kind of refusal for one command.

    Args:
        place: Where the tmpfs is mounted; made if it is missing.
        sizes, inodes: How many of each.
    """
    with mounted(place, f"size={ROOM}"):
        drilling.copy_before(place, verb, inputs)
        before = _pages(place)
        ended = drilling.run(verb.arguments(inputs), place)
        if ended.code != 0:
            raise SystemExit(f"{verb.name} fails when it is left alone: {ended.text[-2000:]}")
        whole, needed = Undisturbed(drilling.contents(place), ended.events, 0.0), _pages(place)
        files = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.name in GROWING}
    step = max(1, (2 * needed - before) // max(sizes, 1))  # twice: the new file lies beside the old one for a while
    cases = [(f"size {4 * pages} KiB", f"size={4 * pages}k") for pages in range(before + 1, 2 * needed, step)]
    first = before_inodes(verb, inputs) + 1
    cases += [(f"{n} inodes", f"size={ROOM},nr_inodes={n}") for n in range(first + 1, first + 1 + inodes)]
    for name, options in cases:
        with mounted(place, options):
            drilling.copy_before(place, verb, inputs)
            ended = drilling.run(verb.arguments(inputs), place)
            torn = _torn(place, inputs, whole, files) if ended.code else None
            remount(place, f"size={ROOM},nr_inodes=100000")
            _judge(f"{verb.name}, {name}", ended, torn, verb, inputs, place, whole, findings)
    _refused(verb, inputs, place, whole, files, findings)
    findings.count(verb.name, len(cases))


def before_inodes(verb: Verb, inputs: Path) -> int:
    """Files and folders that the command finds in its place."""
    return sum(1 + sum(1 for _ in (inputs / name).rglob("*")) for name in verb.before)


def _refused(
    verb: Verb, inputs: Path, place: Path, whole: Undisturbed, files: dict[Path, bytes], findings: Findings
) -> None:
    """A place that is read-only, somebody else's, or fine with a cache and a home that are not."""
    with mounted(place, f"size={ROOM}"):
        drilling.copy_before(place, verb, inputs)
        remount(place, f"size={ROOM},ro")
        ended = drilling.run(verb.arguments(inputs), place)
        remount(place, f"size={ROOM},rw")
        _judge(
            f"{verb.name}, read-only", ended, _torn(place, inputs, whole, files), verb, inputs, place, whole, findings
        )
    with mounted(place, f"size={ROOM},mode=755"):
        drilling.copy_before(place, verb, inputs)
        ended = drilling.run(verb.arguments(inputs), place, inside=_become_nobody)
        _judge(
            f"{verb.name}, as nobody", ended, _torn(place, inputs, whole, files), verb, inputs, place, whole, findings
        )
    with mounted(place, f"size={ROOM}"):
        drilling.copy_before(place, verb, inputs)
        ended = drilling.run(verb.arguments(inputs), place, inside=_without_home)
        problem = f"refused: {ended.text.strip()[-200:]}" if ended.code == 2 else None
        _judge(f"{verb.name}, no home", ended, problem, verb, inputs, place, whole, findings)
    findings.count(verb.name, 3)


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _without_home() -> None:
    os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = "/proc/1/nowhere"


def _judge(
    case: str, ended: drilling.Ended, torn: str | None, verb: Verb, inputs: Path, place: Path, whole: Undisturbed,
    findings: Findings,
) -> None:  # fmt: skip
    """How it ended, what lies there, and what the call with room makes of it."""
    problem = ended.problem() or torn
    kept_less = "cannot be kept" in ended.text  # a result or feature, which is said and costs no other result
    if problem is None and (ended.code or kept_less):
        again = drilling.run(verb.to_go_on(place, inputs), place)
        problem = again.problem() or (f"again: {again.text.strip()[-200:]}" if again.code else None)
    now, expected = drilling.contents(place), whole.files
    if kept_less:  # the results are all there, so the call with room has made no features for them again
        expected = {name: of for name, of in expected.items() if name in now or not name.endswith(SUFFIX)}
    problem = problem or drilling.difference(expected, now)
    if problem is not None:
        findings.add(case, problem)


def _torn(place: Path, inputs: Path, whole: Undisturbed, files: dict[Path, bytes]) -> str | None:
    """Which files under final names are not as an undisturbed run has, or had, them."""
    for path in place.rglob("*"):
        name = path.relative_to(place)
        if not stat.S_ISREG(path.stat().st_mode):
            continue
        if path.name.startswith(".") and path.name.endswith(".tmp"):
            if not (inputs / name).exists():  # the run that is resumed has one, of the process that was killed
                return f"left behind: {name}"
            continue
        if path.name in GROWING and name in files:
            lines = path.read_bytes().splitlines(keepends=True)
            if not files[name].startswith(b"".join(line for line in lines if line.endswith(b"\n"))):
                return f"torn: {name}"
        elif path.suffix == ".json" and not path.read_bytes().rstrip().endswith(b"}"):
            return f"torn: {name}"
    found = drilling.contents(place)
    single = [name for name in found if "/" not in name and name in whole.files and not name.endswith(".jsonl")]
    torn = [name for name in single if found[name] != whole.files[name]]
    return f"torn: {', '.join(torn)}" if torn else None


def _pages(place: Path) -> int:
    """Pages of 4 KiB in use."""
    status = os.statvfs(place)
    return (status.f_blocks - status.f_bfree) * status.f_frsize // 4096


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
