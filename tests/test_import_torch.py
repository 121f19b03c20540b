"""`simclr import` of PyTorch backbones: features are those of the model that was saved, and no pickle runs."""

import os
import pickle
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet

import simclr
from helpers import MUTATIONS, NarrowResNet, mutate_bytes, parts_of, peak_bytes_of, with_random_state
from simclr.errors import UserError
from simclr.models.external.torchvision_bridge import IMAGENET
from simclr.tasks.import_ import import_checkpoint
from simclr.tasks.options.using import Import
from simclr.weights.importers.import_torch import CIFAR10, import_torch
from simclr.weights.importers.torch_file import TorchFile

BASIC18 = (resnet.BasicBlock, [2, 2, 2, 2])


def cifar(model: resnet.ResNet, padding: int = 1) -> resnet.ResNet:
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, padding, bias=False)
    parts_of(model).maxpool = nn.Identity()
    return model


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def same_features(
    model: nn.Module, file: Path, *, format: str | None = None, size: int = 32, normalisation: tuple = IMAGENET
) -> simclr.weights.importers.import_torch.Backbone:
    """Import, and compare with the model fed as its library would."""
    found = import_torch(file, format=format, size=size)  # pyrefly: ignore
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(5))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation)
    with torch.no_grad():
        theirs = model((x - mean) / std).flatten(1)
        ours = found.encoder(x)
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    return found


def test_lightly_of_torchvision(tmp_path: Path) -> None:
    """Its documented module, as Lightning saves it: with hyper-parameters of a class that is not installed."""
    model = with_random_state(nn.Sequential(*list(NarrowResNet().children())[:-1]))
    head = under("projection_head.layers.", nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)).state_dict())
    state = under("backbone.", model.state_dict()) | head
    torch.save({"state_dict": OrderedDict(state), "epoch": 3, "hyper": Path("x"), "loops": {"a": [1, 2.5, None, True]}},
               tmp_path / "a.ckpt")  # fmt: skip
    found = same_features(model, tmp_path / "a.ckpt", size=64)
    assert found.format == "lightly" and found.encoder.config.name == "torchvision/resnet18"
    assert set(found.left_out) == set(head)


@pytest.mark.parametrize("relu", [True, False])
def test_lightly_of_its_own_resnet(relu: bool, tmp_path: Path) -> None:
    """Its ResNetGenerator's names; in a Sequential of its children, as in its example, no ReLU follows the stem."""
    whole = cifar(with_random_state(cifar(NarrowResNet())))  # the second: a fresh first convolution
    if relu:
        names = whole.state_dict()
        model: nn.Module = whole
    else:
        kept = [whole.conv1, whole.bn1, whole.layer1, whole.layer2, whole.layer3, whole.layer4, whole.avgpool]
        model = nn.Sequential(*kept)
        names = model.state_dict()
    names = {f"backbone.{name.replace('downsample', 'shortcut')}": value for name, value in names.items()}
    torch.save({"state_dict": names}, tmp_path / "a.ckpt")
    found = same_features(model.eval(), tmp_path / "a.ckpt")
    config = found.encoder.config
    assert found.format == "lightly" and config.stem_relu == relu and config.width == 1 / 16 and not found.left_out


@pytest.mark.parametrize("small", [True, False])
def test_solo_learn(small: bool, tmp_path: Path) -> None:
    """Its 3x3 stem pads by 2, and CIFAR-10 has its own normalisation."""
    model = with_random_state(cifar(NarrowResNet(), padding=2) if small else NarrowResNet())
    rest = {"projector.0.weight": torch.ones(3, 2), "classifier.bias": torch.ones(5)}
    torch.save({"state_dict": under("backbone.", model.state_dict()) | rest}, tmp_path / "a.ckpt")
    normalisation = CIFAR10 if small else IMAGENET
    found = same_features(model, tmp_path / "a.ckpt", size=32 if small else 64, normalisation=normalisation)
    assert found.format == "solo-learn" and set(found.left_out) == set(rest)
    assert found.encoder.config.stem_padding == (2 if small else 1)


@pytest.mark.parametrize("zipped", [True, False])
def test_moco(zipped: bool, tmp_path: Path) -> None:
    """Both of torch.save's formats; the released files are of the older one."""
    model = with_random_state(NarrowResNet(resnet.Bottleneck, [3, 4, 6, 3]))
    state = under("module.encoder_q.", model.state_dict()) | under(
        "module.encoder_k.", with_random_state(NarrowResNet()).state_dict()
    )
    fc = {"module.encoder_q.fc.0.weight": torch.ones(4, 4), "module.queue": torch.ones(4, 9)}
    content = {"epoch": 200, "arch": "resnet50", "state_dict": state | fc, "optimizer": {"state": {}, "lr": 0.03}}
    torch.save(content, tmp_path / "moco.pth.tar", _use_new_zipfile_serialization=zipped)
    found = same_features(model, tmp_path / "moco.pth.tar", size=64)
    assert found.format == "moco" and found.encoder.config.name == "torchvision/resnet50"
    assert {"module.queue", "module.encoder_q.fc.0.weight", "module.encoder_k.conv1.weight"} <= set(found.left_out)


def test_torchvision_and_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state_dict by itself, halves, channels last; and the encoder's folder gives the same features."""
    model = with_random_state(resnet.resnet18(num_classes=7))
    state = {name: value for name, value in model.state_dict().items() if "tracked" not in name}
    save_file(state, tmp_path / "a.safetensors")
    parts_of(model).fc = nn.Identity()
    found = same_features(model, tmp_path / "a.safetensors")
    assert found.left_out == ("fc.bias", "fc.weight") and found.encoder.config.stem == "auto"
    import_checkpoint(Import(checkpoint=tmp_path / "a.safetensors", out=tmp_path / "out", size=40))
    said = capsys.readouterr().err
    assert "7x7 stem" in said and "mean 0.485, 0.456, 0.406" in said and "fc (2 tensors)" in said
    loaded = simclr.load(tmp_path / "out")
    assert loaded.preprocessing == "torchvision" and loaded.encoder.config.size == 40
    x = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(loaded.encoder(x), found.encoder(x))
    narrow = with_random_state(NarrowResNet())
    turned = {
        name: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for name, v in narrow.state_dict().items()
    }
    torch.save(turned, tmp_path / "b.pt")
    same_features(narrow, tmp_path / "b.pt", size=64)
    halves = {name: value.half() if value.is_floating_point() else value for name, value in narrow.state_dict().items()}
    torch.save(halves, tmp_path / "c.pt")
    narrow.load_state_dict(halves)
    same_features(narrow, tmp_path / "c.pt", size=64)


@pytest.mark.parametrize(
    ("block", "blocks", "name"),
    [
        (resnet.BasicBlock, [3, 4, 6, 3], "resnet34"),
        (resnet.Bottleneck, [3, 4, 23, 3], "resnet101"),
        (resnet.Bottleneck, [3, 8, 36, 3], "resnet152"),
    ],
)
def test_depths(block: type, blocks: list[int], name: str, tmp_path: Path) -> None:
    model = with_random_state(NarrowResNet(block, blocks))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert same_features(model, tmp_path / "a.pt", size=64).encoder.config.name == f"torchvision/{name}"


def test_what_does_not_fit(tmp_path: Path) -> None:
    model = NarrowResNet()
    state = model.state_dict()
    small = under("backbone.", cifar(NarrowResNet()).state_dict())
    big = {name: torch.zeros(()).expand(v.shape) for name, v in state.items()}
    cases = {
        "lacks layer4.1.bn2.weight": {k: v for k, v in state.items() if k != "layer4.1.bn2.weight"},
        "layer1.0.se.weight": under("encoder_q.", state | {"layer1.0.se.weight": torch.ones(1)}),
        r"\(1, 2, 2, 2\) basic": {k: v for k, v in state.items() if not k.startswith("layer1.1")},
        "has shape": state | {"layer2.0.conv1.weight": torch.ones(3, 3, 3, 3)},
        "--format": small,
        "a kernel of 3x3": state | {"conv1.weight": torch.ones(4, 1, 7, 7)},
        "holds no ResNet": {"vit.weight": torch.ones(3)},
        "no named tensors": {"epoch": 3},
        "same place": big,
        "outside of its storage": state | {"bn1.weight": torch.zeros(()).expand(4)},
        "weights are floats": state | {"bn1.weight": torch.ones(4, dtype=torch.int64)},
    }
    for i, (reason, content) in enumerate(cases.items()):
        torch.save(content, tmp_path / f"{i}")
        with pytest.raises(UserError, match=reason):
            import_torch(tmp_path / f"{i}")
    torch.save(state, tmp_path / "x")
    with pytest.raises(UserError, match="no checkpoint of moco"):
        import_torch(tmp_path / "x", format="moco")
    with pytest.raises(UserError, match="--mean and --std"):
        import_checkpoint(Import(checkpoint=tmp_path / "x", out=tmp_path / "out", mean=(0.0, 0.0, 0.0)))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights(
    zipped: bool, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training code saves along: objects of many classes, some with tensors of their own."""
    lightning = ModuleType("lightning")
    AttributeDict = type("AttributeDict", (dict,), {"__module__": "lightning"})
    vars(lightning)["AttributeDict"] = AttributeDict
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    weights = {"conv1.weight": torch.randn(4, 3, 7, 7), "bn1.bias": torch.randn(4)}
    network = nn.Linear(2, 3)
    content = {
        "args": Namespace(lr=0.1, out=Path("x")),
        "counts": defaultdict(int, a=1),
        "names": {str, int},
        "range": range(3),
        "hyper_parameters": AttributeDict(lr=0.1),
        "scores": [np.float64(0.5), np.ones(3)],
        "edges": torch.eye(3).to_sparse(),
        "optimizer": torch.optim.SGD(network.parameters(), 0.1, momentum=0.9),
        "network": network,
        "state_dict": weights,
        "rng": torch.get_rng_state(),
    }
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    file = TorchFile(tmp_path / "a.pt")
    loaded = dict(file.read(file.shapes))
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


class Payload:
    """Creates a file where a pickle is run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_a_command(zipped: bool, tmp_path: Path) -> None:
    state = NarrowResNet().state_dict()
    for i, content in enumerate(({"state_dict": state, "x": Payload(tmp_path / "made")}, Payload(tmp_path / "made"))):
        file = tmp_path / f"{i}.pt"
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"posix\.system.*nothing of it was run"):
            import_torch(file)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    with pytest.raises(UserError, match="nothing of it was run"):
        import_torch(tmp_path / "bare.pkl")
    assert not (tmp_path / "made").exists()


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """As it could be a thousand times its size."""
    torch.save({"x": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="compressed"):
        TorchFile(tmp_path / "b.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_mutated_files(kind: str, tmp_path: Path) -> None:
    """Each ends in one sentence or in an encoder; an archive's has the numbers that were written: it has checksums."""
    model = with_random_state(NarrowResNet())
    state = model.state_dict()
    whole = tmp_path / "whole"
    if kind == "safetensors":
        save_file(state, whole)
    else:
        torch.save({"state_dict": state}, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    refused, count = 0, MUTATIONS // 4 if MUTATIONS < 1000 else MUTATIONS
    for seed in range(count):
        rng = np.random.default_rng(seed)
        (tmp_path / "x").write_bytes(damaged(content, rng))
        try:
            held = peak_bytes_of(lambda: TorchFile(tmp_path / "x"))
            assert held < 8 * len(content), seed
            found = import_torch(tmp_path / "x").encoder.backbone.state_dict()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
        else:
            for name, value in found.items():
                assert value.shape == state[name].shape
                assert kind != "zip" or torch.equal(value, state[name]), (seed, name)
    assert refused > 0.2 * count


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Half of them where the description of the tensors is: at the beginning, or an archive's directory at the end."""
    if rng.random() < 0.5:
        return mutate_bytes(content, rng)
    edge = 20_000
    if content.startswith(b"PK") and rng.random() < 0.5:
        return content[:-edge] + mutate_bytes(content[-edge:], rng)
    return mutate_bytes(content[:edge], rng) + content[edge:]
