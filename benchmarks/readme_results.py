"""The README's table of accuracies: pretrain and evaluate with several seeds, print mean and spread.

    python examples/emoji.py --out data/emoji
    python benchmarks/readme_results.py digits fashion-mnist data/emoji --seeds 3 --out runs/readme
    python benchmarks/readme_results.py fashion-mnist data/emoji --alexnet --out runs/readme

Each run is the plain commands a user would type, with --seed, --labels and --protocol; accuracy is that of the last
checkpoint. Runs that are finished are not repeated, so the script can be stopped and called again. `--alexnet` adds the
row of torchvision's AlexNet (57 million parameters), trained from scratch on the same few labels at 64 pixels: ten
minutes a run on a core, half an hour with 6,000 labels.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from simclr.evaluation.results import Result
from simclr.reports.evaluation import accuracy_rows

LABELS = {"digits": (None, "5/class"), "fashion-mnist": (None, "10%", "1%"), "emoji": (None, "10%", "1%")}
FROZEN, TRAINED = ("knn", "linear"), ("finetune", "supervised")
"""Protocols; those that train a network are left to the few labels, as long as they take minutes."""
COLUMNS = ("kNN", "linear", "fine-tuned")
ROWS = ("encoder", "hog", "patches", "random", "pixels", "supervised", "alexnet")
COMPARED = ("hog", "patches", "pixels", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="+", help=f"of {', '.join(LABELS)}, or a folder of one of these names")
    parser.add_argument("--alexnet", action="store_true", help="train AlexNet on the few labels too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, help="make this seed's runs and print no table")
    parser.add_argument("--out", type=Path, default=Path("runs/readme"))
    args = parser.parse_args()
    if unknown := [data for data in args.data if Path(data).name not in LABELS]:
        parser.error(f"{unknown[0]} is none of {', '.join(LABELS)}")
    for data in args.data:
        for seed in range(args.seeds) if args.only_seed is None else [args.only_seed]:
            run_once(args.out, data, seed)
            for labels in LABELS[Path(data).name][1:] if args.alexnet else ():
                alexnet_once(args.out, data, seed, labels)
    if args.only_seed is None:
        for data in args.data:
            print_table(args.out, data, args.seeds)


def run_once(out: Path, data: str, seed: int) -> None:
    run = run_of(out, data, seed)
    if not (run / "config.json").exists():
        simclr("pretrain", data, "--out", run, "--seed", seed)
    elif not (run / "summary.json").exists():
        simclr("resume", run)
    for labels in LABELS[Path(data).name]:
        result = result_file(out, data, seed, labels)
        if not has_records(result):
            flags = ["--protocol", ",".join(protocols_of(labels)), *([] if labels is None else ["--labels", labels])]
            simclr("evaluate", run, data, "--seed", seed, "--json", result, *flags, "--compare", *COMPARED)


def alexnet_once(out: Path, data: str, seed: int, labels: str) -> None:
    result = result_file(out, data, seed, labels, kind="alexnet")
    if not has_records(result):
        flags = ["--protocol", "supervised", "--size", 64, "--compare", "--labels", labels, "--seed", seed]
        simclr("evaluate", "torchvision/alexnet", data, *flags, "--out", result.with_suffix(""), "--json", result)


def protocols_of(labels: str | None) -> tuple[str, ...]:
    return FROZEN if labels is None else FROZEN + TRAINED


def simclr(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "simclr", *map(str, arguments)], check=True)


def run_of(out: Path, data: str, seed: int) -> Path:
    return out / f"{Path(data).name}-{seed}"


def result_file(out: Path, data: str, seed: int, labels: str | None, kind: str = "evaluation") -> Path:
    return run_of(out, data, seed) / f"{kind}-{(labels or 'all').replace('/', '-').replace('%', 'pc')}.json"


def print_table(out: Path, data: str, seeds: int) -> None:
    summaries = [json.loads((run_of(out, data, seed) / "summary.json").read_text()) for seed in range(seeds)]
    minutes = [summary["seconds_of_this_call"] / 60 for summary in summaries]
    print(f"\n{data}: {statistics.mean(minutes):.1f} minutes a run, {seeds} seeds\n")
    print("| labels | features | kNN, % | linear, % | trained whole, % |")
    print("|---|---|---|---|---|")
    for labels in LABELS[Path(data).name]:
        rows = accuracy_rows(results_of(out, data, seeds, labels))
        for row in sorted(rows, key=lambda row: ROWS.index(row.name)):
            cells = [spread([100 * value for value in row.values.get(column, ())]) for column in COLUMNS]
            print(f"| {labels or 'all'} | {row.name} | {' | '.join(cells)} |")


def results_of(out: Path, data: str, seeds: int, labels: str | None) -> list[Result]:
    """The results of all seeds; those of AlexNet, where they are there for every seed, at the end."""
    files = [result_file(out, data, seed, labels) for seed in range(seeds)]
    of_alexnet = [result_file(out, data, seed, labels, kind="alexnet") for seed in range(seeds)]
    results = [result for file in files for result in read_records(file)]
    if all(map(has_records, of_alexnet)):
        results += [replace(result, subject="alexnet") for file in of_alexnet for result in read_records(file)]
    return results


def read_records(file: Path) -> list[Result]:
    return [Result(**record) for record in json.loads(file.read_text())["records"]]


def has_records(file: Path) -> bool:
    """Whether the evaluation is done, by a version that lists its results."""
    return file.exists() and "records" in json.loads(file.read_text())


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; empty where nothing was measured."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    main()
