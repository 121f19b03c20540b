"""Protocols whose results are more than an accuracy, each on models under test -> results.

    curve       the label-efficiency curve (`curve.py`), beside a network trained on the labels alone
    probe       what can be read from each layer (`probe.py`, the paper's table 3)
    label-free  geometry, neighbours, clusters and copies (`label_free.py`)
    transfer    several data sets, by logistic regression (`transfer.py`) or a grid of trainings (`grid.py`)

`measure.py` has the protocols of the main table.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from simclr.config.finetune import SMALL
from simclr.data.images import Images
from simclr.data.presets import TransferSet
from simclr.evaluation.curve import Count, Key, labels_curve
from simclr.evaluation.grid import Grid, finetune_transfer
from simclr.evaluation.keys import curve_from_scratch_key, curve_key, label_free_key, probe_key
from simclr.evaluation.label_free import label_free, view_features
from simclr.evaluation.measure import EvaluationContext, about_split, fitting, supervised_recipe, train_subject
from simclr.evaluation.metrics import SUPERVISED
from simclr.evaluation.probe import probe
from simclr.evaluation.results import About, Measured, Result
from simclr.evaluation.split import Split
from simclr.evaluation.subjects import EvaluatedModel
from simclr.evaluation.transfer import Measure, linear_transfer, transfer
from simclr.training.fit import Execution

FROM_SCRATCH = "from scratch"
"""Subject of a transfer by a network with random weights."""


def curve_results(
    subjects: Sequence[EvaluatedModel],
    split: Split,
    *,
    counts: Sequence[Count] | None,
    seeds: Sequence[int],
    flip: float | None,
    context: EvaluationContext,
) -> tuple[list[Result], tuple[str, ...]]:
    """The points of the label-efficiency curve: metric top1, setting labels_per_class.

    Args:
        subjects: The model under test first; where it is a network, one of its shape is trained on the labels alone.
        split: With all labels: each point draws its own from these.
        counts: As `labels_curve` takes them.
        flip: Probability of a left-right flip in training from scratch; None: the recipe's.

    Returns:
        The results, and sentences about counts that were left out. Errors are those of `labels_curve`.
    """
    first, by_name = subjects[0], {subject.name: subject for subject in subjects}
    network = first.encoder
    recipes = [] if network is None else [supervised_recipe(network, n, flip) for n in (SMALL, SMALL + 1)]
    results: list[Result] = []

    def keep(point: Key, make: Callable[[], float]) -> float:
        source, count, seed = point
        if source == SUPERVISED:
            key = curve_from_scratch_key(first, split, count, seed, recipes)
        else:
            key = curve_key(by_name[source], split, count, seed)
        result = context.store.get(key, lambda: Measured(metrics={"top1": make()}), about_split(source, split))
        results.append(result)
        return result.value("top1")

    def from_scratch(train: Images, test: Images, seed: int) -> float:
        assert network is not None
        recipe = supervised_recipe(network, len(train), flip)
        train, test = first.fitted(train), first.fitted(test)
        execution = Execution(world=context.world)
        return train_subject(first, train, test, recipe, seed=seed, from_scratch=True, execution=execution).accuracy

    curve = labels_curve(
        {subject.name: subject.features for subject in subjects}, split, counts=counts, seeds=seeds, keep=keep,
        supervised=from_scratch if network is not None else None,
        progress=lambda sentence: context.say(f"  curve: {sentence}"),
    )  # fmt: skip
    return results, curve.notes


def probe_result(subject: EvaluatedModel, split: Split, seed: int, context: EvaluationContext) -> Result:
    """Every task on every layer of a network: metrics "LAYER/TASK", accuracies in [0, 1]; the others as details.

    Raises:
        UserError: The subject has no network, or too few images.
    """
    train, test = subject.fitted(split.train), subject.fitted(split.test)

    def make() -> Measured:
        probes = probe(
            subject, train, test, seed=seed, progress=lambda text: context.say(f"  probe of {subject.name}: {text}")
        )
        return Measured(metrics=probes.metrics, details=probes.details)

    return context.store.get(probe_key(subject, split, seed), make, about_split(subject.name, split))


def label_free_result(
    subject: EvaluatedModel, images: Images, test: Images | None, seed: int, *, copies: bool, context: EvaluationContext
) -> Result:
    """What features and pixels show without labels: `label_free.METRICS`, and the rest of `LabelFree` as details.

    Args:
        test: Images that may be copies of the others; None: there are none.
        copies: Whether to look for copies, which depend on the images alone, so that once is enough.
    """
    shown, shown_test = subject.fitted(images), None if test is None else subject.fitted(test)

    def make() -> Measured:
        context.say(f"  label-free: {subject.name}")
        views = None
        if subject.encoder is not None:
            views = view_features(subject.encoder, shown, preset=subject.preprocessing, seed=seed)
        measured = label_free(
            subject.features(images), shown, views=views, seed=seed, duplicates=copies, test=shown_test
        )
        return Measured(metrics=measured.metrics, details=measured.details)

    key = label_free_key(subject, shown, shown_test, seed, copies=copies)
    return context.store.get(key, make, About(subject=subject.name, data_name=images.name))


def transfer_results(
    subjects: Sequence[EvaluatedModel],
    sets: Sequence[TransferSet],
    seed: int,
    *,
    grid: Grid | None,
    context: EvaluationContext,
) -> list[Result]:
    """Every subject on every set, as `transfer` returns it.

    Args:
        grid: Of trainings, for which subjects without a network are left out; from scratch, the network of the first
            alone is trained, and the results are those of "from scratch". None: logistic regression.
    """

    def linearly(subject: EvaluatedModel, data: TransferSet) -> Result:
        with fitting("fitting", context.world, unit="thousandth") as progress:
            return linear_transfer(subject, data, seed=seed, store=context.store, progress=progress)

    measure: Measure = linearly
    if grid is not None:
        subjects = [subject for subject in subjects if subject.encoder is not None]
        measure = partial(
            finetune_transfer, grid=grid, seed=seed, folder=context.folder,
            progress=lambda text: context.say(f"  {text}"),
        )  # fmt: skip
    from_scratch = grid is not None and grid.from_scratch
    results = transfer(
        subjects[:1] if from_scratch else subjects, sets, measure,
        progress=lambda text: context.say(f"  transfer: {text}"),
    )  # fmt: skip
    return [replace(result, subject=FROM_SCRATCH) for result in results] if from_scratch else results
