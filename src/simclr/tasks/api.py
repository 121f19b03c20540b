"""The Python API: what the commands do, as functions of plain values. `import simclr` offers them by these names."""

import re
from collections.abc import Iterator, Mapping, Sequence
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
from simclr.tasks.options.labels import Distill, Evaluate, Finetune
from simclr.tasks.options.pretraining import Pretrain, Resume
from simclr.tasks.options.using import Embed, Select
from simclr.tasks.select import Selected
from simclr.training.run import RunFolder
from simclr.weights.folder import Model, load

Place = str | PathLike[str]
"""A path, or a name that the commands take too, such as "digits" or "timm/resnet18"."""


def pretrain(
    data: Place, *, method: type[Method] | str | None = None, init: "Run | Place | None" = None, **options: Any
) -> "Run":
    """Pretrain an encoder on unlabelled images, as `simclr pretrain`.

    Args:
        data: Folder of images, .npz file, or name of a data set.
        method: What turns batches of views into a loss: "simclr", "moco", or a class of your own (docs/methods.md);
            None: what the recipe says.
        init: Weights to begin from: a run, an encoder's folder, timm/NAME or torchvision/NAME; None: what the recipe
            says, which is random weights in all that have a name.
        options: `out` (folder of the run), `recipe`, and further options of the command (`Pretrain`); any setting of
            the training (`PretrainConfig`), such as `epochs=200`.

    Raises:
        UserError: Images and settings do not go together, memory or disk are full, or the loss is not finite.
        Stopped: A signal asked to stop; `simclr.resume` continues.
    """
    from simclr.tasks.pretrain import pretrain as task

    with in_python_words():
        if isinstance(method, str):
            options["method"], method = method, None
        if init is not None:
            options["init"] = _place(init)
        given, overrides = _split(Pretrain, options, data=fspath(data))
        return Run(task(given, overrides, method).path)


def resume(run: "Run | Place", *, method: type[Method] | None = None, **options: Any) -> "Run":
    """Resume a training that was stopped or killed, with the same bits as without a stop, as `simclr resume`.

    Args:
        method: Of a run whose method is no part of the package and cannot be imported by name.
        options: `data` and `pack`, and the settings that change no result, such as `workers`.
    """
    from simclr.tasks.resume import resume as task

    with in_python_words():
        path = Path(_place(run))
        task(*_split(Resume, options, run=path), method)
        return Run(path)


def finetune(run: "Run | Place", data: Place, *, out: Place, **options: Any) -> "Run":
    """Fine-tune an encoder on labelled images as a classifier, as `simclr finetune`.

    Args:
        run: Where training begins: a run, an encoder's folder, timm/NAME, torchvision/NAME, or random.
        data: Labelled images.
        out: Folder of the training and of the classifier; the same call continues a training that was stopped.
        options: Of the command (`Finetune`), such as `labels="10/class"`, and of the training (`FinetuneConfig`).
    """
    from simclr.tasks.finetune import finetune as task

    with in_python_words():
        task(*_split(Finetune, options, run=_place(run), data=fspath(data), out=Path(out)))
        return Run(Path(out))


def distill(teacher: "Run | Place", data: Place, *, out: Place, **options: Any) -> "Run":
    """Distil a classifier into a student on unlabelled images, as `simclr distill`.

    Args:
        teacher: A fine-tuned, distilled or imported classifier, timm/NAME or torchvision/NAME.
        data: Images to learn on.
        out: Folder of the run; the same call continues a training that was stopped.
        options: Of the command (`Distill`), such as `encoder="small"`, and of the training (`DistillConfig`).
    """
    from simclr.tasks.distill import distill as task

    with in_python_words():
        task(*_split(Distill, options, teacher=_place(teacher), data=fspath(data), out=Path(out)))
        return Run(Path(out))


def evaluate(
    run: "Run | Place",
    *data: Place,
    protocol: str | Sequence[str] = ("knn", "linear"),
    compare: "Sequence[Run | Place]" = ("hog", "pixels", "random"),
    labels: str | None = None,
    seeds: int = 1,
    finetune: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Result]:
    """Measure an encoder by the papers' protocols, beside baselines, as `simclr evaluate`; prints the table.

    Args:
        run: A run, an encoder's folder, timm/NAME, torchvision/NAME, or a baseline: hog, patches, pixels, random.
        data: Labelled images (folder, .npz file or name); for the protocol transfer several sets.
        protocol: One or more of knn, linear, logistic, finetune, supervised, curve, probe, label-free and transfer; as
            text with commas between, as on the command line, or as a sequence.
        compare: Models in further rows of the table: anything that `run` may be, and "init": what the run was
            pretrained from, which the default adds for such a run.
        labels: Labels that may be used: a share such as "1%", a number such as "10/class", or a file with the names of
            images, one per line; None: all.
        seeds: Number of seeds; with two or more the table has mean and spread.
        finetune: For the protocol finetune: settings that replace those of the recipe (`FinetuneConfig`).
        settings: Any other option of the command (`Evaluate`), such as seed=1, out="results" (folder in which results
            are kept), linear="sgd" or leave_one_out=True.

    Returns:
        What was measured, each with model, data, protocol, settings, seed and metrics.

    Raises:
        UserError: Run, data and settings do not go together, or a result could not be measured.
    """
    from simclr.tasks.evaluate import evaluate as task

    with in_python_words():
        options, _ = _split(
            Evaluate,
            {"protocol": protocol if isinstance(protocol, str) else ",".join(protocol), "labels": labels, **settings},
            run=_place(run), data=tuple(fspath(place) for place in data),
            compare=tuple(_place(model) for model in compare), seeds=seeds,
        )  # fmt: skip
        return task(options, Overrides(finetune or {}))


def embed(run: "Run | Place", data: Place, *, out: Place | None = None, **options: Any) -> np.ndarray:
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


def select(run: "Run | Place", data: Place, *, count: int = 50, **options: Any) -> list[Selected]:
    """Select the images that are most worth labelling, as `simclr select`; the one to label first is the first.

    Args:
        run: A run, an encoder's folder, timm/NAME or torchvision/NAME.
        data: Images; no labels are needed.
        count: Number of images.
        options: Of the command (`Select`), such as `labelled="done.txt"` and `out="chosen.csv"`.

    Raises:
        UserError: Run and data do not go together, or there are fewer images without a label than `count`.
    """
    from simclr.tasks.select import select as task

    with in_python_words():
        given, _ = _split(Select, options, run=_place(run), data=fspath(data), count=count)
        return task(given, quiet=True)


@dataclass(frozen=True)
class Run:
    """A training in its folder: of an encoder, or of a classifier where it was fine-tuned or distilled.

    The functions of this module that begin with a run are its methods too: `run.evaluate(data)` is
    `simclr.evaluate(run, data)`.
    """

    path: Path

    evaluate = evaluate
    embed = embed
    finetune = finetune
    select = select
    resume = resume

    def load(self, *, device: str = "cpu") -> Model:
        """The trained encoder, with its classifier if it has one."""
        return load(self.path, device=device)

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the training, oldest first: step, learning rate, loss and the method's metrics."""
        return RunFolder(self.path).read_metrics()


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
    for name in ("out", "labels_file", "labelled", "json", "picture", "cache"):
        if isinstance(given.get(name), str) and "Path" in str(names[name]):
            given[name] = Path(given[name])
    settings = {name: value for name, value in options.items() if name not in given}
    if "config" not in names and settings:
        raise UserError(f"There is no option {next(iter(settings))!r}; there are {', '.join(names)}.")
    made = kind(**known, **given)
    if settings:
        Overrides(settings)(made.config)  # wrong names and values are said before anything is opened
    return made, Overrides(settings)
