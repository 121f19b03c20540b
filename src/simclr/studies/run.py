"""Running a study: every arm with every seed is pretrained, evaluated, and kept in a folder."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

from simclr.data.images import fit_channels
from simclr.data.opening import open_data
from simclr.errors import Diverged, NotFinite, UserError
from simclr.evaluation.results import About, Measured, Result, ResultStore
from simclr.files import write_atomically
from simclr.studies.classes import drawn_classes
from simclr.studies.distillation import distilled
from simclr.studies.study import Arm, Study
from simclr.tasks.api import Run, evaluate, pretrain, resume
from simclr.tasks.pretrain_images import same_data
from simclr.training.progress import say
from simclr.training.run import RunFolder

CHOOSE_BY = "knn"
"""The metric of a training by which candidates are compared: accuracy within the training images."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What an arm came to with one seed.

    Attributes:
        arm: Name of the arm.
        settings: The candidate that was chosen; empty where there was no choice.
        results: One for each protocol; empty where the training diverged.
        diverged: The sentence that says so, else empty.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]
    results: Sequence[Result]
    diverged: str = ""


def run_study(
    study: Study, data: str, *, out: Path, seeds: Sequence[int], settings: Mapping[str, Any] | None = None,
    arms: Sequence[Arm] | None = None,
) -> Iterator[list[Measurement]]:  # fmt: skip
    """The measurements of all arms, seed after seed, so that what is cut off has whole comparisons.

    What the folder `out` already holds is not made again. A training that diverges is a measurement without results.

    Args:
        data: Labelled images with a test part.
        out: Each run is in a folder of it that its settings name, so that equal arms of two studies are one run.
        settings: On top of every arm, such as {"epochs": 4}.
        arms: Of the study; None: all.
    """
    arms = study.arms if arms is None else arms
    store = ResultStore(out / "results.jsonl")
    chosen: dict[str, Mapping[str, Any]] = {}
    for seed in seeds:
        measured = []
        for arm in arms:
            if arm.name not in chosen:
                chosen[arm.name] = _choose(study, arm, data, out, seed, settings or {})
            training = {**study.settings, **arm.settings, **chosen[arm.name], **(settings or {}), "seed": seed}
            results, diverged = _measure(study, arm, data, out, training, store)
            say(f"{study.name}, {arm.name}, seed {seed}: {'diverged' if diverged else 'measured'}.")
            _keep(results, store)
            measured.append(
                Measurement(arm=arm.name, seed=seed, settings=chosen[arm.name], results=results, diverged=diverged)
            )
        yield measured


def run_folder(data: str, out: Path, settings: Mapping[str, Any]) -> Path:
    """Where the training of these settings is, which name it."""
    text = json.dumps([data, settings], sort_keys=True, default=str)
    return out / "runs" / sha256(text.encode()).hexdigest()[:16]


def trained(data: str, out: Path, settings: Mapping[str, Any]) -> Run | str:
    """The run of these settings, trained now or before; or, where it diverged, the sentence that says so.

    Raises:
        UserError: The data have other images than when it was trained.
    """
    folder = run_folder(data, out, settings)
    diverged = folder.with_suffix(".diverged.json")
    if diverged.exists():
        return str(json.loads(diverged.read_text())["sentence"])
    run = RunFolder(folder)
    if run.exists:
        origin = run.origin
        same_data(fit_channels(open_data(data, split="train"), origin["data"]["channels"]), origin, folder)
    try:
        if not run.exists:
            pretrain(data, out=folder, **settings)
        elif not run.is_finished:
            resume(folder)
    except Diverged as error:
        diverged.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(diverged, json.dumps({"sentence": str(error), "settings": dict(settings)}).encode())
        return str(error)
    if run.checkpoints.exists():  # the encoder is all that is needed from here on
        shutil.rmtree(run.checkpoints)
    return Run(folder)


def _measure(
    study: Study, arm: Arm, data: str, out: Path, training: Mapping[str, Any], store: ResultStore
) -> tuple[Sequence[Result], str]:  # fmt: skip
    """The results of an arm with one seed; or none, and the sentence that says how it diverged."""
    seed, plan = training["seed"], arm.distillation
    run = trained(data, out, training)
    if isinstance(run, str):
        return [], run
    base = run
    if plan is not None and plan.start == "another base":
        base = trained(data, out, {**training, "seed": seed + 1})
        if isinstance(base, str):
            return [], base
    try:
        with redirect_stdout(StringIO()):  # of each evaluation the study prints one number
            if plan is not None:
                return [distilled(plan, run, base, data, out=out / "runs", seed=seed)], ""
            if arm.drawn_classes is not None:
                return [drawn_classes(arm.drawn_classes, run, data, seed=seed, store=store)], ""
            return evaluate(run, data, compare=[], seed=seed, **{**study.evaluation, **arm.evaluation}), ""
    except (Diverged, NotFinite) as error:
        return [], str(error)


def _keep(results: Sequence[Result], store: ResultStore) -> None:
    """Add results to the study's own file, which holds those of all studies in the folder."""
    for result in results:
        measured = Measured(metrics=result.metrics, details=result.details, description=result.description)
        names = {field.name: getattr(result, field.name) for field in fields(About)}
        store.get(result.key, lambda measured=measured: measured, About(**names))


def _choose(
    study: Study, arm: Arm, data: str, out: Path, seed: int, settings: Mapping[str, Any]
) -> Mapping[str, Any]:  # fmt: skip
    """The arm's best candidate by accuracy within the training images."""
    if not arm.candidates:
        return {}
    best, highest = arm.candidates[0], -1.0
    for candidate in arm.candidates:
        run = trained(data, out, {**study.settings, **arm.settings, **candidate, **settings, "seed": seed})
        if isinstance(run, str):
            continue
        final = json.loads(RunFolder(run.path).summary.read_text())["final"]
        if CHOOSE_BY not in final:
            raise UserError(
                f"The settings of {arm.name} are chosen by kNN accuracy within the training images, which was not "
                "measured: leave --knn-every out, and give labelled images of two classes or more."
            )
        if final[CHOOSE_BY] > highest:
            best, highest = candidate, final[CHOOSE_BY]
    return best
