"""`simclr study ITEM DATA`: a figure or table of the papers, from its definition to its picture."""

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from simclr.config.overrides import Overrides
from simclr.config.pretrain import PretrainConfig, require_seed
from simclr.config.recipes import find_recipe
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.errors import Stopped, UserError
from simclr.files import replacing
from simclr.methods import find_method
from simclr.studies.catalogue import STUDIES, find_study
from simclr.studies.options import Study as StudyOptions
from simclr.studies.run import Measurement, run_folder, run_study
from simclr.studies.study import Arm, Study
from simclr.studies.tables import as_json, draw, report
from simclr.tasks.opening import write
from simclr.tasks.options.pretraining import Plan as PlanOptions
from simclr.tasks.plan import plan
from simclr.tasks.pretrain_images import check_settings
from simclr.training.progress import duration, say
from simclr.training.run import RunFolder

TIME_MATTERS = (
    "recipe", "method", "batch_size", "size", "encoder", "width", "stem", "sk", "feature", "head", "head_layers",
    "head_dim", "views_per_image", "small_crops", "queue", "loss", "memory", "precision",
)  # fmt: skip
"""Settings that the time of a step depends on."""


def study(options: StudyOptions, overrides: Overrides) -> list[Measurement]:
    """Run a study and write its table and picture; list all studies where none is named.

    Raises:
        UserError: There is no such study or point, or settings and images do not go together.
        Stopped: A signal asked to stop; the same call goes on.
    """
    if options.item is None:
        for name, make in STUDIES.items():
            made = make(options.scale)
            print(f"{name:<24}{made.source}: {made.title} ({len(made.arms)} points)")
        return []
    found = find_study(options.item, options.scale)
    arms = found.selected(options.points)
    if options.data is None:
        raise UserError(f"simclr study {options.item} needs DATA: labelled images with a test part.")
    if options.seeds < 1:
        raise UserError(f"--seeds was {options.seeds}; it must be at least 1.")
    first = overrides.values.get("seed", 0)
    require_seed(first, count=options.seeds)
    settings = {name: value for name, value in overrides.values.items() if name != "seed"}
    _refuse_what_is_compared(found, arms, settings)
    for arm in arms:
        for training in found.trainings(arm):
            check_arm(arm, training | settings)
    data = part_of(options.data, options.images, options.out) if options.images is not None else options.data
    _require_test_part(data)
    seeds = range(first, first + options.seeds)
    if options.dry_run:
        estimate(found, arms, data, settings, seeds, options.out)
        return []
    measured: list[Measurement] = []
    try:
        for of_seed in run_study(found, data, out=options.out, seeds=seeds, settings=settings, arms=arms):
            measured += of_seed
            number = len({one.seed for one in measured})
            say(f"{options.item}: {number} seed{'s' * (number > 1)} done.")
            page = report(found, arms, measured, _how(options, settings, first, number))
            write(options.out / f"{found.name}.md", page.encode())
            write(options.out / f"{found.name}.png", draw(found, arms, measured))
            write(
                options.out / f"{found.name}.json",
                (json.dumps(as_json(found, arms, measured), indent=1) + "\n").encode(),
            )
    except Stopped as stopped:
        raise Stopped(
            f"Stopped; what is trained is in {options.out}, and the same command goes on.", stopped.signal
        ) from None
    print((options.out / f"{found.name}.md").read_text())
    return measured


def check_arm(arm: Arm, settings: Mapping[str, Any]) -> PretrainConfig:
    """The settings of a training as far as they are known before an image is read.

    Raises:
        UserError: They do not go together.
    """
    if arm.candidates and settings.get("knn_every") == 0:
        raise UserError(
            f"Point {arm.name}: its settings are chosen by kNN accuracy within the training images, which --knn-every "
            "0 leaves out; leave the flag out."
        )
    try:
        config = check_settings_of(settings)
        find_method(config.method).check(config, DistributedContext())
    except UserError as error:
        raise UserError(f"Point {arm.name}: {error}") from None
    return config


def check_settings_of(settings: Mapping[str, Any]) -> PretrainConfig:
    """Recipe and settings as one, checked.

    Raises:
        UserError: They do not go together.
    """
    recipe = find_recipe(settings["recipe"]).config
    config = Overrides({name: value for name, value in settings.items() if name != "recipe"})(recipe)
    check_settings(config, DistributedContext())
    return config


def _refuse_what_is_compared(study: Study, arms: Sequence[Arm], settings: Mapping[str, Any]) -> None:
    """A flag on top of every arm may not take away what the arms differ in."""
    configs = [check_arm(arm, training) for arm in arms for training in study.trainings(arm)]
    for name in settings:
        values = list(dict.fromkeys(getattr(config, name) for config in configs))
        if len(values) > 1:
            raise UserError(
                f"--{name.replace('_', '-')} was given, and {study.name} compares {', '.join(map(str, values))}; leave "
                "it out, or choose points with --points."
            )


def estimate(
    study: Study, arms: Sequence[Arm], data: str, settings: Mapping[str, Any], seeds: Sequence[int], out: Path
) -> float:  # fmt: skip
    """Print how many trainings there are, and how long they take by a few steps of each kind; the seconds."""
    num_images = len(open_data(data, split="train"))
    step_seconds: dict[str, float] = {}
    trainings = _missing_trainings(study, arms, data, settings, seeds, out)
    total = 0.0
    for given in trainings:
        config = check_settings_of(given)
        kind = json.dumps({name: given[name] for name in TIME_MATTERS if name in given}, default=str)
        if kind not in step_seconds:
            step_seconds[kind] = _seconds_of_a_step(data, given)
        total += step_seconds[kind] * config.steps(num_images)
    train_too = sum(_trains_a_network(study, arm) for arm in arms) * len(seeds)
    print(
        f"{study.name}: {len(arms)} points, {len(seeds)} seeds: {len(trainings)} trainings on {num_images:,} images, "
        f"about {duration(total)} on this machine. Not in that time: {len(arms) * len(seeds)} evaluations, {train_too} "
        "of which train a network themselves. Trainings that are finished already are not counted."
    )
    return total


def _trains_a_network(study: Study, arm: Arm) -> bool:
    """Whether the evaluation is a training of its own: fine-tuning, distillation, a linear classifier by SGD."""
    options = {**study.evaluation, **arm.evaluation}
    trains = {"finetune", "supervised"} & {*study.protocols(arm)} or options.get("linear") == "sgd"
    return arm.distillation is not None or (arm.drawn_classes is None and bool(trains))


def _missing_trainings(
    study: Study, arms: Sequence[Arm], data: str, settings: Mapping[str, Any], seeds: Sequence[int], out: Path
) -> list[dict[str, Any]]:  # fmt: skip
    """Settings of the trainings that are still to be made, each once.

    Of an arm with candidates all are trained with the first seed, and one with each further seed: the first stands
    for it, as which one is chosen is not known.
    """
    missing: dict[Path, dict[str, Any]] = {}
    for arm in arms:
        candidates = list(study.trainings(arm))
        for seed in seeds:
            for training in candidates if seed == seeds[0] else candidates[:1]:
                given = {**training, **settings, "seed": seed}
                missing[run_folder(data, out, given)] = given
            if arm.distillation is not None and arm.distillation.start == "another base":
                given = {**candidates[0], **settings, "seed": seed + 1}
                missing[run_folder(data, out, given)] = given
    return [given for folder, given in missing.items() if not RunFolder(folder).is_finished]


def part_of(data: str, count: int, out: Path) -> str:
    """An .npz with `count` random training images of a data set of one size, and all of its test images."""
    train, test = open_data(data, split="train"), open_data(data, split="test")
    identity = sha256(f"{train.fingerprint} {test.fingerprint}".encode()).hexdigest()[:8]
    path = out / f"{Path(data).name}-{count}-{identity}.npz"
    if path.exists():
        return str(path)
    if train.labels is None or test.labels is None:
        raise UserError(f"{data} has no labels, which a study measures accuracy by.")
    if not 2 <= count <= len(train):
        raise UserError(f"--images was {count}; {data} has {len(train):,} training images.")
    if len(np.unique(np.concatenate([train.sizes, test.sizes]), axis=0)) > 1:
        raise UserError(f"--images was given, and the images of {data} have several sizes; leave it out.")
    chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:count])
    arrays = {}
    for part, images, rows in (("train", train, chosen), ("test", test, np.arange(len(test)))):
        arrays[f"x_{part}"] = np.stack([np.asarray(image) for image in images.read(rows)]).squeeze()
        assert images.labels is not None
        arrays[f"y_{part}"] = images.labels[rows]
    out.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyrefly: ignore[bad-argument-type]
    return str(path)


def _require_test_part(data: str) -> None:
    test = open_data(data, split="test")
    if test.labels is None:
        raise UserError(f"{data} has no labels, which a study measures accuracy by.")


def _seconds_of_a_step(data: str, settings: Mapping[str, Any]) -> float:
    """By `simclr plan`, with the strategy that training would take."""
    given = {name: value for name, value in settings.items() if name != "recipe"}
    recipe = settings["recipe"]
    config = replace(PretrainConfig(), device=given.get("device", "auto"))
    with redirect_stdout(StringIO()):
        planned = plan(PlanOptions(data=data, recipe=recipe, config=config), Overrides(given))
    taken = next((strategy for strategy in planned.strategies if strategy.name == planned.choice), None)
    if taken is None or taken.step_seconds is None:
        raise UserError("No memory strategy fits; give a smaller --batch-size, --size, --width or --encoder.")
    return taken.step_seconds


def command_of(options: StudyOptions, settings: Mapping[str, Any], first: int = 0) -> str:
    """What is to be typed to make the same study again.

    Args:
        first: Of the seeds.
    """
    words = ["simclr", "study", str(options.item), str(options.data)]
    for name, value, default in (
        ("images", options.images, None), ("scale", options.scale, "cpu"), ("seeds", options.seeds, 3),
        ("seed", first, 0), ("points", options.points, None),
    ):  # fmt: skip
        words += [f"--{name}", str(value)] if value != default else []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def _how(options: StudyOptions, settings: Mapping[str, Any], first: int, seeds: int) -> str:
    number = f"{seeds} seed" + "s" * (seeds > 1)
    return (
        f"`{command_of(options, settings, first)}`: {number}, test accuracy of the last checkpoint, mean ± standard "
        "deviation."
    )
