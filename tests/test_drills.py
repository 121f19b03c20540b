"""Short forms of the drills in benchmarks/: commands that are killed, refused by the disk, or run two at a time.

A process of its own forks the commands, because this one has threads. Every kill and every interleaving comes before a
chosen change of the disk, so they are the same in every run.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHORT = """
import json, sys, tempfile
from pathlib import Path
import drill_disk, drill_kill, drill_pairs, drilling
from drilling import Findings, find

drilling.warm_up(libraries=False)
results = {"kill": Findings(), "disk": Findings(), "pairs": Findings()}
with tempfile.TemporaryDirectory() as scratch:
    scratch = Path(scratch)
    scratch.chmod(0o755)
    inputs, place = scratch / "inputs", scratch / "place"
    drilling.make_inputs(inputs)
    for name, kills in (("pretrain", 2), ("evaluate", 1), ("predict csv", 1), ("export hub-folder", 2)):
        drill_kill.drill(find(name), inputs, place, results["kill"], kills=kills, timed=False)
    for first, second in (("resume", "resume"),):
        drill_pairs.drill(find(first), find(second), inputs, place, results["pairs"], points=2)
    reason = drill_disk.cannot_mount()
    for name in ("predict csv",) if reason is None else ():
        drill_disk.drill(find(name), inputs, scratch / "disk", results["disk"], sizes=2, inodes=1)
print(json.dumps({name: [found.cases, found.found] for name, found in results.items()} | {"skipped": reason}))
"""


@pytest.fixture(scope="module")
def drilled():
    """Drill -> cases by name, findings; and why disks were left out."""
    command = [sys.executable, "-c", SHORT]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("drill", ["kill", "pairs", "disk"])
def test_nothing_is_torn_lost_or_doubled(drilled, drill):
    if drill == "disk" and drilled["skipped"] is not None:
        pytest.skip(drilled["skipped"])
    cases, found = drilled[drill]
    assert sum(cases.values()) >= 2 and found == []
