"""The run folder: everything that a training leaves behind, and all that it needs to go on, whatever the method.

RUN/
  config.json      the resolved settings; of a pretraining run itself a recipe
  run.json         the manifest: method, what the result depends on, data, versions, hardware, command
  metrics.jsonl    one line per record; depends on settings and data alone, so a resumed run writes the same bytes
  timing.jsonl     views per second and waiting time of the same steps: the machine's part of the story
  checkpoints/     step-*.pt, atomic and checksummed (checkpoint.py)
  encoder/         model.safetensors + config.json: what `simclr.load` reads
  init/            as encoder/: what a pretraining with --init began from
  summary.json     written when the run ends
  .lock            while a process writes the folder
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from simclr.config.pretrain import PretrainConfig, load_config, settings_digest
from simclr.config.records import RunRecord, SummaryRecord, read_json, read_record, versioned
from simclr.config.training import TrainingConfig
from simclr.errors import UserError
from simclr.files import is_temporary, open_regular, reason_of, sweep, write_atomically, writing
from simclr.training.lock import LOCK


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
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def encoder(self) -> Path:
        """Folder of the published weights."""
        return self.path / "encoder"

    @property
    def classifier(self) -> Path:
        """Folder of the network with its classifier, where the method trains one."""
        return self.path / "classifier"

    @property
    def key_encoder(self) -> Path:
        """Folder of the momentum encoder of a run that has one."""
        return self.path / "key_encoder"

    @property
    def init(self) -> Path:
        """Folder of the weights that a pretraining with --init began from."""
        return self.path / "init"

    @property
    def metrics(self) -> Path:
        """File of the records, one JSON line each."""
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """File of the machine's part of the records."""
        return self.path / "timing.jsonl"

    @property
    def summary(self) -> Path:
        """File that is written when the run ends."""
        return self.path / "summary.json"

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "config.json").is_file() and (self.path / "run.json").is_file()

    @property
    def config(self) -> PretrainConfig:
        """Settings of a pretraining run."""
        return load_config(self.path / "config.json")

    @property
    def method(self) -> str:
        """Name of the method: simclr, supervised, distill, or module:Class of one that is not part of the package."""
        return _read(self.path / "run.json").method

    @property
    def is_pretraining(self) -> bool:
        """Whether the run trains an encoder without labels, so that `config` holds its settings."""
        return self.exists and self.method not in ("supervised", "distill")

    @property
    def cpu_threads(self) -> int:
        """Threads that the run began with."""
        return _read(self.path / "run.json").machine.cpu_threads

    @property
    def origin(self) -> dict[str, Any]:
        """What run.json holds."""
        return _read(self.path / "run.json").model_dump(exclude_unset=True)

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end; it then has a whole summary."""
        remedy = f"remove it, then {self.resuming}"
        return self.summary.exists() and bool(read_record(self.summary, SummaryRecord, remedy=remedy))

    def refuse_changed_settings(self) -> None:
        """Stop where config.json is not what the run began with; a result has one set of settings."""
        began, config = _read(self.path / "run.json").settings, self.path / "config.json"
        if began is not None and began != settings_digest(read_json(config, remedy="restore it")):
            raise UserError(
                f"{config} was changed after the run began, and its result would be of neither settings; restore it, "
                f"or start a new run with --recipe {config}."
            )

    def refuse_existing(self) -> None:
        """Stop where a new run would overwrite something, but for what a process left that was killed at its start."""
        config = self.path / "config.json"
        if config.exists() and not _is_leftover(config):
            raise UserError(
                f"{self.path} already holds a run; `simclr resume {self.path}` continues it, and another --out "
                "starts a new one."
            )
        if self.path.exists() and not (self.path.is_dir() and all(map(_is_leftover, self.path.iterdir()))):
            raise UserError(f"{self.path} exists and is no run; give another --out, or empty it first.")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the disk refuses in the block into a sentence that says how to go on."""
        with writing(self.path, hint=f"what was saved before is kept; make room, then {self.resuming}"):
            yield

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
                write_atomically(file, b"".join(line + b"\n" for line in _records(file, step)))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, oldest first."""
        return [json.loads(line) for line in _records(self.metrics, None)]


def claim(
    run: RunFolder, config: TrainingConfig, manifest: Mapping[str, Any], keep_inputs: Callable[[], None] | None = None
) -> None:
    """Make the folder of a new run, or see that the one that is there is of the same method, settings and inputs."""
    if not run.exists:
        create_run(run.path, config, manifest, keep_inputs)
        return
    began = _read(run.path / "run.json")
    expected = RunRecord(**json.loads(json.dumps(dict(manifest))), settings=settings_digest(asdict(config)))
    run.refuse_changed_settings()
    if (began.method, began.settings, began.inputs) != (expected.method, expected.settings, expected.inputs):
        raise UserError(
            f"{run.path} holds a training of another method, or of other settings, images or weights; give another "
            "folder."
        )
    with writing(run.path, hint="give another folder"):
        run.checkpoints.mkdir(exist_ok=True)


def create_run(
    path: Path, config: TrainingConfig, manifest: Mapping[str, Any], keep_inputs: Callable[[], None] | None = None
) -> RunFolder:
    """Make the folder of a new run; a folder that holds one already, or anything else, is left as it is.

    Args:
        manifest: The fields of `RunRecord` beside the settings.
        keep_inputs: Writes `RunFolder.init`, where the run has initial weights to keep.

    config.json comes last and makes it a run: a folder without it, left by a process that was killed here, counts as
    empty. What was made is removed again where the disk refuses the rest.
    """
    run = RunFolder(path)
    run.refuse_existing()
    try:
        with writing(path, hint="give another --out"):
            if run.init.is_dir():  # left by a process that was killed here
                rmtree(run.init)
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(path / "run.json", versioned({**manifest, "settings": settings_digest(asdict(config))}))
            if keep_inputs is not None:
                keep_inputs()
            write_atomically(path / "config.json", versioned(asdict(config)))
    except BaseException:
        with suppress(OSError):
            rmtree(run.init, ignore_errors=True)
            for name in ("config.json", "run.json"):
                (path / name).unlink(missing_ok=True)
            run.checkpoints.rmdir()
        raise
    return run


def _is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a process leaves that was killed while it made a run's folder."""
    if path.is_dir() and path.name == "init":  # written after run.json
        names = {inner.name for inner in path.iterdir() if not is_temporary(inner.name)}
        return names <= {"model.safetensors", "config.json"} and _is_origin(path.parent / "run.json")
    if path.is_dir():
        return path.name == "checkpoints" and all(is_temporary(inner.name) for inner in path.iterdir())
    if path.name == "config.json":  # as versions wrote it that did not write it atomically
        return path.stat().st_size == 0
    return path.name == LOCK or is_temporary(path.name) or (path.name == "run.json" and _is_origin(path))


def _is_origin(path: Path) -> bool:
    try:
        return bool(_read(path))
    except UserError:
        return False


def _read(path: Path) -> RunRecord:
    return read_record(path, RunRecord, remedy="restore it, or start a new run")


def open_run(path: Path) -> RunFolder:
    """An existing run's folder."""
    run = RunFolder(path)
    for name in ("finetune", "distill"):
        if not run.exists and (path / f"{name}.json").is_file():
            raise UserError(
                f"{path} was begun by an earlier version of `simclr {name}`; start again in another folder."
            )
    if not run.exists:
        raise UserError(f"{path} holds no run (no config.json and run.json in it); `simclr pretrain` makes one.")
    return run


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


def _records(file: Path, step: int | None) -> Iterator[bytes]:
    """The lines of a file of records, up to a step, without what a killed process left unfinished."""
    if not file.exists():
        return
    with open_regular(file) as lines:
        for line in lines:
            if _is_record_until(line, step):
                yield line.removesuffix(b"\n")


def _is_record_until(line: bytes, step: int | None) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict):
        return False
    written = record.get("step", 0)
    return isinstance(written, int) and (step is None or written <= step)
