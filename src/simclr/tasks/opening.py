"""Open images and encoders and write files for commands, with progress bars and messages."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from simclr.data.images import Channels, Images, Split
from simclr.data.opening import open_source
from simclr.data.readers.named import NAMES
from simclr.data.readers.store import Reading
from simclr.data.source import Skipped, some
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.files import open_regular, reason_of, require_possible, write_atomically, writing
from simclr.training.progress import counting, say
from simclr.training.run import RunFolder
from simclr.weights.folder import FORMAT, WEIGHTS_MARK, Model, load_quietly


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How a command opens its images; run.json keeps it (`OptionsRecord`)."""

    strict: bool = False
    """The first image that cannot be read is an error."""
    labels: str | None = None
    """CSV of path,label lines."""
    pack: str = "auto"
    """Where a folder's images are kept decoded: auto, off, or a folder."""
    side: int | None = None
    """Shorter side to which larger images are shrunk."""

    @classmethod
    def of(cls, flags: Any) -> "DataOptions":
        """Those of a command's flags, with absolute paths, so that they are valid from every working folder."""
        return cls(
            strict=getattr(flags, "strict", False),
            labels=None if flags.labels_file is None else str(flags.labels_file.resolve()),
            pack=flags.pack if flags.pack in ("auto", "off") else str(Path(flags.pack).expanduser().resolve()),
            side=flags.pack_side,
        )

    def reading(self, world: DistributedContext, *, channels: Channels = "auto") -> Reading:
        """How files become pixels, with messages and progress of the main process."""
        return Reading(
            strict=self.strict, channels=channels, workers=os.cpu_count() or 1, pack=self.pack, side=self.side,
            say=partial(say, main=world.is_main), counting=partial(counting, main=world.is_main),
        )  # fmt: skip


def open_aloud(
    source: str,
    world: DistributedContext,
    reading: Reading,
    *,
    split: Split = "train",
    labels: str | None = None,
    known: Sequence[str] = (),
    readable: bool = False,
) -> Images:
    """Open data, complete its pack, and print the notes.

    Args:
        labels: CSV of path,label lines.
        known: Notes that are not to be printed again.
        readable: Leave out damaged images, which are all decoded to find them, for work on labels: an accuracy shall
            count no image twice. Else they are replaced when they are read (`Images.read`).
    """
    images = open_source(source, split=split, labels=Path(labels) if labels else None, reading=reading)
    prepared = images.prepare()
    if readable:
        with counting("Checking images", main=world.is_main) as progress:
            images = images.readable(progress)
    for note in [*images.notes, *prepared]:
        if note not in known:
            say(note, main=world.is_main)
    world.require_equal(
        f"images of {source}",
        {"number": len(images), "fingerprint": images.fingerprint},
        "Give every process the same files.",
    )
    return images


MAX_NAMED = 10
"""Files left out that are named; the others are counted."""


class LeftOut:
    """Counts what cannot be read, and remembers the first few."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, skipped: Skipped) -> None:
        """Count a file; the first one is reported at once."""
        if not self.count:
            say(f"{some([skipped.key])} is left out ({skipped.reason}); others like it are counted at the end.")
        self.count += 1
        if len(self._first) < MAX_NAMED:
            self._first.append(f"{skipped.key} ({skipped.reason})")

    def named(self) -> str:
        """The first few files with their reasons, for a sentence."""
        more = self.count - len(self._first)
        return some(self._first, max_named=MAX_NAMED) + (f" and {more:,} more" if more else "")

    def tell(self, num_used: int) -> None:
        """Report how many files were left out, if any."""
        if self.count:
            say(f"{self.count:,} of {self.count + num_used:,} files left out: {self.named()}.")


def load_model(path: str | PathLike[str], *, device: str | torch.device = "cpu", main: bool = True) -> Model:
    """Load an encoder as `simclr.load` does, and say it where its training is unfinished.

    Args:
        main: Whether this process prints messages.
    """
    model = load_quietly(path, device=device)
    if model.progress is not None and not model.progress.finished:
        say(model.progress.warning(path), main=main)
    return model


def as_begun(images: Images, data: Mapping[str, Any], world: DistributedContext) -> Images:
    """The images that a run began with: earlier versions left out those that cannot be decoded.

    Args:
        data: What run.json says of them.
    """
    if len(images) <= int(data["images"]) or images.fingerprint == data["fingerprint"]:
        return images
    with counting("Checking images", main=world.is_main) as progress:
        left = images.readable(progress)
    if left.fingerprint != data["fingerprint"]:
        return images
    say(left.notes[-1], main=world.is_main)
    return left


def open_parts(source: str, world: DistributedContext, options: DataOptions) -> tuple[Images, Images | None]:
    """The images to learn from, and the data's own test part where it has one."""
    reading = options.reading(world)
    train = open_aloud(source, world, reading, labels=options.labels, readable=True)
    if not train.has_own_split:
        return train, None
    test = open_aloud(source, world, reading, split="test", labels=options.labels, known=train.notes, readable=True)
    return train, test


def side_of(run: Path, source: str, requested: int | None) -> int | None:
    """What --pack-side asks for, else how far the run shrank its images, for a folder that is to be shrunk alike."""
    if requested is not None:
        return requested
    if not RunFolder(run).exists or not Path(source).expanduser().is_dir():
        return None
    return (RunFolder(run).origin.get("data") or {}).get("options", {}).get("side")


def lasting(source: str) -> str:
    """The data argument with an absolute path, so that it is valid from every working folder."""
    name, colon, place = source.partition(":")
    if name in NAMES:
        return f"{name}:{Path(place).expanduser().resolve()}" if colon else source
    return str(Path(source).expanduser().resolve())


def start_encoder_folder(folder: Path, *, ours: Mapping[str, str]) -> None:
    """See that an encoder's folder can be made here, and remove what a killed command left of an earlier attempt.

    config.json is written last, so a folder without it is no encoder's yet.

    Args:
        ours: Further files that will be written, and a text that those of this package contain.

    Raises:
        UserError: An encoder, a run, or a file that this package did not write is there.
    """
    config, tensors = folder / "config.json", folder / "model.safetensors"
    # until 2026-11-30 config.json was written before the weights
    if config.exists() and (tensors.exists() or not _contains(config, FORMAT)):
        raise UserError(f"{folder} holds an encoder or a run already; give another folder, or remove it first.")
    marks = {tensors.name: WEIGHTS_MARK, config.name: FORMAT, **ours}
    left = [folder / name for name in marks if (folder / name).exists()]
    for path in left:
        if not _contains(path, marks[path.name]):
            raise UserError(f"{path} is there already, and would be replaced; give another folder, or remove it first.")
    with writing(folder):
        for path in left:
            path.unlink()


def _contains(path: Path, text: str) -> bool:
    """Whether a text stands near the beginning of a file."""
    try:
        with open_regular(path) as file:
            return text.encode() in file.read(1 << 20)
    except (OSError, UserError):
        return False


def require_writable(path: Path) -> None:
    """Reject a path that cannot be written, before the work begins."""
    require_possible(path)
    try:
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        with TemporaryFile(dir=folder):  # permissions alone do not tell: root may write to /proc, which takes nothing
            reason = "it is a folder" if path.is_dir() else None
    except OSError as error:
        reason = reason_of(error)
    if reason is not None:
        raise UserError(f"{path} cannot be written: {reason}; give another path.")


def tell_if_replaced(path: Path) -> None:
    """Report that an existing file will be replaced."""
    if path.is_file():
        say(f"{path} is there already and will be replaced.")


def write(path: Path, content: bytes) -> None:
    """Write a file atomically and create its parent folders."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
