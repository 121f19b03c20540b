"""benchmarks/checkpoints.py: small checkpoints in the authors' layout and format, on a folder of a few JPEG files."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bundle_writer import authors_variables, write_bundle
from simclr.models import EncoderConfig, LinearClassifier, ProjectionHead, build_encoder
from simclr.models.classifier import usual_names

# Top-1 accuracy in % of SimCLR v2 by the README of google-research/simclr: 1 %, 10 %, 100 %, linear, supervised.
README_TOP1 = {
    "r50_1x_sk0": (57.9, 68.4, 76.3, 71.7, 76.6),
    "r50_1x_sk1": (64.5, 72.1, 78.7, 74.6, 78.5),
    "r50_2x_sk0": (66.3, 73.9, 79.1, 75.6, 77.8),
    "r50_2x_sk1": (70.6, 77.0, 81.3, 77.7, 79.3),
    "r101_1x_sk0": (62.1, 71.4, 78.2, 73.6, 78.0),
    "r101_1x_sk1": (68.3, 75.1, 80.6, 76.3, 79.6),
    "r101_2x_sk0": (69.1, 75.8, 80.7, 77.0, 78.9),
    "r101_2x_sk1": (73.2, 78.8, 82.4, 79.0, 80.1),
    "r152_1x_sk0": (64.0, 73.0, 79.3, 74.5, 78.3),
    "r152_1x_sk1": (70.0, 76.5, 81.3, 77.2, 79.9),
    "r152_2x_sk0": (70.2, 76.6, 81.1, 77.4, 79.1),
    "r152_2x_sk1": (74.2, 79.4, 82.9, 79.4, 80.4),
    "r152_3x_sk1": (74.9, 80.1, 83.1, 79.8, 80.5),
}
NUM_CLASSES, WIDTH, SIZE = 1000, 1 / 32, 32


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import checkpoints

    return checkpoints


def write_checkpoint(folder: Path, *, seed: int, layer: int) -> Any:
    """A network in the authors' format; returns what it computes: (B, 3, S, S) -> (B, K) logits."""
    encoder = build_encoder(EncoderConfig("resnet10", channels=3, size=SIZE, width=WIDTH))
    head = ProjectionHead(encoder.num_features, layers=3, dim=8)
    linear = LinearClassifier(encoder.num_features, NUM_CLASSES)
    variables = authors_variables(encoder, head, linear, seed=seed)
    write_bundle(folder / "model.ckpt-7", {k: v for k, v in variables.items() if not k.endswith("/Momentum")})
    for module in (encoder, head, linear):
        module.eval()

    @torch.no_grad()
    def logits(x: torch.Tensor) -> torch.Tensor:
        return linear(head.hiddens(encoder(x))[layer])

    return logits


def write_images(folder: Path, places: list[int], logits: Any) -> np.ndarray:
    """A JPEG per place, in the folder of the class that `logits` ranks there; (n, S, S, 3) pixels as Pillow reads."""
    names, _ = usual_names(NUM_CLASSES)
    generator = np.random.default_rng(0)
    pixels = []
    for i, place in enumerate(places):
        drawn = np.kron(generator.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        file = folder / f"{i}.JPEG"
        folder.mkdir(exist_ok=True)
        Image.fromarray(drawn).save(file)
        with Image.open(file) as image:
            pixels.append(np.asarray(image))
        ranking = logits(views_of(pixels[-1:])).argsort(descending=True)[0]
        of_class = folder / names[int(ranking[place])]
        of_class.mkdir(exist_ok=True)
        file.rename(of_class / file.name)
    return np.stack(pixels)


def views_of(pixels: Any) -> torch.Tensor:
    """Images of the encoder's own size as the network sees them, which is as they are."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", *map(str, arguments), "--device", "cpu", "--pack", "off"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_accuracies_are_those_of_the_notebook(script: Any) -> None:
    released = {item.name: item for item in script.released()}
    assert len(released) == 74
    for network, top1 in README_TOP1.items():
        ours = [released[f"simclrv2/{kind}/{network}"].top1 for kind in script.V2_COLUMNS]
        assert np.abs(np.subtract(ours, top1)).max() <= script.TOLERANCE + 1e-9
    for width, top1 in ((1, 69.1), (2, 74.2), (4, 76.6)):
        assert abs(released[f"simclrv1/pretrain/{width}x"].top1 - top1) <= script.TOLERANCE
    item = released["simclrv2/finetuned_10pct/r152_3x_sk1"]
    assert (item.network, item.width, item.sk, item.head_layer) == ("resnet152", 3, True, 1)
    layers = {item.name.split("/")[1]: item.head_layer for item in released.values()}
    assert [kind for kind, layer in layers.items() if layer] == ["finetuned_1pct", "finetuned_10pct"]


def test_checkpoints_are_evaluated_as_they_are(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right, different, damaged, of another network and missing ones; then again, from the kept results."""
    names = ("simclrv2/finetuned_1pct/a", "simclrv1/pretrain/1x", "simclrv2/supervised/a", "simclrv2/supervised/b")
    places = {name: tmp_path / "files" / name for name in names} | {
        "simclrv1/pretrain/1x": tmp_path / "files" / "ResNet50_1x"
    }
    few_labels = write_checkpoint(places[names[0]], seed=1, layer=1)
    linear = write_checkpoint(places[names[1]], seed=2, layer=0)
    for name in names[2:]:
        write_checkpoint(places[name], seed=3, layer=0)
    (data,) = places[names[2]].glob("*.data-*")
    data.write_bytes(b"****" + data.read_bytes()[4:])
    pixels = write_images(tmp_path / "val", [0, 3, 40, 0, 0], few_labels)

    def item(name: str, top1: float, *, layer: int = 0, width: float = WIDTH, endings: tuple[str, ...] = ()) -> Any:
        return script.Released(
            name=name, endings=endings or (name.partition("/")[2],), network="resnet10", width=width, sk=False,
            head_layer=layer, top1=top1,
        )  # fmt: skip

    table = [
        item(names[0], 59.8, layer=1), item(names[1], 99.0, endings=("ResNet50_1x",)), item(names[2], 50.0),
        item(names[3], 50.0, width=1.0), item("simclrv2/supervised/c", 50.0),
    ]  # fmt: skip
    monkeypatch.setattr(script, "released", lambda: table)
    monkeypatch.setattr(script, "NUM_IMAGES", len(pixels))
    out = tmp_path / "out"
    call = (tmp_path / "files", tmp_path / "val", "--out", out)
    assert run(script, monkeypatch, *call) == 1
    shown = capsys.readouterr().out
    assert f"| {names[0]} | TensorFlow 1 | 60.0 | 59.8 | 80.0 | agrees |" in shown
    assert "1 of 4 checkpoints agree" in shown and "Missing: simclrv2/supervised/c" in shown
    assert f"{names[2]}: not evaluated" in shown and "do not have their checksum" in shown
    assert f"{names[3]}: not evaluated" in shown and "another network" in shown

    class_names, _ = usual_names(NUM_CLASSES)
    labels = np.empty(len(pixels), np.int64)
    for file in (tmp_path / "val").glob("*/*"):
        labels[int(file.stem)] = class_names.index(file.parent.name)
    scores = linear(views_of(pixels)).numpy()
    ahead = (scores > scores[np.arange(len(labels)), labels][:, None]).sum(1)
    rows = {row["checkpoint"]: row for row in json.loads((out / "checkpoints.json").read_text())["rows"]}
    metrics = rows[names[1]]["result"]["metrics"]
    assert metrics["top1"] == (ahead < 1).mean() and metrics["top5"] == (ahead < 5).mean()
    assert f"Different: {names[1]}" in shown

    monkeypatch.setattr(script, "outputs", None)  # nothing is computed again
    assert run(script, monkeypatch, *call, "--only", names[0]) == 0
    assert len((out / "results.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    monkeypatch.setattr(script, "NUM_IMAGES", 50_000)
    assert run(script, monkeypatch, *call, "--only", names[0]) == 0
    shown = capsys.readouterr().out
    assert "no verdict from 5 images" in shown and "agree" not in shown


def test_mistakes_end_in_a_sentence(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for arguments, sentence in (
        ((tmp_path / "none", tmp_path), "There is no folder"),
        ((tmp_path, tmp_path), "None of the 74 checkpoints is below"),
        ((tmp_path, tmp_path, "--only", "r50"), "--only was r50"),
        ((tmp_path, tmp_path, "--batch-size", 0), "--batch-size was 0"),
        ((tmp_path, tmp_path, "--out", tmp_path / "file"), "cannot be written"),
    ):
        assert run(script, monkeypatch, "--out", tmp_path / "out", *arguments) == 2
        assert sentence in capsys.readouterr().err
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(images / "a.png")
    (tmp_path / "pretrain" / "1x").mkdir(parents=True)
    assert run(script, monkeypatch, tmp_path, images, "--out", tmp_path / "out") == 2
    assert "has no labels" in capsys.readouterr().err


def test_savedmodels_and_checkpoints_are_found(script: Any, tmp_path: Path) -> None:
    """Wherever the folder given begins in the authors' tree."""
    for place in ("simclrv2/pretrained/r50_1x_sk0/saved_model/variables", "simclrv1/pretrain/4x/saved_model"):
        (tmp_path / place).mkdir(parents=True)
    for place in ("simclrv2/pretrained/r50_1x_sk0/model.ckpt-250228.index", "ResNet50_2x/model.ckpt-225206.index"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    found = [(item.name, path) for item, path in script.find_checkpoints(tmp_path, script.released())]
    assert found == [
        ("simclrv1/pretrain/2x", tmp_path / "ResNet50_2x/model.ckpt-225206"),
        ("simclrv1/pretrain/4x", tmp_path / "simclrv1/pretrain/4x/saved_model"),
        ("simclrv2/pretrained/r50_1x_sk0", tmp_path / "simclrv2/pretrained/r50_1x_sk0/model.ckpt-250228"),
        ("simclrv2/pretrained/r50_1x_sk0", tmp_path / "simclrv2/pretrained/r50_1x_sk0/saved_model"),
    ]
    below = script.find_checkpoints(tmp_path / "simclrv2" / "pretrained", script.released())
    assert [item.name for item, _ in below] == ["simclrv2/pretrained/r50_1x_sk0"] * 2
