"""The steps of an arm with distillation: a pretrained encoder becomes a teacher, and the teacher has a student."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from simclr.data.opening import open_data
from simclr.evaluation.results import Result, read_results
from simclr.studies.study import Distillation
from simclr.tasks.api import Run, distill, finetune
from simclr.training.run import RunFolder


def distilled(plan: Distillation, run: Run, base: Run, data: str, *, out: Path, seed: int) -> Result:
    """The test accuracies of a student, or of its teacher where the plan has no student.

    Args:
        run: The pretrained encoder that the teacher is fine-tuned from.
        base: The pretrained encoder that the student begins from, where it does not begin with new weights.
        data: Labelled images with a test part.
        out: Teachers and students are in folders of it, which their settings name.

    Raises:
        Diverged: One of the two did.
    """
    tested_on = open_data(data, split="test").fingerprint
    teacher = _folder(out, "teacher", [run.path.name, seed, plan.teacher, tested_on])
    _finished(teacher, lambda: finetune(run, data, out=teacher, seed=seed, **plan.teacher))
    if plan.student is None:
        return _result(teacher, "encoder")
    options: dict[str, Any] = dict(plan.student)
    if plan.start != "new weights":
        options["student"] = str(base.path)
    named = {**options, "student": base.path.name} if "student" in options else options
    student = _folder(out, "student", [teacher.name, seed, named])
    _finished(student, lambda: distill(teacher, data, out=student, seed=seed, **options))
    return _result(student, "student")


def _folder(out: Path, kind: str, settings: list[Any]) -> Path:
    return out / f"{kind}-{sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}"


def _finished(folder: Path, train: Callable[[], Run]) -> None:
    """Train, or go on, unless that was done; of the training only what can be used is left."""
    run = RunFolder(folder)
    if not run.summary.exists():
        train()
    if run.checkpoints.exists():
        shutil.rmtree(run.checkpoints)


def _result(folder: Path, subject: str) -> Result:
    """The accuracies of the classifier, which its training left in the folder."""
    results, _ = read_results(folder / "evaluation" / "results.jsonl")
    return next(result for result in results if result.protocol == "classifier" and result.subject == subject)
