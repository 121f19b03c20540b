"""Change one thing at a time: what decides a result must be computed anew, and nothing else must be.

    python benchmarks/drill_cache.py

Each scenario copies a finished evaluation (encoder, images, results, features) to another folder, changes one thing and
runs `simclr evaluate` again. The functions that compute (feature extraction, neighbours, fits, trainings, probes) are
wrapped so that their calls are counted; they do their work all the same. Every scenario states which protocols must be
computed again; all others must come from the store. At the end the figures are compared with those of the same command
without any store or cache. Images come as an .npz file and as a folder of BMP files, whose sizes tell nothing. Exit
code 0 only without a finding.
(The test suite holds a short form: tests/test_drill_cache.py.)
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from simclr.cli import main as cli
from simclr.config import finetune as finetune_config
from simclr.evaluation import curve, grid, keys, measure, protocols, subjects, transfer
from simclr.evaluation import probe as probing
from simclr.models import EncoderConfig, build_encoder
from simclr.models.heads import ProjectionHead
from simclr.weights.folder import load, save_encoder

COMPUTES: dict[str, list[tuple[Any, str]]] = {
    "features": [(subjects, "extract")],
    "knn": [(measure, "knn_votes")],
    "linear": [(measure, "linear_probe")],
    "logistic": [(measure, "logistic_probe")],
    "finetune": [],
    "supervised": [],
    "curve": [(curve, "linear_probe")],
    "curve from scratch": [(protocols, "train_subject")],
    "probe": [(protocols, "probe")],
    "label-free": [(protocols, "label_free")],
    "transfer": [(transfer, "logistic_probe"), (grid, "train_subject")],
}
"""What is counted -> the functions that compute it, where they are called from. Trainings on labels are counted by the
protocol that they are for (`measure._train`)."""

ALL = frozenset(COMPUTES) - {"features"}
FROM_SCRATCH = frozenset({"supervised", "curve from scratch"})
FROZEN = frozenset({"knn", "linear", "logistic", "curve", "transfer"})
UNLABELLED = frozenset({"probe", "label-free"})
ACCURACIES = frozenset({"knn", "linear", "logistic", "finetune", "supervised"})
PROTOCOLS = ("knn", "linear", "logistic", "finetune", "supervised", "curve", "probe", "label-free", "transfer")
FLAGS = ("--finetune.epochs", "1", "--counts", "2")


@dataclass
class Place:
    """One evaluation: everything lies in one folder."""

    root: Path
    data: str
    protocols: tuple[str, ...] = PROTOCOLS

    @property
    def counted(self) -> frozenset[str]:
        """What its protocols compute."""
        curve = {"curve from scratch"} if "curve" in self.protocols else set()
        return frozenset({"features", *self.protocols, *curve})

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def images(self) -> Path:
        return self.root / self.data


@dataclass(frozen=True)
class Scenario:
    """One change, and what has to be computed because of it."""

    name: str
    must: frozenset[str]
    """Computed again, every one."""
    change: Callable[[Place], None] = lambda place: None
    flags: tuple[str, ...] = ()
    """More flags than those of the first call."""
    constants: tuple[tuple[Any, str, Any], ...] = ()
    """Module, name and value of constants that are changed."""
    may: frozenset[str] = frozenset()
    """Whether these are computed does not matter: it is right either way."""
    relative: bool = False
    """Whether paths are spelled relative to the folder."""


# ---- what is changed


def pixel(part: str) -> Callable[[Place], None]:
    """Some pixels of one image of the part, in a file of the same size."""

    def change(place: Place) -> None:
        if place.images.is_file():
            rewrite(
                place, lambda arrays: arrays[f"x_{part}"].__setitem__((3, 2, 2), 255 - arrays[f"x_{part}"][3, 2, 2])
            )
            return
        file = sorted((place.images / part).rglob("*.bmp"))[3]
        content = bytearray(file.read_bytes())
        content[-1 - 20] ^= 0xFF
        file.write_bytes(content)

    return change


def label(place: Place) -> None:
    """One training image is of another class."""
    if place.images.is_file():
        rewrite(place, lambda arrays: arrays["y_train"].__setitem__(0, 1 - arrays["y_train"][0]))
    else:
        file = sorted((place.images / "train" / "a").iterdir())[0]
        file.rename(place.images / "train" / "b" / file.name)


def classes(place: Place) -> None:
    """The two classes are exchanged, in both parts."""
    if place.images.is_file():
        rewrite(place, lambda arrays: [np.subtract(1, arrays[y], out=arrays[y]) for y in ("y_train", "y_test")])
        return
    for part in ("train", "test"):
        (place.images / part / "a").rename(place.images / part / "c")


def rewrite(place: Place, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    arrays = dict(np.load(place.images))
    change(arrays)
    np.savez(place.images, **arrays)


def weight(place: Place) -> None:
    """One weight of the encoder is another."""
    model = load(place.model)
    with torch.no_grad():
        next(model.encoder.parameters()).view(-1)[5] += 0.5
    save(place, model.encoder, model.head)


def head_weight(place: Place) -> None:
    model = load(place.model)
    assert model.head is not None
    with torch.no_grad():
        next(model.head.parameters()).view(-1)[5] += 0.5
    save(place, model.encoder, model.head)


def preprocessing(place: Place) -> None:
    model = load(place.model)
    save(place, model.encoder, model.head, preprocessing="torchvision")


def size(place: Place) -> None:
    model = load(place.model)
    other = build_encoder(replace(model.encoder.config, size=12))
    other.load_state_dict(model.encoder.state_dict())
    save(place, other, model.head)


def save(place: Place, encoder: Any, head: Any, preprocessing: Any = "google") -> None:
    save_encoder(encoder, place.model, head=head, preprocessing=preprocessing, origin={})


def touched(place: Place) -> None:
    """All files are a day older, in the same places with the same contents."""
    import os

    for file in place.root.rglob("*"):
        status = file.stat()
        os.utime(file, (status.st_atime - 86_400, status.st_mtime - 86_400))


def two_threads(place: Place) -> None:
    torch.set_num_threads(2)


def no_results(place: Place) -> None:
    (place.root / "out" / "results.jsonl").unlink()


def no_cache(place: Place) -> None:
    shutil.rmtree(place.root / "cache")


def raised(module: Any, name: str) -> tuple[Any, str, Any]:
    return module, name, getattr(module, name) + 1


DECIDING = [
    Scenario("pixel of a training image", ALL | {"features"}, pixel("train")),
    Scenario("pixel of a test image", ALL | {"features"}, pixel("test")),
    Scenario("label", ALL - UNLABELLED, label, may=UNLABELLED | {"features"}),
    Scenario("classes", ALL - UNLABELLED, classes, may=UNLABELLED | {"features"}),
    Scenario("weight", (ALL - FROM_SCRATCH) | {"features"}, weight),
    Scenario("weight of the head", frozenset({"probe"}), head_weight),
    Scenario("preprocessing", ALL | {"features"}, preprocessing),
    Scenario("image size", ALL | {"features"}, size),
    Scenario("seed", ALL, flags=("--seed", "1"), may=frozenset({"features"})),
    Scenario("learning rate", frozenset({"finetune"}), flags=("--finetune.lr", "0.02")),
    Scenario("recipe", frozenset({"finetune"}), flags=("--finetune-recipe", "small-linear")),
    Scenario("head layer", frozenset({"finetune"}), flags=("--finetune.head-layer", "1")),
    Scenario("linear by SGD", frozenset({"linear"}), flags=("--linear", "sgd")),
    Scenario("counts", frozenset({"curve", "curve from scratch"}), flags=("--counts", "3")),
    Scenario(
        "labels",
        ACCURACIES,
        may=frozenset({"features"}),
        flags=("--labels", "5/class", "--protocol", "knn,linear,logistic,finetune,supervised"),
    ),
    Scenario(
        "leave one out",
        frozenset({"knn"}),
        flags=("--leave-one-out", "--protocol", "knn", "--finetune.epochs", "30"),
    ),
    Scenario("version of features", FROZEN | UNLABELLED | {"features"}, constants=(raised(keys, "FEATURES_VERSION"),)),
    Scenario("version of kNN", frozenset({"knn"}), constants=(raised(keys, "KNN_VERSION"),)),
    Scenario("version of logistic", FROZEN - {"knn"}, constants=(raised(keys, "LOGISTIC_VERSION"),)),
    Scenario("version of training", FROM_SCRATCH | {"finetune"}, constants=(raised(keys, "TRAINING_VERSION"),)),
    Scenario("version of metrics", ACCURACIES | {"transfer"}, constants=(raised(keys, "METRICS_VERSION"),)),
    Scenario("version of probe", frozenset({"probe"}), constants=(raised(keys, "PROBE_VERSION"),)),
    Scenario(
        "version of curve", frozenset({"curve", "curve from scratch"}), constants=(raised(keys, "CURVE_VERSION"),)
    ),
    Scenario("version of label-free", frozenset({"label-free"}), constants=(raised(keys, "LABEL_FREE_VERSION"),)),
    Scenario("version of transfer", frozenset({"transfer"}), constants=(raised(transfer, "TRANSFER_VERSION"),)),
    Scenario("k", frozenset({"knn"}), constants=(raised(keys, "KNN_K"),)),
    Scenario("temperature", frozenset({"knn"}), constants=((keys, "KNN_TEMPERATURE", 0.1),)),
    Scenario("l2 values", frozenset({"linear", "curve"}), constants=((keys, "LINEAR_L2_VALUES", (1.0, 10.0)),)),
    Scenario("tolerance", FROZEN - {"knn"}, constants=((keys, "TOL", 1e-5),)),
    Scenario("noise of the probe", frozenset({"probe"}), constants=((probing, "NOISE", 0.2),)),
    Scenario("results lost", ALL, no_results),
]
NEUTRAL = [
    Scenario("the same in another folder", frozenset()),
    Scenario("times of files", frozenset(), touched),
    Scenario("cache lost", frozenset(), no_cache),
    Scenario("other outputs", frozenset(), flags=("--json", "other.json", "--picture", "other.png")),
    Scenario("workers of training", frozenset(), flags=("--finetune.workers", "0")),
    Scenario("threads", frozenset(), two_threads),
    Scenario("spelling of paths", frozenset(), relative=True),
]


# ---- how it is run


def prepare(root: Path, data: str, protocols: tuple[str, ...]) -> Place:
    """A tiny untrained encoder and a few images, two classes apart by brightness."""
    place, draw = Place(root, data, protocols), np.random.default_rng(0)
    config = EncoderConfig("small", channels=1, size=8, width=0.25)
    encoder = build_encoder(config, seed=1)
    save(place, encoder, ProjectionHead(encoder.num_features, dim=8, seed=1))
    arrays = {}
    for part, count in (("train", 32), ("test", 12)):
        y = np.arange(count) % 2
        arrays[f"x_{part}"] = (draw.integers(0, 200, (count, 8, 8)) + 20 * y[:, None, None]).astype(np.uint8)
        arrays[f"y_{part}"] = y
    if data.endswith(".npz"):
        np.savez(place.images, **arrays)
        return place
    for part in ("train", "test"):
        for i, (x, y) in enumerate(zip(arrays[f"x_{part}"], arrays[f"y_{part}"], strict=True)):
            file = place.images / part / "ab"[y] / f"{i}.bmp"  # uncompressed: other pixels, the same size
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(file)
    return place


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the calls of what computes; the functions themselves run."""
    calls = dict.fromkeys(COMPUTES, 0)

    def counting(name: str, function: Callable) -> Callable:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **options)

        return wrapped

    train = measure._train

    def counting_training(protocol: str, *arguments: Any) -> Any:
        calls[protocol] += 1
        return train(protocol, *arguments)

    with ExitStack() as stack:
        stack.enter_context(patch.object(measure, "_train", counting_training))
        for name, functions in COMPUTES.items():
            for module, attribute in functions:
                stack.enter_context(patch.object(module, attribute, counting(name, getattr(module, attribute))))
        yield calls


@contextmanager
def quick() -> Iterator[None]:
    """Trainings of a few steps."""
    recipes = finetune_config.FINETUNE_RECIPES
    short = {
        name: replace(config, epochs=0, min_steps=2, batch_size=8)
        for name, config in recipes.items()
        if name.startswith("small")
    }
    with patch.dict(recipes, short), patch.object(probing, "EPOCHS", 2):
        yield


def evaluate(
    place: Place, *flags: str, cache: str = "cache", out: str = "out", relative: bool = False
) -> frozenset[str]:
    """Run the command in this process: what was computed.

    Raises:
        RuntimeError: It failed.
    """
    root = Path("..", place.root.name) if relative else place.root
    command = [
        "simclr", "evaluate", str(root / "model"), str(root / place.data), "--compare", "--device", "cpu",
        "--pack", "off", "--out", str(root / out), "--cache", "off" if cache == "off" else str(root / cache),
        "--protocol", ",".join(place.protocols), *FLAGS, *flags,
    ]  # fmt: skip
    said = io.StringIO()
    with (
        patch.object(sys, "argv", command), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said),
        contextlib.chdir(place.root), counted() as calls,
    ):  # fmt: skip
        try:
            cli.main()
        except SystemExit as stop:
            raise RuntimeError(f"{' '.join(command)} ended with code {stop.code}:\n{said.getvalue()}") from None
    return frozenset(name for name, count in calls.items() if count)


def run(base: Place, scenario: Scenario, root: Path, *, compare: bool) -> str | None:
    """A sentence about what is wrong, or None."""
    shutil.copytree(base.root, root)
    place, threads = replace(base, root=root), torch.get_num_threads()
    scenario.change(place)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        for module, name, value in scenario.constants:
            stack.enter_context(patch.object(module, name, value))
        computed = evaluate(place, *scenario.flags, relative=scenario.relative)
        if missing := (scenario.must & base.counted) - computed:
            return f"{scenario.name}: {', '.join(sorted(missing))} came from the store"
        if needless := computed - scenario.must - scenario.may:
            return f"{scenario.name}: {', '.join(sorted(needless))} computed again"
        if evaluate(place, *scenario.flags):
            return f"{scenario.name}: not kept"
        if compare:
            evaluate(place, *scenario.flags, "--json", "stored.json")
            evaluate(place, *scenario.flags, "--json", "fresh.json", cache="off", out="nowhere")
            stored, fresh = (json.loads((root / name).read_text()) for name in ("stored.json", "fresh.json"))
            for found in (stored, fresh):
                found["protocol"] = None
            if stored != fresh:
                return f"{scenario.name}: other figures than without a store"
    return None


def drill(
    scenarios: list[Scenario], data: str, *, compare: bool, protocols: tuple[str, ...] = PROTOCOLS
) -> Iterator[tuple[str, str | None]]:
    """The name of each scenario, and what is wrong."""
    with tempfile.TemporaryDirectory() as folder, quick():
        base = prepare(Path(folder) / "base", data, protocols)
        first = evaluate(base)
        yield "first call", None if first == base.counted else f"first call computed only {sorted(first)}"
        for number, scenario in enumerate(scenarios):
            yield scenario.name, run(base, scenario, Path(folder) / str(number), compare=compare)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    wrong = 0
    for data in ("images.npz", "images"):
        for name, finding in drill(DECIDING + NEUTRAL, data, compare=True):
            print(f"{data}: {name}: {finding or 'as it must be'}", flush=True)
            wrong += finding is not None
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
