"""Transfer: how well do encoders do on other data sets? SimCLR, appendix B.8, which follows Kornblith et al. 2019.

Several subjects on several sets give one table. Each set has its metric; everything that is chosen is chosen on its
validation images; the chosen settings are trained once more on training and validation images together, and that
is tested. `grid.py` does so by fine-tuning, `linear_transfer` by logistic regression on frozen features.

Shapes: m test images, K classes. Every figure is a share in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from simclr.data.images import Images
from simclr.data.presets import Metric, TransferSet
from simclr.errors import UserError
from simclr.evaluation.keys import linear_transfer_key
from simclr.evaluation.logistic import L2_PATH, logistic_probe
from simclr.evaluation.metrics import accuracy, mean_average_precision_11, mean_per_class, permutation_test
from simclr.evaluation.results import ResultStore
from simclr.evaluation.subjects import EvaluatedModel

TRANSFER_VERSION = 1
"""Raise it when the same features and labels give another score, choice or credits (`judge`) in linear transfer."""
PERMUTATIONS = 100_000
CROP = 1.0  # share of the shorter side that is seen: the whole central square (B.8.1)


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """How well one subject does on one set."""

    subject: str
    data: str
    metric: Metric
    score: float
    """On the test images, in [0, 1]."""
    validation: float | None
    """Of the chosen settings on the validation images, before they were trained on too; None: nothing was chosen."""
    chosen: dict[str, float]
    """What was chosen on the validation images: the l2 strength, or learning rate and weight decay."""
    credits: list[float]
    """(m,) what each test image brings; their mean is the score, but for 11-point mAP (`judge`)."""
    seed: int
    converged: bool = True
    """Whether every fit of a logistic regression reached its tolerance."""


Measure = Callable[[EvaluatedModel, TransferSet], Transferred]


def transfer(
    subjects: Sequence[EvaluatedModel],
    sets: Sequence[TransferSet],
    measure: Measure,
    *,
    progress: Callable[[str], None],
) -> list[Transferred]:
    """Measure every subject on every set.

    Args:
        measure: `linear_transfer` or `grid.finetune_transfer` with its settings; a ledger makes it resumable.
        progress: Told what is being done.

    Raises:
        UserError: Two subjects or two sets of the same name, which one table cannot tell apart.
    """
    for what, names in (("subjects", [s.name for s in subjects]), ("data sets", [s.name for s in sets])):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"Two {what} are called {twice[0]}, and one table cannot tell them apart; rename a folder.")
    results = []
    for data in sets:
        for subject in subjects:
            progress(f"{data.name}: {subject.name}")
            results.append(measure(subject, data))
    return results


def linear_transfer(
    subject: EvaluatedModel,
    data: TransferSet,
    *,
    seed: int,
    strengths: Sequence[float] = L2_PATH,
    ledger: ResultStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Transferred:
    """Logistic regression on frozen features, without augmentation; one for each class where an image may show several.

    The encoder sees the whole central square of each image, as in the paper (B.8.1: shorter side resized to the
    encoder's size, then its centre), not the 0.875 of it that the other protocols show.

    Args:
        seed: Noted with the result, which does not depend on it: the optimum is one, and the parts are given.
        strengths: The l2 strengths to choose among; the paper's are 45 from 1e-6 to 1e5.
        ledger: Where results are kept and looked up.
        progress: Called with (done, total) thousandths of a fit.

    Raises:
        UserError: The images do not fit the subject, features are not finite, or there is no image to choose by.
    """

    def measure() -> dict[str, Any]:
        features = partial(subject.features, crop=CROP)
        train, test = features(data.train), features(data.test)  # (n, F), (m, F)
        held = None if data.validation is None else (features(data.validation), shown(data.validation))
        probe = logistic_probe(
            train, shown(data.train), test, validation=held, seed=seed, strengths=strengths, progress=progress,
            metric=lambda scores, truth: judge(scores, np.arange(scores.shape[1]), truth, data.metric)[0],
            device=subject.world.device,
        )  # fmt: skip
        score, credits = judge(probe.scores, probe.classes, shown(data.test), data.metric)
        return {
            "score": score,
            "validation": probe.validation_scores.get(probe.strength),
            "chosen": {"l2": probe.strength},
            "credits": credits,
            "converged": probe.converged,
        }

    key = linear_transfer_key(subject, data, seed, strengths=list(strengths), crop=CROP, version=TRANSFER_VERSION)
    about = {"subject": subject.name, "images": data.name, "split": data.how}
    found = (ledger or ResultStore(None)).get(key, measure, about=about)
    return Transferred(subject=subject.name, data=data.name, metric=data.metric, seed=seed, **found)


def judge(scores: np.ndarray, classes: np.ndarray, truth: np.ndarray, metric: Metric) -> tuple[float, list[float]]:
    """The metric, and what each image brings, for the permutation test.

    Credits are such that their mean is the score: 1 for an image told rightly, and for accuracy per class weighted so
    that all classes count alike. Average precision is no mean over images, and exchanging the outcomes of single images
    between two encoders means nothing for it; there credits are those of accuracy: the share of the image's classes
    that are told rightly.

    Args:
        scores: (m, K) logits.
        classes: (K,) the label that each column stands for.
        truth: (m,) labels; for mAP (m, K), as `Images.targets`.
    """
    if metric == "11-point mAP":
        known = truth >= 0  # (m, K)
        right = known & ((scores > 0) == (truth == 1))
        credits = right.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
        return mean_average_precision_11(scores, truth), credits.tolist()
    predicted = classes[scores.argmax(axis=1)]  # (m,)
    right = (predicted == truth).astype(np.float64)
    if metric == "top-1":
        return accuracy(predicted, truth), right.tolist()
    _, members, counts = np.unique(truth, return_inverse=True, return_counts=True)
    return mean_per_class(predicted, truth), (right * len(right) / (len(counts) * counts[members])).tolist()


def rows(results: Sequence[Transferred]) -> dict[str, dict[str, list[float]]]:
    """The summary table: subject -> set -> one score a seed, and "mean" over the sets at the end.

    A subject that was not measured on all sets has no mean.
    """
    subjects, sets = (list(dict.fromkeys(names)) for names in zip(*((r.subject, r.data) for r in results), strict=True))
    table: dict[str, dict[str, list[float]]] = {}
    for subject in subjects:
        by_seed: dict[int, dict[str, float]] = {}
        for result in results:
            if result.subject == subject:
                by_seed.setdefault(result.seed, {})[result.data] = result.score
        table[subject] = {name: [scores[name] for scores in by_seed.values() if name in scores] for name in sets}
        if all(set(scores) == set(sets) for scores in by_seed.values()):
            table[subject]["mean"] = [float(np.mean(list(scores.values()))) for scores in by_seed.values()]
    return table


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Whether two subjects differ on a set by more than chance."""

    data: str
    first: str
    second: str
    seed: int
    difference: float
    """Of the scores, first - second."""
    p: float
    """Of the permutation test; that of mAP is one of accuracy (`judge`)."""
    how: str
    """ "exact", or how many samples."""


def differences(results: Sequence[Transferred], *, samples: int = PERMUTATIONS, seed: int = 0) -> list[Difference]:
    """The permutation test between any two subjects, for each set and each seed.

    It speaks of the images that happened to be tested on, not of what another training run would have given.
    """
    found = []
    for a, b in combinations(results, 2):
        if (a.data, a.seed) == (b.data, b.seed):
            p, how = permutation_test(np.array(a.credits), np.array(b.credits), samples=samples, seed=seed)
            found.append(
                Difference(
                    data=a.data,
                    first=a.subject,
                    second=b.subject,
                    seed=a.seed,
                    difference=a.score - b.score,
                    p=p,
                    how=how,
                )
            )
    return found


def summary(results: Sequence[Transferred]) -> dict[str, Any]:
    """All of it as JSON can hold it, without the credits of single images."""
    plain = [{name: value for name, value in asdict(result).items() if name != "credits"} for result in results]
    return {
        "table": rows(results), "results": plain, "differences": [asdict(found) for found in differences(results)],
    }  # fmt: skip


def shown(images: Images) -> np.ndarray:
    """(n,) labels, or (n, K) targets where an image may show several classes."""
    found = images.labels if images.targets is None else images.targets
    assert found is not None
    return found
