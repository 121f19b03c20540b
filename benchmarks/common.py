"""What the benchmarks share: paired rounds and their spread, the machine's description, and the two training loops.

`run_ours` is what `simclr pretrain` runs, watched step by step. `LightlyLoop` is the loop of lightly's own SimCLR page
(https://docs.lightly.ai/self-supervised-learning/examples/simclr.html) around an encoder of ours, so that a comparison
is about everything around the encoder.
"""

import copy
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from simclr.config.pretrain import PretrainConfig
from simclr.data.images import Images, array_images
from simclr.distributed import DistributedContext
from simclr.methods.simclr import SimCLR
from simclr.tasks import pretrain_images as pretraining
from simclr.training.fit import fit
from simclr.training.loop import Task
from simclr.training.progress import Outcome
from simclr.training.run import RunFolder, describe_machine

# --- measuring --------------------------------------------------------------------------------------------------------

Contender = Callable[[], int]
"""Makes or trains on some views and returns how many."""


def paired_rounds(contenders: dict[str, Contender], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Views per second of each contender in each round, after a round to warm up.

    Each round runs every contender once for at least `seconds`, one after the other, so that what disturbs the machine
    disturbs them alike and a ratio within the round stands.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, contender in contenders.items():
            speed = views_per_second(contender, seconds)
            if round_:
                speeds[name].append(speed)
    return speeds


def views_per_second(contender: Contender, seconds: float) -> float:
    """Speed over as many calls as take at least `seconds`; of work that is done when the call returns."""
    made, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds:
        made += contender()
    return made / spent


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Ours over theirs, round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def spread(values: list[float], form: str = "{:.1f}") -> str:
    """Median (smallest to largest)."""
    median, low, high = (form.format(x).strip() for x in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def mean_and_deviation(values: list[float], form: str = "{:.1f}") -> str:
    """Mean and standard deviation, over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{form.format(statistics.mean(values))} ± {form.format(deviation)}"


def print_markdown(header: list[str], rows: list[list[str]]) -> None:
    """A table that can be pasted into the README."""
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


# --- the machine ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and command: what a published figure has to carry."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return describe_machine() | {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all: a benchmark that is cut off leaves what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def in_fresh_process(cores: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a new Python that may use `cores` cores, with its threads and its workers."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_on_cores, cores, function, arguments).result()


def _on_cores(cores: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if hasattr(os, "sched_setaffinity"):  # Linux: threads and worker processes inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    return function(*arguments)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that keep a core busy meanwhile, each in a session of its own, as other users' programs are.

    They end with this process too, however it ends.
    """
    busy = [sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"]
    processes = [subprocess.Popen(busy, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# --- data -------------------------------------------------------------------------------------------------------------


def random_images(count: int, side: int, channels: int = 3) -> Images:
    """Random pixels: as costly to work on as photographs in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return array_images(
        pixels, None, name="random pixels", split="all", has_own_split=False, classes=None, channels="auto"
    )


def parquet_images(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Pixels (n, H, W, 3) uint8, labels (n,) and the file format of images of one size, as Hugging Face writes them."""
    from pyarrow import parquet

    table = parquet.read_table(path, columns=["image", "label"])
    files = [Image.open(io.BytesIO(image["bytes"])) for image in table["image"].to_pylist()]
    pixels = np.stack([np.asarray(file.convert("RGB")) for file in files])
    return pixels, table["label"].to_numpy(), str(files[0].format)


# --- our loop ---------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Raised by a watcher that has seen enough."""


class Watch:
    """Stands in for the progress bar of `train`: it is told of every step, and what it does is not part of a step."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._on_step = on_step

    def step(self, done: int) -> None:
        self._on_step(done)

    def record(self, record: dict[str, float], _outcome: Outcome) -> None:
        self._on_step(int(record["step"]))


def run_ours(
    images: Images,
    config: PretrainConfig,
    on_step: Callable[[Task, int], None],
    *,
    change: Callable[[Task], Task] = lambda task: task,
    world: DistributedContext | None = None,
    folder: Path | None = None,
) -> Outcome | None:
    """`simclr pretrain` with `on_step(task, steps done)` called after each step, until it ends or raises `Stop` (None).

    Args:
        change: Adjusts the task before training, such as its number of steps.
        world: Processes that share the batch; without one, this process on the device that the settings name.
        folder: Where the run is kept, and gone on with if there is one; None: nowhere.
    """
    if world is None:
        gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        world = DistributedContext(device=torch.device("cuda", 0) if gpu else torch.device("cpu"))

    outcome = None
    with tempfile.TemporaryDirectory() as temporary, suppress(Stop):
        path = folder or Path(temporary) / "run"
        path, new = world.broadcast((path, not path.exists()))
        run = RunFolder(path)
        config = pretraining.settle_memory(images, config, run, world, SimCLR, new=new, budget=None)
        task = change(pretraining.build_task(images, config, run, world))
        manifest = {"machine": describe_machine()} if new else None
        outcome = fit(task, run, config, world, manifest=manifest, progress=Watch(lambda done: on_step(task, done)))
    return outcome


def encoder_alone(task: Task) -> Contender:
    """Forward and backward of encoder and head on ready random views: what a step cannot do without."""
    method = copy.deepcopy(task.method)
    encoder, head = method.encoder, method.head
    expects, device = encoder.config, next(method.parameters()).device
    views = torch.rand(task.views_per_step, expects.channels, expects.size, expects.size, device=device)
    views = views.to(memory_format=torch.channels_last)
    half = task.precision != torch.float32
    if half:
        views = views.to(task.precision)
    gradient: list[torch.Tensor] = []

    def contender() -> int:
        with torch.autocast(device.type, task.precision, enabled=half):
            z = head(encoder(views))
        gradient[:] = gradient or [torch.randn_like(z)]
        method.zero_grad(set_to_none=True)
        z.backward(gradient[0])
        return len(views)

    return contender


# --- lightly's loop ---------------------------------------------------------------------------------------------------

SGD = {
    "example": {"lr": 0.06},
    "benchmark": {"lr": 0.12, "momentum": 0.9, "weight_decay": 5e-4},
}
"""lightly's settings: of its SimCLR example page, and of its CIFAR-10 benchmark (0.06 per 128 images, here for 256)."""


class LightlyLoop:
    """Training as lightly's documentation advises: one call is one step.

    SimCLRTransform on PIL images (no blur and jitter of half strength on small ones, as its docstring advises),
    shuffled DataLoader with drop_last and persistent workers, each view in a forward of its own, NTXentLoss and
    SimCLRProjectionHead with their defaults, SGD. Pixels stay in [0, 1] as the encoder expects them.

    Args:
        encoder: (B, C, S, S) -> (B, F).
        num_features: F.
        workers: Of the DataLoader.
        settings: "example" or "benchmark" (`SGD`).
    """

    def __init__(
        self,
        images: list[Image.Image],
        encoder: torch.nn.Module,
        num_features: int,
        *,
        size: int,
        batch_size: int,
        workers: int,
        settings: str = "example",
        device: str = "cpu",
    ) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform

        small = size <= 32
        transform = SimCLRTransform(
            input_size=size, cj_strength=0.5 if small else 1.0, gaussian_blur=0.0 if small else 0.5, normalize=None
        )
        self.device = device
        self.model = torch.nn.Sequential(encoder, SimCLRProjectionHead(num_features, num_features, 128)).to(device)
        self.criterion = NTXentLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SGD[settings])
        self.ahead = 2 * workers
        """Batches that waiting workers may have finished."""
        self._loader = DataLoader(
            Transformed(images, transform),
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        self._batches = self._endless()

    def __call__(self) -> int:
        """One step; how many views it took."""
        x0, x1 = (x.to(self.device) for x in next(self._batches)[0])
        z0, z1 = self.model(x0), self.model(x1)
        loss = self.criterion(z0, z1)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 2 * len(x0)

    def close(self) -> None:
        """End the workers."""
        del self._batches
        if (iterator := self._loader._iterator) is not None:
            iterator._shutdown_workers()  # pyrefly: ignore[missing-attribute]

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self._loader


class Transformed(Dataset):
    """PIL images through a transform, as torchvision's data sets give them: (views, label)."""

    def __init__(self, images: list[Image.Image], transform: Callable[[Image.Image], Any]) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._transform(self._images[index]), 0


def pil_images(images: Images) -> list[Image.Image]:
    """All images, decoded, as lightly's transform takes them."""
    found = []
    for begin in range(0, len(images), 1024):
        for pixels in images.read(np.arange(begin, min(begin + 1024, len(images)))):
            found.append(Image.fromarray(pixels[..., 0] if images.channels == 1 else pixels))
    return found


def best_workers(make: Callable[[int], LightlyLoop], candidates: list[int], seconds: float) -> dict[int, float]:
    """Views per second of lightly's loop by number of workers, each with a loop of its own."""
    speeds = {}
    for workers in candidates:
        loop = make(workers)
        for _ in range(loop.ahead + 1):
            loop()
        speeds[workers] = views_per_second(loop, seconds)
        loop.close()
    return speeds


def stretched(task: Task, steps: int) -> Task:
    """The task with its schedule, warm-up included, spread over another number of steps."""
    scale = task.total_steps / steps
    rate = task.learning_rate
    return replace(task, total_steps=steps, learning_rate=lambda step: rate(round(step * scale)), evaluate_every=0)
