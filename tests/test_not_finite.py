"""A network that gives NaN ends in a sentence and exit code 2, wherever features or probabilities would leave."""

import numpy as np
import pytest
import torch
from PIL import Image

import simclr as package
from simclr.config.finetune import FinetuneConfig
from simclr.data.opening import open_data
from simclr.errors import Diverged, UserError
from simclr.evaluation.finetune import finetune
from simclr.models import EncoderConfig, build_encoder
from simclr.models.classifier import Classifier
from simclr.weights.folder import load, save_classifier

SHAPE = EncoderConfig("small", channels=1, size=8, width=0.5)


def save(folder, encoder, linear=None):
    network = Classifier(encoder, None, 2)
    if linear is not None:
        torch.nn.init.constant_(network.linear.weight, linear)
    save_classifier(network, folder, classes=["a", "b"], preprocessing="google", origin={})
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A classifier whose encoder has a NaN weight."""
    encoder = build_encoder(SHAPE, seed=0)
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] = float("nan")
    return save(tmp_path_factory.mktemp("broken"), encoder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in "abcdefgh":
        Image.fromarray(np.full((8, 8), 5 * ord(name) % 256, np.uint8)).save(folder / f"{name}.png")
    return folder


def test_an_export_that_cannot_be_compared_is_refused(simclr, tmp_path):
    encoder = build_encoder(EncoderConfig("torchvision/resnet18", channels=3, size=32), seed=0)
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] = float("nan")
    save_classifier(Classifier(encoder, None, 2), tmp_path / "m", classes=["a", "b"], preprocessing="google", origin={})
    code, _, said = simclr("export", tmp_path / "m", "--format", "torchvision", "--out", tmp_path / "x.safetensors")
    assert code == 2 and "nothing was written" in said and not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["embed", "MODEL", "IMAGES", "--out", "OUT/x.npz"],
        ["predict", "MODEL", "IMAGES", "--out", "OUT/x.csv"],
        ["evaluate", "MODEL", "digits", "--protocol", "knn", "--compare", "--json", "OUT/x.json", "--cache", "OUT/c"],
        ["evaluate", "MODEL", "digits", "--protocol", "label-free", "--json", "OUT/x.json", "--cache", "off"],
    ],
    ids=lambda command: " ".join(command[:1] + command[4:5]),
)
def test_commands_say_so_and_leave_no_file(simclr, broken, images, tmp_path, command):
    words = {"MODEL": str(broken), "IMAGES": str(images)}
    code, out, said = simclr(*(words.get(word, word.replace("OUT", str(tmp_path))) for word in command))
    assert code == 2 and "NaN or infinite" in said.splitlines()[-1] and "Warning" not in said
    assert "nan" not in out.lower() and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_library_says_so(broken, images):
    model, files = load(broken), sorted(images.iterdir())
    for use in (model.embed, model.probabilities, model.classify):
        with pytest.raises(UserError, match="NaN or infinite"):
            use(files)
    with pytest.raises(UserError, match="NaN or infinite"):
        package.SimCLR(pretrained=broken).fit_transform(np.zeros((3, 64)))


def test_scores_beyond_all_numbers_have_no_probabilities(tmp_path, images):
    encoder = build_encoder(SHAPE, seed=0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.abs_()  # features far from 0, whatever torch draws from this seed
    model = load(save(tmp_path, encoder, linear=3e38))
    with pytest.raises(UserError, match="NaN or infinite"):
        model.probabilities(sorted(images.iterdir()))


def test_nan_in_a_later_batch_leaves_no_file(simclr, images, tmp_path, monkeypatch):
    folder = save(tmp_path / "model", build_encoder(SHAPE, seed=0))
    calls = []

    def forward(self, x):
        calls.append(len(x))
        return torch.full((len(x), 2), float("nan") if len(calls) == 3 else 0.0)

    monkeypatch.setattr(Classifier, "forward", forward)
    code, _, said = simclr("predict", folder, images, "--out", tmp_path / "x.csv", "--batch-size", 2)
    assert code == 2 and "NaN or infinite" in said and len(calls) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_trained_network_of_nan_has_diverged(monkeypatch):
    """As a grid search takes it: the next cell."""
    digits = open_data("digits").subset(np.arange(40))
    config = FinetuneConfig(epochs=0, min_steps=1, batch_size=8, lr=0.01, workers=0)
    forward = Classifier.forward
    monkeypatch.setattr(
        Classifier, "forward", lambda self, x: forward(self, x) * (1 if self.training else float("nan"))
    )
    with pytest.raises(Diverged, match="not finite"):
        finetune(build_encoder(SHAPE, seed=0), None, digits, digits, config, seed=0)
