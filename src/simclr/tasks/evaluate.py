"""`simclr evaluate RUN DATA`: protocols x models x seeds -> results, and tables, JSON and pictures made of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from simclr import distributed
from simclr.config.finetune import FinetuneConfig, find_finetune_recipe
from simclr.config.pretrain import require_seed
from simclr.errors import Stopped, UserError
from simclr.evaluation.curve import Curve
from simclr.evaluation.grid import PAPER_GRID, PAPER_GRID_FROM_SCRATCH
from simclr.evaluation.measure import ACCURACIES, Protocol, Settings
from simclr.evaluation.protocols import curve_results, label_free_result, probe_result, transfer_results
from simclr.evaluation.results import Result
from simclr.evaluation.subjects import WITHOUT_NETWORK, is_initial
from simclr.evaluation.transfer import differences
from simclr.models.layers import require_layer
from simclr.reports.curve import curve_table, draw_curve, when_it_pays
from simclr.reports.evaluation import accuracy_summary, accuracy_text, layer_note, mean_accuracies, records
from simclr.reports.label_free import label_free_pictures, label_free_summary, label_free_text
from simclr.reports.probe import probe_summary, probe_text
from simclr.reports.transfer import transfer_summary, transfer_text
from simclr.reports.verdict import Comparison, comparisons, is_baseline, verdict_summary, verdict_text
from simclr.tasks.evaluation_session import Session, check_network, results_folder
from simclr.tasks.opening import require_writable, write
from simclr.training.progress import say
from simclr.training.run import RunFolder

if TYPE_CHECKING:
    from simclr.tasks.options.labels import Evaluate


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a protocol with a table of its own gives."""

    results: list[Result]
    text: str
    summary: dict[str, Any]
    """For the JSON file."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """File name -> PNG."""


def evaluate(options: "Evaluate", overrides: Callable[[FinetuneConfig], FinetuneConfig]) -> list[Result]:
    """The command: what can be checked is checked first, and each result is kept as soon as it is there.

    Returns:
        All that was measured.

    Args:
        overrides: Puts the flags that were given on top of a recipe for fine-tuning.

    Raises:
        UserError: RUN, DATA and the flags do not go together, or a result could not be measured.
    """
    protocols = protocols_of(options.protocol)
    check_flags(options, protocols, overrides)
    with distributed.joined(options.device) as world:
        try:
            session = Session.open(options, protocols, world)
            session.check()
            settings = Settings(
                linear=options.linear, recipe=options.finetune_recipe, overrides=overrides, flip=session.flip,
                pseudo_labels=options.pseudo_labels,
            )  # fmt: skip
            results = session.measure([cast(Protocol, name) for name in protocols if name in ACCURACIES], settings)
            reports = {name: REPORTS[name](session) for name in protocols if name in REPORTS}
            session.tell_reused()
            picture = _picture(session, results) if options.picture else None
            if world.is_main:
                _print_and_write(session, results, reports, picture)
            if session.failed:
                raise UserError(f"{len(session.failed)} of the results above are missing: {session.failed[0]}")
            return [*results, *(result for report in reports.values() for result in report.results)]
        except Stopped as stopped:
            folder = results_folder(options)
            kept = (
                f"results are in {folder}, and the same command continues"
                if folder
                else "without --out no result is stored"
            )
            raise Stopped(f"Stopped; {kept}.", stopped.signal) from None


def protocols_of(text: str) -> list[str]:
    """The protocols of `--protocol`, each once.

    Raises:
        UserError: One of them is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = (*ACCURACIES, *REPORTS)
    if not names or any(name not in known for name in names):
        raise UserError(f"--protocol was {text!r}; give one or more of {', '.join(known)}, with commas between.")
    return list(dict.fromkeys(names))


def check_flags(
    options: "Evaluate", protocols: Sequence[str], overrides: Callable[[FinetuneConfig], FinetuneConfig]
) -> None:
    """Reject flags that contradict one another or have no effect, before any image is opened.

    Raises:
        UserError: One sentence about the first of them.
    """
    if len(options.data) != 1 and (list(protocols) != ["transfer"] or not options.data):
        raise UserError(
            f"{len(options.data)} data sets were given; give one, or several with --protocol transfer alone."
        )
    if options.seeds < 1:
        raise UserError(f"--seeds was {options.seeds}; it must be at least 1.")
    require_seed(options.seed, count=options.seeds)
    check_network(options)
    for path in (options.json, options.picture):
        if path is not None:
            require_writable(path)
    if options.picture is not None and options.picture.suffix.lower() != ".png":
        raise UserError(f"--picture was {options.picture}; the picture is a PNG file: give a name that ends in .png.")
    if options.out is not None:
        require_writable(options.out / "results.jsonl")
    if options.finetune_recipe is not None:
        find_finetune_recipe(options.finetune_recipe)
    if options.leave_one_out and list(protocols) != ["knn"]:
        raise UserError(
            f"--leave-one-out is about nearest neighbours; --protocol was {options.protocol!r}, give knn alone."
        )
    _check_layer(options, protocols)
    if options.labels is not None and (ignoring := [name for name in protocols if name in REPORTS]):
        raise UserError(
            f"--labels was {options.labels!r}, and has no effect on {', '.join(ignoring)}: it is for "
            f"{', '.join(ACCURACIES)}; curve takes --counts instead, the others all images. Ask for these in a call "
            "without --labels."
        )
    if options.pseudo_labels and not {"finetune", "supervised"} & set(protocols):
        raise UserError(
            "--pseudo-labels is about the protocols finetune and supervised, which train a network; --protocol was "
            f"{options.protocol!r}."
        )
    flags_given = options.finetune_recipe is not None or overrides(FinetuneConfig()) != FinetuneConfig()
    if flags_given and "finetune" not in protocols:
        raise UserError(
            f"--finetune-recipe and --finetune.* are about the protocol finetune; --protocol was {options.protocol!r}, "
            "and supervised, linear and transfer have recipes of their own."
        )


def _check_layer(options: "Evaluate", protocols: Sequence[str]) -> None:
    """Reject a layer that there is not, or that has no effect.

    Raises:
        UserError: One sentence about it.
    """
    if options.layer is None:
        return
    require_layer(options.layer)
    if ignoring := [name for name in protocols if name not in OF_LAYERS]:
        raise UserError(
            f"--layer was {options.layer}, and has no effect on {', '.join(ignoring)}: it is for "
            f"{', '.join(OF_LAYERS)}. Ask for these in a call without --layer (fine-tuning has --finetune.head-layer, "
            "and probe shows every layer)."
        )
    if options.feature != "auto":
        raise UserError(
            f"--layer {options.layer} and --feature {options.feature} both say which features are read; give one."
        )
    if options.run in WITHOUT_NETWORK:
        raise UserError(f"--layer was {options.layer}, and RUN is {options.run}, which has no layers; leave it out.")


# ---- protocols with a table of their own


def _curve(session: Session) -> Report:
    """Accuracy over the number of labels per class."""
    options, subjects = session.options, session.subjects()
    results, notes = curve_results(
        subjects, session.split(options.seed, every=True), counts=options.counts or None, seeds=session.seeds,
        flip=session.flip, context=session.context,
    )  # fmt: skip
    curve = Curve.from_results(results, notes)
    lines = [curve_table(curve), when_it_pays(curve, source=subjects[0].name), layer_note(results)]
    text = "\n".join(line for line in lines if line)
    return Report(results=results, text=text, summary=curve.to_dict(), pictures={"curve.png": draw_curve(curve)})


def _probe(session: Session) -> Report:
    """What can be read from each layer: colour, rotation, noise, edges (the paper's table 3)."""
    split, first = session.split(session.options.seed, every=True), session.subjects()[0]
    results = [
        probe_result(subject, split, seed, session.context)
        for seed in session.seeds
        for subject in session.subjects(seed)
        if subject.encoder is not None or subject.name == first.name
    ]
    return Report(results=results, text=probe_text(results), summary=probe_summary(results))


def _label_free(session: Session) -> Report:
    """Geometry of the features, neighbours, worst-clustered images, and copies that make other figures a lie."""
    subjects, images, test = session.subjects(), session.train, session.test
    results = [
        label_free_result(
            subject, images, test, session.options.seed, copies=subject is subjects[0], context=session.context
        )
        for subject in subjects
    ]
    shown, shown_test = subjects[0].fitted(images), None if test is None else subjects[0].fitted(test)
    pictures = label_free_pictures(results[0], shown, shown_test)
    return Report(
        results=results, text=label_free_text(results), summary=label_free_summary(results), pictures=pictures
    )


def _transfer(session: Session) -> Report:
    """Several sets, each with its metric, in one table; and whether encoders differ by more than chance."""
    options = session.options
    grid = None
    if options.transfer_by != "linear":
        papers = PAPER_GRID_FROM_SCRATCH if options.transfer_by == "scratch" else PAPER_GRID
        steps = papers.steps if options.grid_steps is None else options.grid_steps
        rates, decays = options.grid_rates or papers.rates, options.grid_decays or papers.decays
        grid = replace(papers, steps=steps, rates=rates, decays=decays)
    results: list[Result] = []
    for seed in session.seeds:
        results += transfer_results(
            session.subjects(seed), session.sets(seed), seed, grid=grid, context=session.context
        )
    tests = differences(results)
    return Report(results=results, text=transfer_text(results, tests), summary=transfer_summary(results, tests))


OF_LAYERS = ("knn", "linear", "logistic", "curve")
"""The protocols whose features may be those of any layer."""
REPORTS: dict[str, Callable[[Session], Report]] = {
    "transfer": _transfer,
    "probe": _probe,
    "curve": _curve,
    "label-free": _label_free,
}
"""Protocol -> the function that measures it and makes its tables."""


# ---- output


def _picture(session: Session, results: list[Result]) -> bytes:
    """An evaluation at a glance; all processes take part in making its features."""
    from simclr.reports.pictures import draw_evaluation

    run, split = Path(session.options.run), session.split(session.options.seed)
    metrics = RunFolder(run).read_metrics() if (run / "metrics.jsonl").is_file() else []
    return draw_evaluation(session.subjects()[0].features(split.test), split, mean_accuracies(results)[0], metrics)


def _print_and_write(
    session: Session, results: list[Result], reports: dict[str, Report], picture: bytes | None
) -> None:
    """The tables on standard output, and the files that the flags name."""
    options = session.options
    if results:
        print(accuracy_text(results))
        compared, with_start = _comparisons(session, results), _comparisons(session, results, against=is_initial)
        verdicts = [verdict_text(compared) if compared != with_start else "", verdict_text(with_start, own_start=True)]
        print("\n".join(verdict for verdict in verdicts if verdict))
    for name, progress in session.unfinished().items():
        print(f"Unfinished training: {name}, {progress.text}.")
    for name, report in reports.items():
        print(f"{chr(10) * bool(results)}{name}\n{report.text}")
        for file, content in report.pictures.items():
            if session.folder is not None:
                write(session.folder / file, content)
                say(f"A picture is in {session.folder / file}.")
    if options.json is not None:
        write(options.json, (json.dumps(_summary(session, results, reports), indent=2) + "\n").encode())
    if options.picture is not None and picture is not None:
        write(options.picture, picture)
        say(f"The picture is in {options.picture}.")


def _comparisons(
    session: Session, results: list[Result], *, against: Callable[[str], bool] = is_baseline
) -> list[Comparison]:
    """The model under test against the strongest baselines, or against its own start (`is_initial`)."""
    labels = session.options.labels
    return comparisons(results, labels_drawn=labels is not None and not Path(labels).is_file(), against=against)


def _summary(session: Session, results: list[Result], reports: dict[str, Report]) -> dict[str, Any]:
    """What the JSON file holds: accuracies by name, every single result, and the reports."""
    options, first = session.options, results[0] if results else None
    every = [*results, *(result for report in reports.values() for result in report.results)]
    return {
        **accuracy_summary(results),
        "protocol": {
            "run": options.run,
            "data": options.data,
            "split": None if first is None else first.split,
            "labels": options.labels,
            "layer": options.layer,
            "seeds": list(session.seeds),
            "test_images": None if first is None else first.num_test,
        },
        "pretraining_paid": verdict_summary(_comparisons(session, results)) if results else [],
        "further_pretraining_paid": (
            verdict_summary(_comparisons(session, results, against=is_initial)) if results else []
        ),
        "unfinished": {name: progress.to_dict() for name, progress in session.unfinished().items()},
        "reports": {name: report.summary for name, report in reports.items()},
        "records": records(every),
    }
