"""Model card of a hub folder, made from the records of a run: data, settings, accuracies beside baselines, limits.

The card states only what the records hold, and names what they lack. No path of this machine is in it.
"""

import json
from pathlib import Path
from typing import Any

from simclr.reports.run_results import Table
from simclr.reports.table import markdown_table, seeds_note
from simclr.weights.exporters.preprocessing import in_words
from simclr.weights.folder import Model

PAPERS = {
    "simclr": "SimCLR (Chen et al. 2020, arXiv:2002.05709)",
    "moco": "MoCo v2 (Chen et al. 2020, arXiv:2003.04297)",
}
"""Methods of the package, as the card cites them."""

SETTINGS = (
    "method", "encoder", "width", "stem", "sk", "feature", "head", "head_layers", "head_dim", "head_norm", "queue",
    "ema", "size", "views_per_image", "small_crops", "small_crop_min", "small_crop_max", "augmentation", "strength",
    "crop_min", "flip", "jitter", "grayscale", "blur", "loss", "temperature", "optimizer", "lr", "lr_scaling",
    "weight_decay", "epochs", "batch_size", "global_bn", "seed",
)  # fmt: skip
"""Settings of pretraining that the card lists."""

BASELINE_MEANINGS = {
    "hog": "are histograms of oriented gradients (Dalal and Triggs 2005), made in seconds",
    "patches": "are features of k-means patches (Coates, Lee and Ng 2011) of the training images",
    "pixels": "are the images themselves as features",
    "random": "is the same network with random weights",
    "init": "is what this pretraining began from",
    "supervised": "is the same network trained from scratch on the same labels",
}


def model_card(
    name: str,
    model: Model,
    *,
    preprocessing: dict[str, Any],
    origin: dict[str, Any],
    run: dict[str, Any] | None,
    config: dict[str, Any] | None,
    tables: list[Table],
    licence: str | None,
) -> bytes:
    """README.md with the front matter that huggingface.co reads.

    Args:
        name: Of the model.
        preprocessing: What `preprocessing_of` returns.
        origin: Facts about where the weights come from, as the encoder's folder has them.
        run, config: run.json and config.json of the pretraining, if it is one of ours.
        tables: What `results_of` returns.
        licence: An identifier such as apache-2.0; None: the author states none.
    """
    parts = [
        _front_matter(model, licence),
        f"# {name}",
        _summary(model, origin, run),
        "## Use\n\n" + _use(model),
        "## What goes in\n\n"
        + in_words(preprocessing)
        + " `preprocessing.json` has every number. `simclr.load(...).embed` does all of it, and refuses images with "
        "other channels, or floats outside [0, 1].",
        "## Training\n\n" + _training(origin, run, config) + _progress(model),
        "## Accuracy\n\n" + _accuracy(tables),
        "## Intended use and limits\n\n" + _limits(model, run, tables),
        "## Licence\n\n" + _licence(licence),
    ]
    return ("\n\n".join(parts) + "\n").encode()


def _front_matter(model: Model, licence: str | None) -> str:
    """YAML; JSON's strings are YAML's too."""
    task = "image-classification" if model.classes else "image-feature-extraction"
    lines = ["---", f"license: {json.dumps(licence or 'other')}"]
    if licence is None:
        lines.append('license_name: "unstated"')
    lines += ["library_name: simclr", f"pipeline_tag: {task}", "tags:", "- simclr", "- self-supervised-learning"]
    return "\n".join([*lines, "- contrastive-learning", f"- {task}", "---"])


def _summary(model: Model, origin: dict[str, Any], run: dict[str, Any] | None) -> str:
    config = model.encoder.config
    images = f"{config.channels}-channel images of {config.size} x {config.size} pixels"
    width = "" if config.width == 1 else f", width {config.width:g}"
    what = f"An image encoder ({config.name}{width}): {images} to {model.encoder.num_features} features"
    what += f", with a classifier of {len(model.classes):,} classes. " if model.classes else ". "
    if run is not None:
        count, data = run["data"]["images"], run["data"]["name"]
        method = PAPERS.get(run["method"], run["method"])
        return f"{what}Pretrained by {method} on {count:,} unlabelled images, {data}."
    if "imported_from" in origin:
        return f"{what}Imported from {origin['imported_from']} ({origin.get('format', 'another format')})."
    if origin.get("method") in ("finetune", "distill"):
        return f"{what}Made by `simclr {origin['method']}`."
    if origin.get("method") in PAPERS:
        average = ", whose weights are a moving average of those that were trained" if origin.get("average") else ""
        return f"{what}Pretrained by {PAPERS[origin['method']]}{average}."
    return what + "Where its weights come from is not recorded."


def _use(model: Model) -> str:
    lines = ["import simclr", "", 'model = simclr.load("FOLDER")  # the downloaded files']
    lines.append(f'features = model.embed(["a.png", "b.png"])  # (2, {model.encoder.num_features}) float32')
    if model.classes:
        lines.append('names = model.classify(["a.png", "b.png"])')
    return "```python\n" + "\n".join(lines) + "\n```"


def _training(origin: dict[str, Any], run: dict[str, Any] | None, config: dict[str, Any] | None) -> str:
    if run is None or config is None:
        known = {key: value for key, value in origin.items() if value not in (None, [], False)}
        if not known:
            return "Nothing is recorded."
        return "Recorded of the origin: " + ", ".join(f"{key} {value}" for key, value in known.items()) + "."
    data, machine = run["data"], run["machine"]
    lines = [f"- data: {data['name']}, {data['images']:,} images, fingerprint `{data['fingerprint']}`"]
    if data["left_out"]:
        lines.append(f"- left out, unreadable: {len(data['left_out']):,} files")
    gpu = machine.get("gpu")
    lines.append(f"- simclr {machine['simclr']}, torch {machine['torch']}, {f'on {gpu}' if gpu else 'on a CPU'}")
    lines += _start(run)
    if origin.get("method") in ("finetune", "distill"):
        lines.append(f"- after that: {origin['method']}, with labels")
    table = ["| setting | value |", "|---|---|"]
    idle = () if config.get("small_crops") else ("small_crop_min", "small_crop_max")
    table += [f"| {key} | {config[key]} |" for key in SETTINGS if config.get(key) is not None and key not in idle]
    return "\n".join(lines) + "\n\n" + "\n".join(table)


def _start(run: dict[str, Any]) -> list[str]:
    """Where the weights began, and whether labels took part."""
    initial = run.get("inputs", {}).get("init")
    if initial is None:
        return ["- no label took part in pretraining"]
    head = "without a projection head" if initial["head"] is None else "with their projection head"
    return [
        f"- began from the weights of {initial['name']} {head}, SHA-256 of the encoder `{initial['weights']}`",
        "- no label took part in this pretraining; how those weights were made is not recorded here",
    ]


def _progress(model: Model) -> str:
    if model.progress is None:
        return ""
    if model.progress.finished:
        return f"\n\nThe training of these weights reached its end, step {model.progress.step:,}."
    return f"\n\n**The training of these weights is unfinished: they are from {model.progress.text}.**"


def _accuracy(tables: list[Table]) -> str:
    if not tables:
        return "Not measured for these weights. `simclr evaluate FOLDER DATA` does so, beside what they have to beat."
    shown = []
    for table in tables:
        title = f"{table.data or 'Labelled images (the results do not name them)'}: {table.split}."
        rows = table.rows
        shown.append(f"{title} Top-1 in %, {seeds_note(rows)}.\n\n{markdown_table(rows, corner='features')}")
    there = {row.name for table in tables for row in table.rows}
    meanings = [f"`{name}` {meaning}" for name, meaning in BASELINE_MEANINGS.items() if name in there]
    if meanings:
        shown.append(f"Baselines: {'; '.join(meanings)}.")
    return "\n\n".join(shown)


def _limits(model: Model, run: dict[str, Any] | None, tables: list[Table]) -> str:
    uses = "features for classification with few labels, for search and for grouping of images"
    lines = [f"- Made for {uses} like those that it was trained on; on others it was not measured."]
    if model.classes:
        lines.append(
            f"- It knows {len(model.classes):,} classes and answers with one of them whatever it is shown; its "
            "probabilities are not calibrated."
        )
    lines.append(
        "- What was never in the training images, or what the augmentations erase (exact colours, small objects at the "
        "rim), may be missing from the features."
    )
    if run is not None:
        lines.append("- Whatever is one-sided in the training images is in the features too; it was not examined.")
    if not tables:
        lines.append("- No accuracy was measured.")
    return "\n".join(lines)


def _licence(licence: str | None) -> str:
    if licence is None:
        return "The author of these weights has stated none, so no permission is given by this card; ask them."
    return (
        f"The weights are under {licence}, as stated by their author. The images they were trained on have their own."
    )


def read_json(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if there is none or it is damaged."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
