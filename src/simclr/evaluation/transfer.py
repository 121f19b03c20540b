"""Transfer of encoders to other data sets: SimCLR, appendix B.8, which follows Kornblith et al. 2019.

Several subjects on several sets give one table. Each set has its metric; everything that is chosen is chosen on its
validation images; the chosen settings are trained once more on training and validation images together, and that
is tested. `grid.py` does so by fine-tuning, `linear_transfer` by logistic regression on frozen features.

Shapes: m test images, K classes. All scores are shares in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from simclr.data.images import Images
from simclr.data.presets import Metric, TransferSet
from simclr.errors import UserError
from simclr.evaluation.keys import linear_transfer_key
from simclr.evaluation.logistic import L2_PATH, FitOptions, logistic_probe
from simclr.evaluation.metrics import accuracy, mean_average_precision_11, mean_per_class, permutation_test
from simclr.evaluation.results import About, Measured, Result, ResultStore
from simclr.evaluation.subjects import EvaluatedModel

TRANSFER_VERSION = 1
"""Raise it when the same features and labels give another score, choice or credits in linear transfer."""
PERMUTATIONS = 100_000
CROP = 1.0  # share of the shorter side that is seen: the whole central square (B.8.1)


Measure = Callable[[EvaluatedModel, TransferSet], Result]
"""`linear_transfer` or `grid.finetune_transfer` with its settings."""


def transfer(
    subjects: Sequence[EvaluatedModel],
    sets: Sequence[TransferSet],
    measure: Measure,
    *,
    progress: Callable[[str], None],
) -> list[Result]:
    """Measure every subject on every set.

    Args:
        measure: With a store of results it is resumable.
        progress: Called with what is being measured.

    Returns:
        Results with the metrics score, on the test images, and validation: that of the chosen settings on the
        validation images before they were trained on too, None where nothing was chosen. Both are shares in [0, 1] by
        `data["metric"]`. Details: what was "chosen" on the validation images, the "credits" of the test images
        (`score_and_credits`), and of logistic regression whether every fit "converged".

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
    l2_values: Sequence[float] = L2_PATH,
    store: ResultStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Logistic regression on frozen features, without augmentation; one for each class where an image may show several.

    The encoder sees the whole central square of each image, as in the paper (B.8.1: shorter side resized to the
    encoder's size, then its centre), not the 0.875 of it that the other protocols show.

    Args:
        seed: Noted with the result, which does not depend on it (the solution is unique, and the parts are given)
            except for k-means patches, which are learnt from the training images by it.
        l2_values: The values to choose among; the paper's are 45 from 1e-6 to 1e5.
        store: Where results are kept and looked up.
        progress: Called with (done, total) thousandths of a fit.

    Raises:
        UserError: The images do not fit the subject, features are not finite, or there is no image to choose by.
    """
    subject = subject.learnt_from(data.train, seed=seed)

    def measure() -> Measured:
        features = partial(subject.features, crop=CROP)
        train, test = features(data.train), features(data.test)  # (n, F), (m, F)
        held = None if data.validation is None else (features(data.validation), true_labels(data.validation))

        def metric(scores: np.ndarray, truth: np.ndarray) -> float:
            return score_and_credits(scores, np.arange(scores.shape[1]), truth, data.metric)[0]

        probe = logistic_probe(
            train, true_labels(data.train), test, validation=held, seed=seed, l2_values=l2_values, metric=metric,
            options=FitOptions(device=subject.world.device, progress=progress),
        )  # fmt: skip
        score, credits = score_and_credits(probe.scores, probe.classes, true_labels(data.test), data.metric)
        return Measured(
            metrics={"score": score, "validation": probe.validation_scores.get(probe.l2)},
            details={"chosen": {"l2": probe.l2}, "credits": credits, "converged": probe.converged},
        )

    key = linear_transfer_key(subject, data, seed, l2_values=list(l2_values), crop=CROP, version=TRANSFER_VERSION)
    return (store or ResultStore(None)).get(key, measure, about_transfer(subject, data))


def about_transfer(subject: EvaluatedModel, data: TransferSet) -> About:
    """Names and counts of a result of transfer, for readers."""
    return About(
        subject=subject.name, data_name=data.name, split=data.how, num_train=len(data.train), num_test=len(data.test)
    )


def score_and_credits(
    scores: np.ndarray, classes: np.ndarray, truth: np.ndarray, metric: Metric
) -> tuple[float, list[float]]:
    """The metric in [0, 1], and the (m,) credits: what each image contributes, for the permutation test.

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
    """Of the permutation test; that of mAP is one of accuracy (`score_and_credits`)."""
    how: str
    """ "exact", or how many samples."""


def differences(results: Sequence[Result], *, samples: int = PERMUTATIONS, seed: int = 0) -> list[Difference]:
    """The permutation test between any two subjects, for each set and each seed.

    It speaks of the images that happened to be tested on, not of what another training run would have given.
    """
    tested = []
    for a, b in combinations(results, 2):
        if (a.data_name, a.seed) == (b.data_name, b.seed):
            p, description = permutation_test(
                np.array(a.details["credits"]), np.array(b.details["credits"]), samples=samples, seed=seed
            )
            tested.append(
                Difference(
                    data=a.data_name, first=a.subject, second=b.subject, seed=a.seed,
                    difference=a.value("score") - b.value("score"), p=p, how=description,
                )
            )  # fmt: skip
    return tested


def true_labels(images: Images) -> np.ndarray:
    """(n,) labels, or (n, K) targets where an image may show several classes."""
    truth = images.labels if images.targets is None else images.targets
    assert truth is not None
    return truth
