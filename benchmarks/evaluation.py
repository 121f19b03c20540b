"""Evaluation on cached features against scikit-learn: kNN, and the 45-value path of logistic regressions.

    python benchmarks/evaluation.py --json evaluation.json
    python benchmarks/evaluation.py --rows 2000 --queries 500 --width 64 --path-rows 500     # in seconds

Features are made up: classes in 64 dimensions, mixed into `--width` directions of falling variance, then ReLU. Both
sides get them as float32. Each round times ours and scikit-learn's once, one after the other, and the ratio is taken
within the round; the results are compared too.

kNN: KNeighborsClassifier(n_neighbors=20, metric="cosine", algorithm="brute"), with the same weights for the comparison,
on up to 1,000 queries, and equal ones, its fastest, for the time. Path: one LogisticRegression per strength, from
scratch, max_iter=1000. Both sides stop at the same `--tol`: scikit-learn when no component of the gradient is above it,
ours when the gradient's norm is not. 1e-4 is scikit-learn's default, 3e-5 is ours.

The floor of kNN is 2 x queries x rows x width operations, in one matrix product.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import in_fresh_process, machine, print_markdown, ratios, spread, write_json
from simclr.evaluation.knn import KNN_K, KNN_TEMPERATURE, knn
from simclr.evaluation.logistic import L2_PATH, path
from simclr.evaluation.metrics import accuracy

OURS, THEIRS = "ours", "scikit-learn"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=60_000, help="labelled rows of kNN")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--path-rows", type=int, default=10_000, help="labelled rows of the logistic path")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--tol", type=float, default=1e-4, help="of the logistic regressions, on both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="threads of both sides")
    parser.add_argument("--only", choices=["knn", "path"], help="one of the two")
    parser.add_argument("--json", type=Path, help="also write every measurement here")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "settings": {k: str(v) for k, v in vars(args).items()}}
    for name, measure in (("knn", measure_knn), ("path", measure_path)):
        if args.only in (None, name):
            results[name] = in_fresh_process(args.cores, measure, args)
            print(name, results[name]["agreement"], flush=True)
            if args.json:
                write_json(args.json, results)
    print_table(results)


def measure_knn(args: argparse.Namespace) -> dict[str, Any]:
    """Agreement, and seconds of each round, of classifying all queries."""
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = made_up(args.rows + args.queries, args.width, args.classes)
    train, known, test = features[: args.rows], labels[: args.rows], features[args.rows :]

    def theirs(weights: Any, queries: np.ndarray) -> np.ndarray:
        model = KNeighborsClassifier(KNN_K, metric="cosine", algorithm="brute", weights=weights)
        return model.fit(train, known).predict(queries)

    same = theirs(lambda distance: np.exp((1 - distance) / KNN_TEMPERATURE), test[:1000]) == knn(
        train, known, test[:1000]
    )
    times, found = timed({OURS: lambda: knn(train, known, test), THEIRS: lambda: theirs("uniform", test)}, args)
    agreement = {"equal predictions": int(same.sum()), "of": len(same)}
    return {"agreement": agreement | {"accuracy": accuracy(found[OURS], labels[args.rows :])}} | times


def measure_path(args: argparse.Namespace) -> dict[str, Any]:
    """Agreement, and seconds of each round, of fitting all 45 values of l2."""
    from sklearn.linear_model import LogisticRegression

    features, labels = made_up(args.path_rows + 2_000, args.width, args.classes)
    train, known = features[: args.path_rows], labels[: args.path_rows]
    test, asked = features[args.path_rows :], labels[args.path_rows :]

    def ours() -> list[tuple[np.ndarray, np.ndarray]]:
        return [(w.coefficients, w.intercepts) for w in path(train, known, args.classes, tol=args.tol)]

    def theirs() -> list[tuple[np.ndarray, np.ndarray]]:
        fits = (
            LogisticRegression(C=1 / (l2 * len(train)), max_iter=1000, tol=args.tol).fit(train, known) for l2 in L2_PATH
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of 1,000 steps that were not enough
            return [(fit.coef_.astype(np.float64), fit.intercept_.astype(np.float64)) for fit in fits]

    times, found = timed({OURS: ours, THEIRS: theirs}, args)
    objectives, scores = (
        {
            name: np.array([judge(*fit, l2) for fit, l2 in zip(fits, L2_PATH, strict=True)])  # pyrefly: ignore[bad-argument-count]
            for name, fits in found.items()
        }
        for judge in (
            lambda w, b, l2: objective(train @ w.T + b, known) + l2 / 2 * np.square(w).sum(),
            lambda w, b, _: accuracy((test @ w.T + b).argmax(1), asked),
        )
    )  # (45,) each
    excess = objectives[THEIRS] - objectives[OURS]
    agreement = {
        "objective, theirs above ours, least and most": [float(excess.min()), float(excess.max())],
        "best test accuracy": {name: float(values.max()) for name, values in scores.items()},
        "largest difference of test accuracy": float(np.abs(scores[OURS] - scores[THEIRS]).max()),
        "at l2": L2_PATH[int(np.abs(scores[OURS] - scores[THEIRS]).argmax())],
    }
    return {"agreement": agreement} | times


def timed(
    contenders: dict[str, Callable[[], Any]], args: argparse.Namespace
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Wall and CPU seconds of each contender in each round, and what each returned."""
    from threadpoolctl import threadpool_limits

    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    found = {}
    with threadpool_limits(args.cores):
        for _ in range(args.rounds):
            for name, contender in contenders.items():
                begin = time.perf_counter(), time.process_time()
                found[name] = contender()
                wall[name].append(time.perf_counter() - begin[0])
                cpu[name].append(time.process_time() - begin[1])
    return {"wall": wall, "cpu": cpu}, found


def objective(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross entropy."""
    top = scores.max(1)
    return float((top + np.log(np.exp(scores - top[:, None]).sum(1)) - scores[np.arange(len(labels)), labels]).mean())


def made_up(n: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, width) float32 and labels (n,) that a linear classifier gets right four times of five."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, classes, n)
    hidden = 0.35 * draw.normal(size=(classes, 64))[labels] + draw.normal(size=(n, 64))
    mix = draw.normal(size=(64, width)) / 8 * np.arange(1, 65)[:, None] ** -0.5
    return np.maximum(hidden @ mix + 0.1 * draw.normal(size=(n, width)), 0).astype(np.float32), labels


def print_table(results: dict[str, Any]) -> None:
    rows = []
    for name, what in (("knn", "kNN"), ("path", "45 logistic regressions")):
        if name in results:
            for clock in ("wall", "cpu"):
                ours, theirs = results[name][clock][OURS], results[name][clock][THEIRS]
                ratio = spread(ratios(theirs, ours), "{:.1f}")
                rows.append([f"{what}, {clock}", spread(ours, "{:.2f}"), spread(theirs, "{:.2f}"), ratio])
    print_markdown(["", "ours, s", "scikit-learn, s", "times faster"], rows)


if __name__ == "__main__":
    main()
