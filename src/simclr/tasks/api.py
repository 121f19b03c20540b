"""The Python API: what the commands do, as functions of plain values. `import simclr` offers them by these names."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from simclr.config.overrides import Overrides
from simclr.errors import UserError
from simclr.evaluation.results import Result
from simclr.methods.method import Method
from simclr.methods.simclr import SimCLR
from simclr.tasks.options.labels import Distill, Evaluate, Finetune
from simclr.tasks.options.pretraining import Pretrain, Resume
from simclr.tasks.options.using import Embed
from simclr.training.run import RunFolder
from simclr.weights.folder import Model, load

Place = str | PathLike[str]
"""A path, or a name that the commands take too, such as "digits" or "timm/resnet18"."""


@dataclass(frozen=True)
class Run:
    """A training in its folder: of an encoder, or of a classifier where it was fine-tuned or distilled."""

    path: Path

    def load(self, *, device: str = "cpu") -> Model:
        """The trained encoder, with its classifier if it has one."""
        return load(self.path, device=device)

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the training, oldest first: step, learning rate, loss and the method's metrics."""
        return RunFolder(self.path).read_metrics()

    def evaluate(self, *data: Place, **options: Any) -> list[Result]:
        """`simclr.evaluate` of this run."""
        return evaluate(self, *data, **options)

    def embed(self, data: Place, *, out: Place | None = None, **options: Any) -> np.ndarray:
        """Features (n, F) float32 of the images of every split, in the order of `simclr.open_data(data, split="all")`.

        Args:
            out: Also write features, keys and labels to this .npz file, as `simclr embed` does.
            options: As of `simclr embed`.
        """
        return embed(self, data, out=out, **options)

    def finetune(self, data: Place, *, out: Place, **options: Any) -> "Run":
        """`simclr.finetune` from this run."""
        return finetune(self, data, out=out, **options)

    def resume(self, **options: Any) -> "Run":
        """`simclr.resume` of this run."""
        return resume(self, **options)


def pretrain(data: Place, *, method: type[Method] = SimCLR, **options: Any) -> Run:
    """Learn an encoder from unlabelled images, as `simclr pretrain`.

    Args:
        data: Folder of images, .npz file, or name of a data set.
        method: What turns batches of views into a loss (docs/methods.md).
        options: `out` (folder of the run), `recipe`, and further options of the command (`Pretrain`); any setting of
            the training (`PretrainConfig`), such as `epochs=200`.

    Raises:
        UserError: Images and settings do not go together, or memory, disk or the loss gave out.
        Stopped: A signal asked to stop; `simclr.resume` goes on.
    """
    from simclr.tasks.pretrain import pretrain as task

    with in_python_words():
        given, overrides = _split(Pretrain, options, data=fspath(data))
        return Run(task(given, overrides, method).path)


def resume(run: Run | Place, *, method: type[Method] | None = None, **options: Any) -> Run:
    """Go on with a training that was stopped or killed, to the same bits, as `simclr resume`.

    Args:
        method: Of a run whose method is no part of the package and cannot be imported by name.
        options: `data` and `pack`, and the settings that change no result, such as `workers`.
    """
    from simclr.tasks.resume import resume as task

    with in_python_words():
        path = Path(_place(run))
        task(*_split(Resume, options, run=path), method)
        return Run(path)


def finetune(run: Run | Place, data: Place, *, out: Place, **options: Any) -> Run:
    """Turn an encoder into a classifier by training on labelled images, as `simclr finetune`.

    Args:
        run: Where training begins: a run, an encoder's folder, timm/NAME, torchvision/NAME, or random.
        data: Labelled images.
        out: Folder of the training and of the classifier; a call that was stopped goes on when it is made again.
        options: Of the command (`Finetune`), such as `labels="10/class"`, and of the training (`FinetuneConfig`).
    """
    from simclr.tasks.finetune import finetune as task

    with in_python_words():
        task(*_split(Finetune, options, run=_place(run), data=fspath(data), out=Path(out)))
        return Run(Path(out))


def distill(teacher: Run | Place, data: Place, *, out: Place, **options: Any) -> Run:
    """Let a student learn a classifier's probabilities on images without labels, as `simclr distill`.

    Args:
        teacher: A fine-tuned, distilled or imported classifier, timm/NAME or torchvision/NAME.
        data: Images to learn on.
        out: Folder of the run; a call that was stopped goes on when it is made again.
        options: Of the command (`Distill`), such as `encoder="small"`, and of the training (`DistillConfig`).
    """
    from simclr.tasks.distill import distill as task

    with in_python_words():
        task(*_split(Distill, options, teacher=_place(teacher), data=fspath(data), out=Path(out)))
        return Run(Path(out))


def evaluate(run: Run | Place, *data: Place, **options: Any) -> list[Result]:
    """Measure an encoder by the papers' protocols, beside baselines, as `simclr evaluate`; prints the table.

    Args:
        run: A run, an encoder's folder, timm/NAME, torchvision/NAME, random, or pixels.
        data: Labelled images; for transfer several sets.
        options: Of the command (`Evaluate`), such as `protocol="knn,linear"`; `finetune`, a dictionary of settings for
            the protocol of that name.

    Returns:
        What was measured, each with model, data, protocol, settings, seed and metrics.
    """
    from simclr.tasks.evaluate import evaluate as task

    with in_python_words():
        overrides = Overrides(options.pop("finetune", {}))
        given, _ = _split(Evaluate, options, run=_place(run), data=tuple(fspath(place) for place in data))
        return task(given, overrides)


def embed(run: Run | Place, data: Place, *, out: Place | None = None, **options: Any) -> np.ndarray:
    """Features (n, F) float32 of the images of every split, as `simclr embed` writes them.

    Args:
        run: A run, or an encoder's folder or file.
        out: Also write features, keys and labels to this .npz file; features then need not fit the memory twice.
        options: Of the command (`Embed`).
    """
    from tempfile import TemporaryDirectory

    from simclr.tasks.embed import embed as task

    with in_python_words(), TemporaryDirectory(prefix="simclr-") as scratch:
        path = Path(out) if out is not None else Path(scratch) / "features.npz"
        given, _ = _split(Embed, options, run=Path(_place(run)), data=fspath(data), out=path)
        task(given)
        with np.load(path, allow_pickle=False) as archive:
            return archive["features"]


@contextmanager
def in_python_words() -> Iterator[None]:
    """Sentences that name a flag of the command, such as --batch-size, name the parameter: batch_size."""
    try:
        yield
    except UserError as error:
        words = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise type(error)(words).with_traceback(error.__traceback__) from None


def _place(run: Run | Place) -> str:
    return str(run.path) if isinstance(run, Run) else fspath(run)


def _split(kind: type, options: dict[str, Any], **known: Any) -> tuple[Any, Overrides]:
    """Options of a command, and the settings among what was given."""
    names = {f.name: f.type for f in fields(kind)}
    given = {name: value for name, value in options.items() if name in names and name != "config"}
    for name in ("out", "labels_file", "json", "picture", "cache"):
        if isinstance(given.get(name), str) and "Path" in str(names[name]):
            given[name] = Path(given[name])
    settings = {name: value for name, value in options.items() if name not in given}
    if "config" not in names and settings:
        raise UserError(f"There is no option {next(iter(settings))!r}; there are {', '.join(names)}.")
    made = kind(**known, **given)
    if settings:
        Overrides(settings)(made.config)  # wrong names and values are said before anything is opened
    return made, Overrides(settings)
