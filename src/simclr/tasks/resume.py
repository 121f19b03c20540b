"""`simclr resume RUN`: resume a training from its newest intact checkpoint, whatever its method."""

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr import distributed
from simclr.config.overrides import Overrides
from simclr.config.pretrain import changed_on_resume
from simclr.config.training import FREE_ON_RESUME
from simclr.data.readers.named import NAMES
from simclr.errors import UserError
from simclr.methods import find_method
from simclr.methods.method import Method
from simclr.tasks import pretrain_images as pretraining
from simclr.tasks.initial import kept_weights
from simclr.tasks.opening import DataOptions, as_begun, lasting, open_aloud
from simclr.training.device import same_threads
from simclr.training.lock import hold
from simclr.training.progress import say
from simclr.training.run import RunFolder, open_run

if TYPE_CHECKING:
    from simclr.tasks.options.pretraining import Resume

TASKS = {
    "finetune": ("simclr.tasks.options.labels:Finetune", "simclr.tasks.finetune:finetune"),
    "distill": ("simclr.tasks.options.labels:Distill", "simclr.tasks.distill:distill"),
}
"""Command -> its options and what carries it out, each as module:name."""


MAY_BE_PATHS = ("run", "teacher", "student", "labels", "only_labels")
"""Options that name a file or folder, or something else."""
NO_PATHS = ("random", "pixels", "same")
"""Values of these that mean something else even where there is a folder of that name."""


def resume(options: "Resume", overrides: Overrides, method: type[Method] | None = None) -> None:
    """Go on, refusing whatever would change the result.

    Args:
        overrides: Settings to change, of those that change no result.
        method: Of a run whose method is no part of the package, where its module cannot be imported by name.

    Raises:
        UserError: There is no such run, or it cannot go on as it began.
        Stopped: A signal asked to stop.
    """
    run = open_run(options.run)
    _refuse_changes(run, overrides)
    run.refuse_changed_settings()
    if run.is_finished:
        say(f"{options.run} has already reached its end; the encoder is in {run.encoder}.")
    elif run.is_pretraining:
        _resume_pretraining(run, options, overrides, method)
    else:
        _resume_task(run, options, overrides)


def _refuse_changes(run: RunFolder, overrides: Overrides) -> None:
    """Raise where the settings that were given would change the result of the run."""
    if not run.is_pretraining:
        fixed = [f"--{name.replace('_', '-')}" for name in overrides.values if name not in FREE_ON_RESUME]
        if fixed:
            raise UserError(f"Changing {', '.join(fixed)} would change the result of {run.path}; leave it out.")
        return
    saved = run.config
    config = overrides(saved)
    changed = changed_on_resume(saved, config)
    if changed:
        what = ", ".join(f"--{n.replace('_', '-')} from {getattr(saved, n)} to {getattr(config, n)}" for n in changed)
        raise UserError(
            f"Changing {what} would change the result of {run.path}; leave it out to continue as started, or "
            "start a new run with --recipe " + str(run.path / "config.json") + "."
        )


def _resume_pretraining(run: RunFolder, options: "Resume", overrides: Overrides, method: type[Method] | None) -> None:
    config, origin = overrides(run.config), run.origin
    method = method or find_method(run.method)
    with distributed.joined(config.device) as world, hold(run.path, world):
        if world.on_main(lambda: run.is_finished):  # another process has brought it to its end since
            say(f"{run.path} has already reached its end; the encoder is in {run.encoder}.", main=world.is_main)
            return
        initial = kept_weights(run)
        same_threads(run.cpu_threads, world)
        source = lasting(options.data) if options.data else _known_place(origin, run.path)
        opened = DataOptions(**origin["data"]["options"] | ({"pack": options.pack} if options.pack else {}))
        reading = opened.reading(world, channels=config.channels)
        images = open_aloud(source, world, reading, labels=opened.labels)
        images = as_begun(images, origin["data"], world)
        pretraining.same_data(images, origin, run.path, main=world.is_main)
        pretraining.pretrain_images(images, config, run, world, method=method, initial=initial)


def _resume_task(run: RunFolder, options: "Resume", overrides: Overrides) -> None:
    record = run.origin.get("task")
    if record is None or record["name"] not in TASKS:
        raise UserError(f"{run.path} is a training of an evaluation; the same `simclr evaluate` command continues it.")
    kind, job = (getattr(import_module(place.split(":")[0]), place.split(":")[1]) for place in TASKS[record["name"]])
    given = record["options"] | {"out": str(run.path)}
    if options.data:
        given["data"] = lasting(options.data)
    if options.pack:
        given["pack"] = options.pack
    settings = given.pop("settings", {}) | dict(overrides.values)
    job(_options_from(kind, given), Overrides(settings))


def task_record(name: str, options: Any, overrides: Callable[..., Any]) -> dict[str, Any]:
    """What run.json keeps of a command, so that `resume` starts it again: options with absolute paths, settings."""
    assert isinstance(overrides, Overrides)
    plain = asdict(replace(options, config=type(options.config)()))
    plain.pop("config")
    kept = {option: _absolute(option, value) for option, value in plain.items()}
    return {"name": name, "options": kept | {"settings": dict(overrides.values)}}


def _absolute(name: str, value: Any) -> Any:
    """The value of an option as JSON can hold it; a path means the same from every folder."""
    if name == "data":
        return lasting(value)
    if isinstance(value, Path):
        return str(value.expanduser().resolve())
    if name in MAY_BE_PATHS and value not in NO_PATHS and value is not None and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def _options_from(kind: type, values: dict[str, Any]) -> Any:
    """Options as the command line would have parsed them."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"run.json holds options that no version wrote ({error.errors()[0]['msg']}).") from None


def _known_place(origin: dict[str, Any], run: Path) -> str:
    """Where the run's images were, if they still are."""
    source = origin["data"]["source"]
    if source.partition(":")[0] not in NAMES and not Path(source).exists():
        raise UserError(f"{run} was trained on {source}, which is no longer there; name its new place with --data.")
    return source
