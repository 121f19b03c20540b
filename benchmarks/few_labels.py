"""What few labels are worth: selected by `simclr select` or at random, and with pseudo-labels or without.

    simclr pretrain fashion-mnist --recipe cpu --epochs 4 --out runs/few   # other settings in docs/few-labels.md
    python benchmarks/few_labels.py fashion-mnist --run runs/few --out runs/few-labels

Training images are split as in choose_settings.py (50,000 and 10,000 of fashion-mnist): labels are chosen among the
first, accuracies are of the second. The encoder saw both, without labels. No test image is opened.

`--part select`: the linear probe and kNN (k 1) on frozen features, with labels of selected or of random images.
`--part pseudo`: `simclr evaluate --protocol finetune,supervised` with and without `--pseudo-labels`.
What is measured is kept: the script can be stopped and called again.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from choose_settings import open_parts
from common import machine, write_json
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.evaluation.cache import open_cache
from simclr.evaluation.keys import labelled_digest
from simclr.evaluation.knn import KNN_VERSION, knn
from simclr.evaluation.logistic import LOGISTIC_VERSION, linear_probe
from simclr.evaluation.measure import EvaluationContext, Settings, measure_one
from simclr.evaluation.metrics import mean_and_spread
from simclr.evaluation.results import About, Measured, Result, ResultStore
from simclr.evaluation.selection import SELECTION_VERSION, select_typical
from simclr.evaluation.split import split_data
from simclr.evaluation.subjects import EvaluatedModel, subject_of
from simclr.random import shuffled
from simclr.reports.png import png
from simclr.reports.table import Row, markdown_table
from simclr.training.run import open_run
from simclr.weights.folder import load_quietly

COUNTS = (10, 20, 50, 100, 200, 500)
SELECTED, RANDOM = "selected", "random"
COLOURS = {SELECTED: "#2a6f97", RANDOM: "#e09f3e"}
METRICS = {"linear": "linear probe", "knn": "kNN, k 1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="training images: a name, file or folder, as choose_settings.py takes it")
    parser.add_argument("--run", type=Path, required=True, help="pretrained run")
    parser.add_argument("--part", nargs="+", choices=("select", "pseudo"), default=["select", "pseudo"])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="labels, of --part select")
    parser.add_argument("--labels", nargs="+", default=["60/class"], help="labels, of --part pseudo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help="only so many training images, to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs/few-labels"))
    args = parser.parse_args()
    learn, held_out = open_parts(args.data, args.rows)
    subject = subject_of(
        load_quietly(args.run), "encoder", cache=open_cache(str(args.out / "features")), world=DistributedContext()
    )
    store = ResultStore(args.out / "results.jsonl")
    tested = f"{len(held_out):,} held-out training images"
    content: dict[str, object] = {"machine": machine()}
    if "select" in args.part:
        results = select_results(args, subject, learn, held_out, store)
        content["select"] = [result.to_dict() for result in results]
        print(f"\n{select_table(results)}\n\nAccuracy in % on {tested}.\n", flush=True)
        (args.out / "selected-labels.png").write_bytes(draw(results, tested))
    if "pseudo" in args.part:
        results = pseudo_results(args, subject, learn, held_out, store)
        content["pseudo"] = [result.to_dict() for result in results]
        print(f"\n{pseudo_table(results)}\n\nAccuracy in % on {tested}.")
    write_json(args.out / "few_labels.json", content)


# ---- selected and random labels


def select_results(
    args: argparse.Namespace, subject: EvaluatedModel, learn: Images, held_out: Images, store: ResultStore
) -> list[Result]:
    """Metrics `linear`, `knn` and `classes`, the share of the classes that the labels meet."""
    results = []
    for seed in args.seeds:
        choices: dict[str, Callable[[int], np.ndarray]] = {
            SELECTED: lambda count, seed=seed: select_typical(subject.features(learn), count, seed=seed).rows,
            RANDOM: lambda count, seed=seed: shuffled(len(learn), seed, 0)[:count],
        }
        for name, rows_of in choices.items():
            for count in args.counts:
                key = {
                    "protocol": "few labels benchmark",
                    "version": {"selection": SELECTION_VERSION, "logistic": LOGISTIC_VERSION, "knn": KNN_VERSION},
                    "model": subject.model,
                    "data": {"train": labelled_digest(learn), "held_out": labelled_digest(held_out)},
                    "settings": {"choice": name, "count": count},
                    "seed": seed,
                }
                make = partial(accuracies_of, subject, learn, held_out, partial(rows_of, count), seed)
                about = About(subject=name, data_name=learn.name, num_train=count, num_test=len(held_out))
                results.append(store.get(key, make, about))
                measured = ", ".join(f"{metric} {100 * results[-1].value(metric):.1f}" for metric in METRICS)
                print(f"seed {seed}, {name}, {count} labels: {measured}", flush=True)
    return results


def accuracies_of(
    subject: EvaluatedModel, learn: Images, held_out: Images, rows_of: Callable[[], np.ndarray], seed: int
) -> Measured:
    assert learn.labels is not None and held_out.labels is not None
    train, queries, rows = subject.features(learn), subject.features(held_out), rows_of()  # (n, F), (m, F), (count,)
    labels = learn.labels[rows]
    linear = linear_probe(train[rows], labels, queries, seed=seed).predicted
    nearest = knn(train[rows], labels, queries, k=1)
    classes = len(np.unique(labels)) / len(np.unique(learn.labels))
    shares = {"linear": (linear == held_out.labels).mean(), "knn": (nearest == held_out.labels).mean()}
    return Measured(metrics={name: float(share) for name, share in shares.items()} | {"classes": classes})


def by_count(results: list[Result], choice: str, metric: str) -> dict[int, list[float]]:
    """Labels -> a value for each seed."""
    values: dict[int, list[float]] = {}
    for result in results:
        if result.subject == choice and result.num_train is not None:
            values.setdefault(result.num_train, []).append(result.value(metric))
    return values


def select_table(results: list[Result]) -> str:
    rows = [
        Row(f"{title}, {choice}", {str(count): each for count, each in by_count(results, choice, metric).items()})
        for metric, title in {**METRICS, "classes": "classes met"}.items()
        for choice in (SELECTED, RANDOM)
    ]
    return markdown_table(rows, corner="labels")


def draw(results: list[Result], what: str) -> bytes:
    """Mean accuracy and a band of ± one standard deviation over the number of labels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2, sharey=True), METRICS.items(), strict=True):
        for choice, colour in COLOURS.items():
            values = by_count(results, choice, metric)
            counts = list(values)
            means, spreads = zip(*(mean_and_spread(each) for each in values.values()), strict=True)
            middle, width = 100 * np.array(means), 100 * np.array([spread or 0.0 for spread in spreads])
            axes.fill_between(counts, middle - width, middle + width, color=colour, alpha=0.18, linewidth=0)
            axes.plot(counts, middle, "o-", color=colour, markersize=3.5, linewidth=1.6, label=f"{choice} images")
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        ticks = list(by_count(results, SELECTED, metric))
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.set_xlabel("labels")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"accuracy on {what}, %")
    figure.axes[0].legend(frameon=False, loc="lower right")
    return png(figure)


# ---- pseudo-labels


def pseudo_results(
    args: argparse.Namespace, subject: EvaluatedModel, learn: Images, held_out: Images, store: ResultStore
) -> list[Result]:
    """Fine-tuning and training from scratch; metric top1."""
    context, flip = EvaluationContext(store=store), open_run(args.run).config.flip
    results = []
    for seed in args.seeds:
        for labels in args.labels:
            split = split_data(learn, held_out, seed=seed, labels=labels)
            for protocol in ("finetune", "supervised"):
                for pseudo in (False, True):
                    settings = Settings(flip=flip, pseudo_labels=pseudo)
                    result = measure_one(protocol, subject, split, seed, settings, context)
                    results.append(result)
                    how = "with" if pseudo else "without"
                    top1 = 100 * result.value("top1")
                    print(f"seed {seed}, {labels}, {protocol}, {how} pseudo-labels: {top1:.1f}", flush=True)
    return results


def pseudo_table(results: list[Result]) -> str:
    rows: dict[str, dict[str, list[float]]] = {}
    for result in results:
        pseudo = "pseudo_labels" in result.settings
        row = rows.setdefault(f"{result.protocol}{', pseudo-labels' * pseudo}", {})
        row.setdefault(f"{result.num_train:,} labels", []).append(result.value("top1"))
    return markdown_table([Row(name, values) for name, values in rows.items()])


if __name__ == "__main__":
    main()
