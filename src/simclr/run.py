"""The run folder: everything that a pretraining run leaves behind, and all that it needs to go on.

RUN/
  config.json      the resolved settings; itself a recipe
  run.json         where it came from: data, versions, hardware, command
  metrics.jsonl    one line per record; depends on settings and data alone, so a resumed run writes the same bytes
  timing.jsonl     views per second and waiting time of the same steps: the machine's part of the story
  checkpoints/     step-*.pt, atomic and checksummed (checkpoint.py)
  encoder/         model.safetensors + config.json: what `simclr.load` reads
  summary.json     written when the run ends
"""

import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr.config import PretrainConfig, load_config
from simclr.errors import UserError
from simclr.files import reason_of, sweep, write_atomically


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on disk."""

    path: Path
    how_to_resume: str = ""
    """For sentences; by default the command `simclr resume`."""
    lasting: bool = True
    """Whether it stays when the work is done, and is worth naming."""

    @property
    def resuming(self) -> str:
        """What a person does to go on."""
        return self.how_to_resume or f"`simclr resume {self.path}`"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def encoder(self) -> Path:
        return self.path / "encoder"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        return self.path / "timing.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def config(self) -> PretrainConfig:
        return load_config(self.path / "config.json")

    @property
    def origin(self) -> dict[str, Any]:
        """What run.json holds: data, versions, hardware, command."""
        try:
            origin = json.loads((self.path / "run.json").read_text())
            _ = origin["data"]["source"], origin["data"]["options"], origin["data"]["fingerprint"]
            _ = origin["machine"]["cpu_threads"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path / 'run.json'} is damaged; restore it, or start a new run.") from None
        return origin

    def refuse_existing(self) -> None:
        """Stop where a new run would overwrite something."""
        if (self.path / "config.json").exists():
            raise UserError(
                f"{self.path} already holds a run; `simclr resume {self.path}` goes on with it, and another --out "
                "starts a new one."
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} exists and is no run; give another --out, or empty it first.")

    def append(self, file: Path, record: dict[str, Any]) -> None:
        """Add one JSON line."""
        try:
            with open(file, "a") as lines:
                lines.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(
                f"{file} could not be written: {reason_of(error, file)}. The last good checkpoint is kept; make room, "
                f"then {self.resuming}."
            ) from None

    def sync(self) -> None:
        """Put the records on the disk, before a checkpoint that counts on them."""
        for file in (self.metrics, self.timing):
            if file.exists():
                with open(file, "rb") as lines:
                    os.fsync(lines.fileno())

    def rewind(self, step: int) -> None:
        """Forget the records after `step`, and a last line that a killed process left unfinished."""
        sweep(self.path)
        sweep(self.checkpoints)
        for file in (self.metrics, self.timing):
            if file.exists():
                kept = [line for line in file.read_bytes().splitlines() if _is_record_until(line, step)]
                write_atomically(file, b"".join(line + b"\n" for line in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, oldest first."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_bytes().splitlines() if _is_record_until(line, None)]


def create_run(path: Path, config: PretrainConfig, origin: dict[str, Any]) -> RunFolder:
    """Make the folder of a new run; a folder that holds one already, or anything else, is left as it is."""
    run = RunFolder(path)
    run.refuse_existing()
    try:
        run.checkpoints.mkdir(parents=True)
        write_atomically(path / "run.json", (json.dumps(origin, indent=2) + "\n").encode())
        config.save(path / "config.json")
    except OSError as error:
        raise UserError(f"The run folder {path} cannot be made: {error.strerror}; give another --out.") from None
    return run


def open_run(path: Path) -> RunFolder:
    """An existing run's folder."""
    for name in ("finetune", "distill"):
        if (path / f"{name}.json").is_file():
            raise UserError(f"{path} belongs to `simclr {name}`; the same command as before goes on, or evaluates it.")
    if not (path / "config.json").is_file() or not (path / "run.json").is_file():
        raise UserError(f"{path} holds no run (no config.json and run.json in it); `simclr pretrain` makes one.")
    return RunFolder(path)


def describe_machine() -> dict[str, Any]:
    """Versions and hardware, for run.json and for every published figure."""
    import numpy
    import torch

    from simclr import __version__

    return {
        "simclr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


def _is_record_until(line: bytes, step: int | None) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and (step is None or record.get("step", 0) <= step)
