"""Probes: transformations against numpy and scipy, layers against a forward pass by hand, what an MLP can read."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn

from helpers import parts_of
from simclr.config.encoder import EncoderConfig
from simclr.data.images import Images, array_images
from simclr.errors import UserError
from simclr.evaluation import probe as probing
from simclr.evaluation.probe import TASKS, fit_predict, layers_of, probe, sobel, transformed
from simclr.evaluation.subjects import EvaluatedModel
from simclr.models.encoder import Encoder, build_encoder
from simclr.models.heads import ProjectionHead
from simclr.views.views import eval_images

SIZE = 16


def colourful(n: int, seed: int, channels: int = 3) -> Images:
    """Smooth random pictures in saturated colours."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (n, 4, 4, channels))
    pixels = scipy.ndimage.zoom(coarse, (1, 4, 4, 1), order=1)
    return array_images(
        pixels.astype(np.uint8), None, name="colours", split="all", has_own_split=False, classes=None,
        channels="3" if channels == 3 else "auto",
    )  # fmt: skip


class MeanColour(nn.Module):
    """An encoder that knows the mean of each channel, and nothing of places."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, S, S) -> (B, C)."""
        return self.scale * x.mean((2, 3))


def subject(encoder: Encoder, head: ProjectionHead | None = None) -> EvaluatedModel:
    return EvaluatedModel(name="tested", encoder=encoder, head=head, size=SIZE, channels=encoder.config.channels)


def batches(images, task, seed=0, chunk=256):
    pixels, answers = zip(*transformed(images, task, seed, size=SIZE, chunk=chunk), strict=True)
    return torch.cat(pixels), np.concatenate(answers)


def test_rotation_and_sobel_equal_numpy_and_scipy():
    images = colourful(40, 0)
    plain = eval_images(images.read(np.arange(40)), SIZE)
    turned, turns = batches(images, "rotation")
    assert set(turns) == {0, 1, 2, 3}
    for image, k, result in zip(plain, turns, turned, strict=True):
        assert np.array_equal(np.rot90(image.numpy(), k, axes=(1, 2)), result.numpy())
    filtered, answers = batches(images, "sobel")
    assert set(answers) == {0, 1}
    for image, is_filtered, result in zip(plain.numpy(), answers, filtered.numpy(), strict=True):
        gradient = [[scipy.ndimage.sobel(c, axis=a, mode="nearest") / 4 for c in image] for a in (0, 1)]
        expected = np.minimum(np.hypot(*np.array(gradient)), 1) if is_filtered else image
        np.testing.assert_allclose(result, expected, atol=1e-6)
    step = torch.zeros(1, 1, 6, 6)
    step[..., 3:] = 1
    assert sobel(step).amax() == 1


def test_gray_and_noise_are_what_they_say():
    images = colourful(400, 1)
    plain = eval_images(images.read(np.arange(400)), SIZE)
    seen, coloured = batches(images, "colour")
    assert 0.74 < coloured.mean() < 0.86  # a fifth is gray, as in pretraining
    assert torch.equal(seen[coloured == 1], plain[coloured == 1])
    luma = (plain * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(seen[coloured == 0], luma.expand_as(plain)[coloured == 0])
    seen, noisy = batches(images, "corrupted")
    assert torch.equal(seen[noisy == 0], plain[noisy == 0])
    middle = (plain > 0.35) & (plain < 0.65)  # far from where clipping bites
    middle[noisy == 0] = False
    noise = (seen - plain)[middle].numpy() / probing.NOISE
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs((noise**4).mean() - 3) < 0.3  # as a normal distribution has
    assert seen.min() >= 0 and seen.max() <= 1


@pytest.mark.parametrize("task", TASKS)
def test_a_transformation_depends_on_seed_and_index_alone(task):
    images = colourful(30, 2)
    pixels, answers = batches(images, task)
    again, same = batches(images, task, chunk=7)
    assert torch.equal(pixels, again) and np.array_equal(answers, same)
    assert not np.array_equal(batches(images, task, seed=1)[1], answers)


def test_mean_colour_tells_colour_from_gray_but_no_rotation():
    encoder = Encoder(EncoderConfig("small", channels=3, size=SIZE), MeanColour(), 3)
    result = probe(subject(encoder), colourful(1500, 3), colourful(500, 4), tasks=["colour", "rotation"])
    assert list(result.table) == ["h"] and not result.notes
    assert result.chance == {"colour": 0.8, "rotation": 0.25}
    assert result.table["h"]["colour"] > 0.97
    assert abs(result.table["h"]["rotation"] - 0.25) < 0.07  # three and a half standard errors


def test_layers_are_those_of_a_forward_pass_and_hooks_are_removed():
    encoder = build_encoder(EncoderConfig("small", channels=3, size=SIZE), seed=0).train()
    head = ProjectionHead(encoder.num_features, layers=3, dim=10)
    names = layers_of(encoder, head)
    assert names == ["stem", "group1", "group2", "group3", "group4", "h", "head.0", "head.1", "z"]
    assert layers_of(encoder, None) == names[:6]
    assert layers_of(encoder, ProjectionHead(encoder.num_features, kind="none")) == names[:6]
    assert layers_of(encoder, ProjectionHead(encoder.num_features, kind="linear")) == [*names[:6], "z"]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images = colourful(20, 5)
    features, _ = probing._features(subject(encoder, head), images, "rotation", names, 0)
    assert encoder.training and head.training
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert not any(module._forward_hooks for module in encoder.modules())
    encoder.eval(), head.eval()
    with torch.no_grad():
        x, _ = batches(images, "rotation")
        backbone = parts_of(encoder).backbone
        expected = [backbone.stem(x)]
        for group in backbone.groups:
            expected.append(group(expected[-1]))
        above = head.hiddens(encoder(x))
    for name, output in zip(names, [e.mean((2, 3)) for e in expected] + above, strict=True):
        np.testing.assert_allclose(features[name], output.numpy(), atol=1e-5)


def test_layers_of_a_timm_model():
    encoder = build_encoder(EncoderConfig("timm/test_vit", channels=3, size=32))
    names = layers_of(encoder, None)
    features, _ = probing._features(subject(encoder), colourful(4, 6), "sobel", names, 0)
    assert len(names) > 2 and names[0] == "stage0" and names[-1] == "h"
    assert all(features[name].shape == (4, 64) for name in names)


def test_layers_of_a_torchvision_model():
    encoder = build_encoder(EncoderConfig("torchvision/resnet18", channels=3, size=32))
    assert layers_of(encoder, None) == ["layer1", "layer2", "layer3", "layer4", "h"]
    features, _ = probing._features(subject(encoder), colourful(3, 6), "sobel", ["layer4", "h"], 0)
    np.testing.assert_allclose(features["layer4"], features["h"], atol=1e-5)  # h is its average


def test_hooks_are_removed_after_an_error_too(monkeypatch):
    encoder = build_encoder(EncoderConfig("small", channels=3, size=SIZE))
    monkeypatch.setattr(probing, "transformed", lambda *_, **__: iter([(torch.zeros(2, 1, SIZE, SIZE), np.zeros(2))]))
    with pytest.raises(UserError, match="channels"):
        probing._features(subject(encoder), colourful(2, 0), "sobel", ["stem"], 0)
    assert not any(module._forward_hooks for module in encoder.modules())


def test_poisoned_test_answers_change_nothing_but_the_figure(monkeypatch):
    encoder = build_encoder(EncoderConfig("small", channels=3, size=SIZE), seed=0)
    train, test = colourful(200, 7), replace(colourful(100, 8), name="test")
    clean = probe(subject(encoder), train, test, tasks=["corrupted"], layers=["stem", "h"])
    true = transformed

    def poisoned(images, task, seed, **settings):
        for pixels, answers in true(images, task, seed, **settings):
            yield pixels, 1 - answers if images.name == "test" else answers

    monkeypatch.setattr(probing, "transformed", poisoned)
    other = probe(subject(encoder), train, test, tasks=["corrupted"], layers=["stem", "h"])
    for layer in ("stem", "h"):  # of two answers: the same predictions are right where they were wrong
        assert other.table[layer]["corrupted"] == pytest.approx(1 - clean.table[layer]["corrupted"])
    assert clean.table["stem"]["corrupted"] > 0.7


def test_the_probe_is_not_linear_and_does_not_touch_the_global_generator():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 2)).astype(np.float32)
    y = (x.prod(1) > 0).astype(np.int64)  # exclusive or
    torch.manual_seed(5)
    state = torch.get_rng_state()
    predicted = fit_predict(x[:1000], y[:1000], x[1000:], seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert (predicted == y[1000:]).mean() > 0.95
    assert np.array_equal(predicted, fit_predict(x[:1000], y[:1000], x[1000:], seed=0))


def test_gray_images_are_not_asked_for_their_colour():
    encoder = build_encoder(EncoderConfig("small", channels=1, size=SIZE))
    gray = colourful(60, 9, channels=1)
    result = probe(subject(encoder), gray, gray, tasks=["colour", "sobel"], layers=["h"])
    assert list(result.table["h"]) == ["sobel"] and "gray" in result.notes[0]
    in_three = replace(gray, channels=3)
    encoder = build_encoder(EncoderConfig("small", channels=3, size=SIZE))
    assert probe(subject(encoder), in_three, in_three, tasks=["colour"], layers=["h"]).table == {"h": {}}


def test_what_cannot_be_probed_is_said():
    encoder = build_encoder(EncoderConfig("small", channels=3, size=SIZE))
    images = colourful(30, 0)
    with pytest.raises(UserError, match=r"no layer 'group9'.*group1"):
        probe(subject(encoder), images, images, layers=["group9"])
    with pytest.raises(UserError, match="no task 'flip'"):
        probe(subject(encoder), images, images, tasks=["flip"])
    with pytest.raises(UserError, match="too few"):
        probe(subject(encoder), images.subset([0, 1]), images)
    with pytest.raises(UserError, match="expects 3-channel"):
        probe(subject(encoder), colourful(30, 0, channels=1), images)
