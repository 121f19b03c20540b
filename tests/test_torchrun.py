"""`torchrun` as a user starts it: what reaches the terminal, and how all processes end on the trouble of one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.multiprocess

PRETRAIN = (
    "pretrain", "DATA", "--recipe", "digits", "--batch-size", "16", "--epochs", "1", "--device", "cpu", "--memory",
    "plain", "--knn-every", "0", "--log-every", "1",
)  # fmt: skip


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    """Two processes, with nothing of pytest's in their environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)
    path = tmp_path_factory.mktemp("torchrun") / "images.npz"
    np.savez(path, x=pixels)
    return path


def ended_together(done: subprocess.CompletedProcess, sentence: str) -> bool:
    """Exit code 2, the sentence once, and no traceback but torchrun's own."""
    ours = [line for line in done.stderr.splitlines() if 'File "' in line and "simclr" in line]
    return done.returncode != 0 and "exitcode  : 2" in done.stderr and done.stderr.count(sentence) == 1 and not ours


def arguments(images: Path, out: Path, *more: object) -> list[object]:
    return ["-m", "simclr", *(images if word == "DATA" else word for word in PRETRAIN), "--out", out, *more]


def test_nothing_but_the_course_of_training_is_printed(images, tmp_path):
    done = torchrun(*arguments(images, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("Done: ") == 1


def test_a_mistake_is_printed_once(tmp_path):
    done = torchrun(*arguments(tmp_path / "nowhere.npz", tmp_path / "run"))
    assert ended_together(done, "nowhere.npz"), done.stderr
    assert not (tmp_path / "run").exists()


def test_other_images_in_one_process_end_all(images, tmp_path):
    """As on two hosts whose folders of the same name are not the same: a program gives each process its own."""
    pixels = dict(np.load(images))["x"]
    pixels[5, 3, 3] ^= 1
    for rank in (0, 1):
        np.savez(tmp_path / f"{rank}.npz", x=pixels if rank else np.load(images)["x"])
    program = tmp_path / "main.py"
    program.write_text(
        "import os, sys\n"
        "sys.argv = ['simclr', *[w.replace('RANK', os.environ['RANK']) for w in sys.argv[1:]]]\n"
        "from simclr.cli.main import main\nmain()\n"
    )
    done = torchrun(program, *arguments(tmp_path / "RANK.npz", tmp_path / "run")[2:])
    assert ended_together(done, "do not have the same images"), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_in_one_process_ends_all(images, tmp_path):
    """A gradient of one process is everybody's; here a loss breaks whose gradient stays whole."""
    program = tmp_path / "main.py"
    program.write_text(
        "import os\n"
        "from simclr.methods.simclr import SimCLR\n"
        "forward, calls = SimCLR.forward, []\n"
        "def broken(self, *views, detail=False):\n"
        "    loss, metrics = forward(self, *views, detail=detail)\n"
        "    calls.append(1)\n"
        "    bad = float('nan') if os.environ['RANK'] == '1' and len(calls) == 2 else 0.0\n"
        "    return loss + bad, metrics\n"
        "SimCLR.forward = broken\n"
        "from simclr.cli.main import main\nmain()\n"
    )
    done = torchrun(program, *arguments(images, tmp_path / "run")[2:])
    assert ended_together(done, "no longer finite at step 2"), done.stderr


def test_a_signal_to_one_process_stops_all_in_peace_and_resume_goes_on(images, tmp_path):
    program = tmp_path / "main.py"
    program.write_text(
        "import os, signal\n"
        "from simclr.methods.simclr import SimCLR\n"
        "forward, calls = SimCLR.forward, []\n"
        "def disturbed(self, *views, detail=False):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return forward(self, *views, detail=detail)\n"
        "SimCLR.forward = disturbed\n"
        "from simclr.cli.main import main\nmain()\n"
    )
    done = torchrun(program, *arguments(images, tmp_path / "run")[2:])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("Stopped at step 2, saved") == 1, done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    done = torchrun("-m", "simclr", "resume", tmp_path / "run")
    assert done.returncode == 0 and done.stderr.count("Resuming at step 2 of") == 1, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
