"""Fine-tuning transfer: a grid of learning rates and weight decays, chosen on validation images (SimCLR, appendix B.8).

Each cell is one training, noted when it is done; an interrupted one goes on from its last checkpoint.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simclr.config.finetune import FinetuneConfig
from simclr.data.images import Images
from simclr.data.presets import TransferSet
from simclr.distributed import DistributedContext
from simclr.errors import Diverged, UserError
from simclr.evaluation.keys import grid_key, labelled_digest, training_key, transfer_data
from simclr.evaluation.measure import train_subject
from simclr.evaluation.results import About, Measured, Result, ResultStore, name_of
from simclr.evaluation.subjects import EvaluatedModel
from simclr.evaluation.transfer import about_transfer, score_and_credits, true_labels
from simclr.training.fit import Execution

GRID_VERSION = 1
"""Raise it when a cell stands for another training (`settings`), or another cell is chosen from the same scores."""


class Cell(NamedTuple):
    """One setting of the grid."""

    rate: float
    """Peak learning rate."""
    decay: float
    """Weight decay times learning rate: the papers divide the listed values by the rate."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid of trainings; the defaults are the paper's for fine-tuning."""

    steps: int = 20_000
    """Updates of each training."""
    rates: tuple[float, ...] = tuple(np.logspace(-4, -1, 7).tolist())
    """Peak learning rates, for whatever batch size."""
    decays: tuple[float, ...] = (0.0, *np.logspace(-6, -3, 7).tolist())
    """Weight decays, each to be divided by the learning rate."""
    batch_size: int = 256
    from_scratch: bool = False
    """Random weights of the subject's shape instead of its own: the baseline of the paper's table."""

    def __post_init__(self) -> None:
        if not self.rates or not self.decays or min(self.rates) <= 0 or min(self.decays) < 0 or self.steps < 1:
            raise UserError(
                f"A grid of {self.steps} steps with learning rates {_list(self.rates)} and weight decays "
                f"{_list(self.decays)} cannot be run: give at least one step, a rate above 0, a decay of 0 or more."
            )

    @property
    def cells(self) -> list[Cell]:
        """All settings, by rate and then by decay."""
        return [Cell(rate, decay) for rate in self.rates for decay in self.decays]


PAPER_GRID = Grid()
PAPER_GRID_FROM_SCRATCH = Grid(
    steps=40_000,
    rates=tuple(np.logspace(-3, 0, 7).tolist()),
    decays=tuple(np.logspace(-5, -1.5, 8).tolist()),
    from_scratch=True,
)

Trainer = Callable[[Cell, Images, Images], tuple[np.ndarray, np.ndarray]]
"""Cell, images to learn from, m other images -> (m, K) logits of the latter, and the (K,) labels of the columns."""


def finetune_transfer(
    subject: EvaluatedModel,
    data: TransferSet,
    *,
    grid: Grid = PAPER_GRID,
    seed: int,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    steps: Callable[[int, int], None] | None = None,
) -> Result:
    """Fine-tune with every cell of the grid; train the best on validation once more, on those images too, and test it.

    Args:
        seed: Of the order of images and of the views, and of the weights where training is from scratch.
        folder: Where finished cells are noted (`cells.jsonl`) and the one in progress keeps its checkpoints. None:
            nothing is kept.
        progress: Called with the cell that is being trained, but for those that are done.
        steps: Called with (done, total) steps of the cell.

    Raises:
        UserError: Raw pixels, a set without validation images, or images that do not fit the encoder; no cell that
            trains without diverging.
        Stopped: A signal asked to stop; called again with the same folder, the search goes on.
    """
    if subject.encoder is None:
        raise UserError(f"{subject.name} have no network to fine-tune; leave them out, or take the linear protocol.")
    key = grid_key(
        subject, seed, from_scratch=grid.from_scratch, batch_size=grid.batch_size, steps=grid.steps,
        version=GRID_VERSION,
    )  # fmt: skip
    store = ResultStore(None if folder is None else folder / "cells.jsonl", subject.world)
    train = partial(_train, subject, grid, seed, None if folder is None else folder / "unfinished", steps)
    return choose_and_test(data, grid, train, store=store, key=key, about=about_transfer(subject, data), say=progress)


def choose_and_test(
    data: TransferSet,
    grid: Grid,
    train: Trainer,
    *,
    store: ResultStore,
    key: dict[str, Any],
    about: About,
    say: Callable[[str], None],
) -> Result:
    """Train each cell, choose one on the validation images, and test it.

    Args:
        train: What trains a cell.
        store: Where results of cells are kept and looked up.
        key: All that a training depends on, besides the cell and the images.
        about: Names of the result.

    Returns:
        The result of the chosen cell on the test images, as `transfer` describes it.
    """
    if data.validation is None:
        raise UserError(f"{data.name} has no image to spare for choosing settings; give more images of each class.")
    validation = data.validation
    chosen_on = transfer_data(data)

    def key_of(cell: Cell, parts: dict[str, Any]) -> dict[str, Any]:
        return {**key, "settings": key["settings"] | cell._asdict(), "data": parts}

    def validate(number: int, cell: Cell) -> Measured:
        say(f"{data.name}: cell {number} of {len(grid.cells)}, rate {cell.rate:.3g}, decay {cell.decay:.3g}")
        try:
            scores, labels = train(cell, data.train, validation)
        except Diverged:
            return Measured(metrics={"score": None}, description="diverged")
        return Measured(metrics={"score": score_and_credits(scores, labels, true_labels(validation), data.metric)[0]})

    best, best_score = None, -math.inf
    for number, cell in enumerate(grid.cells, start=1):
        score = store.get(key_of(cell, chosen_on), partial(validate, number, cell), about).metrics["score"]
        if score is not None and score > best_score:  # of equal ones the first
            best, best_score = cell, score
    if best is None:
        raise UserError(f"Every training of the grid on {data.name} diverged; give lower learning rates.")

    def test() -> Measured:
        say(f"{data.name}: training on all, rate {best.rate:.3g}, decay {best.decay:.3g}")
        score, credits = score_and_credits(*train(best, data.learn, data.test), true_labels(data.test), data.metric)
        return Measured(metrics={"score": score}, details={"credits": credits})

    tested = store.get(key_of(best, chosen_on | {"test": labelled_digest(data.test)}), test, about)
    return replace(
        tested,
        metrics=tested.metrics | {"validation": best_score},
        details=tested.details | {"chosen": best._asdict(), "converged": True},
    )


def settings(cell: Cell, grid: Grid, num_images: int) -> FinetuneConfig:
    """Settings of the training of a cell: SGD with Nesterov momentum 0.9 and a cosine, batch norm as in the paper."""
    steps_per_epoch = num_images / grid.batch_size
    return FinetuneConfig(
        optimizer="sgd",
        lr=cell.rate,
        lr_scaling="none",
        weight_decay=cell.decay / cell.rate,
        epochs=0,
        min_steps=grid.steps,
        batch_size=grid.batch_size,
        batch_norm_decay=max(1 - 10 / steps_per_epoch, 0.9),
    )


def _train(
    subject: EvaluatedModel,
    grid: Grid,
    seed: int,
    unfinished: Path | None,
    steps: Callable[[int, int], None] | None,
    cell: Cell,
    learn: Images,
    queries: Images,
) -> tuple[np.ndarray, np.ndarray]:
    """(m, K) logits of `queries` after training on `learn`, and the (K,) labels of the columns."""
    encoder = subject.encoder
    assert encoder is not None
    fit = partial(replace, channels=max(learn.channels, queries.channels, encoder.config.channels))
    learn, queries = fit(learn), fit(queries)  # gray images for an encoder of colour; the reverse is refused
    config = settings(cell, grid, len(learn))
    key = training_key(subject, learn, seed, config, from_scratch=grid.from_scratch)
    run = None if unfinished is None else unfinished / name_of(key)
    execution = Execution(world=subject.world, run=run, progress=steps)
    try:
        trained = train_subject(
            subject, learn, queries, config, seed=seed, from_scratch=grid.from_scratch, execution=execution
        )
    except Diverged:
        _remove(run, subject.world)
        raise
    _remove(run, subject.world)
    return trained.scores, trained.labels


def _remove(run: Path | None, world: DistributedContext) -> None:
    """Checkpoints of a training that has ended."""
    if run is not None and world.is_main:
        shutil.rmtree(run, ignore_errors=True)


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "(none)"
