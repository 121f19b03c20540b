"""ONNX files from strangers: one graph of plain operators with its weights inside, or a sentence before it is run."""

import json
from pathlib import Path

import numpy as np
import pytest

import simclr
from simclr.config.encoder import EncoderConfig
from simclr.errors import UserError
from simclr.models.encoder import build_encoder
from simclr.tasks.export import export
from simclr.tasks.options.using import Export
from simclr.weights.folder import save_encoder

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
helper = onnx.helper


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """A file of `simclr export`, as onnx reads it."""
    folder = tmp_path_factory.mktemp("onnx")
    save_encoder(
        build_encoder(EncoderConfig("small", channels=1, size=12)),
        folder / "encoder",
        preprocessing="google",
        origin={},
    )
    export(Export(run=folder / "encoder", format="onnx", out=folder / "w.onnx"))
    return onnx.load(folder / "w.onnx")


def graph_within():
    return helper.make_graph([helper.make_node("Identity", ["images"], ["y"])], "inner", [], [])


def external(tensor) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "secrets.bin"


def external_weights(model) -> None:
    external(model.graph.initializer[0])


def external_without_a_place(model) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL


def external_constant(model) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32))
    external(tensor)
    model.graph.node.append(helper.make_node("Constant", [], ["extra"], value=tensor))


def external_among_several(model) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32))
    external(tensor)
    model.graph.node.append(helper.make_node("Constant", [], ["extra"]))
    attribute = model.graph.node[-1].attribute.add()
    attribute.name, attribute.type = "values", onnx.AttributeProto.TENSORS
    attribute.tensors.append(tensor)


def external_sparse(model) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.dims.append(4)
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.zeros(4, np.float32)))
    external(sparse.values)


def endless_loop(model) -> None:
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=graph_within()))


def branch(model) -> None:
    model.graph.node.append(helper.make_node("If", ["c"], [], then_branch=graph_within(), else_branch=graph_within()))


def own_function(model) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("mine", "f", ["a"], ["b"], [node], []))


def own_operator(model) -> None:
    model.graph.node[0].domain = "com.evil"


def contributed_operator(model) -> None:
    model.graph.node[0].domain = "com.microsoft"


def training(model) -> None:
    model.training_info.add().algorithm.CopyFrom(graph_within())


REFUSED = {
    external_weights: "external data", external_without_a_place: "external data", external_constant: "external data",
    external_among_several: "external data", external_sparse: "external data", endless_loop: "graph within",
    branch: "graph within", own_function: "functions", own_operator: "operators of its own",
    contributed_operator: "operators of its own", training: "training",
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_refused_before_it_is_run(change, model, tmp_path: Path, monkeypatch) -> None:
    """Also from the folder of its external data, which onnxruntime would read."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    change(changed)
    (tmp_path / "w.onnx").write_bytes(changed.SerializeToString())
    (tmp_path / "secrets.bin").write_bytes(bytes(10_000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("it was given to onnxruntime"))
    with pytest.raises(UserError, match=REFUSED[change]) as caught:
        simclr.load("w.onnx")
    assert str(caught.value).isprintable()


def test_errors_of_the_session_are_sentences(model, tmp_path: Path, capfd) -> None:
    """Neither a traceback nor what onnxruntime prints by itself."""
    changes = {
        "unknown": lambda m: setattr(m.graph.node[0], "op_type", "Nothing"),
        "renamed": lambda m: setattr(m.graph.output[0], "name", "other"),
        "retyped": lambda m: setattr(m.graph.initializer[0], "data_type", 11),
        "input": lambda m: m.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
        "shapeless": lambda m: m.graph.initializer[0].dims.append(1 << 40),
        "future": lambda m: setattr(m, "ir_version", 10_000),
    }
    for name, change in changes.items():
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        change(changed)
        (tmp_path / f"{name}.onnx").write_bytes(changed.SerializeToString())
        with pytest.raises(UserError) as caught:
            simclr.load(tmp_path / f"{name}.onnx").embed(np.zeros((1, 12, 12), np.uint8))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000, name
    assert capfd.readouterr().err == ""


def test_its_description_is_validated(model, tmp_path: Path) -> None:
    for change in ({"num_features": "128"}, {"classes": ["\x1b[2J"]}, {"preprocessing": {"preset": "none"}}):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        for entry in changed.metadata_props:
            if entry.key == "simclr":
                entry.value = json.dumps(json.loads(entry.value) | change)
        (tmp_path / "w.onnx").write_bytes(changed.SerializeToString())
        with pytest.raises(UserError, match="does not fit"):
            simclr.load(tmp_path / "w.onnx")


def test_more_entries_than_a_graph_has(tmp_path: Path) -> None:
    """Two bytes each: a file of megabytes that a reader would take minutes for."""
    (tmp_path / "w.onnx").write_bytes(b"\x08\x01" * 1_100_000)
    with pytest.raises(UserError, match="more than 1,000,000 entries"):
        simclr.load(tmp_path / "w.onnx")
