"""Tables, JSON and model cards read results by their fields; figures are those of the results, by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from simclr.evaluation.results import KEY_FIELDS, About, Measured, Result, ResultStore
from simclr.models import EncoderConfig, build_encoder
from simclr.reports.evaluation import accuracy_summary, accuracy_text, records
from simclr.reports.label_free import label_free_summary, label_free_text
from simclr.reports.pictures import draw_accuracies
from simclr.reports.probe import probe_summary, probe_text
from simclr.reports.run_results import results_of
from simclr.weights.folder import Model, digest_of


def result(subject: str, protocol: str, top1: float, seed: int = 0, description: str = "as told") -> Result:
    return Result(
        protocol=protocol, version={}, model={"weights": subject}, data={"test": "a"}, settings={}, seed=seed,
        metrics={"top1": top1, "mean_per_class": top1 / 2}, details={"credits": [1.0]}, description=description,
        subject=subject, data_name="digits", split="80/20", num_test=400,
    )  # fmt: skip


RESULTS = [
    result("encoder", "knn", 0.5), result("encoder", "knn", 0.7, seed=1), result("encoder", "finetune", 0.9),
    result("supervised", "supervised", 0.25, description="from scratch"),
    result("pixels", "knn", 0.4, description="on pixels"),
]  # fmt: skip


def test_the_main_table_and_what_is_said_below_it() -> None:
    assert accuracy_text(RESULTS).split("\n") == [
        "features                       kNN  fine-tuned",
        "encoder                60.0 ± 14.1        90.0",
        "pixels (baseline)             40.0           -",
        "supervised (baseline)            -        25.0",
        "Top-1 accuracy in %, mean ± sample standard deviation over 1 to 2 seeds.",
        "knn of encoder: as told.",
        "knn of pixels: on pixels.",
        "finetune: as told.",
        "supervised: from scratch.",
        "Test images: 400, so the standard error of an accuracy is at most 2.5 points.",
    ]


def test_top_5_has_a_table_where_the_papers_report_it() -> None:
    """Of linear classifiers and fine-tuning on more than ten classes, not of nearest neighbours."""

    def many(one: Result, num_classes: int = 100) -> Result:
        return replace(one, metrics={**one.metrics, "top5": one.value("top1") + 0.05}, num_classes=num_classes)

    measured = [*RESULTS, result("encoder", "linear", 0.6)]
    assert accuracy_text([many(one) for one in measured]).split("\n")[4:9] == [
        "Top-1 accuracy in %, mean ± sample standard deviation over 1 to 2 seeds.",
        "features               fine-tuned  linear",
        "encoder                      95.0    65.0",
        "supervised (baseline)        30.0       -",
        "Top-5 accuracy in %, one seed, so no spread.",
    ]
    assert accuracy_text([many(one, 10) for one in measured]) == accuracy_text(measured)


def test_the_json_keeps_its_keys() -> None:
    """They are what scripts of users read."""
    summary = json.loads(json.dumps(accuracy_summary(RESULTS)))
    assert summary["encoder"] == {"knn": pytest.approx(0.6), "finetune": 0.9}
    assert summary["supervised"] == {"supervised": 0.25} and summary["pixels"] == {"knn": 0.4}
    assert summary["spread"]["encoder"] == {"knn": pytest.approx(0.02**0.5), "finetune": None}
    assert summary["results"][1] == {
        "features": "encoder", "protocol": "knn", "seed": 1, "top1": 0.7, "mean_per_class": 0.35, "how": "as told",
    }  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_the_legend_covers_no_figure(rows: int) -> None:
    figure = Figure(figsize=(6, 4.3), dpi=110)
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.add_subplot()
    draw_accuracies(axes, {f"model {row}": {"knn": 1.0, "linear": 1.0} for row in range(rows)})
    figure.draw(renderer)
    legend = axes.get_legend()
    assert legend is not None and len(axes.texts) == 2 * rows
    assert legend.get_window_extent(renderer).y1 <= axes.get_window_extent(renderer).y1
    assert legend.get_window_extent(renderer).y0 > max(text.get_window_extent(renderer).y1 for text in axes.texts)


def test_records_are_results_without_details() -> None:
    plain = json.loads(json.dumps(records(RESULTS)))
    assert [Result(**record) for record in plain] == [replace(each, details={}) for each in RESULTS]


def test_probes_by_layer_and_task() -> None:
    details = {"chance": {"rotation": 0.25}, "num_train": 9, "num_test": 3, "notes": ["Colour is left out."]}
    results = [
        replace(result(subject, "probe", 0, seed), metrics={"h/rotation": h, "head.0/rotation": z}, details=details)
        for subject, seed, h, z in (("encoder", 0, 0.8, 0.3), ("random", 0, 0.5, 0.2), ("encoder", 1, 0.6, 0.4))
    ]
    assert probe_text(results).split("\n") == [
        "layer                 rotation",
        "h                  70.0 ± 14.1",
        "head.0              35.0 ± 7.1",
        "random: h                 50.0",
        "random: head.0            20.0",
        "chance (baseline)         25.0",
        "What an MLP reads from each layer, accuracy in %, mean ± sample standard deviation over 1 to 2 seeds.",
        "Colour is left out.",
    ]
    summary = probe_summary(results)
    assert [probes["table"]["h"]["rotation"] for probes in summary["seeds"]] == [0.8, 0.6]
    assert summary["compared"]["random"] == [
        {"table": {"h": {"rotation": 0.5}, "head.0": {"rotation": 0.2}}, **details}
    ]


def test_label_free_measures_and_copies() -> None:
    pairs = [
        {"original": f"o{i}", "copy": f"c{i}", "original_row": i, "copy_row": i, "similarity": 1.0, "kind": "identical"}
        for i in range(12)
    ]
    copies = {
        "searched": "a", "asked": "a", "num_searched": 40, "num_asked": 40, "num_identical": 12, "num_near": 0,
        "num_flat": 0, "pairs": pairs, "sentence": "of an earlier version",
    }  # fmt: skip
    details = {"alignment_rows": 0, "uniformity_rows": 40, "num_clusters": 4, "num_features": 8}
    metrics = {"alignment": None, "uniformity": -1.5, "effective_rank": 4.25, "silhouette": 0.5}
    pixels = replace(result("pixels", "label-free", 0), metrics=metrics)
    first = replace(pixels, details=details | {"within": copies, "across": None})
    lines = label_free_text([first]).split("\n")
    assert lines[1].split() == ["pixels", "(baseline)", "-", "-1.50", "4.25", "8.00", "0.50"]
    assert lines[3].startswith("12 of 40 images of a are copies") and lines[4] == "  c0 shows o0 (1.000)"
    assert lines[-1] == "  and 2 more, all in --json" and len(lines) == 15
    assert label_free_summary([first])["pixels"]["silhouette"] == 0.5


def test_a_model_card_takes_results_of_its_weights_alone(tmp_path: Path) -> None:
    """Another encoder may have the very same accuracies on the same images."""
    encoder = build_encoder(EncoderConfig("small", channels=1, size=8, width=0.25), seed=0)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"method": "simclr", "machine": {"cpu_threads": 1}}')
    store = ResultStore(tmp_path / "evaluation" / "results.jsonl")
    for weights, subject in ((digest_of(encoder), "encoder"), ("other", "encoder"), ("third", "random")):
        for seed in (0, 1):
            key = result(subject, "knn", 0, seed).key | {"model": {"weights": weights}}
            about = About(subject=subject, data_name="digits", split=f"80/20 by class, seed {seed}")
            store.get(key, lambda seed=seed: Measured(metrics={"top1": 0.5 + seed / 10}), about)
    elsewhere = result("encoder", "knn", 0).key | {"model": {"weights": "other"}, "data": {"test": "b"}}
    store.get(elsewhere, lambda: Measured(metrics={"top1": 0.5}), About(subject="encoder", data_name="photos"))
    assert set(elsewhere) == set(KEY_FIELDS)
    (table,) = results_of(tmp_path, Model(encoder, "google"))
    assert (table.data, table.split) == ("digits", "80/20 by class")
    assert {row.name: dict(row.values) for row in table.rows} == {
        "encoder": {"kNN": [0.5, 0.6]}, "random": {"kNN": [0.5, 0.6]},
    }  # fmt: skip
