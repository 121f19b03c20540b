"""Chooses settings of pretraining without test images: arms of equal time, scored on held-out training images.

    python examples/emoji.py --out data/emoji
    python benchmarks/choose_settings.py --data fashion-mnist cifar10-jpeg/train.parquet data/emoji/train \\
        --minutes 2 --seeds 0 --arm control --arm crops crop_min=0.5 --arm hot temperature=0.5
    python benchmarks/choose_settings.py --minutes 10 --seeds 0 1 2 ... (the arms that did well)

An arm is a name and settings of `simclr pretrain` on top of the recipe `cpu`, which is adapted to the data as the
command does; the first arm is the control. The names hog, patches, pixels and random stand for baselines without
training.

Training images are split into a development part and a held-out part (`split_rows`): 50,000 and 10,000 of
fashion-mnist, 45,000 and 5,000 of CIFAR-10; of the emoji a fifth of the bases, so that no variant of a held-out emoji
is trained on, and as in their test part without skin tones. Nothing opens a test image: of a folder or a file give the
training part. A .parquet file (as Hugging Face's `datasets` writes images) is decoded once, to an .npz beside --out.

Equal time: a run is one process on `--cores` cores. From opening the data to the last step everything counts, the
measurement of speed included by which the schedule is stretched over the steps that fit. A run ends when its time is
over, wherever its schedule is then. `--clock cpu` counts processor time divided by the cores instead of wall-clock
time, for machines that are shared with other work: for screening alone.

`--also-read stages1-4 stages1-4+pca` scores the trained (or random) encoder with other features too
(`EncoderConfig.feature`), nothing trained anew; pca: standardised, then the first 128 principal components with unit
variance, by the development images. Each is an arm of its own in file and tables, "ARM read as ...".

Scores: kNN with all development labels, and the exact linear probe with 1 %, 10 % and all of them; the first two are
means over `--draws` choices of labels, the same for all arms. A run is one JSON line; what is in the file is not run
again. Runs of an arm and the control with the same data, seed, time and machine's processor are paired.

The rule: an arm may become a default when it helps on at least two of the three sets and hurts on none by more than
half a point. Its number is the mean of the four scores. It helps where the 95 % interval of the paired difference over
seeds (Student's t) is above zero, which one seed never shows: screening only says what to confirm.
"""

import argparse
import ast
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common import Stop, in_fresh_process, machine, parquet_images, print_markdown, run_ours, stretched
from simclr.config.overrides import Overrides
from simclr.config.pretrain import PretrainConfig
from simclr.config.recipes import RECIPES, fit_recipe
from simclr.data.images import Images
from simclr.data.opening import open_data
from simclr.data.splits import label_subset, split_indices
from simclr.distributed import DistributedContext
from simclr.evaluation.cache import FeatureCache
from simclr.evaluation.knn import knn
from simclr.evaluation.logistic import linear_probe
from simclr.evaluation.subjects import BASELINE_NAMES, EvaluatedModel, open_subject
from simclr.models.encoder import encoder_of
from simclr.tasks.pretrain_images import returned_encoder
from simclr.training.loop import Task

HELD_OUT = {60_000: 10_000, 50_000: 5_000}
"""Training images -> those that are held out; of other sets a fifth."""
SPLIT_SEED = 0
SCORES = ("knn", "linear 1%", "linear 10%", "linear all")
MAY_HURT = 0.005  # share of the images: half a point
MUST_HELP = 2  # sets
WARM_STEPS = 5
"""Steps before a measurement of speed: kernels are compiled, threads are up."""
COMPONENTS = 128  # of PCA, the width of h in the recipe
PROBE = 0.03  # of the time, for the measurement of speed
PROBE_STEPS = 10  # at least

Run = dict[str, Any]


def main() -> None:
    args = arguments()
    runs = read_runs(args.out)
    for seed in args.seeds:  # a seed at a time: what is cut off has whole comparisons
        for data in args.data:
            source = prepared(data, args.out.parent)
            for name, settings in args.arms.items():
                seconds = 0.0 if name in BASELINE_NAMES else 60 * args.minutes
                key = {
                    "data": name_of(data), "arm": name, "settings": settings, "seed": seed, "budget": seconds,
                    "clock": args.clock, "cores": args.cores,
                }  # fmt: skip
                if any(key.items() <= run.items() for run in runs):
                    continue
                print(f"{key['data']}, {name}, seed {seed}: ", end="", flush=True)
                done, scores_of_arms = in_fresh_process(
                    args.cores, run_arm, source, name, settings, seed, seconds, args
                )
                done |= {"machine": machine()}
                args.out.parent.mkdir(parents=True, exist_ok=True)
                for arm, scores in scores_of_arms.items():
                    runs.append(key | done | {"arm": arm, "scores": scores})
                    with open(args.out, "a") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
                    listed = ", ".join(f"{score} {100 * value:.1f}" for score, value in scores.items())
                    print(f"{arm}, {done['seconds']:.0f} s, {done['epochs']:.1f} epochs: {listed}", flush=True)
    report(runs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, help="training images: names, files or folders")
    parser.add_argument(
        "--arm", nargs="+", action="append", dest="given", metavar=("NAME", "SETTING=VALUE"), required=True,
        help="repeated; the first is the control",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--draws", type=int, default=3, help="of the few labels")
    parser.add_argument("--skip-all", action="store_true", help="no linear probe with all labels, which takes minutes")
    parser.add_argument("--also-read", nargs="+", default=[], metavar="FEATURE[+pca]", help="further features to score")
    parser.add_argument("--rows", type=int, help="only so many training images, to try the script")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/choose_settings.jsonl"))
    args = parser.parse_args()
    args.arms = {name: parsed(settings) for name, *settings in args.given}
    if len(args.arms) < len(args.given):
        parser.error("two arms have the same name")
    for name, settings in args.arms.items():
        if name in BASELINE_NAMES and settings:
            parser.error(f"{name} is a baseline and takes no settings; give the arm another name")
        Overrides(settings)(RECIPES["cpu"].config)  # wrong names and values are said before anything runs
    return args


def parsed(settings: list[str]) -> dict[str, Any]:
    """SETTING=VALUE, where a value is a Python literal or a text."""
    values = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def name_of(data: str) -> str:
    """fashion-mnist; the folder's name for the part of a data set (data/emoji/train, cifar10-jpeg/train.parquet)."""
    path = Path(data)
    return path.resolve().parent.name if path.stem == "train" else path.name


def read_runs(file: Path) -> list[Run]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.exists() else []


# --- data -------------------------------------------------------------------------------------------------------------


def open_parts(data: str, rows: int | None) -> tuple[Images, Images]:
    """Development and held-out images."""
    images = open_data(data, split="train" if data == "fashion-mnist" or data == "digits" else "all")
    if rows is not None:
        images = images.subset(np.linspace(0, len(images) - 1, min(rows, len(images))).astype(np.int64))
    learn, held_out = split_rows(images)
    return images.subset(learn), images.subset(held_out)


def split_rows(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training images to learn from and to hold out: by class; of the emoji whole groups of variants."""
    assert images.labels is not None
    if all(Path(key).stem.startswith(("google-", "twitter-")) for key in images.keys):
        return split_emoji([Path(key).stem.partition("-")[2].upper() for key in images.keys], images.labels)
    fraction = HELD_OUT.get(len(images), len(images) / 5) / len(images)
    return split_indices(images.labels, fraction=fraction, seed=SPLIT_SEED)


def split_emoji(codes: list[str], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for the CODE of files that examples/emoji.py wrote: VENDOR-CODE.png."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import emoji

    same = {emoji.flag_of(region): emoji.flag_of(other) for region, other in emoji.SAME_FLAG.items()}
    bases = [emoji.base_of(code) for code in codes]
    first: dict[tuple[str, ...], int] = {}  # base -> its first row
    members = np.array([first.setdefault(same.get(base, base), row) for row, base in enumerate(bases)])  # (n,)
    firsts = np.array(list(first.values()))
    held_out = np.isin(members, firsts[split_indices(labels[firsts], fraction=0.2, seed=SPLIT_SEED)[1]])
    toned = np.array([bool(emoji.SKIN_TONES & set(code.split("-"))) for code in codes])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out & ~toned)


def prepared(data: str, folder: Path) -> str:
    """What to open: of a .parquet file the .npz of its decoded images, which is made if it is missing."""
    if not data.endswith(".parquet"):
        return data
    target = folder / f"{name_of(data)}-{Path(data).stem}.npz"
    if not target.exists():
        pixels, labels, _ = parquet_images(Path(data))
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(target, x=pixels, y=labels)
    return str(target)


# --- one run, in a process of its own ---------------------------------------------------------------------------------


class Clock:
    """Seconds since it was made, of the wall or of the processor per core, and whether the time is over."""

    def __init__(self, kind: str, cores: int, budget: float) -> None:
        self._now = time.perf_counter if kind == "wall" else lambda: time.process_time() / cores
        self._began, self.budget = self._now(), budget

    @property
    def seconds(self) -> float:
        return self._now() - self._began

    @property
    def left(self) -> float:
        return self.budget - self.seconds


def run_arm(
    data: str, name: str, settings: dict[str, Any], seed: int, seconds: float, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """What was done for one arm, and scores on held-out training images: of the arm, and of it read otherwise."""
    clock = Clock(args.clock, args.cores, seconds)
    learn, held_out = open_parts(data, args.rows)
    config, _ = fit_recipe(RECIPES["cpu"], learn)
    config = Overrides(settings | {"seed": seed, "knn_every": 0, "save_every": 10**9, "device": "cpu"})(config)
    shape = encoder_of(config, learn.channels)
    world, cache = DistributedContext(), FeatureCache(None)
    if name in BASELINE_NAMES:
        subject = open_subject(
            name, like=shape, preprocessing=config.augmentation, seed=seed, cache=cache, world=world
        ).learnt_from(learn, seed=seed)
        done = {"seconds": clock.seconds, "steps": 0, "planned_steps": 0, "epochs": 0.0}
    else:
        task, done = train(learn, config, clock)
        encoder = returned_encoder(task.method.encoder.eval(), learn, config)
        subject = EvaluatedModel(
            name=name, encoder=encoder, preprocessing=config.augmentation, size=config.size, channels=learn.channels
        )
    began = time.perf_counter()
    scores = {name: scores_of(subject, learn, held_out, args)}
    for reading in args.also_read if subject.encoder is not None else ():
        feature, _, whitened = reading.partition("+")
        other = subject.read_as(feature)
        scores[f"{name} read as {reading}"] = scores_of(other, learn, held_out, args, whitened=bool(whitened))
    return done | {
        "learn": len(learn), "held_out": len(held_out), "draws": args.draws,
        "scoring_seconds": time.perf_counter() - began, "config": asdict(config),
    }, scores  # fmt: skip


def train(images: Images, config: PretrainConfig, clock: Clock) -> tuple[Task, dict[str, Any]]:
    """`simclr pretrain` with its schedule stretched over the steps that fit the time that is left."""
    seconds_per_step = _seconds_per_step(images, config, clock)
    steps = max(2, int(clock.left / seconds_per_step))
    trained: list[Task] = []
    reached = 0

    def on_step(task: Task, done: int) -> None:
        nonlocal reached
        trained[:], reached = [task], done
        if clock.left <= 0 and done < task.total_steps:
            raise Stop

    run_ours(images, config, on_step, change=lambda task: stretched(task, steps))
    return trained[0], {
        "seconds": clock.seconds, "steps": reached, "planned_steps": steps,
        "epochs": reached * config.batch_size / len(images),
    }  # fmt: skip


def _seconds_per_step(images: Images, config: PretrainConfig, clock: Clock) -> float:
    """Of a run that is thrown away, and whose time counts."""
    moments: list[float] = []

    def on_step(_task: Task, done: int) -> None:
        if done >= WARM_STEPS:
            moments.append(clock.seconds)
        if len(moments) > PROBE_STEPS and moments[-1] - moments[0] >= PROBE * clock.budget:
            raise Stop
        if clock.left < clock.budget / 2 and len(moments) > 1:
            raise Stop

    run_ours(images, config, on_step, change=lambda task: stretched(task, 10**9))
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def scores_of(
    subject: EvaluatedModel, learn: Images, held_out: Images, args: argparse.Namespace, *, whitened: bool = False
) -> dict[str, float]:
    """Shares of held-out images that are told rightly."""
    assert learn.labels is not None and held_out.labels is not None
    train, queries = subject.features(learn), subject.features(held_out)  # (n, F), (m, F)
    if whitened:
        train, queries = pca_whitened(train, queries)
    labels, truth = learn.labels, held_out.labels

    def linear(rows: np.ndarray, seed: int) -> float:
        return float((linear_probe(train[rows], labels[rows], queries, seed=seed).predicted == truth).mean())

    scores = {"knn": float((knn(train, labels, queries) == truth).mean())}
    for share in ("1%", "10%"):
        drawn = [linear(label_subset(labels, share, seed=seed), seed) for seed in range(args.draws)]
        scores[f"linear {share}"] = statistics.mean(drawn)
    if not args.skip_all:
        scores["linear all"] = linear(np.arange(len(labels)), 0)
    return scores


def pca_whitened(train: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardised, then the first COMPONENTS principal components with unit variance, all by the training rows."""
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale = 1 / np.maximum(deviation, 1e-6)
    rows = ((train - mean) * scale).astype(np.float32)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    chosen = np.argsort(values)[::-1][:COMPONENTS]
    basis = (vectors[:, chosen] / np.sqrt(np.maximum(values[chosen], 1e-6))).astype(np.float32)  # (F, COMPONENTS)
    return rows @ basis, ((queries - mean) * scale).astype(np.float32) @ basis


# --- the rule ---------------------------------------------------------------------------------------------------------


def report(runs: list[Run]) -> None:
    """A table for each set and time, and for each arm whether it may become a default."""
    groups: dict[tuple[float, str, int], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run["budget"], run["clock"], run["cores"]].append(run)
    baselines = [run for run in runs if run["arm"] in BASELINE_NAMES]
    for (budget, clock, cores), some in groups.items():
        if budget == 0:
            continue
        for data in dict.fromkeys(run["data"] for run in some):
            print(f"\n{data}, {budget / 60:g} minutes of {cores} cores ({clock} clock), held-out training images:")
            print_table([run for run in (*baselines, *some) if run["data"] == data])
        control = some[0]["arm"]
        for arm in dict.fromkeys(run["arm"] for run in some):
            if arm != control:
                print(verdict(some, arm, control))


def print_table(runs: list[Run]) -> None:
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        of_arm = [run for run in runs if run["arm"] == arm]
        cells = [_mean_and_deviation([run["scores"].get(score) for run in of_arm]) for score in SCORES]
        epochs = statistics.mean(run["epochs"] for run in of_arm)
        rows.append(
            [arm, str(len(of_arm)), f"{epochs:.1f}", *cells, _mean_and_deviation(list(map(mean_score, of_arm)))]
        )
    print_markdown(["arm", "seeds", "epochs", *SCORES, "mean"], rows)


def verdict(runs: list[Run], arm: str, control: str) -> str:
    """Whether an arm may become a default, and by which differences."""
    differences = {
        data: paired_differences([run for run in runs if run["data"] == data], arm, control)
        for data in dict.fromkeys(run["data"] for run in runs)
    }
    differences = {data: values for data, values in differences.items() if values}
    clauses = [f"{data} {in_words(values)}" for data, values in differences.items()]
    helps = sum(helps_by(values) for values in differences.values())
    hurts = [data for data, values in differences.items() if statistics.mean(values) < -MAY_HURT]
    allowed = helps >= MUST_HELP and not hurts and len(differences) > MUST_HELP
    missing = "" if len(differences) > MUST_HELP else f", measured on {len(differences)} of {MUST_HELP + 1} sets"
    harm = f"hurts on {', '.join(hurts)}" if hurts else "hurts on none"
    return (
        f"{arm} {'may' if allowed else 'may not'} become a default: helps on {helps}, {harm}{missing} "
        f"({'; '.join(clauses)})."
    )


def paired_differences(runs: list[Run], arm: str, control: str) -> list[float]:
    """Differences of the mean scores, arm - control, for each seed that both have."""
    by_seed = {name: {run["seed"]: run for run in runs if run["arm"] == name} for name in (arm, control)}
    shared = sorted(by_seed[arm].keys() & by_seed[control].keys())
    return [mean_score(by_seed[arm][seed]) - mean_score(by_seed[control][seed]) for seed in shared]


def mean_score(run: Run) -> float:
    return statistics.mean(run["scores"].values())


def helps_by(differences: list[float]) -> bool:
    """Whether the 95 % interval of the mean difference is above zero."""
    margin = margin_of(differences)
    return margin is not None and statistics.mean(differences) - margin > 0


def margin_of(differences: list[float]) -> float | None:
    """Half of the 95 % interval; None of a single difference."""
    if len(differences) < 2:
        return None
    from scipy.stats import t

    n = len(differences)
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5


def in_words(differences: list[float]) -> str:
    margin = margin_of(differences)
    interval = ", one seed" if margin is None else f" ± {100 * margin:.1f}, {len(differences)} seeds"
    return f"{100 * statistics.mean(differences):+.1f}{interval}"


def _mean_and_deviation(values: list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.1f}" + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")


if __name__ == "__main__":
    main()
