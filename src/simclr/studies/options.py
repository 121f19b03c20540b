"""Flags of `simclr study`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from simclr.config.pretrain import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Study:
    """Run a figure or table of the papers as a grid of trainings, and show it beside the paper's values.

    Without ITEM, the studies are listed. The settings are those of the study (`--scale`); flags of `simclr pretrain`,
    such as --epochs, replace them in every training. What is stopped or killed goes on by the same command.
    """

    item: Positional[Annotated[str | None, arg(metavar="ITEM")]] = None
    """The study, such as figure-9; unset: list all."""

    data: Positional[Annotated[str | None, arg(metavar="DATA")]] = None
    """Labelled images with a test part: a folder, .npz file or name, as in `simclr evaluate`."""

    out: Path = Path("runs/studies")
    """Folder of the trainings, which studies share, and of ITEM.md, ITEM.png and ITEM.json."""

    scale: Literal["cpu", "paper"] = "cpu"
    """Settings: a small network for minutes on a CPU, or the paper's own (ImageNet on many GPUs)."""

    seeds: int = 3
    """Number of seeds, from 0 or --seed on."""

    points: str | None = None
    """Names of the points to run, with commas between; a * stands for any text, such as "batch 32 / *"; unset: all."""

    images: int | None = None
    """Train on so many random images of the training part, all of one size; unset: on all."""

    dry_run: bool = False
    """Only say how many trainings there are, and how long they would take on this machine."""

    config: Annotated[PretrainConfig, arg(name="")] = field(default_factory=PretrainConfig)
