"""What the drills share: the commands of `simclr` in forked processes that stop at chosen moments, and their outputs.

A parent imports the package once and forks a process for each command, so that a command costs a fraction of a second
instead of the seconds that importing torch takes. The parent itself trains nothing and starts no threads.

A moment is an event: the k-th time that a command makes, opens for writing, renames or removes a file or folder within
its place, or flushes one to the disk. An audit hook counts them (`sys.addaudithook`), so a moment is the same in
every run, and a process can be killed or stopped there without any timing.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from simclr.cli import main as cli
from simclr.cli.commands import COMMANDS
from simclr.evaluation.results import read_results
from simclr.files import file_digest

STEPS = ["--epochs", "0", "--min-steps", "6", "--batch-size", "6", "--save-every", "2", "--workers", "0"]
PRETRAIN = [
    "--recipe", "digits", "--epochs", "3", "--batch-size", "6", "--save-every", "2",
    "--log-every", "1", "--knn-every", "2", "--workers", "0", "--size", "8",
    "--width", "0.25", "--head-dim", "8", "--max-checkpoints", "2", "--pack", "off",
]  # fmt: skip
WALL_TIME = {
    "summary.json": {"seconds_of_this_call", "steps_of_this_call", "views_per_second", "wait_share"},
    "plan.json": {
        "budget_bytes", "timed_at", "step_seconds", "views_per_second", "epoch_seconds", "run_seconds", "fits",
    },
}  # fmt: skip
"""Fields that hold times or free memory of the machine, and are left out of every comparison; so is timing.jsonl."""
LIBRARIES = (
    "matplotlib.backends.backend_agg", "pyarrow.parquet", "sklearn.linear_model", "onnx", "onnxruntime",
    "scipy.optimize", "simclr.reports.pictures", "timm", "torchvision",
)  # fmt: skip
"""What some commands import when they are called."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1}
"""Audit events that count, and how many of their arguments are paths; opening for writing counts as well."""


@dataclass(frozen=True)
class Verb:
    """One command that writes, in a place of its own.

    Attributes:
        command: Arguments; {inputs} stands for the folder of inputs. Outputs are relative to the place.
        again: Arguments that go on after a kill, given the place; None: the same command.
        before: Copied from the inputs into the place before the command starts.
        output: What it writes, for drills in which several commands share an output.
    """

    name: str
    command: list[str]
    again: Callable[[Path], list[str] | None] | None = None
    before: tuple[str, ...] = ()
    output: str = ""

    def arguments(self, inputs: Path) -> list[str]:
        return [argument.replace("{inputs}", str(inputs)) for argument in self.command]

    def to_go_on(self, place: Path, inputs: Path) -> list[str]:
        """The arguments of the call that follows a kill."""
        other = self.again(place) if self.again is not None else None
        return self.arguments(inputs) if other is None else other


def _resume_if_begun(place: Path) -> list[str] | None:
    return ["resume", "run"] if (place / "run" / "config.json").is_file() else None


VERBS = [
    Verb("pretrain", ["pretrain", "{inputs}/images", "--out", "run", *PRETRAIN], again=_resume_if_begun, output="run"),
    Verb("pretrain moco",
         ["pretrain", "{inputs}/images", "--out", "run", *PRETRAIN, "--method", "moco", "--queue", "8",
          "--bn-splits", "2", "--no-head-norm"], again=_resume_if_begun, output="run"),
    Verb("pretrain init", ["pretrain", "{inputs}/images", "--out", "run", *PRETRAIN, "--init", "{inputs}/encoder"],
         again=_resume_if_begun, output="run"),
    Verb("resume", ["resume", "run"], before=("run",), output="run"),
    Verb(
        "evaluate",
        [
            "evaluate", "{inputs}/encoder", "{inputs}/images", "--protocol", "knn,linear", "--out", "results",
            "--cache", "cache", "--json", "evaluation.json", "--pack", "off",
        ],
        output="results",
    ),
    Verb(
        "evaluate finetune",
        [
            "evaluate", "{inputs}/encoder", "{inputs}/images", "--protocol", "finetune", "--compare", "--out",
            "results", "--cache", "off", "--pack", "off", *(f"--finetune.{flag[2:]}" if flag[:2] == "--" else flag
                                                            for flag in STEPS),
        ],
        output="results",
    ),
    Verb(
        "evaluate curve",
        [
            "evaluate", "pixels", "{inputs}/images", "--protocol", "curve", "--compare", "--counts", "1", "2",
            "--out", "results", "--cache", "cache", "--pack", "off",
        ],
        output="results",
    ),
    Verb("embed", ["embed", "{inputs}/encoder", "{inputs}/images", "--out", "embedded.npz", "--pack", "off"],
         output="embedded.npz"),
    Verb("pack", ["embed", "{inputs}/encoder", "{inputs}/images", "--out", "embedded.npz", "--pack", "packs"],
         output="embedded.npz"),
    Verb("select",
         ["select", "{inputs}/encoder", "{inputs}/images", "--count", "3", "--out", "chosen.csv", "--pack", "off",
          "--cache", "cache"],
         output="chosen.csv"),
    Verb("finetune",
         ["finetune", "{inputs}/encoder", "{inputs}/images", "--out", "classifier", "--pack", "off", *STEPS],
         output="classifier"),
    Verb("finetune pseudo-labels",
         ["finetune", "{inputs}/encoder", "{inputs}/images", "--out", "classifier", "--pack", "off", *STEPS,
          "--labels", "2/class", "--pseudo-labels"],
         output="classifier"),
    Verb("distill", ["distill", "{inputs}/classifier", "{inputs}/images", "--out", "student", "--pack", "off", *STEPS],
         output="student"),
    Verb("predict csv", ["predict", "{inputs}/classifier", "{inputs}/images", "--out", "classes.csv"],
         output="classes.csv"),
    Verb("predict parquet", ["predict", "{inputs}/classifier", "{inputs}/images", "--out", "classes.parquet"],
         output="classes.parquet"),
    Verb("import", ["import", "{inputs}/foreign.pt", "imported", "--size", "8"], output="imported"),
    Verb("export safetensors", ["export", "{inputs}/classifier", "--format", "safetensors", "--out", "exported"],
         output="exported"),
    Verb("export hub-folder", ["export", "{inputs}/classifier", "--format", "hub-folder", "--out", "exported"],
         output="exported"),
    Verb("export torchvision", ["export", "{inputs}/torchvision", "--format", "torchvision", "--out", "exported.pth"],
         output="exported.pth"),
    Verb("export timm", ["export", "{inputs}/timm", "--format", "timm", "--out", "exported.safetensors"],
         output="exported.safetensors"),
    Verb("export onnx", ["export", "{inputs}/classifier", "--format", "onnx", "--out", "exported.onnx"],
         output="exported.onnx"),
    Verb("views", ["views", "{inputs}/images", "--out", "views.png", "--images", "2", "--columns", "2", "--pack", "off",
                   "--size", "8"], output="views.png"),
    Verb("plan", ["plan", "{inputs}/images", "--json", "plan.json", *PRETRAIN[:-2]], output="plan.json"),
]  # fmt: skip
"""Every command that writes, by its name."""


@dataclass
class Ended:
    """How a process ended."""

    code: int | None
    """Exit code; None after a kill, and while the process is stopped."""
    text: str
    """Standard output and standard error."""
    events: int = 0
    """Events that it came through; counted only where it ended by itself."""
    stopped: bool = False
    pid: int = 0

    @property
    def sentence(self) -> bool:
        """Whether it was refused as a user's mistake is: exit code 2, one sentence, no traceback."""
        last = self.text.strip().splitlines()[-1:]
        return self.code == 2 and bool(last) and last[0].startswith("simclr: ") and "Traceback" not in self.text

    def problem(self) -> str | None:
        """What is wrong with the end of a process that was left alone."""
        if self.code == 0:
            return "a traceback on standard error" if "Traceback (most recent" in self.text else None
        return None if self.sentence else f"exit code {self.code}: {self.text.strip()[-300:]}"


@dataclass
class Findings:
    """What a drill found, and how much it looked at."""

    cases: dict[str, int] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)

    def count(self, name: str, cases: int = 1) -> None:
        self.cases[name] = self.cases.get(name, 0) + cases

    def add(self, case: str, problem: str) -> None:
        self.found.append(f"{case}: {problem}")
        print(f"FOUND {case}: {problem}", file=sys.stderr, flush=True)

    def table(self, title: str) -> str:
        """The summary: cases and findings by name."""
        width = max(map(len, self.cases), default=0)
        lines = [f"{title:<{width}}  cases  findings"]
        for name, cases in self.cases.items():
            mine = sum(case.startswith((f"{name}:", f"{name},")) for case in self.found)
            lines.append(f"{name:<{width}}  {cases:>5}  {mine:>8}")
        lines.append(f"{'all':<{width}}  {sum(self.cases.values()):>5}  {len(self.found):>8}")
        return "\n".join([*lines, *(f"FOUND {case}" for case in dict.fromkeys(self.found))])


def start(
    arguments: list[str], place: Path, *, at: int | None = None, action: int = signal.SIGKILL,
    inside: Callable[[], None] | None = None,
) -> int:  # fmt: skip
    """Fork a process that runs a command in `place`; its id.

    Args:
        at: The event before which it sends itself a signal; None: never.
        action: That signal: SIGKILL, or SIGSTOP for an interleaving.
        inside: Called in the process first, to change its user or environment.
    """
    log = place.with_name(place.name + f".log{start.count}")  # pyrefly: ignore
    start.count += 1  # pyrefly: ignore
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        _logs[pid] = log
        return pid
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(place)
        if inside is not None:
            inside()
        counter = _Events(place.resolve(), at, action)
        code = _call(arguments)
        print(f"\n@events {counter.count}")
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


start.count = 0  # pyrefly: ignore
_logs: dict[int, Path] = {}


def _call(arguments: list[str]) -> int:
    sys.argv = ["simclr", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Events:
    """Counts the events of this process, from its making on, and sends the signal at the chosen one."""

    def __init__(self, place: Path, at: int | None, action: int) -> None:
        self.count = 0
        self._place, self._at, self._action = str(place), at, action
        self._busy = False
        fsync = os.fsync

        def counted(descriptor: Any) -> None:
            self._step()
            fsync(descriptor)

        os.fsync = counted
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and self._is_inside(path):
                self._step()
        elif event in EVENTS and any(self._is_inside(path) for path in arguments[: EVENTS[event]]):
            self._step()

    def _is_inside(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.path.join(self._place, os.fsdecode(path))  # an absolute path stays as it is
        return os.path.normpath(name).startswith(self._place)

    def _step(self) -> None:
        self.count += 1
        if self.count == self._at:
            os.kill(os.getpid(), self._action)


def wait(pid: int, *, seconds: float = 120.0) -> Ended:
    """The end of a process, or its stop; one that takes longer than `seconds` is killed and counts as hanging."""
    ended = wait_for(pid, seconds)
    if ended is not None:
        return ended
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return Ended(code=-1, text=_logs[pid].read_text(errors="replace") + f"\nhung for {seconds:g} s", pid=pid)


def wait_for(pid: int, seconds: float) -> Ended | None:
    """The end of a process, or its stop; None where it goes on after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found:
            break
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)
    text = _logs[pid].read_text(errors="replace") if _logs[pid].exists() else ""
    if os.WIFSTOPPED(status):
        return Ended(code=None, text=text, stopped=True, pid=pid)
    _logs.pop(pid).unlink(missing_ok=True)
    counted = re.search(r"\n@events (\d+)\n", text)
    events = int(counted[1]) if counted else 0
    text = text.replace(counted[0], "\n") if counted else text
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    if code is None and os.WTERMSIG(status) != signal.SIGKILL:
        return Ended(code=-os.WTERMSIG(status), text=text, pid=pid)
    return Ended(code=code, text=text, events=events, pid=pid)


def run(arguments: list[str], place: Path, **options: Any) -> Ended:
    """Run a command to its end, its kill or its stop; arguments as of `start`."""
    return wait(start(arguments, place, **options))


def fresh(place: Path, verb: Verb, inputs: Path) -> None:
    """An empty place, with what the command goes on with."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    copy_before(place, verb, inputs)


def copy_before(place: Path, verb: Verb, inputs: Path) -> None:
    for name in verb.before:
        shutil.copytree(inputs / name, place / name)


def contents(place: Path) -> dict[str, str]:
    """Every file below `place`, with a digest of what must not depend on kills or on other processes.

    Left out are times (WALL_TIME, timing.jsonl) and lock files. Checkpoints are compared by what they hold, not by
    their bytes, and whole lines of results in any order.
    """
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_dir() or path.name in ("timing.jsonl", ".lock", "lock"):
            continue
        if path.suffix == ".pt" and path.name.startswith("step-"):
            state = torch.load(BytesIO(path.read_bytes()), weights_only=True)
            name, digest = name.rpartition("-")[0], _digest(state)
        elif path.name in WALL_TIME:
            digest = _digest(_without(json.loads(path.read_bytes()), WALL_TIME[path.name]))
        elif path.name == "results.jsonl":
            digest = _digest(sorted(json.dumps(result.to_dict()) for result in read_results(path)[0]))
        else:
            digest = file_digest(path)
        found[name] = digest
    return found


def difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """What is wrong with the files of a place, in a few words."""
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    parts = [f"{what} {', '.join(names[:4])}" for what, names in
             (("missing:", missing), ("left behind:", more), ("differs:", other)) if names]  # fmt: skip
    return "; ".join(parts) or None


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            digest.update(f"{key!r}:".encode())
            _feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        digest.update(repr(value).encode())


def warm_up(*, libraries: bool = True) -> None:
    """Import what commands import, without starting a thread.

    Args:
        libraries: Also what only some commands import.
    """
    import importlib

    torch.set_num_threads(1)
    for command in COMMANDS.values():
        importlib.import_module(command.job.split(":")[0])
    for name in LIBRARIES if libraries else ():
        with suppress(ImportError):
            importlib.import_module(name)
    tyro.extras.get_parser(COMMANDS["predict"].flags)  # another user may not read the modules that tyro imports late


@dataclass(frozen=True)
class Undisturbed:
    """A command that was left alone."""

    files: dict[str, str]
    events: int
    seconds: float


def undisturbed(verb: Verb, place: Path, inputs: Path) -> Undisturbed:
    """Run a command to its end in a fresh place; one that fails ends the drill."""
    fresh(place, verb, inputs)
    begun = time.monotonic()
    ended = run(verb.arguments(inputs), place)
    seconds = time.monotonic() - begun
    if ended.code != 0:
        raise SystemExit(f"{verb.name} fails when it is left alone: {ended.text[-2000:]}")
    return Undisturbed(contents(place), ended.events, seconds)


def make_inputs(inputs: Path) -> None:
    """Images with labels, an encoder, a classifier, a ResNet that libraries know, somebody else's checkpoint, and a
    run that stopped at a third of its steps.
    """
    inputs.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for label, low in (("bright", 128), ("dark", 0)):
        (inputs / "images" / label).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(inputs / "images" / label / f"{i}.png")
    pid = os.fork()
    if not pid:  # in a process of its own, so that this one starts no threads
        code = 1
        try:
            _make_models(inputs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "the inputs cannot be made"
    place, verb = inputs / "begun", find("pretrain")
    events = undisturbed(verb, place, inputs).events
    for at in range(events // 3, events, events // 12):
        fresh(place, verb, inputs)
        run(verb.arguments(inputs), place, at=at)
        if (place / "run" / "encoder" / "config.json").is_file():
            break
    shutil.move(place / "run", inputs / "run")
    shutil.rmtree(place)


def find(name: str) -> Verb:
    """The verb of this name."""
    return next(verb for verb in VERBS if verb.name == name)


def _make_models(inputs: Path) -> None:
    from simclr.config.encoder import EncoderConfig
    from simclr.models.classifier import Classifier
    from simclr.models.encoder import build_encoder
    from simclr.weights.folder import save_classifier, save_encoder

    encoder = build_encoder(EncoderConfig("small", channels=3, size=8, width=0.25), seed=0)
    save_encoder(encoder, inputs / "encoder", preprocessing="google", origin={})
    torch.manual_seed(0)
    network = Classifier(encoder, None, 2)
    torch.nn.init.normal_(network.linear.weight)
    save_classifier(network, inputs / "classifier", classes=["bright", "dark"], preprocessing="google", origin={})
    for name in ("torchvision/shufflenet_v2_x0_5", "timm/mobilenetv3_small_050"):
        encoder = build_encoder(EncoderConfig(name, channels=3, size=32), seed=0)
        save_encoder(encoder, inputs / name.partition("/")[0], preprocessing="torchvision", origin={})
    torch.save(_Narrow().state_dict(), inputs / "foreign.pt")


class _Narrow(ResNet):
    """A torchvision ResNet-18 with a sixteenth of the channels."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Identity()

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:
            self.inplanes = 4
        return super()._make_layer(block, planes // 16, *args, **kwargs)
