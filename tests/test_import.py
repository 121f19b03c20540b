"""`simclr import`: the authors' checkpoints become encoders' folders that compute what the authors' graph computed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simclr
from bundle_writer import authors_variables, write_bundle
from helpers import known, parts_of
from simclr.cli.main import main
from simclr.errors import UserError
from simclr.models import Encoder, EncoderConfig, LinearClassifier, ProjectionHead, build_encoder
from simclr.tasks.import_ import import_checkpoint
from simclr.tasks.options.using import Import
from simclr.weights.importers.import_tf import import_tf

REFERENCE = Path(os.environ.get("SIMCLR_REFERENCE", Path(__file__).parent / "reference"))
FOLDERS = sorted(path.parent for path in REFERENCE.glob("tf_checkpoints/*/outputs.npz"))
TOLERANCE = 1e-4  # relative L2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_authors_checkpoints(folder: Path, tmp_path: Path) -> None:
    with np.load(folder / "outputs.npz") as file:
        expected = dict(file)
    config = json.loads(str(expected["config"]))
    command = Import(checkpoint=folder, out=tmp_path / "out", size=config["image_size"])
    import_checkpoint(command)
    model = simclr.load(tmp_path / "out")
    assert model.encoder.config.name == f"resnet{config['depth']}" and model.encoder.config.width == config["width"]
    assert model.encoder.config.sk == (config["sk_ratio"] > 0)
    assert model.head is not None and model.classifier is not None and len(model.classes) == config["num_classes"]
    x = torch.from_numpy(expected["x"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        h = model.encoder(x)
        head, classifier = known(model.head), parts_of(known(model.classifier))
        ours = {"h": h, "z": head(h), "head_input": classifier.features(x), "logits": classifier(x)}
    for key, tensor in ours.items():
        theirs = expected[f"{key}_eval"]
        assert np.linalg.norm(tensor.numpy() - theirs) < TOLERANCE * np.linalg.norm(theirs), key


def make(
    name: str,
    width: float,
    *,
    size: int = 32,
    sk: bool = False,
    layers: int = 2,
    kind: str = "nonlinear",
    dim: int = 8,
    reads: int = 0,
) -> tuple[Encoder, ProjectionHead, LinearClassifier, dict[str, np.ndarray]]:
    """Networks with random numbers, and the variables that the authors would have saved of them."""
    encoder = build_encoder(EncoderConfig(name, channels=3, size=size, width=width, sk=sk))
    head = ProjectionHead(encoder.num_features, kind=kind, layers=layers, dim=dim)  # pyrefly: ignore
    linear = LinearClassifier(reads or encoder.num_features, 5)
    return encoder, head, linear, authors_variables(encoder, head, linear)


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    wanted = theirs.state_dict()
    return all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("name", "width", "size", "sk"),
    [
        ("resnet18", 0.07, 32, False), ("resnet34", 1 / 64, 224, False), ("resnet50", 0.03, 224, False),
        ("resnet101", 1 / 64, 32, False), ("resnet152", 0.02, 224, False), ("resnet200", 1 / 64, 224, False),
        ("resnet18", 0.0441, 32, False), ("resnet50", 1 / 32, 32, True), ("resnet101", 0.035, 224, True),
    ],
)  # fmt: skip
def test_any_depth_width_and_stem(name: str, width: float, size: int, sk: bool, tmp_path: Path) -> None:
    encoder, head, linear, variables = make(name, width, size=size, sk=sk, layers=3)
    write_bundle(tmp_path / "model.ckpt-7", {k: v for k, v in variables.items() if "Momentum" not in k}, shards=2)
    found = import_tf(tmp_path)
    config = found.encoder.config
    wanted = (name, size, encoder.config.resolved_stem, sk)
    assert (config.name, config.size, config.resolved_stem, config.sk) == wanted
    assert config.width == pytest.approx(width, abs=1e-3) and found.encoder.num_features == encoder.num_features
    assert found.head is not None and found.classifier is not None and found.step == 7
    assert same(found.encoder, encoder) and same(found.head, head) and same(found.classifier.linear, linear)
    assert not found.left_out and not found.slots


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    encoder, _, linear, variables = make("resnet10", 1 / 32)
    write_bundle(tmp_path / "v1", {k: v for k, v in variables.items() if not k.startswith("head_contrastive")})
    found = import_tf(tmp_path / "v1")
    assert found.head is None and found.classifier is not None and same(found.classifier.linear, linear)
    assert len(found.slots) == sum(name.endswith("Momentum") for name in variables if "contrastive" not in name)
    write_bundle(tmp_path / "v2", {k: v for k, v in variables.items() if not k.startswith("head_supervised")})
    found = import_tf(tmp_path / "v2")
    assert found.head is not None and found.classifier is None and same(found.encoder, encoder)


def test_linear_head(tmp_path: Path) -> None:
    _, head, _, variables = make("resnet10", 1 / 32, kind="linear")
    write_bundle(tmp_path / "x", {name.replace("nl_0", "l_0"): value for name, value in variables.items()})
    found = import_tf(tmp_path)
    assert found.head is not None and found.head.kind == "linear" and same(found.head, head)


def test_supervised_head_within_the_projection_head(tmp_path: Path) -> None:
    """Widths, SimCLR v2's number of steps, or the user decide."""
    *_, variables = make("resnet10", 1 / 32, layers=3)
    images = torch.rand(2, 3, 32, 32)
    for step, asked, layer in ((751, None, 1), (3754, None, 1), (37535, None, 0), (37535, 2, 2), (751, 0, 0)):
        write_bundle(tmp_path / "x", variables | {"global_step": np.array(step)})
        found = import_tf(tmp_path, head_layer=asked)
        assert found.classifier is not None and found.head is not None and found.classifier.head_layer == layer
        with torch.no_grad():
            hidden = found.head.hiddens(found.encoder(images))[layer]
            assert torch.equal(found.classifier(images), found.classifier.linear(hidden))
    *_, variables = make("resnet10", 1 / 32, layers=3, dim=7, reads=7)
    write_bundle(tmp_path / "x", variables)
    found = import_tf(tmp_path)
    assert found.classifier is not None and found.classifier.head_layer == 3
    with pytest.raises(UserError, match="--head-layer was 0"):
        import_tf(tmp_path, head_layer=0)


def test_moving_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, head, _, variables = make("resnet10", 1 / 32)
    other = authors_variables(*make("resnet10", 1 / 32)[:3], seed=1)
    copies = {f"ema_model/{k}": v for k, v in other.items() if "/" in k and "supervised" not in k and "Mom" not in k}
    write_bundle(tmp_path / "in" / "x", variables | copies)
    found = import_tf(tmp_path / "in")
    assert same(found.encoder, encoder) and set(found.left_out) == set(copies)
    import_checkpoint(Import(checkpoint=tmp_path / "in", out=tmp_path / "out", ema=True))
    model = simclr.load(tmp_path / "out")
    assert model.classifier is None and model.head is not None and not same(model.head, head)
    with pytest.raises(UserError, match="none was taken"):
        import_checkpoint(Import(checkpoint=tmp_path / "in", out=tmp_path / "no", ema=True, head_layer=1))
    kernel = copies["ema_model/base_model/conv2d/kernel"]
    assert np.array_equal(model.encoder.state_dict()["backbone.stem.0.conv.weight"], kernel.transpose(3, 2, 0, 1))
    assert "head_supervised/linear_layer/dense/kernel" in capsys.readouterr().err


def test_what_does_not_fit(tmp_path: Path) -> None:
    *_, variables = make("resnet10", 1 / 32)
    kernel = "base_model/conv2d_3/kernel"
    cases: dict[str, dict[str, Any]] = {
        "lacks base_model/batch_normalization_3/gamma": {
            k: v for k, v in variables.items() if "zation_3/gamma" not in k
        },
        "base_model/dense/bias": variables | {"base_model/dense/bias": np.zeros(3, "float32")},
        "12 convolutions": {k: v for k, v in variables.items() if not k.startswith(kernel)},
        "has shape": variables | {kernel: variables[kernel][:, :, ::2]},
        "types?": variables | {kernel: variables[kernel].astype("float16")},
        "is no text": variables | {"_CHECKPOINTABLE_OBJECT_GRAPH": np.float32(0)},
        "no checkpoint of SimCLR": {"dense/kernel": np.zeros(3, "float32")},
    }
    for i, (reason, content) in enumerate(cases.items()):
        write_bundle(tmp_path / f"{i}", content)
        with pytest.raises(UserError, match=reason):
            import_tf(tmp_path / f"{i}")
    with pytest.raises(UserError, match="leave out --ema"):
        import_tf(tmp_path / "0", ema=True)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From files to names of classes; a second import into the folder is refused."""
    *_, variables = make("resnet10", 1 / 32)
    write_bundle(tmp_path / "in" / "model.ckpt-7", variables)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    flags = ["--size", "28", "--classes", str(tmp_path / "names.txt")]
    arguments = ["simclr", "import", str(tmp_path / "in" / "model.ckpt-7"), str(tmp_path / "out"), *flags]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    said = capsys.readouterr().err
    for part in ("resnet10", "width 0.03125", "cifar stem", "28 x 28", "2 layers", "5 classes", "of the optimiser"):
        assert part in said
    model = simclr.load(tmp_path / "out")
    image = np.zeros((28, 28, 3), np.uint8)
    assert model.embed(image).shape == (1, 16) and model.classify(image)[0] in ("ant", "bee", "cat", "dog", "elk")
    assert model.head is not None and model.preprocessing == "google"
    with pytest.raises(SystemExit):
        main()
    assert "already" in capsys.readouterr().err
