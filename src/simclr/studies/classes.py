"""Transfer to fewer classes: a linear probe on random subsets of the classes, with equally many labels per class."""

from dataclasses import replace
from typing import Any

import numpy as np

from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.keys import accuracy_key
from simclr.evaluation.logistic import linear_probe
from simclr.evaluation.measure import about_split
from simclr.evaluation.results import Measured, Result, ResultStore
from simclr.evaluation.split import Split, split_data
from simclr.evaluation.subjects import EvaluatedModel, open_subject
from simclr.studies.study import DrawnClasses
from simclr.tasks.api import Run

LABELS = 20
"""Labels per class."""
DRAWS = 10
"""Subsets of the classes whose accuracies are averaged."""
DRAWN_CLASSES_VERSION = 1
"""Of the computation: raise it when the same inputs give other numbers."""


def drawn_classes(plan: DrawnClasses, run: Run, data: str, *, seed: int, store: ResultStore) -> Result:
    """The linear probe on `plan.count` classes, with the metrics top1 and kappa.

    top1 is the mean over classes, whose sizes differ from draw to draw, and then over draws. kappa is the accuracy
    corrected for chance, (a - 1/K) / (1 - 1/K).

    Raises:
        UserError: The data have fewer classes.
    """
    split = split_data(open_data(data), open_data(data, split="test"), seed=seed, labels=f"{LABELS}/class")
    assert split.train.labels is not None
    num_classes = len(np.unique(split.train.labels))
    count = num_classes if plan.count is None else plan.count
    if count > num_classes:
        raise UserError(f"{data} has {num_classes} classes, and {count} were asked for; choose points with --points.")
    model = run.load()
    subject = open_subject(
        str(run.path) if plan.subject == "encoder" else plan.subject, like=model.encoder.config,
        preprocessing=model.preprocessing, seed=seed, cache=FeatureCache(None), world=DistributedContext(),
    )  # fmt: skip
    key: dict[str, Any] = accuracy_key("linear", subject, split, seed)
    key["version"] |= {"drawn_classes": DRAWN_CLASSES_VERSION}
    key |= {"protocol": "linear, drawn classes", "settings": key["settings"] | {"draws": DRAWS, "classes": count}}

    def make() -> Measured:
        mean = _mean_accuracy(subject, split, count, seed)
        return Measured(metrics={"top1": mean, "kappa": (mean - 1 / count) / (1 - 1 / count)})

    return store.get(key, make, replace(about_split(plan.subject, split), num_classes=count))


def _mean_accuracy(subject: EvaluatedModel, split: Split, count: int, seed: int) -> float:
    learn, truth = split.train.labels, split.test.labels
    assert learn is not None and truth is not None
    features = subject.features(split.train), subject.features(split.test)  # (n, F), (m, F)
    known = np.unique(learn)
    random = np.random.default_rng([seed, count])
    accuracies = []
    for _ in range(DRAWS if count < len(known) else 1):
        drawn = random.choice(known, count, replace=False)
        rows, queries = np.isin(learn, drawn), np.isin(truth, drawn)
        probe = linear_probe(features[0][rows], learn[rows], features[1][queries], seed=seed)
        right = probe.predicted == truth[queries]
        accuracies.append(np.mean([right[truth[queries] == label].mean() for label in drawn]))
    return float(np.mean(accuracies))
