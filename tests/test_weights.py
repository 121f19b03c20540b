"""A saved encoder: same features from a run's folder, an encoder's folder, paths, PIL images, arrays and tensors."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import simclr
from helpers import known, parts_of
from simclr import UserError
from simclr.config.encoder import EncoderConfig
from simclr.models.classifier import Classifier
from simclr.models.encoder import build_encoder
from simclr.models.heads import ProjectionHead
from simclr.weights.folder import save_classifier, save_encoder

GRAY = EncoderConfig("small", channels=1, size=12)
COLOUR = EncoderConfig("small", channels=3, size=40)


def saved(config, folder):
    encoder = build_encoder(config, seed=5).eval()
    save_encoder(encoder, folder, preprocessing="google", origin={})
    return encoder


@pytest.mark.parametrize("config", [GRAY, COLOUR], ids=["gray", "colour"])
def test_every_form_of_an_image_gives_the_same_features(config, tmp_path):
    saved(config, tmp_path / "encoder")
    model = simclr.load(tmp_path)  # the folder above encoder/, as of a run
    shape = (6, 50, 44) if config.channels == 1 else (6, 50, 44, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = model.embed(pixels)
    assert expected.shape == (6, 128) and expected.dtype == np.float32

    pictures = [Image.fromarray(image) for image in pixels]
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    tensor = torch.from_numpy(pixels[..., None] if config.channels == 1 else pixels).permute(0, 3, 1, 2)  # (6, C, H, W)
    forms = [paths, [str(p) for p in paths], pictures, list(pixels), tensor, pixels / 255.0, tensor / 255.0]
    for form in forms:
        np.testing.assert_allclose(model.embed(form), expected, atol=1e-5)
    np.testing.assert_allclose(model.embed(paths[2]), expected[2:3], atol=1e-5)
    np.testing.assert_allclose(model.embed(pixels, batch_size=4), expected, atol=1e-5)


def test_gray_images_show_as_colour_but_not_the_reverse(tmp_path):
    saved(COLOUR, tmp_path / "colour")
    saved(GRAY, tmp_path / "gray")
    gray = np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8)
    colour = np.repeat(gray[..., None], 3, axis=-1)
    model = simclr.load(tmp_path / "colour")
    np.testing.assert_allclose(model.embed(gray), model.embed(colour), atol=1e-6)
    with pytest.raises(UserError, match="1-channel images and what was given is in colour"):
        simclr.load(tmp_path / "gray").embed(colour)


@pytest.mark.parametrize(
    "pixels", [np.full((2, 12, 12), 200.0), np.full((2, 12, 12), -0.5), np.full((2, 12, 12), np.nan)]
)
def test_floats_outside_the_unit_range_are_refused(pixels, tmp_path):
    saved(GRAY, tmp_path)
    with pytest.raises(UserError, match=r"floats in \[0, 1\]"):
        simclr.load(tmp_path).embed(pixels)


@pytest.mark.parametrize(
    "images", [torch.rand(7, 12, 12), torch.rand(12, 12), np.zeros((2, 12, 12, 4)), np.zeros((0, 12, 12))]
)
def test_shapes_that_could_be_misread_are_refused(images, tmp_path):
    saved(COLOUR, tmp_path)
    with pytest.raises(UserError, match="shape"):
        simclr.load(tmp_path).embed(images)


def test_weights_come_back_bit_for_bit_and_say_what_they_expect(tmp_path):
    encoder = saved(COLOUR, tmp_path)
    loaded = simclr.load(tmp_path).encoder
    assert loaded.config == COLOUR and not loaded.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["encoder"]["size"] == 40 and described["input"]["range"] == [0.0, 1.0]


def head_of(encoder, **arguments):
    head = ProjectionHead(encoder.num_features, seed=6, **arguments)
    return head.eval()


@pytest.mark.parametrize(
    "arguments", [{"layers": 3, "dim": 20}, {"kind": "linear", "dim": 9}, {"kind": "none"}], ids=lambda a: str(a)
)
def test_the_projection_head_travels_with_its_encoder(arguments, tmp_path):
    encoder = build_encoder(GRAY, seed=5)
    head = head_of(encoder, **arguments)
    save_encoder(encoder, tmp_path, preprocessing="google", origin={}, head=head)
    loaded = known(simclr.load(tmp_path).head)
    h = torch.randn(4, encoder.num_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(h), head(h)) and not loaded.training


def test_a_folder_from_before_there_were_heads_is_read(tmp_path):
    """As version 0.1.0's first folders: no head, and no digest in the file's metadata."""
    encoder = saved(GRAY, tmp_path)
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    loaded = simclr.load(tmp_path)
    assert loaded.head is None and loaded.classifier is None and loaded.classes == []
    assert torch.equal(
        loaded.encoder.state_dict()["backbone.stem.0.conv.weight"], parts_of(encoder).backbone.stem[0].conv.weight
    )
    with pytest.raises(UserError, match="no classifier"):
        loaded.classify(np.zeros((1, 12, 12), np.uint8))


@pytest.mark.parametrize("head_layer", [0, 1, 2])
def test_a_network_that_names_classes_comes_back(head_layer, tmp_path):
    encoder = build_encoder(COLOUR, seed=5)
    network = Classifier(encoder, head_of(encoder), 3, head_layer=head_layer).eval()
    torch.nn.init.normal_(network.linear.weight)
    classes = ["cat", "Hund", "oiseau à plumes"]
    save_classifier(network, tmp_path, classes=classes, preprocessing="torchvision", origin={"run": "here"})
    loaded = simclr.load(tmp_path)
    assert loaded.preprocessing == "torchvision" and loaded.classes == classes
    pixels = np.random.default_rng(1).integers(0, 256, (5, 50, 44, 3), dtype=np.uint8)
    h = torch.from_numpy(loaded.embed(pixels))
    features = known(network.head).hiddens(h)[head_layer] if head_layer else h
    logits = (features @ network.linear.weight.T + network.linear.bias).detach().numpy()
    likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.probabilities(pixels, batch_size=2), likely, rtol=1e-3, atol=1e-5)
    assert loaded.classify(list(pixels)) == [classes[best] for best in likely.argmax(axis=1)]


def test_files_that_were_not_written_together_are_refused(tmp_path):
    """A save cut off between the two files: the classes are those of one network, the weights of another."""
    encoder = build_encoder(GRAY)
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        network = Classifier(encoder, None, 2)
        save_classifier(network, tmp_path / name, classes=classes, preprocessing="google", origin={"run": name})
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b" / "config.json")
    with pytest.raises(UserError, match=r"not the one that model\.safetensors was written with"):
        simclr.load(tmp_path / "b")
    described = json.loads((tmp_path / "a" / "config.json").read_text())
    described["origin"]["note"] = "what people add here is theirs"
    (tmp_path / "a" / "config.json").write_text(json.dumps(described))
    assert simclr.load(tmp_path / "a").classes == ["cat", "dog"]


def damage_nothing(folder):
    shutil.rmtree(folder)


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_format(folder):
    (folder / "config.json").write_text('{"format": "other"}')


def damage_name(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"small"', '"smal"'))


def damage_shape(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"small"', '"resnet50"'))


def damage_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def damage_missing(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_nothing, damage_config, damage_format, damage_name, damage_shape, damage_weights, damage_missing],
)
def test_a_damaged_encoder_is_one_clear_sentence(damage, tmp_path):
    folder = tmp_path / "encoder"
    saved(GRAY, folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        simclr.load(folder)
    assert len(str(caught.value).splitlines()) == 1
