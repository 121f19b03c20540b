"""Whole training steps per second of ours against lightly's documented loop, and our step against its encoder alone.

    pip install lightly
    python benchmarks/train.py --json train.json

Same encoder (ours, in both), same images, same batch. Ours is what `simclr pretrain` runs: its loop, its threads that
make views ahead, its optimiser, its records. lightly's is the loop of its SimCLR page (common.py), with the number of
worker processes that is fastest here. That page leaves tensors in torch's default layout, ours puts them channels-last;
`--lightly-encoder channels-last` does so in lightly's loop too. `--lightly-encoder torchvision` takes the page's own
network where the setting's is ResNet-18: a smaller task at 32 pixels, since its stem halves the image twice.

`outside` is the share of our step that is not the encoder's and head's forward and backward: 1 - t_encoder / t_step,
where t_encoder is measured on ready random views of the same batch, in the same process with the same threads. It is
negative where noise is larger than what it measures: on a busy machine our step, with its threads, gets more of a core
than the encoder alone does, so the share counts on a quiet one only.

Every measurement has a process of its own that may use `cores` cores in all, workers included. In it the contenders
take turns, a few seconds each, and ratios are taken within a round: median (smallest to largest) over the rounds.
`--neighbours 0 1 2` measures beside as many processes that keep a core busy; `simclr` runs with
GOMP_SPINCOUNT=1000, which has to be set for this script (and is then lightly's too).
"""

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from common import (
    Contender,
    LightlyLoop,
    Stop,
    best_workers,
    encoder_alone,
    in_fresh_process,
    machine,
    neighbours,
    pil_images,
    print_markdown,
    random_images,
    ratios,
    run_ours,
    spread,
    views_per_second,
    write_json,
)
from simclr.config.encoder import EncoderConfig
from simclr.config.pretrain import PretrainConfig
from simclr.config.recipes import RECIPES
from simclr.data.images import Images
from simclr.data.opening import open_data
from simclr.errors import UserError
from simclr.models.encoder import build_encoder
from simclr.training.loop import Task


@dataclass(frozen=True)
class Setting:
    name: str
    size: int
    source: int
    """Pixels a side of the stored images."""
    encoder: str
    recipe: str
    batch: int
    """Images a step; few where a step would take minutes on a CPU."""
    data: str | None = None
    """Named data; None: random pixels."""
    target: float | None = None
    """Largest share outside the encoder that issue 3 allows."""


SETTINGS = [
    Setting("small, fashion-mnist, 28 px", 28, 28, "small", "cpu", 256, data="fashion-mnist", target=0.15),
    Setting("small, colour, 32 px", 32, 32, "small", "cpu", 256, target=0.15),
    Setting("resnet18, colour, 32 px", 32, 32, "resnet18", "cifar", 64, target=0.05),
    Setting("small, colour, 224 px", 224, 256, "small", "photos", 32),
    Setting("resnet18, colour, 224 px", 224, 256, "resnet18", "photos", 16),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="settings whose name contains this")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--neighbours", type=int, nargs="+", default=[0], help="busy processes beside, one after another"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="least time of one measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="lightly's candidates")
    parser.add_argument("--lightly-encoder", choices=["ours", "channels-last", "torchvision"], default="ours")
    parser.add_argument("--batch", type=int, help="images a step, instead of each setting's own")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/train.json"))
    args = parser.parse_args()
    chosen = [s if args.batch is None else replace(s, batch=args.batch) for s in SETTINGS]
    results: list[dict[str, Any]] = []
    for setting in chosen:
        if args.only and args.only not in setting.name:
            continue
        for cores, beside in product(args.cores, args.neighbours):
            try:
                with neighbours(beside):
                    result = in_fresh_process(cores, measure, setting, cores, args)
            except UserError as error:
                print(f"{setting.name} is left out: {error}", flush=True)
                continue
            results.append({"setting": asdict(setting), "cores": cores, "neighbours": beside} | result)
            write_json(args.json, {"machine": machine(), "options": options(args), "results": results})
            print(f"{setting.name}, {cores} core{'s' * (cores > 1)}: done", flush=True)
    print_results(results)


def options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def print_results(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        setting, speeds = result["setting"], result["views_per_second"]
        lightly = speeds.get("lightly")
        where = f"{result['cores']} core{'s' * (result['cores'] > 1)}"
        if result["neighbours"]:
            where += f", {result['neighbours']} beside"
        outside = [100 * (1 - ratio) for ratio in ratios(speeds["ours"], speeds["encoder alone"])]
        rows.append(
            [
                f"{setting['name']}, batch {setting['batch']}, {where}",
                spread(speeds["ours"], "{:,.0f}"),
                f"{spread(lightly, '{:,.0f}')}, {result['lightly_workers']} workers" if lightly else "not installed",
                spread(ratios(speeds["ours"], lightly), "{:.2f}") if lightly else "",
                spread(outside) + (f", target {100 * setting['target']:.0f}" if setting["target"] else ""),
            ]
        )
    print_markdown(["setting", "ours, views/s", "lightly, views/s", "ours / lightly", "outside the encoder, %"], rows)


# --- one setting, in a process of its own -----------------------------------------------------------------------------


def measure(setting: Setting, cores: int, args: argparse.Namespace) -> dict[str, Any]:
    """Views per second of ours, of the encoder alone and of lightly, round by round."""
    warnings.filterwarnings("ignore")
    config = our_config(setting)
    with LightlyProcess(setting, cores, args) as lightly:
        rounds = Rounds(lightly, config.workers, rounds=args.rounds, seconds=args.seconds)
        run_ours(images_of(setting), config, rounds, change=lambda task: replace(task, total_steps=10**9))
    return {
        "views_per_second": rounds.speeds,
        "lightly_workers": lightly.workers,
        "lightly_by_workers": lightly.tried,
        "threads_ahead": config.workers,
    }


def images_of(setting: Setting) -> Images:
    return open_data(setting.data) if setting.data else random_images(max(8 * setting.batch, 64), setting.source)


def our_config(setting: Setting) -> PretrainConfig:
    """The recipe as the command line would take it, for this encoder, size and batch, without kNN checks."""
    return replace(
        RECIPES[setting.recipe].config,
        encoder=setting.encoder,
        size=setting.size,
        batch_size=setting.batch,
        knn_every=0,
        save_every=10**9,
        device="cpu",
    )


class Rounds:
    """Told of each of our steps: segments of our training alternate with segments of the others.

    While others run, our threads and lightly's workers finish what they had begun and wait; the first steps of a
    segment, which find those batches ready, are therefore not timed. The first round warms up and is dropped.
    """

    def __init__(self, lightly: "LightlyProcess", ahead: int, *, rounds: int, seconds: float) -> None:
        self._lightly, self._ahead, self._rounds, self._seconds = lightly, ahead, rounds, seconds
        self._encoder: Contender | None = None
        self._untimed, self._views, self._begun = ahead + 1, 0, 0.0
        self.speeds: dict[str, list[float]] = {"ours": [], "encoder alone": []}
        if lightly.tried:
            self.speeds["lightly"] = []

    def __call__(self, task: Task, _done: int) -> None:
        if self._untimed:
            self._untimed -= 1
            self._begun, self._views = time.perf_counter(), 0
            return
        self._views += task.views_per_step
        spent = time.perf_counter() - self._begun
        if spent < self._seconds:
            return
        self._encoder = self._encoder or encoder_alone(task)
        measured = {"ours": self._views / spent, "encoder alone": views_per_second(self._encoder, self._seconds)}
        if self._lightly.tried:
            measured["lightly"] = self._lightly.segment()
        for name, speed in measured.items():
            self.speeds[name].append(speed)
        if len(self.speeds["ours"]) > self._rounds:
            for speeds in self.speeds.values():
                del speeds[0]
            raise Stop
        self._untimed = self._ahead + 1


# --- lightly, in another process --------------------------------------------------------------------------------------


class LightlyProcess:
    """lightly's loop in a Python of its own, which trains when it is asked to and sleeps otherwise.

    What our training sets for its process (how memory is freed) does not reach it, and its workers are forked where no
    thread of ours runs.
    """

    def __init__(self, setting: Setting, cores: int, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setting, cores, args))
        self._process.start()
        theirs.close()
        self.tried: dict[int, float] = self._pipe.recv()
        """Views per second by number of workers; empty where lightly is not installed."""
        self.workers = max(self.tried, key=self.tried.__getitem__) if self.tried else None

    def __enter__(self) -> "LightlyProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # the process sees the end of its orders
        self._process.join()

    def segment(self) -> float:
        """Views per second of some steps now."""
        self._pipe.send("go on")
        return self._pipe.recv()


def _serve(orders: Connection, setting: Setting, cores: int, args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(cores)
    torch.manual_seed(0)
    make = lightly_loop(setting, images_of(setting), args.lightly_encoder)
    tried = best_workers(make, args.workers, args.seconds) if make else {}
    orders.send(tried)
    if make is None:
        return
    loop = make(max(tried, key=tried.__getitem__))
    with suppress(EOFError):
        while orders.recv():
            begun = time.perf_counter()
            for _ in range(loop.ahead + 1):  # use up what the workers finished while they waited
                if time.perf_counter() - begun < args.seconds:  # where steps are long, that is no head start
                    loop()
            orders.send(views_per_second(loop, args.seconds))
    loop.close()


def lightly_loop(setting: Setting, images: Images, encoder: str) -> Callable[[int], LightlyLoop] | None:
    """Number of workers -> lightly's loop over these images; None where lightly is not installed."""
    try:
        import lightly.transforms  # noqa: F401
    except ImportError as error:
        print(f"lightly is left out ({error}): pip install lightly", flush=True)
        return None
    pictures = pil_images(images)

    def make(workers: int) -> LightlyLoop:
        if encoder == "torchvision" and setting.encoder == "resnet18":
            from torchvision.models import resnet18

            backbone, num_features = resnet18(), 512
            backbone.fc = torch.nn.Identity()
        else:
            config = EncoderConfig(
                name=setting.encoder, channels=images.channels, size=setting.size, stem=our_config(setting).stem
            )
            backbone = build_encoder(config, seed=0)
            num_features = backbone.num_features
        if encoder == "channels-last":
            backbone.to(memory_format=torch.channels_last)
        return LightlyLoop(
            pictures, backbone, num_features, size=setting.size, batch_size=setting.batch, workers=workers
        )

    return make


if __name__ == "__main__":
    main()
