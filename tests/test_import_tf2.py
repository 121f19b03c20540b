"""TensorFlow 2 checkpoints of the authors' model: TensorFlow's own, and of many shapes and kinds from our writer."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simclr
from bundle_writer import authors_variables, field, write_bundle
from helpers import MUTATIONS, known, mutate_bytes, peak_bytes_of
from object_graph_writer import VALUE, object_graph, write_tf2
from simclr.config.encoder import RESNETS
from simclr.errors import UserError
from simclr.models import Encoder, EncoderConfig, LinearClassifier, ProjectionHead, build_encoder
from simclr.tasks.import_ import import_checkpoint
from simclr.tasks.options.using import Import
from simclr.weights.importers.import_tf import import_tf
from simclr.weights.importers.object_graph import ObjectGraph
from simclr.weights.importers.tensor_bundle import TensorBundle

REFERENCE = Path(os.environ.get("SIMCLR_TF2_REFERENCE", Path(__file__).parent / "reference" / "tf2_checkpoints"))
FOLDERS = sorted(path.parent for path in REFERENCE.glob("*/outputs.npz"))
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_tensorflow_wrote_and_computed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Object-graph checkpoints and a SavedModel, whose variables are called after a list."""
    with np.load(folder / "outputs.npz") as file:
        expected = dict(file)
    size = expected["pixels"].shape[1]
    import_checkpoint(Import(checkpoint=folder, out=tmp_path / "out", size=size))
    model = simclr.load(tmp_path / "out")
    depth, _, kind = folder.name.partition("_")
    assert model.encoder.config.name == f"resnet{depth[1:]}" and model.encoder.config.sk == (kind == "sk")
    assert model.head is not None and model.classifier is not None
    x = torch.from_numpy(expected["pixels"]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        h = model.encoder(x)
        ours = {"h": h, "z": model.head(h), "logits": model.classifier(x)}
    for key, tensor in ours.items():
        assert np.linalg.norm(tensor.numpy() - expected[key]) < 2e-6 * np.linalg.norm(expected[key]), key
    said = capsys.readouterr().err
    if kind != "saved_model":
        assert "at step 100" in said and "save_counter" in said
    assert ("variables of the optimiser" in said) == (kind == "cifar")  # which alone was saved with its slots


@pytest.mark.parametrize(
    ("name", "size", "sk", "layers"),
    [
        ("resnet50", 224, True, 3), ("resnet101", 32, True, 2), ("resnet34", 224, True, 0),
        ("resnet18", 32, True, 1), ("resnet18", 32, False, 4), ("resnet200", 224, False, 1),
    ],
)  # fmt: skip
def test_any_depth_stem_and_head(name: str, size: int, sk: bool, layers: int, tmp_path: Path) -> None:
    encoder, head, linear, variables, layout = network(name, size=size, sk=sk, layers=layers)
    write_tf2(tmp_path / "ckpt-7", variables, **layout)
    found = import_tf(tmp_path, size=size)
    config = found.encoder.config
    assert (config.name, config.resolved_stem, config.sk) == (name, encoder.config.resolved_stem, sk)
    assert found.classifier is not None and (found.head is None) == (layers == 0)
    pairs = [(found.encoder, encoder), (found.classifier.linear, linear)]
    pairs += [(known(found.head), head)] if layers else []
    for ours, theirs in pairs:
        wanted = theirs.state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in ours.state_dict().items())
    assert found.step == 7 and found.left_out == (f"save_counter{VALUE}",)


def network(
    name: str, *, size: int = 32, sk: bool = False, layers: int = 2
) -> tuple[Encoder, ProjectionHead, LinearClassifier, dict[str, np.ndarray], dict[str, Any]]:
    """Networks with random numbers, the same by TF1's names, and what `write_tf2` must know of the encoder."""
    encoder = build_encoder(EncoderConfig(name, channels=3, size=size, width=1 / 32, sk=sk))
    head = ProjectionHead(
        encoder.num_features, kind="linear" if layers < 2 else "nonlinear", layers=max(layers, 2), dim=4
    )
    linear = LinearClassifier(encoder.num_features, 5)
    variables = authors_variables(encoder, head, linear)
    gone = ("Momentum", "head_contrastive") if layers == 0 else ("Momentum",)
    variables = {key: value for key, value in variables.items() if not any(part in key for part in gone)}
    shape = RESNETS[name]
    stem_convs = 3 if sk and size > 32 else 1
    layout: dict[str, Any] = {
        "blocks": shape.blocks,
        "bottleneck": shape.bottleneck,
        "sk": sk,
        "stem_convs": stem_convs,
    }
    return encoder, head, linear, variables, layout


def test_what_does_not_fit(tmp_path: Path) -> None:
    *_, variables, layout = network("resnet10")
    paths = write_tf2(tmp_path / "x", variables, **layout)
    content = {paths[name] + VALUE: value for name, value in variables.items()}
    keys = {path: path + VALUE for path in paths.values()}
    kernel = paths["base_model/conv2d_3/kernel"] + VALUE
    gamma = paths["base_model/batch_normalization_3/gamma"]
    other = object_graph({"dense/kernel": "x"})
    excitation = {f"model/resnet_model/block_groups/0/layers/0/se_layer/se_reduce/bias{VALUE}": np.zeros(2, "float32")}
    whole = object_graph(keys)
    cases: dict[str, dict[str, Any]] = {
        "se_reduce": content | excitation | {OBJECT_GRAPH: whole},
        "lacks base_model/batch_normalization_3/gamma": content
        | {OBJECT_GRAPH: object_graph({k: v for k, v in keys.items() if k != gamma})},
        "which is not there": {k: v for k, v in content.items() if k != kernel} | {OBJECT_GRAPH: whole},
        "has shape": content | {kernel: content[kernel][:, :, ::2], OBJECT_GRAPH: whole},
        "is no text": content | {OBJECT_GRAPH: np.float32(0)},
        "no checkpoint of SimCLR": {"dense/kernel" + VALUE: np.zeros(3, "float32"), OBJECT_GRAPH: other},
        "graph is none": content | {OBJECT_GRAPH: b"\x12\x00"},
        "graph is none.": content | {OBJECT_GRAPH: field(1, field(1, field(1, 9) + field(2, b"model")))},
        "in circles": content | {OBJECT_GRAPH: endless()},
        "does not end": content | {OBJECT_GRAPH: b"\x0a\xff"},
    }  # fmt: skip
    for i, (reason, variables_of_case) in enumerate(cases.items()):
        write_bundle(tmp_path / f"{i}", variables_of_case)
        with pytest.raises(UserError, match=reason):
            import_tf(tmp_path / f"{i}")
    with pytest.raises(UserError, match="leave out --ema"):
        import_tf(tmp_path / "x", ema=True)


def endless() -> bytes:
    """One node that is its own child under every name."""
    names = ["model", "resnet_model", "initial_conv_relu_max_pool", *map(str, range(256))]
    return field(1, b"".join(field(1, field(1, 0) + field(2, name.encode())) for name in names))


def test_mutated_checkpoints(tmp_path: Path) -> None:
    """Damage to the object graph under right checksums: each ends in one sentence, or in a network of that shape."""
    encoder, *_, variables, layout = network("resnet10")
    paths = write_tf2(tmp_path / "x", variables, **layout)
    names = {path + VALUE: variables[name] for name, path in paths.items()}
    graph = object_graph({path: path + VALUE for path in paths.values()})
    import_tf(tmp_path / "x")  # which compiles the checksum
    refused, count = 0, MUTATIONS // 4 if MUTATIONS < 1000 else MUTATIONS
    for seed in range(count):
        rng = np.random.default_rng(seed)
        damaged = mutate_bytes(graph, rng)
        (tmp_path / "y.data-00000-of-00001").unlink(missing_ok=True)
        content = {"a": np.zeros(1, "float32"), OBJECT_GRAPH: damaged} if seed % 4 else names | {OBJECT_GRAPH: damaged}
        write_bundle(tmp_path / "y", content)
        assert peak_bytes_of(lambda: graph_alone(tmp_path / "y")) < 8 * len(graph) + 100_000, seed
        try:
            found = import_tf(tmp_path / "y").encoder.state_dict()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
        else:
            wanted = encoder.state_dict()
            assert all(value.shape == wanted[key].shape for key, value in found.items())
    assert refused > 0.5 * count


def graph_alone(prefix: Path) -> None:
    with suppress(UserError):
        ObjectGraph(TensorBundle(prefix))
