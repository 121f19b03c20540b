"""Golden runs: short trainings whose losses and weights a change of structure must leave identical.

    python tests/golden/runs.py            run all and compare with golden.json (exit code 1 where anything differs)
    python tests/golden/runs.py --write    run all and record what came out: only for a change of numbers, which the
                                           changelog then names, or to add the digests of another machine

One thread, CPU. Losses are compared with a tolerance on every machine; the SHA-256 of the final weights only on those
whose processor and torch are recorded, because another processor or release may add in another order. `golden.json`
holds the losses of each minor release of torch, because what torch draws from a seed, and so the initial weights,
changed between 2.11 and 2.14, and the digests of each machine.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

RECORD = Path(__file__).parent / "golden.json"
EARLY_STEPS, EARLY_TOLERANCE, LATER_TOLERANCE = 5, 2e-3, 5e-2
"""Relative, of a loss. With all vector instructions of the machine switched off (SSE instead of AVX-512) the worst
difference in the first five steps was 8e-4, of distillation, and in twenty 2e-2, of gradient caching with AdamW, where
rounding grows; a wrong gradient shows by the second or third step."""
ACCURACY_TOLERANCE = 0.02
"""Of accuracies in [0, 1]: seven of the 359 test images may fall on the other side of a decision."""

_RECORDS = "--log-every 1 --workers 0 --device cpu --seed 3"
_DIGITS = f"pretrain digits --recipe digits --warmup-epochs 1 --knn-every 1 --batch-size 144 --epochs 2 {_RECORDS}"
_LABELS = f"digits --lr 0.01 --epochs 2 --min-steps 0 --batch-size 144 {_RECORDS}"

RUNS = {
    "pretrain-plain": f"{_DIGITS} --memory plain",
    "pretrain-recompute": f"{_DIGITS} --memory checkpointing",
    "pretrain-cache": f"{_DIGITS} --memory grad-cache --chunk 48",
    "pretrain-colour": (
        "pretrain COLOUR --recipe cpu --size 16 --encoder small --stem strided --feature h --scaling none "
        "--optimizer lars --lr 0.005 --momentum 0.9 --warmup-epochs 1 "
        "--views torchvision --loss dcl --head-layers 3 --blur 0.5 --batch-size 24 --epochs 4 --memory plain "
        f"--knn-every 0 {_RECORDS}"
    ),
    "finetuned": f"finetune pretrain-plain {_LABELS} --labels 20%",
    "supervised": f"finetune random {_LABELS} --size 8 --optimizer adamw",
    "distilled": f"distill finetuned {_LABELS} --labels 20% --alpha 0.8",
}
"""Name -> command without --out. A name of an earlier run stands for its folder, COLOUR for the images below."""

EVALUATION = (
    "evaluate pretrain-plain digits --protocol knn,linear,logistic,finetune --labels 20/class --cache off --device cpu "
    "--finetune.epochs 2 --seeds 2 --compare random pixels"
)


def run_all(work: Path) -> dict[str, Any]:
    """Run everything below the folder `work`; name -> losses and digest, and the accuracies of the evaluation."""
    np.savez(work / "colour.npz", x=_colour_images())
    results: dict[str, Any] = {}
    for name, command in RUNS.items():
        _simclr(*_placed(command, work), "--out", str(work / name))
        results[name] = {"losses": list(_losses(work / name)), "weights": _weights_digest(work / name)}
    _simclr(*_placed(EVALUATION, work), "--json", str(work / "evaluation.json"))
    measured = json.loads((work / "evaluation.json").read_text())["results"]
    results["evaluation"] = {f"{r['features']} {r['protocol']} seed {r['seed']}": r["top1"] for r in measured}
    return results


def load_record() -> dict[str, Any] | None:
    """What is recorded for this release of torch: runs, and the digests of this machine or None; None: nothing is."""
    content = json.loads(RECORD.read_text()) if RECORD.exists() else {"runs": {}, "digests": {}}
    if torch_release() not in content["runs"]:
        return None
    return {"runs": content["runs"][torch_release()], "digests": content["digests"].get(machine_name())}


def differences(results: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """A sentence for everything in which results differ from the record (`load_record`)."""
    found = []
    digests = recorded["digests"]
    for name in RUNS:
        ours, theirs = (np.array(source[name]["losses"]) for source in (results, recorded["runs"]))  # (steps,)
        if ours.shape != theirs.shape:
            found.append(f"{name}: {len(ours)} steps instead of {len(theirs)}")
        elif (wrong := _wrong_steps(ours, theirs)).any():
            step = int(wrong.argmax())
            found.append(f"{name}: loss of step {step + 1} is {ours[step]!r} instead of {theirs[step]!r}")
        elif digests is not None and digests[name] != results[name]["weights"]:
            found.append(f"{name}: other final weights, though the losses agree within the tolerance")
    ours, theirs = results["evaluation"], recorded["runs"]["evaluation"]
    if ours.keys() != theirs.keys():
        found.append(f"evaluation: {sorted(ours.keys() ^ theirs.keys())} on one side only")
    exact = digests is not None
    for key in ours.keys() & theirs.keys():
        if abs(ours[key] - theirs[key]) > (0 if exact else ACCURACY_TOLERANCE):
            found.append(f"evaluation: {key} is {ours[key]} instead of {theirs[key]}")
    return found


def _wrong_steps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    tolerance = np.where(np.arange(len(theirs)) < EARLY_STEPS, EARLY_TOLERANCE, LATER_TOLERANCE)
    return np.abs(ours - theirs) > tolerance * np.abs(theirs)  # (steps,)


def torch_release() -> str:
    """Minor release, such as 2.14."""
    import torch

    return ".".join(torch.__version__.split(".")[:2])


def machine_name() -> str:
    """What decides the order of additions: processor, vector instructions, and versions of torch and numpy."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    model = [facts.get(f"{name}\t", facts.get(f"{name}\t\t", "?")).strip() for name in ("vendor_id", "model")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{' '.join(model)}, {capability}, torch {torch.__version__.split('+')[0]}, numpy {np.__version__}"


def _placed(command: str, work: Path) -> Iterator[str]:
    for word in command.split():
        yield str(work / "colour.npz") if word == "COLOUR" else str(work / word) if word in RUNS else word


def _simclr(*arguments: str) -> None:
    from simclr.cli.main import main

    before, sys.argv = sys.argv, ["simclr", *arguments]
    try:
        main()
    finally:
        sys.argv = before


def _colour_images() -> np.ndarray:
    """(120, 20, 20, 3) uint8: smooth colours with a bright square, so that views of one image are alike."""
    numbers = np.random.default_rng(0)
    images = numbers.uniform(30, 220, (120, 1, 1, 3)) + numbers.uniform(-30, 30, (120, 20, 20, 3))
    for image, (top, left) in zip(images, numbers.integers(0, 12, (120, 2)), strict=True):
        image[top : top + 8, left : left + 8] += 60
    return images.clip(0, 255).astype(np.uint8)


def _losses(run: Path) -> Iterator[float]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)["loss"]


def _weights_digest(run: Path) -> str:
    """SHA-256 of names and values of all tensors of the encoder's file, in the order of the names."""
    from safetensors.numpy import load_file

    digest = sha256()
    for name, tensor in sorted(load_file(run / "encoder" / "model.safetensors").items()):
        digest.update(name.encode() + tensor.tobytes())
    return digest.hexdigest()


def _write(results: dict[str, Any]) -> None:
    """Add this machine's digests, and other numbers in the place of those that differ beyond the tolerance."""
    content = json.loads(RECORD.read_text()) if RECORD.exists() else {"runs": {}, "digests": {}}
    before = content["runs"].get(torch_release())
    if before is None or differences(results, {"runs": before, "digests": None}):
        runs = {name: {"losses": results[name]["losses"]} for name in RUNS}
        content["runs"][torch_release()] = runs | {"evaluation": results["evaluation"]}
        of_others = f"torch {torch_release()}."
        content["digests"] = {name: found for name, found in content["digests"].items() if of_others not in name}
    content["digests"][machine_name()] = {name: results[name]["weights"] for name in RUNS}
    RECORD.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Compare with the record, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record what comes out")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="golden-") as work:
        results = run_all(Path(work))
    recorded = load_record()
    found = ["nothing is recorded for this torch"] if recorded is None else differences(results, recorded)
    print("\n".join(found) or "identical")
    if arguments.write:
        _write(results)
    return 1 if found and not arguments.write else 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    sys.exit(main())
