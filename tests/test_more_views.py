"""More than two views of an image, small crops among them: against loops over pairs and the definition of a view."""

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import simclr as package
from helpers import SMALL_RUN, known
from simclr.config.pretrain import PretrainConfig, load_config
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses.nt_xent import nt_xent_dense
from simclr.methods.method import Method
from simclr.methods.moco import MoCo
from simclr.methods.simclr import SimCLR
from simclr.tasks import pretrain_images as pretraining
from simclr.tasks.pretrain_views import check_small_crops, check_views, describe_views, policies_of
from simclr.training.batches import Batch
from simclr.training.grad_cache import GradCache
from simclr.training.memory import measure
from simclr.training.meter import peak_bytes
from simclr.training.run import RunFolder
from simclr.views import reference
from simclr.views.params import draw
from simclr.views.policy import Policy

MANY = replace(SMALL_RUN, size=12, views_per_image=3, small_crops="2:7", small_crop_min=0.1, small_crop_max=0.3)


@pytest.fixture(scope="module")
def images():
    return open_data("digits").subset(np.arange(150))


def built(config: PretrainConfig, dtype: torch.dtype = torch.float32) -> SimCLR:
    method = pretraining.build_method(config, 1, DistributedContext())
    assert isinstance(method, SimCLR)
    return method.to(dtype)


def batch_of(images, rows):
    return Batch(images.read(rows, copy=False), np.full(len(rows), 4), rows, lambda: rows)


def random_views(config, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(count, 1, size, size, generator=generator, dtype=dtype) for size in config.view_sizes]


def loop_loss(rows: list[list[torch.Tensor]], temperature: float, decoupled: bool) -> float:
    """Mean over ordered pairs of two views of one image; `rows[v][i]` is the unit projection of view v of image i."""
    terms = []
    places = [(v, i) for v in range(len(rows)) for i in range(len(rows[0]))]
    for v, i in places:
        for p, _ in (place for place in places if place[1] == i and place[0] != v):
            others = [(u, j) for u, j in places if (j != i if decoupled else (u, j) != (v, i))]
            total = sum(math.exp(float(rows[v][i] @ rows[u][j]) / temperature) for u, j in others)
            terms.append(math.log(total) - float(rows[v][i] @ rows[p][i]) / temperature)
    return sum(terms) / len(terms)


# ---- the loss


@pytest.mark.parametrize("loss", ["nt-xent", "dcl"])
def test_the_loss_is_the_mean_over_all_pairs_of_an_images_views(loss):
    config = replace(MANY, loss=loss, loss_scale=3.0)
    method, views = built(config, torch.float64), random_views(config, 5, torch.float64)
    scaled, metrics = method(*views, detail=True)
    full, small = method.encoder(torch.cat(views[:3])), method.encoder(torch.cat(views[3:]))
    z = torch.nn.functional.normalize(method.head(torch.cat([full, small])), dim=1).detach()
    expected = loop_loss([list(part) for part in z.split(5)], config.temperature, loss == "dcl")
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-10)
    assert float(scaled.detach()) == pytest.approx(3 * expected, rel=1e-10)
    first, second = z[:5], z[5:10]  # measured on the first two views
    assert float(metrics["alignment"]) == pytest.approx(float((first - second).square().sum(1).mean()), rel=1e-6)
    hits = (first @ second.T).argmax(1) == torch.arange(5)
    assert float(metrics["contrastive_accuracy"]) == pytest.approx(float(hits.float().mean()))


def test_two_views_have_the_loss_of_the_paper():
    method, views = built(SMALL_RUN), random_views(SMALL_RUN, 6)
    za, zb = method.head(method.encoder(torch.cat(views))).chunk(2)
    assert len(views) == method.num_views == 2
    assert torch.equal(method(*views)[1]["loss"], nt_xent_dense(za, zb, SMALL_RUN.temperature))


def test_small_crops_do_not_change_the_statistics_of_full_views():
    method, views = built(MANY), random_views(MANY, 6)
    h, _ = method.encode(*views)
    torch.testing.assert_close(h[:18], method.encoder(torch.cat(views[:3])))
    assert h.shape == (30, method.encoder.num_features)


def test_a_queue_takes_the_keys_of_full_views_alone():
    method, views = built(replace(MANY, queue=40, ema=0.5)), random_views(MANY, 4)
    memory = known(method.memory)
    memory.encoder.eval()
    method(*views)
    keys = memory.encoder(torch.cat(views[:3])).view(3, 4, -1).transpose(0, 1).flatten(0, 1)  # image after image
    torch.testing.assert_close(memory.queue.keys[:12], keys)
    assert int(memory.queue.position) == 12


def test_gradient_caching_is_exact():
    method, views = built(MANY, torch.float64).eval(), random_views(MANY, 6, torch.float64)

    def gradients(module, *inputs):
        method.zero_grad()
        loss, _ = module(*inputs)
        loss.backward()
        return [loss.detach(), *(known(p.grad).clone() for p in method.parameters())]

    chunks = [lambda rows=rows: tuple(view[rows] for view in views) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    for ours, expected in zip(gradients(GradCache(method), *chunks), gradients(method, *views), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


# ---- the views


@pytest.mark.parametrize("preset", ["google", "torchvision"])
def test_each_view_is_that_of_the_definition_at_its_size(images, preset):
    config = replace(MANY, augmentation=preset, crop_min=0.5, flip=0.0, blur=0.4)
    rows = np.array([3, 149, 0])
    made = pretraining._make_inputs(images, config, DistributedContext(), config.view_sizes)(batch_of(images, rows))
    assert [view.shape[2:] for view in made] == [(12, 12)] * 3 + [(7, 7)] * 2
    make = Policy.google if preset == "google" else Policy.torchvision
    pixels, sizes = images.read(rows), images.sizes[rows]
    for number, view in enumerate(made):
        size, area = (12, (0.5, 1.0)) if number < 3 else (7, (0.1, 0.3))
        policy = make(size, strength=0.5, channels=1, crop_area=area, flip=0.0, blur=0.4)
        policy = replace(policy, min_covered=0.1 if number < 3 else 0.0)
        params = draw(policy, sizes, seed=0, epoch=4, indices=rows, view=number)
        assert torch.equal(view, reference.render(pixels, params, policy))


def test_further_views_leave_the_first_two_as_they_are(images):
    rows = np.arange(9)
    plain, many = (
        pretraining._make_inputs(images, config, DistributedContext(), config.view_sizes)(batch_of(images, rows))
        for config in (replace(MANY, views_per_image=2, small_crops=None), MANY)
    )
    assert len(plain) == 2 and all(torch.equal(a, b) for a, b in zip(plain, many, strict=False))


def test_small_crops_blur_as_views_of_their_size_do():
    config = replace(PretrainConfig(), size=64, small_crops="1:24")
    full, _, small = policies_of(config, 3, config.view_sizes)
    assert (full.blur, small.blur) == (0.5, 0.0) and small.crop_area == (0.05, 0.14)
    full, _, small = policies_of(replace(config, blur=0.3), 3, config.view_sizes)
    assert full.blur == small.blur == 0.3
    assert replace(small, size=64, crop_area=full.crop_area, min_covered=full.min_covered) == full


# ---- settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"views_per_image": 1}, "--views-per-image was 1; it must be from 2"),
        ({"small_crops": "16"}, "--small-crops was 16; it must be N:SIZE"),
        ({"small_crops": "0:16"}, "--small-crops was 0:16; it must be N:SIZE"),
        ({"small_crops": "2:3"}, "at least 4"),
        ({"small_crops": "2:\u0664\u0664"}, "N:SIZE"),  # digits to Python, but no numbers that a user would write
        ({"small_crop_min": 0.2}, "at most --small-crop-max, 0.14"),
        ({"small_crop_max": 1.5}, "--small-crop-max was 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        PretrainConfig(**given)


class OneView(Method):
    num_views = 1

    def forward(self, *inputs: Any, **options: Any):
        raise NotImplementedError


def test_views_that_a_method_or_the_images_cannot_take_are_refused(images, tmp_path):
    with pytest.raises(UserError, match=r"--small-crops was 2:7, and MoCo takes 2 views of each image, of one size"):
        check_views(replace(MANY, views_per_image=2), MoCo)
    with pytest.raises(UserError, match="--views-per-image was 3, and OneView takes 1 view of each image"):
        check_views(replace(MANY, small_crops=None), OneView)
    with pytest.raises(UserError, match="--small-crop-max has no effect without small crops"):
        check_views(replace(SMALL_RUN, small_crop_max=0.2), SimCLR)
    with pytest.raises(UserError, match="no smaller than views of 7 pixels; give a smaller size, such as 2:4"):
        check_small_crops(replace(MANY, size=7))
    with pytest.raises(UserError, match="leave them out, and give --views-per-image 5"):
        check_small_crops(replace(MANY, size=4))
    manifest = pretraining.manifest_of(images, "digits", {})
    for config, kind in ((replace(MANY, size=6), SimCLR), (replace(MANY, bn_splits=4, queue=64), MoCo)):
        with pytest.raises(UserError, match=r"--(small-crops|views-per-image) was"):
            pretraining.pretrain_images(
                images, config, RunFolder(tmp_path / "run"), DistributedContext(), manifest=manifest, method=kind
            )
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_one_size_takes_no_small_crops():
    config = replace(MANY, encoder="timm/vit_tiny_patch16_224", size=32, small_crops="2:16", width=1.0)
    with pytest.raises(UserError, match=r"does not take images of 16 pixels \(.*\); give a larger size"):
        pretraining.build_method(config, 3, DistributedContext())


def test_settings_survive_being_saved_and_absent_ones_are_the_defaults(tmp_path):
    MANY.save(tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == MANY
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in ("views_per_image", "small_crops", "small_crop_min", "small_crop_max"):
        del saved[name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert load_config(tmp_path / "config.json").view_sizes == (12, 12)


def test_views_in_words():
    assert describe_views((32, 32)) == "views of 32 pixels"
    assert describe_views((32,) * 4) == "4 views of 32 pixels per image"
    assert describe_views((32, 32, 16)) == "2 views of 32 pixels and 1 of 16 per image"


# ---- the rest of a run


def test_memory_counts_the_views_by_their_sizes(images):
    method = built(MANY)
    footprint = measure(method, MANY, images, torch.float32)
    assert footprint.views == 4 * (3 * 12 * 12 + 2 * 7 * 7)
    fresh, views = built(MANY), [view.to(memory_format=torch.channels_last) for view in random_views(MANY, 40)]

    def step():
        fresh(*views)[0].backward()
        return [known(p.grad) for p in fresh.parameters()]

    assert footprint.plain.at(40) / 1.15 == pytest.approx(peak_bytes(step), rel=0.1)


def test_speed_counts_all_views(images, tmp_path):
    config = replace(MANY, epochs=1, knn_every=0)
    task = pretraining.build_task(images, config, RunFolder(tmp_path), DistributedContext())
    assert task.views_per_step == 32 * 5


def test_the_commands_show_all_views(simclr, tmp_path, monkeypatch):
    asked = ("--recipe", "digits", "--width", 0.5, "--views-per-image", 3, "--small-crops", "2:5")
    code, table, _ = simclr("plan", "digits", *asked, "--batch-size", 32, "--json", tmp_path / "plan.json")
    assert code == 0 and "3 views of 8 pixels and 2 of 5 per image" in table
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["view_sizes"] == [8, 8, 8, 5, 5]
    for strategy in plan["strategies"]:
        assert strategy["views_per_second"] == pytest.approx(5 * 32 / strategy["step_seconds"])

    words = Counter()
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda axes, x, y, word, **options: words.update([word]))
    views = ("views", "digits", *asked, "--images", 2, "--out", tmp_path / "views.png")
    code, _, said = simclr(*views)
    assert code == 0, said
    assert words == {"image": 2, "view a": 4, "view b": 4, "view c": 4, "small d": 2, "small e": 2}  # 8 columns
    words.clear()
    assert simclr(*views, "--views-per-image", 12)[0] == 0
    assert words["view l"] == words["small n"] == 2  # all 14

    code, _, said = simclr("pretrain", "digits", *asked, "--method", "moco", "--out", tmp_path / "run")
    assert code == 2 and "MoCo takes 2 views" in said


def test_scikit_learn_takes_them():
    x = np.random.default_rng(0).random((40, 12, 12))
    settings = {"views_per_image": 3, "small_crops": "1:6", "width": 0.5, "workers": 0}
    model = package.SimCLR("digits", epochs=1, size=8, batch_size=20, settings=settings, random_state=0).fit(x)
    assert known(model.config_).view_sizes == (8, 8, 8, 6)
    assert np.isfinite(model.history_[-1]["loss"])
