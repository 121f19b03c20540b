"""Protocols that answer with more than an accuracy: a table of their own, figures for the JSON file, pictures.

curve: labels needed. probe: what the layers know. label-free: geometry, neighbours, copies. transfer: other sets.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from simclr.data.images import Images
from simclr.data.presets import TransferSet
from simclr.errors import UserError
from simclr.evaluation.curve import Key, labels_curve, when_it_pays
from simclr.evaluation.duplicates import Duplicates
from simclr.evaluation.finetune import supervised
from simclr.evaluation.grid import PAPER_GRID, finetune_transfer
from simclr.evaluation.keys import curve_from_scratch_key, curve_key, probe_key
from simclr.evaluation.label_free import LabelFree, label_free, view_features
from simclr.evaluation.measure import SMALL, fitting, supervised_recipe
from simclr.evaluation.metrics import BASELINES, SUPERVISED
from simclr.evaluation.probe import probe
from simclr.evaluation.split import Split
from simclr.evaluation.subjects import EvaluatedModel
from simclr.evaluation.transfer import Measure, Transferred, differences, linear_transfer, rows, summary, transfer
from simclr.reports.curve import curve_table, draw_curve
from simclr.reports.pictures import draw_copies, draw_misfits, draw_neighbours
from simclr.reports.table import Row, seeds_note, text_table

if TYPE_CHECKING:
    from simclr.tasks.evaluate import Session


NAMED = 10
"""Pairs of copies that are printed."""


class Report(NamedTuple):
    """What a protocol has to say."""

    text: str
    figures: dict[str, Any]
    pictures: dict[str, bytes]
    """File name -> PNG."""


def report_curve(session: "Session") -> Report:
    """Accuracy over the number of labels a class, beside the baselines and a network trained on those labels alone."""
    args, split, subjects = session.args, session.split(session.args.seed, every=True), session.subjects()
    by_name = {subject.name: subject for subject in subjects}
    network = subjects[0].encoder
    recipes = [] if network is None else [supervised_recipe(network, n, session.flip) for n in (SMALL, SMALL + 1)]

    def keep(point: Key, make: Callable[[], float]) -> float:
        source, count, seed = point
        if source == SUPERVISED:
            key = curve_from_scratch_key(subjects[0], split, count, seed, recipes)
        else:
            key = curve_key(by_name[source], split, count, seed)
        about = {"subject": source, "images": split.train.name, "split": split.how}
        return session.ledger.get(key, lambda: {"accuracy": make()}, about=about)["accuracy"]

    def from_scratch(train: Images, test: Images, seed: int) -> float:
        assert network is not None
        recipe = supervised_recipe(network, len(train), session.flip)
        train, test = subjects[0].fitted(train), subjects[0].fitted(test)
        return supervised(
            session.like, train, test, recipe, seed=seed, preset=session.preprocessing, world=session.world
        ).accuracy

    found = labels_curve(
        {subject.name: subject.features for subject in subjects},
        split,
        counts=args.counts or None,
        seeds=session.seeds,
        supervised=from_scratch if network is not None else None,
        keep=keep,
        progress=lambda sentence: session.tell(f"  curve: {sentence}"),
    )
    text = f"{curve_table(found)}\n{when_it_pays(found, source=subjects[0].name)}"
    return Report(text, found.to_dict(), {"curve.png": draw_curve(found)})


def report_probe(session: "Session") -> Report:
    """What can be read from each layer: colour, rotation, noise, edges (the paper's table 3)."""
    split, judged = session.split(session.args.seed, every=True), session.subjects()[0]
    if judged.encoder is None:
        raise UserError("The protocol probe looks at the layers of a network, and pixels have none; give an encoder.")
    found: dict[str, list[dict[str, Any]]] = {}  # subject -> probes by seed
    for seed in session.seeds:
        for subject in session.subjects(seed):
            if subject.encoder is not None:
                found.setdefault(subject.name, []).append(_probed(session, subject, split, seed))
    first = found.pop(judged.name)
    chance = first[0]["chance"]
    lines = _layers(first)
    for name, probes in found.items():
        lines += [replace(row, name=f"{name}: {row.name}") for row in _layers(probes)]
    note = seeds_note(lines)
    lines.append(Row("chance", {task: [share] for task, share in chance.items()}, baseline=True))
    notes = [f"What an MLP reads from each layer, accuracy in %, {note}.", *first[0]["notes"]]
    return Report("\n".join([text_table(lines, corner="layer"), *notes]), {"seeds": first, "compared": found}, {})


def _probed(session: "Session", subject: EvaluatedModel, split: Split, seed: int) -> dict[str, Any]:
    """Every task on every layer of one network, from the ledger or measured now."""
    encoder, train, test = subject.encoder, subject.fitted(split.train), subject.fitted(split.test)
    assert encoder is not None

    def make() -> dict[str, Any]:
        return probe(
            encoder, subject.head, train, test, seed=seed, preset=subject.preprocessing,
            progress=lambda text: session.tell(f"  probe of {subject.name}: {text}"),
        ).to_dict()  # fmt: skip

    about = {"subject": subject.name, "images": train.name, "split": split.how}
    return session.ledger.get(probe_key(subject, split, seed), make, about=about)


def _layers(probes: list[dict[str, Any]]) -> list[Row]:
    """A row for each layer, a column for each task; one value a seed."""
    tasks, layers = probes[0]["chance"], probes[0]["table"]
    return [Row(layer, {task: [one["table"][layer][task] for one in probes] for task in tasks}) for layer in layers]


def report_label_free(session: "Session") -> Report:
    """Geometry of the features, neighbours, worst-clustered images, and copies that make other figures a lie."""
    seed, subjects = session.args.seed, session.subjects()
    images, test = session.train, session.test
    found: dict[str, LabelFree] = {}
    for subject in subjects:
        session.tell(f"  label-free: {subject.name}")
        shown = subject.fitted(images)
        views = None
        if subject.encoder is not None:
            views = view_features(subject.encoder, shown, preset=subject.preprocessing, seed=seed)
        found[subject.name] = label_free(
            subject.features(images), shown, views=views, seed=seed, duplicates=subject is subjects[0],
            test=None if test is None else subject.fitted(test),
        )  # fmt: skip
    first = found[subjects[0].name]
    lines = [
        Row(name, {
            "alignment": [] if one.alignment is None else [one.alignment],
            "uniformity": [one.uniformity],
            "effective rank": [one.effective_rank],
            "of": [one.num_features],
            "silhouette": [one.silhouette],
        }, baseline=name in BASELINES)
        for name, one in found.items()
    ]  # fmt: skip
    copies = [one for one in (first.within, first.across) if one is not None]
    text = "\n".join(
        [
            text_table(lines, corner="features", percent=False, digits=2),
            f"Alignment: of two crops of {first.alignment_rows:,} images, lower is closer. Uniformity: of "
            f"{first.uniformity_rows:,} images, lower is wider spread. Silhouette: of {first.num_clusters} clusters.",
            *(line for one in copies for line in _named(one)),
        ]
    )
    shown = subjects[0].fitted(images)
    pictures = {
        "neighbours.png": draw_neighbours(shown, first.neighbours),
        "worst-clustered.png": draw_misfits(shown, first.outliers),
    }
    if first.within is not None and first.within.pairs:
        pictures["copies-within.png"] = draw_copies(first.within, shown)
    if first.across is not None and first.across.pairs and test is not None:
        pictures["copies-across.png"] = draw_copies(first.across, shown, subjects[0].fitted(test))
    return Report(text, {name: one.to_dict() for name, one in found.items()}, pictures)


def _named(copies: Duplicates) -> list[str]:
    """What was found, and the first pairs by name."""
    pairs = copies.pairs[:NAMED]
    more = [f"  and {len(copies.pairs) - NAMED:,} more, all in --json"] if len(copies.pairs) > NAMED else []
    return [copies.sentence, *(f"  {one.copy} shows {one.original} ({one.similarity:.3f})" for one in pairs), *more]


def report_transfer(session: "Session") -> Report:
    """Several sets, each with its metric, in one table; and whether encoders differ by more than chance."""
    args = session.args
    grid = replace(
        PAPER_GRID, steps=args.grid_steps, rates=args.grid_rates or PAPER_GRID.rates,
        decays=args.grid_decays or PAPER_GRID.decays,
    )  # fmt: skip
    results = []
    for seed in session.seeds:
        subjects = session.subjects(seed)
        if args.transfer_by == "linear":
            measure: Measure = partial(_linearly, session=session, seed=seed)
        else:
            subjects = [subject for subject in subjects if subject.encoder is not None]
            measure = partial(
                finetune_transfer, grid=grid, seed=seed, folder=session.folder,
                progress=lambda text: session.tell(f"  {text}"),
            )  # fmt: skip
        results += transfer(
            subjects, session.sets(seed), measure, progress=lambda text: session.tell(f"  transfer: {text}")
        )
    metrics = dict.fromkeys(f"{one.data}: {one.metric}" for one in results)
    lines = [Row(name, columns, baseline=name in BASELINES) for name, columns in rows(results).items()]
    tests = [
        f"{one.data}, seed {one.seed}: {one.first} - {one.second} = {100 * one.difference:+.1f} points, p = {one.p:.2g}"
        for one in differences(results)
    ]
    text = [text_table(lines, corner="features"), f"In %, {seeds_note(lines)}. {'; '.join(metrics)}.", *tests]
    return Report("\n".join(text), summary(results), {})


def _linearly(subject: EvaluatedModel, data: TransferSet, *, session: "Session", seed: int) -> Transferred:
    with fitting("fitting", session.world, unit="thousandth") as progress:
        return linear_transfer(subject, data, seed=seed, ledger=session.ledger, progress=progress)


REPORTS: dict[str, Callable[["Session"], Report]] = {
    "transfer": report_transfer,
    "probe": report_probe,
    "curve": report_curve,
    "label-free": report_label_free,
}
"""Protocol -> what makes its report."""
