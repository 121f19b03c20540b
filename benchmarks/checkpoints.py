"""The authors' released checkpoints on ImageNet: imported, evaluated, and compared with the accuracies they state.

    python benchmarks/checkpoints.py CHECKPOINTS IMAGENET/val --out runs/checkpoints

Below CHECKPOINTS each folder counts whose path ends as in the authors' buckets, with the files of a TensorFlow 1
checkpoint in it or a SavedModel in its folder saved_model:

    simclrv2/finetuned_1pct/r50_1x_sk0      also finetuned_10pct, finetuned_100pct, pretrained, supervised; 65 networks
    simclrv1/pretrain/1x, or ResNet50_1x    also finetune_10pct, finetune_100pct, without a second name; 9 networks

IMAGENET/val has one sub-folder per class, named by its WordNet identifier. The supervised head of each checkpoint is
evaluated as it is (after the first layer of the projection head where SimCLR v2 was fine-tuned on 1 % or 10 %), nothing
is trained. The accuracies compared with are those of the authors' notebook tf2/colabs/imagenet_results.ipynb of
google-research/simclr at 383d414, printed there to 0.1 on 50,000 images, which were cropped and resized as here. No
accuracies of the distilled networks (distill_1pct, distill_10pct) are in it, and these are left out.

Each result is kept in OUT/results.jsonl when it is there; a second call reads the checkpoints again and evaluates those
without a result. The exit code is 1 if an accuracy differs by more than 0.2, or a checkpoint is missing or cannot be
imported; the others are evaluated all the same. `--only` limits what is asked for, as in --only "*/r50_1x_*".
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from common import machine, print_markdown, write_json
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.evaluation.keys import classifier_key
from simclr.evaluation.metrics import accuracies
from simclr.evaluation.results import About, Measured, Result, ResultStore
from simclr.models.classifier import Classifier, usual_names
from simclr.models.inference import outputs, require_channels
from simclr.tasks.opening import DataOptions, open_aloud, require_writable
from simclr.training.device import find_device
from simclr.training.progress import counting
from simclr.weights.importers.import_tf import import_tf

PRESET = "google"
"""Preprocessing of the notebook: the crop of 0.875 of the shorter side, and TensorFlow 2's bicubic resizing."""
NUM_IMAGES = 50_000
"""Of ImageNet's validation part; on others there is nothing to compare with."""
TOLERANCE = 0.2
"""Largest difference of two accuracies in % that are rounded to 0.1 and count as equal. The notebook grants 0.1 between
kinds of devices; the accuracies of the README, measured on TPUs, differ from it by up to 0.2."""

V2_COLUMNS = ("finetuned_1pct", "finetuned_10pct", "finetuned_100pct", "pretrained", "supervised")
V2_TOP1 = {
    "r50_1x_sk0": (58.0, 68.4, 76.3, 71.7, 76.6),
    "r50_1x_sk1": (64.5, 72.0, 78.6, 74.6, 78.5),
    "r50_2x_sk0": (66.2, 73.9, 79.1, 75.4, 77.8),
    "r50_2x_sk1": (70.7, 77.0, 81.3, 77.8, 79.3),
    "r101_1x_sk0": (62.1, 71.5, 78.2, 73.7, 78.0),
    "r101_1x_sk1": (68.3, 75.1, 80.7, 76.3, 79.6),
    "r101_2x_sk0": (69.1, 75.9, 80.8, 77.0, 78.8),
    "r101_2x_sk1": (73.3, 78.8, 82.4, 79.1, 80.1),
    "r152_1x_sk0": (64.1, 73.0, 79.3, 74.6, 78.2),
    "r152_1x_sk1": (70.0, 76.4, 81.3, 77.3, 80.0),
    "r152_2x_sk0": (70.1, 76.6, 81.1, 77.4, 79.1),
    "r152_2x_sk1": (74.2, 79.4, 82.9, 79.3, 80.4),
    "r152_3x_sk1": (74.9, 80.1, 83.1, 79.9, 80.5),
}
"""Network -> top-1 accuracy in % for each of V2_COLUMNS."""
V1_WIDTHS = (1, 2, 4)
V1_TOP1 = {
    "pretrain": (69.0, 74.2, 76.6),
    "finetune_10pct": (65.8, 71.6, 74.5),
    "finetune_100pct": (75.6, 79.2, 80.8),
}
"""Training -> top-1 accuracy in % of ResNet-50 for each of V1_WIDTHS."""


@dataclass(frozen=True, kw_only=True)
class Released:
    """A checkpoint that the authors released, and its accuracy on ImageNet by their notebook."""

    name: str
    """Its folder in the authors' bucket for TensorFlow 2."""
    endings: tuple[str, ...]
    """How the paths of its folder may end."""
    network: str
    width: float
    sk: bool
    head_layer: int
    """Layers of the projection head before the supervised head."""
    top1: float
    """In %."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one checkpoint on the disk."""

    released: Released
    path: Path
    result: Result | None = None
    error: str = ""
    """Why there is no result."""

    @property
    def verdict(self) -> str:
        return self.error if self.result is None else compared(self.result, self.released.top1)


def released() -> list[Released]:
    """All checkpoints with an accuracy in the notebook."""
    v1 = [_released_v1(kind, k) for kind in V1_TOP1 for k in range(len(V1_WIDTHS))]
    return v1 + [_released_v2(network, k) for network in V2_TOP1 for k in range(len(V2_COLUMNS))]


def _released_v1(kind: str, column: int) -> Released:
    width = V1_WIDTHS[column]
    name = f"{kind}/{width}x"
    endings = (name, f"ResNet50_{width}x") if kind == "pretrain" else (name,)
    return Released(
        name=f"simclrv1/{name}", endings=endings, network="resnet50", width=width, sk=False, head_layer=0,
        top1=V1_TOP1[kind][column],
    )  # fmt: skip


def _released_v2(network: str, column: int) -> Released:
    kind, (depth, width, sk) = V2_COLUMNS[column], network.split("_")
    return Released(
        name=f"simclrv2/{kind}/{network}", endings=(f"{kind}/{network}",), network=depth.replace("r", "resnet"),
        width=int(width.removesuffix("x")), sk=sk == "sk1",
        head_layer=int(kind in ("finetuned_1pct", "finetuned_10pct")), top1=V2_TOP1[network][column],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, help="folder that the authors' checkpoints lie below")
    parser.add_argument("images", type=Path, help="ImageNet's validation images: a sub-folder per WordNet identifier")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help='names, such as "simclrv2/finetuned_1pct/*"')
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--pack", default="auto", help="where decoded images are kept: auto, off or a folder")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    try:
        sys.exit(run(args))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> int:
    """Evaluate all that is found; the exit code.

    Raises:
        UserError: There is no such folder, none of the checkpoints is in it, the images cannot be used, or OUT cannot
            be written.
    """
    if args.batch_size < 1:
        raise UserError(f"--batch-size was {args.batch_size}; it must be at least 1.")
    require_writable(args.out / "checkpoints.json")
    asked = [item for item in released() if any(fnmatch(item.name, pattern) for pattern in args.only or ["*"])]
    if not asked:
        raise UserError(f"--only was {' '.join(args.only)}; names are such as {released()[0].name}, with * and ?.")
    found = find_checkpoints(args.checkpoints, asked)
    world = DistributedContext(device=find_device(args.device))
    images = open_images(args.images, world, args.pack)
    store, rows = ResultStore(args.out / "results.jsonl"), []
    for item, path in found:
        row = evaluate(Row(released=item, path=path), images, store, world, args.batch_size)
        print(f"{path}: {row.verdict}", flush=True)
        rows.append(row)
    missing = [item.name for item in asked if item not in [row.released for row in rows]]
    write_json(
        args.out / "checkpoints.json",
        {"machine": machine(), "images": len(images), "rows": [as_dict(row) for row in rows], "missing": missing},
    )
    return report(rows, missing, len(images))


def find_checkpoints(folder: Path, asked: Sequence[Released]) -> list[tuple[Released, Path]]:
    """The checkpoints below a folder, in the order of `asked`; one may be there in several formats."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give the one that the authors' checkpoints lie below.")
    folders = sorted(Path(place) for place, _, _ in os.walk(os.path.abspath(folder)))
    found = [
        (item, path)
        for item in asked
        for place in folders
        if place.as_posix().endswith(tuple(f"/{ending}" for ending in item.endings))
        for path in _checkpoints_in(place)
    ]
    if not found:
        raise UserError(
            f"None of the {len(asked)} checkpoints is below {folder}; the folders are to be called as in the authors' "
            f"buckets, such as {asked[0].name} (also without its first part)."
        )
    return found


def _checkpoints_in(folder: Path) -> Iterator[Path]:
    """Prefixes of TensorFlow 1 checkpoints, and the SavedModel; the folder itself where it has neither."""
    found = [file.with_suffix("") for file in sorted(folder.glob("*.index"))]
    saved_model = folder / "saved_model"
    yield from [*found, *([saved_model] if saved_model.is_dir() else [])] or [folder]


def open_images(folder: Path, world: DistributedContext, pack: str) -> Images:
    """The labelled images, in colour, without damaged ones.

    Raises:
        UserError: They cannot be opened, have no labels, or are training images too.
    """
    reading = DataOptions(pack=pack).reading(world, channels="3")
    images = open_aloud(str(folder), world, reading, split="all", readable=True)
    if images.has_own_split:
        raise UserError(f"{folder} has training images too; give its folder of validation images.")
    if images.labels is None or images.classes is None:
        raise UserError(f"{folder} has no labels; it needs a sub-folder per class, named as n01440764 is.")
    return images


def evaluate(row: Row, images: Images, store: ResultStore, world: DistributedContext, batch_size: int) -> Row:
    """Import a checkpoint and measure its classifier; a failure becomes part of the row."""
    try:
        network = import_classifier(row.released, row.path)
        names, _ = usual_names(network.linear.out_features)
        config = network.encoder.config
        require_channels(config.channels, images)
        targets = columns_of(images, names)
        network.to(world.device)

        def measure() -> Measured:
            with counting(row.released.name, lines=True, unit="image", after=60) as progress:
                scores = outputs(
                    network, images, len(names), size=config.size, preset=PRESET, batch_size=batch_size, world=world,
                    progress=progress,
                )  # fmt: skip
            metrics = accuracies(scores, np.arange(len(names)), targets)
            return Measured(metrics=metrics, description=f"supervised head on layer {network.head_layer}")

        key = classifier_key(network, config, names, PRESET, images, seed=0, device=world.device.type)
        about = About(
            subject=row.released.name, data_name=images.name, num_test=len(images), num_classes=len(names),
        )  # fmt: skip
        return replace(row, result=store.get(key, measure, about))
    except (UserError, OSError) as error:
        return replace(row, error=f"not evaluated: {error}")


def import_classifier(item: Released, path: Path) -> Classifier:
    """The network of a checkpoint, which is to be the one of its name.

    Raises:
        UserError: The files are damaged, hold another network, or none with a supervised head.
    """
    imported = import_tf(path, head_layer=item.head_layer)
    if imported.classifier is None:
        raise UserError(f"{path} has no supervised head.")
    config = imported.encoder.config
    if (config.name, config.width, config.sk) != (item.network, item.width, item.sk):
        raise UserError(
            f"{path} holds a {config.name} of width {config.width:g}{' with selective kernels' * config.sk}, which is "
            f"another network than {item.name}."
        )
    return imported.classifier


def columns_of(images: Images, names: Sequence[str]) -> np.ndarray:
    """(n,) the classifier's class of each image, by its name.

    Raises:
        UserError: The classifier does not know a class of the images.
    """
    assert images.labels is not None and images.classes is not None
    columns = {name: column for column, name in enumerate(names)}
    unknown = [name for name in images.classes if name not in columns]
    if unknown:
        raise UserError(
            f"{images.name} has classes that the supervised head does not have, such as {unknown[0]}; its "
            f"{len(names):,} are {names[0]} to {names[-1]}."
        )
    return np.array([columns[name] for name in images.classes])[images.labels]


def compared(result: Result, top1: float) -> str:
    """The measured accuracy against the stated one, in words; without a verdict where the images are others."""
    difference = round(round(100 * result.value("top1"), 1) - top1, 1)
    if result.num_test != NUM_IMAGES:
        return f"no verdict from {result.num_test:,} images"
    return "agrees" if abs(difference) <= TOLERANCE else f"differs by {difference:+.1f}"


def report(rows: Sequence[Row], missing: Sequence[str], num_images: int) -> int:
    """Print the table and what is wrong; the exit code."""
    print_markdown(
        ["checkpoint", "format", "top-1, %", "authors' top-1, %", "top-5, %", "verdict"],
        [
            [row.released.name, format_of(row.path), percent(row, "top1"), f"{row.released.top1:.1f}",
             percent(row, "top5"), row.verdict if row.result else "not evaluated"]
            for row in rows
        ],
    )  # fmt: skip
    failed = [row for row in rows if row.result is None]
    differing = [row.released.name for row in rows if row.verdict.startswith("differs")]
    agreeing = sum(row.verdict == "agrees" for row in rows)
    if num_images == NUM_IMAGES:
        print(f"\n{agreeing} of {len(rows)} checkpoints agree with the authors' accuracies within {TOLERANCE} points.")
    else:
        print(f"\nNo verdict: these are {num_images:,} images, and the authors' accuracies are of {NUM_IMAGES:,}.")
    for row in failed:
        print(f"{row.released.name}: {row.error}")
    if differing:
        print(f"Different: {', '.join(differing)}.")
    if missing:
        print(f"Missing: {', '.join(missing)} (--only limits what is asked for).")
    return int(bool(failed or differing or missing))


def format_of(path: Path) -> str:
    return "SavedModel" if path.is_dir() else "TensorFlow 1"


def percent(row: Row, metric: str) -> str:
    value = None if row.result is None else row.result.metrics.get(metric)
    return "" if value is None else f"{100 * value:.1f}"


def as_dict(row: Row) -> dict[str, object]:
    return {
        "checkpoint": row.released.name, "path": str(row.path), "authors_top1": row.released.top1,
        "verdict": row.verdict, "result": None if row.result is None else row.result.to_dict(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
