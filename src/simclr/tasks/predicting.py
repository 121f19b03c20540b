"""`simclr predict MODEL IMAGES --out FILE`: the likeliest classes of any number of images, as a table.

Rows are written as they are made, in the order of the keys: a million images need the memory of a thousand, but for
their names. The file appears at the end, whole.
"""

import os
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from simclr.data.readers.files import Reading
from simclr.data.readers.scan import some
from simclr.data.source import Skipped
from simclr.errors import UserError
from simclr.evaluation.streaming import Batch, View, stream_views
from simclr.models.inference import device_of, inference, probabilities_of
from simclr.tasks.opening import load_model, require_writable, tell_if_replaced
from simclr.tasks.tables import open_table, require_table
from simclr.training.progress import counting, say
from simclr.weights.folder import Model

if TYPE_CHECKING:
    from simclr.tasks.options.using import Predict

NAMED = 10
"""Files left out that are named; the others are counted."""


def predict(args: "Predict") -> None:
    """The command.

    Raises:
        UserError: MODEL is no classifier, does not fit the images or gives scores that are not finite, there is no
            image that can be read, or FILE cannot be written.
    """
    _check(args)
    model = load_model(args.model, device=args.device)
    if model.classifier is None:
        raise UserError(
            f"{args.model} has no classifier; `simclr finetune {args.model} DATA --out FOLDER` makes one from labelled "
            "images."
        )
    columns = _columns(args, model.classes)
    config = model.encoder.config
    view = View(channels=config.channels, size=config.size, preset=model.preprocessing)
    bad, classified = _LeftOut(), 0
    with counting("Predicting") as progress:
        how = Reading(workers=os.cpu_count() or 1, side=args.pack_side, progress=progress, say=say)
        batches = stream_views(args.images, view, batch_size=args.batch_size, how=how, leave_out=bad.add)
        first = next(batches, None)  # before a file is made: what is wrong with the images is mostly known now
        if first is None:
            raise UserError(f"None of the {bad.count:,} image files in {args.images} can be used: {bad.named()}.")
        with open_table(args.out, columns) as add:
            for batch in chain([first], batches):
                add(_rows(args, model, batch))
                classified += len(batch.keys)
    if bad.count:
        say(f"{bad.count:,} of {bad.count + classified:,} files left out: {bad.named()}.")
    say(f"The classes of {classified:,} images are in {args.out}.")


def _check(args: "Predict") -> None:
    """What can be wrong before the model is read."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "simclr predict works in one process, with threads; start it without torchrun, or give each process a "
            "folder and a file of its own."
        )
    if args.batch_size < 1:
        raise UserError(f"--batch-size was {args.batch_size}; it must be at least 1.")
    require_table(args.out)
    require_writable(args.out)
    tell_if_replaced(args.out)


def _columns(args: "Predict", classes: list[str]) -> dict[str, Any]:
    """Names and kinds of the table's columns."""
    if not 1 <= args.top <= len(classes):
        raise UserError(f"--top was {args.top}; it must be between 1 and {len(classes)}, the number of classes.")
    columns: dict[str, Any] = {"key": str}
    for place in range(1, args.top + 1):
        number = "" if place == 1 else f"_{place}"
        columns |= {f"class{number}": str, f"probability{number}": float}
    if args.probabilities:
        twice = [name for name, count in Counter(classes).items() if count > 1]
        if twice:
            raise UserError(f"--probabilities needs classes of different names, and several are called {some(twice)}.")
        columns |= {f"probability of {name}": float for name in classes}
    return columns


def _rows(args: "Predict", model: Model, batch: Batch) -> list[Any]:
    """The values of each column."""
    network = model.classifier
    assert network is not None
    with inference(network):
        probabilities = probabilities_of(network(batch.views.to(device_of(network))))  # (B, K)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, : args.top]  # (B, top), of equal ones the first
    values: list[Any] = [batch.keys]
    for place in best.T:
        values += [[model.classes[k] for k in place], np.take_along_axis(probabilities, place[:, None], 1)[:, 0]]
    return [*values, *probabilities.T] if args.probabilities else values


class _LeftOut:
    """Counts what cannot be read, and remembers the first few."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, skipped: Skipped) -> None:
        """The first one is said at once, so that nobody waits for an hour to learn of it."""
        if not self.count:
            say(f"{some([skipped.key])} is left out ({skipped.reason}); others like it are counted at the end.")
        self.count += 1
        if len(self._first) < NAMED:
            self._first.append(f"{skipped.key} ({skipped.reason})")

    def named(self) -> str:
        """For a sentence."""
        more = self.count - len(self._first)
        return some(self._first, most=NAMED) + (f" and {more:,} more" if more else "")
