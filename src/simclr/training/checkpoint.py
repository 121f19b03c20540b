"""Checkpoints that survive anything: written whole or not at all, and never trusted unread.

A checkpoint is an ordinary torch file (`torch.load(path, weights_only=True)` reads it) named
`step-00001234-0123456789abcdef.pt`: the step, and the first 16 hex digits of the file's SHA-256. The name
carries the checksum, so that one atomic rename publishes content and checksum together.
"""

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from simclr.errors import UserError
from simclr.files import open_regular, reason_of, write_atomically

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], *, max_checkpoints: int, resuming: str = ""
) -> Path:
    """Write the state of `step`, then delete all but the newest `keep` checkpoints.

    Args:
        state: Plain dicts, lists, tensors, numbers and strings only.
        resuming: What a person does to go on, for the sentence about a disk that refuses.

    Raises:
        UserError: The disk refused; the checkpoints that were there are all still there.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    try:
        write_atomically(path, content)
    except OSError as error:
        kept = "The last good checkpoint is kept" if checkpoints(folder) else "There is no earlier checkpoint"
        raise UserError(
            f"The checkpoint of step {step} ({len(content) / 2**20:.1f} MiB) could not be written to {folder}: "
            f"{reason_of(error, path)}. {kept}; make room, then {resuming or f'`simclr resume {folder.parent}`'}."
        ) from None
    remove_oldest(folder, max_checkpoints=max_checkpoints)
    return path


def remove_oldest(folder: Path, *, max_checkpoints: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[max_checkpoints:]:
        old.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, newest step first."""
    checkpoints = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(checkpoints, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name states."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def load_newest(folder: Path, say: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint whose content matches its name, telling of each damaged one that was passed over.

    Returns:
        (step, state), or None where no good checkpoint is left.
    """
    for path in checkpoints(folder):
        match = _NAME.fullmatch(path.name)
        assert match
        try:
            with open_regular(path) as file:
                content = file.read()
            if hashlib.sha256(content).hexdigest()[:16] != match[2]:
                raise ValueError("its content does not match its checksum")
            return int(match[1]), torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (PermissionError, MemoryError):  # it is not damaged
            raise
        except Exception as error:  # whatever a damaged file raises, the one before it may be good
            say(f"The checkpoint {path.name} is damaged ({error}); trying the one before.")
    return None


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename the (damaged) checkpoints newer than `step`, so that they no longer count among those kept."""
    for path in checkpoints(folder):
        if step_of(path) > step:
            path.rename(path.with_name(path.name + ".damaged"))
