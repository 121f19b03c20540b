"""`simclr predict MODEL IMAGES --out FILE`: write the most probable classes of any number of images to a table.

Rows are written in the order of the keys, batch by batch, so that memory grows by the names of the images alone. The
file is published at the end.
"""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from simclr.data.images import Images, fit_channels
from simclr.data.opening import open_whole
from simclr.data.readers.store import Reading
from simclr.data.source import some
from simclr.errors import UserError
from simclr.models.inference import device_of, inference, probabilities_of
from simclr.tasks.opening import LeftOut, load_model, require_writable, tell_if_replaced
from simclr.tasks.tables import open_table, require_table
from simclr.training.progress import counting, say
from simclr.views.stream import stream_views
from simclr.weights.folder import Model

if TYPE_CHECKING:
    from simclr.tasks.options.using import Predict


def predict(options: "Predict") -> None:
    """Run the command.

    Raises:
        UserError: MODEL is no classifier, does not fit the images or gives scores that are not finite, there is no
            image that can be read, or FILE cannot be written.
    """
    _check(options)
    model = load_model(options.model, device=options.device)
    if model.classifier is None:
        raise UserError(
            f"{options.model} has no classifier; `simclr finetune {options.model} DATA --out FOLDER` makes one from "
            "labelled images."
        )
    columns = _columns(options, model.classes)
    bad, classified = LeftOut(), 0
    images = _open_images(options, model.encoder.config.channels, bad)
    with counting("Predicting") as progress:
        batches = stream_views(
            images, size=model.encoder.config.size, preset=model.preprocessing, batch_size=options.batch_size,
            leave_out=bad.add, progress=progress,
        )  # fmt: skip
        first = next(batches, None)  # before a file is made: what is wrong with the images is mostly known now
        if first is None:
            raise UserError(f"None of the {bad.count:,} image files in {options.images} can be used: {bad.named()}.")
        with open_table(options.out, columns) as add:
            for batch in chain([first], batches):
                add(_rows(options, model, [images.keys[i] for i in batch.indices.tolist()], batch.views))
                classified += len(batch.indices)
    bad.tell(classified)
    say(f"The classes of {classified:,} images are in {options.out}.")


def _open_images(options: "Predict", channels: int, bad: LeftOut) -> Images:
    reading = Reading(
        channels="3" if channels == 3 else "auto", workers=os.cpu_count() or 1, side=options.pack_side, memory_budget=0,
        allow_empty=True, say=say, counting=counting,
    )  # fmt: skip
    images = open_whole(options.images, reading)
    for note in images.notes:
        say(note)
    for skipped in images.skipped:
        bad.add(skipped)
    return fit_channels(images, channels, who="The model")


def _check(options: "Predict") -> None:
    """Reject arguments that are wrong whatever the model is."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "simclr predict works in one process, with threads; start it without torchrun, or give each process a "
            "folder and a file of its own."
        )
    if options.batch_size < 1:
        raise UserError(f"--batch-size was {options.batch_size}; it must be at least 1.")
    require_table(options.out)
    require_writable(options.out)
    tell_if_replaced(options.out)


def _columns(options: "Predict", classes: list[str]) -> dict[str, Any]:
    """Names and types of the table's columns."""
    if not 1 <= options.top <= len(classes):
        raise UserError(f"--top was {options.top}; it must be between 1 and {len(classes)}, the number of classes.")
    columns: dict[str, Any] = {"key": str}
    for place in range(1, options.top + 1):
        number = "" if place == 1 else f"_{place}"
        columns |= {f"class{number}": str, f"probability{number}": float}
    if options.probabilities:
        twice = [name for name, count in Counter(classes).items() if count > 1]
        if twice:
            raise UserError(f"--probabilities needs classes of different names, and several are called {some(twice)}.")
        columns |= {f"probability of {name}": float for name in classes}
    return columns


def _rows(options: "Predict", model: Model, keys: Sequence[str], views: Tensor) -> list[Any]:
    """Values of each column for a batch of images."""
    network = model.classifier
    assert network is not None
    with inference(network):
        probabilities = probabilities_of(network(views.to(device_of(network))))  # (B, K)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, : options.top]  # (B, top), of equal ones the first
    values: list[Any] = [keys]
    for place in best.T:
        values += [[model.classes[k] for k in place], np.take_along_axis(probabilities, place[:, None], 1)[:, 0]]
    return [*values, *probabilities.T] if options.probabilities else values
