"""Mutated files of every kind that simclr opens: each loads or ends in one sentence, in bounded time and memory.

    python benchmarks/drill_files.py --count 1000000 --workers 2 --out drill     # hours
    python benchmarks/drill_files.py --only torch-zip encoder --minutes 10

Mutation `seed` of a kind is a pure function of (kind, seed). Each is opened in a worker process; a finding is whatever
raises something else than UserError, takes more than 5 s, ends the process, or takes more memory than four times its
files and 200 MB. A finding's files are kept in OUT/findings/KIND-SEED; `tests/test_drill_files.py` is the short form.
"""

import argparse
import copy
import io
import json
import os
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # writers of TensorFlow's files

SECONDS = 5
SPARE_BYTES = 200 << 20  # beside four times the size of the files
SILENT_SECONDS = 60  # after which a worker that says nothing is killed: SIGALRM does not reach code in C

Files = dict[str, bytes]


class Kind(NamedTuple):
    """Files of one kind."""

    build: Callable[[Path], None]
    """Write whole files into an empty folder."""
    open: Callable[[Path], Any]
    """What a user's call does with the folder."""


class Slow(BaseException):
    """A file took too long."""


# ---- files and what opens them ---------------------------------------------------------------------------------------


def _resnet() -> Any:
    import torch

    from helpers import NarrowResNet, with_random_state

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return with_random_state(NarrowResNet())


def _torch(zipped: bool) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        import torch

        content = {"state_dict": _resnet().state_dict(), "epoch": 3, "lr": [0.1, None, True]}
        torch.save(content, folder / "a.pt", _use_new_zipfile_serialization=zipped)

    return build


def _safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(_resnet().state_dict(), folder / "a.pt")


def _import_torch(folder: Path) -> Any:
    from simclr.weights.importers.import_torch import import_torch

    return import_torch(folder / "a.pt")


def _tf1(folder: Path) -> None:
    from bundle_writer import authors_variables, write_bundle

    write_bundle(folder / "model.ckpt-1", authors_variables(*_parts()), shards=1)


def _tf2(folder: Path) -> None:
    from object_graph_writer import write_tf2
    from test_import_tf2 import network

    *_, variables, layout = network("resnet10")
    write_tf2(folder / "model.ckpt-1", variables, **layout)


def _parts() -> Any:
    from simclr.models import EncoderConfig, LinearClassifier, ProjectionHead, build_encoder

    encoder = build_encoder(EncoderConfig("resnet18", channels=3, size=32, width=1 / 16))
    return encoder, ProjectionHead(encoder.num_features, dim=8), LinearClassifier(encoder.num_features, 3)


def _import_tf(folder: Path) -> Any:
    from simclr.weights.importers.import_tf import import_tf

    return import_tf(folder)


def _encoder(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    from simclr.models import EncoderConfig, ProjectionHead, build_encoder
    from simclr.models.classifier import Classifier
    from simclr.weights.folder import save_classifier

    encoder = build_encoder(EncoderConfig("small", channels=1, size=12, mean=(0.5,), std=(0.5,)))
    network = Classifier(encoder, ProjectionHead(encoder.num_features, dim=9), 3, head_layer=1)
    save_classifier(network, folder, classes=["a", "b", "c"], preprocessing="google", origin={"run": "x"})
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights)  # without the digest of the record, so that other records are looked at


def _load(folder: Path) -> Any:
    import simclr

    return simclr.load(folder)


def _export(name: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        from simclr.models import EncoderConfig, build_encoder
        from simclr.tasks.export import export
        from simclr.tasks.options.using import Export
        from simclr.weights.folder import save_encoder

        onnx = name.endswith(".onnx")
        config = EncoderConfig("small" if onnx else "timm/test_resnet", channels=1, size=12 if onnx else 32)
        with tempfile.TemporaryDirectory() as run:
            save_encoder(build_encoder(config), Path(run), preprocessing="google", origin={})
            export(Export(run=Path(run), format="onnx" if onnx else "timm", out=folder / name))
        beside = folder / f"{name}.json"
        beside.write_text(json.dumps(json.loads(beside.read_text()) | {"sha256": ""}))

    return build


def _load_export(name: str) -> Callable[[Path], Any]:
    def open_(folder: Path) -> Any:
        import simclr

        model = simclr.load(folder / name)
        if name.endswith(".onnx"):
            model.embed(np.zeros((1, 12, 12), np.uint8))

    return open_


def _images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)


def _npz(folder: Path) -> None:
    labels = np.arange(6) % 2
    np.savez(folder / "a.npz", x_train=_images(), y_train=labels, x_test=_images(), y_test=labels)


def _npz_compressed(folder: Path) -> None:
    labels = np.arange(6) % 2
    np.savez_compressed(folder / "a.npz", x_train=_images(), y_train=labels, x_test=_images(), y_test=labels)


def _read_all(source: Any, **options: Any) -> None:
    from simclr.data import open_data

    images = open_data(source, **options)
    for i in range(len(images)):
        images.read([i])


def _image(folder: Path) -> None:
    from hostile_images import FORMATS, encoded

    for ending in FORMATS:
        (folder / f"a.{ending}").write_bytes(encoded(ending))


def _labels(folder: Path) -> None:
    from PIL import Image

    for i in range(6):
        (folder / f"{i}.png").write_bytes(b"")
        Image.fromarray(_images()[i]).save(folder / f"{i}.png")
    (folder / "labels.csv").write_text("path,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(6)))


def _open_labels(folder: Path) -> None:
    from simclr.data.labels import read_label_file

    known = [f"{i}.png" for i in range(6)]
    read_label_file(folder / "labels.csv", folder, known, known)


def _run_config(folder: Path) -> None:
    from simclr.config.pretrain import PretrainConfig

    PretrainConfig().save(folder / "config.json")


def _open_run_config(folder: Path) -> Any:
    from simclr.config.pretrain import load_config

    return load_config(folder / "config.json")


def _metrics(folder: Path) -> None:
    lines = [json.dumps({"step": i, "epoch": i / 2, "loss": 1.0 / (i + 1), "knn": None}) for i in range(5)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _open_metrics(folder: Path) -> Any:
    from simclr.training.run import RunFolder

    return RunFolder(folder).read_metrics()


def _results(folder: Path) -> None:
    from simclr.evaluation.results import Measured, ResultStore

    store = ResultStore(folder / "results.jsonl")
    for seed in range(4):
        key = {"protocol": "knn", "version": {"knn": 1}, "model": {}, "data": {}, "settings": {"k": 20}, "seed": seed}
        store.get(key, lambda: Measured(metrics={"top1": 0.5}))


def _open_results(folder: Path) -> Any:
    from simclr.evaluation.results import read_results

    return read_results(folder / "results.jsonl")


KINDS = {
    "torch-zip": Kind(_torch(True), _import_torch),
    "torch-legacy": Kind(_torch(False), _import_torch),
    "safetensors": Kind(_safetensors, _import_torch),
    "tf1": Kind(_tf1, _import_tf),
    "tf2": Kind(_tf2, _import_tf),
    "encoder": Kind(_encoder, _load),
    "export-safetensors": Kind(_export("a.safetensors"), _load_export("a.safetensors")),
    "export-pth": Kind(_export("a.pth"), _load_export("a.pth")),
    "onnx": Kind(_export("a.onnx"), _load_export("a.onnx")),
    "npz": Kind(_npz, lambda folder: _read_all(folder / "a.npz")),
    "npz-compressed": Kind(_npz_compressed, lambda folder: _read_all(folder / "a.npz")),
    "images": Kind(_image, _read_all),
    "labels": Kind(_labels, _open_labels),
    "run-config": Kind(_run_config, _open_run_config),
    "metrics": Kind(_metrics, _open_metrics),
    "results": Kind(_results, _open_results),
}

# ---- mutations -------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 31, 255, 400, 65_536, 1 << 31, 1 << 40, 1 << 63, 10**30, 10**400, 0.5, -0.5,
    1e300, 5e-324, "", "x", "x" * 5000, "\x1b[2J", "../../etc/passwd", "a\nb", "\ud800", [], {}, [[]], [1],
    ["a"] * 1000, [0.5] * 7, {"a": 1}, "timm/resnet18", "torchvision/vgg16", "small", "resnet200", "cifar",
    "linear", "none", "google",
]  # fmt: skip


OPCODES = b"().012NIJKLMRQXU]}{abcdeghijlopqrstu\x80\x81\x85\x86\x87\x88\x8a\x8b\x8c\x8d\x93\x94\x95"  # of pickles


def mutate(files: Files, rng: np.random.Generator) -> Files:
    """One of the files damaged, sometimes twice."""
    names = sorted(files)
    name = names[int(rng.integers(len(names)))]
    content = files[name]
    for _ in range(1 + int(rng.random() < 0.2)):
        content = _structured(name, content, rng) if rng.random() < 0.5 else damaged(content, rng)
    return files | {name: content}


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage as disks, networks and enemies do it; half of it near the ends, where headers and directories are."""
    raw = bytearray(content or b"\0")
    edge = min(len(raw), 2000)
    where = int(rng.integers(3))
    at = int([rng.integers(len(raw)), rng.integers(edge), len(raw) - rng.integers(1, edge + 1)][where])
    other = int(rng.integers(len(raw)))
    length = int(rng.integers(1, 100))
    match int(rng.integers(10)):
        case 0:
            for bit in rng.integers(0, 8, rng.integers(1, 9)):
                raw[min(len(raw) - 1, at + int(rng.integers(16)))] ^= 1 << int(bit)
        case 1:
            del raw[at:]
        case 2:
            del raw[at : at + length]
        case 3:
            raw[at:at] = raw[other : other + length] * int(rng.integers(1, 30))  # duplicated
        case 4:
            raw[at : at + length] = raw[other : other + length]  # spliced
        case 5:
            raw[at:at] = rng.bytes(length)
        case 6:  # a length
            size = int(rng.choice([1, 2, 4, 8]))
            number = int(rng.choice([0, 1, len(raw), 1 << 16, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, (1 << 63) - 1]))
            raw[at : at + size] = (number & ((1 << 8 * size) - 1)).to_bytes(
                size, ["little", "big"][int(rng.integers(2))]
            )
        case 7:
            raw[at] = OPCODES[int(rng.integers(len(OPCODES)))]
        case 8:
            raw[at : at + 8] = b"\xff" * 8
        case _:
            digits = [i for i, byte in enumerate(raw[:4000]) if 48 <= byte <= 57]
            if digits:
                raw[int(rng.choice(digits))] = int(rng.integers(48, 58))
                raw[digits[0] : digits[0]] = b"9" * int(rng.choice([0, 1, 3, 20]))
    return bytes(raw)


def _structured(name: str, content: bytes, rng: np.random.Generator) -> bytes:
    """A change that leaves the outer form whole: a value of JSON, a header, a record of an archive."""
    try:
        if name.endswith(".json"):
            return _other_json(json.loads(content), rng)
        if name.endswith(".jsonl"):
            lines = content.split(b"\n")
            i = int(rng.integers(len(lines) - 1))
            lines[i] = _other_json(json.loads(lines[i]), rng)
            return b"\n".join(lines)
        if name.endswith(".index"):
            from test_tensor_bundle import sealed

            return sealed(damaged(content, rng))
        if content[:2] == b"PK":
            return _other_archive(content, rng)
        if content[8:9] == b"{":
            length = int.from_bytes(content[:8], "little")
            header = _other_json(json.loads(content[8 : 8 + length]), rng)
            return struct.pack("<Q", len(header)) + header + content[8 + length :]
    except Exception:
        pass  # the first damage was such that there is no outer form any more
    return damaged(content, rng)


def _other_json(values: Any, rng: np.random.Generator) -> bytes:
    """One value, key or length changed."""
    values = copy.deepcopy(values)
    places: list[tuple[Any, Any]] = []
    waiting = [values]
    while waiting:
        item = waiting.pop()
        keys = list(item) if isinstance(item, dict) else list(range(len(item))) if isinstance(item, list) else []
        places += [(item, key) for key in keys]
        waiting += [item[key] for key in keys]
    if places:
        item, key = places[int(rng.integers(len(places)))]
        kind = int(rng.integers(6))
        if kind == 0:
            del item[key]
        elif kind == 1 and isinstance(item, dict):
            item[str(VALUES[int(rng.integers(len(VALUES)))])[:5000]] = item[key]
        elif kind == 2 and isinstance(item[key], int | float):
            item[key] = item[key] * int(rng.choice([-1, 0, 2, 10, 1000, 10**9, 10**18]))
        else:
            item[key] = VALUES[int(rng.integers(len(VALUES)))]
    else:
        values = VALUES[int(rng.integers(len(VALUES)))]
    text = json.dumps(values)
    if rng.random() < 0.1:
        text = text.replace("null", str(rng.choice(["NaN", "Infinity", "[" * 5000, "9" * 5000, "-"])), 1)
    return text.encode()


def _other_archive(content: bytes, rng: np.random.Generator) -> bytes:
    """The archive again, with right checksums: a record damaged, missing, twice or compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        records = [(record.filename, old.read(record), record.compress_type) for record in old.infolist()]
    pickles = [i for i, (name, _, _) in enumerate(records) if name.endswith((".pkl", ".npy"))]
    i = int(rng.choice(pickles)) if pickles and rng.random() < 0.7 else int(rng.integers(len(records)))
    name, raw, compression = records[i]
    match int(rng.integers(8)):
        case 0:
            del records[i]
        case 1:
            records.append(records[i])
        case 2:
            records[i] = (name, raw, zipfile.ZIP_STORED if compression else zipfile.ZIP_DEFLATED)
        case 3:
            records[i] = (records[int(rng.integers(len(records)))][0], raw, compression)
        case _:
            records[i] = (name, damaged(raw, rng), compression)
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w") as new:
        for name, raw, compression in records:
            new.writestr(zipfile.ZipInfo(name), raw, compression)
    return buffer.getvalue()


# ---- one file --------------------------------------------------------------------------------------------------------


def whole_files(kind: str) -> Files:
    """The files of a kind, undamaged."""
    with tempfile.TemporaryDirectory() as folder:
        KINDS[kind].build(Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def mutation(kind: str, files: Files, seed: int) -> Files:
    """Mutation `seed` of the files."""
    return mutate(files, np.random.default_rng([sum(kind.encode()), seed]))


def write(files: Files, folder: Path) -> None:
    """Write them into a folder, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def outcome(kind: str, folder: Path) -> str:
    """Either "loads", "refused", or a finding: what was raised, the seconds or the bytes."""
    from simclr.errors import UserError

    size = sum(file.stat().st_size for file in folder.iterdir())
    before, began = _memory("VmRSS"), time.perf_counter()
    _reset_peak()
    try:
        KINDS[kind].open(folder)
        result = "loads"
    except UserError as error:
        text = str(error)
        result = "refused" if text.isprintable() and len(text) < 3000 else f"sentence: {ascii(text)[:300]}"
    except Slow:
        return f"more than {SECONDS} s"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(last.filename).name}:{last.name}: {ascii(str(error))[:200]}"
    if time.perf_counter() - began > SECONDS:
        return f"{time.perf_counter() - began:.0f} s"
    taken = _memory("VmHWM") - before
    return f"{taken >> 20} MB for {size:,} bytes" if taken > 4 * size + SPARE_BYTES else result


def _memory(field: str) -> int:
    """Bytes of this process, by /proc (Linux)."""
    with open("/proc/self/status") as lines:
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":")), 0)


def _reset_peak() -> None:
    with suppress(OSError):  # then the peak is that of the process, and only growth beyond it counts
        Path("/proc/self/clear_refs").write_text("5")


# ---- workers ---------------------------------------------------------------------------------------------------------


def work(kind: str, first: int, step: int, folder: Path) -> None:
    """Open mutations first, first + step, ... until the process is killed; says each finding and, at times, counts."""

    def stop(*_: object) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, stop)
    warnings.simplefilter("ignore")
    output, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
    files = whole_files(kind)
    write(files, folder)
    KINDS[kind].open(folder)  # so that everything is imported
    limit = _memory("VmSize") + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: Counter[str] = Counter()
    for number, seed in enumerate(range(first, sys.maxsize, step)):
        write(mutation(kind, files, seed), folder)
        signal.setitimer(signal.ITIMER_REAL, SECONDS * 2)  # twice: the machine may be busy; `outcome` measures
        result = outcome(kind, folder)
        signal.setitimer(signal.ITIMER_REAL, 0)
        counts[result if result in ("loads", "refused") else "findings"] += 1
        if result not in ("loads", "refused"):
            print(json.dumps({"kind": kind, "seed": seed, "finding": result}), file=output, flush=True)
        if number % 50 == 49:
            print(json.dumps({"kind": kind, "seed": seed, "counts": counts}), file=output, flush=True)
            counts.clear()
        sys.stdout.truncate(0)  # pyrefly: ignore
        sys.stderr.truncate(0)  # pyrefly: ignore


def drill_kind(kind: str, count: int, seed: int, until: float, out: Path) -> Counter[str]:
    """Run one worker until `count` mutations are done; started anew behind a mutation that ended it."""
    counts: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="drill-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    position = seed
    while sum(counts.values()) < count and time.time() < until:
        command = [sys.executable, __file__, "--work", kind, str(position), str(folder / "x")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        while sum(counts.values()) < count and time.time() < until:
            if not select.select([process.stdout], [], [], SILENT_SECONDS)[0]:
                _keep(out, kind, f"after-{position}", folder / "x", "hangs")
                counts["findings"] += 1
                break
            line = process.stdout.readline()
            if not line:
                _keep(out, kind, f"after-{position}", folder / "x", f"the process ended with {process.wait()}")
                counts["findings"] += 1
                break
            said = json.loads(line)
            position = said["seed"] + 1
            if "finding" in said:
                write(mutation(kind, whole_files(kind), said["seed"]), folder / "y")
                _keep(out, kind, str(said["seed"]), folder / "y", said["finding"])
            counts.update(said.get("counts", {}))
        process.kill()
        process.wait()
        position += 50
    shutil.rmtree(folder, ignore_errors=True)
    return counts


def _keep(out: Path, kind: str, seed: str, folder: Path, finding: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "findings.jsonl", "a") as lines:
        lines.write(json.dumps({"kind": kind, "seed": seed, "finding": finding}) + "\n")
    target = out / "findings" / f"{kind}-{seed}"
    if len(list(target.parent.glob(f"{kind}-*"))) < 30 and folder.is_dir():  # enough to see what it is
        shutil.copytree(folder, target, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="mutations of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="number of each kind's first mutation")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many minutes")
    parser.add_argument("--workers", type=int, default=1, help="kinds at once")
    parser.add_argument("--out", type=Path, default=Path("drill_files"), help="folder of findings and counts")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        kind, first, folder = args.work
        work(kind, int(first), 1, Path(folder))
        return
    from concurrent.futures import ThreadPoolExecutor

    each, rounds = -(-args.count // len(args.only)), -(-len(args.only) // args.workers)
    share = 60 * args.minutes / rounds  # seconds for each kind

    def one(kind: str) -> tuple[str, Counter[str]]:
        return kind, drill_kind(kind, each, args.seed, time.time() + share, args.out)

    with ThreadPoolExecutor(args.workers) as pool:
        total: Counter[str] = Counter()
        for kind, counts in pool.map(one, args.only):
            print(f"{kind:20} {sum(counts.values()):9,} {dict(counts)}", flush=True)
            total.update(counts)
    print(f"{'all':20} {sum(total.values()):9,} {dict(total)}; findings in {args.out}")


if __name__ == "__main__":
    main()
