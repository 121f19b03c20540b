"""The other losses against loops, closed forms and scipy; some anchors at a time, and in two processes."""

import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import in_processes
from simclr import UserError
from simclr.config.pretrain import PretrainConfig
from simclr.distributed import DistributedContext
from simclr.losses import anchors, generalised_contrastive, margin_triplet, nt_logistic, nt_xent, nt_xent_views, supcon
from simclr.losses.generalised import Draw, draw_slices, sliced_wasserstein
from simclr.losses.pairwise import margin_triplet_dense, nt_logistic_dense
from simclr.losses.supcon import supcon_dense

NO_PROCESSES = DistributedContext()


def random_views(num_images: int, width: int, num_views: int = 2) -> Tensor:
    """(V, n, D) correlated views, a leaf in fp64."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(1, num_images, width, dtype=torch.float64, generator=draw)
    noise = torch.randn(num_views, num_images, width, dtype=torch.float64, generator=draw)
    return (images + noise).requires_grad_()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive(views: np.ndarray, of_negative, of_positive, semi_hard: bool) -> float:
    """The mean over anchors, one pair at a time: of_positive(s+) + the mean of of_negative(s-, s+)."""
    z = views / np.linalg.norm(views, axis=2, keepdims=True)
    terms = []
    for view, i in product(range(2), range(z.shape[1])):
        positive = float(z[view, i] @ z[1 - view, i])
        negatives = [float(z[view, i] @ z[1 - view, j]) for j in range(z.shape[1]) if j != i]
        if semi_hard:
            negatives = sorted(s for s in negatives if s < positive)[-1:]
        pushed = [of_negative(negative, positive) for negative in negatives]
        terms.append(of_positive(positive) + (sum(pushed) / len(pushed) if pushed else 0.0))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("semi_hard", [False, True])
@pytest.mark.parametrize("form", [nt_logistic, nt_logistic_dense])
def test_nt_logistic_equals_the_loop(form, semi_hard):
    views = random_views(9, 4)
    for temperature in (0.1, 1.0):
        expected = naive(
            views.detach().numpy(), lambda s, _, t=temperature: -math.log(sigmoid(-s / t)),
            lambda s, t=temperature: -math.log(sigmoid(s / t)), semi_hard,
        )  # fmt: skip
        assert form(views[0], views[1], temperature, semi_hard=semi_hard).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("semi_hard", [False, True])
@pytest.mark.parametrize("form", [margin_triplet, margin_triplet_dense])
def test_margin_triplet_equals_the_loop(form, semi_hard):
    views = random_views(9, 4)
    for margin in (0.0, 0.4, 1.6):
        expected = naive(views.detach().numpy(), lambda s, p, m=margin: max(s - p + m, 0), lambda _: 0.0, semi_hard)
        assert form(views[0], views[1], margin, semi_hard=semi_hard).item() == pytest.approx(expected, rel=1e-12)


def test_semi_hard_leaves_out_negatives_that_are_closer_than_the_positive():
    """Each negative equals its anchor, so it is closer than the positive."""
    za, zb = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert margin_triplet(za, zb, 0.5).item() == pytest.approx(1.5)  # s- = 1, s+ = 0
    assert margin_triplet(za, zb, 0.5, semi_hard=True).item() == 0
    assert nt_logistic(za, zb, 1.0, semi_hard=True).item() == pytest.approx(math.log(2))  # of the positive alone


def test_gradients_are_those_of_table_2():
    """Table 2's gradient with respect to the anchor u, and the same terms as seen from its positive and negatives."""
    views = random_views(5, 3)
    u = F.normalize(views.detach(), dim=2)
    n, temperature, margin = u.shape[1], 0.5, 0.4
    logistic, triplet = torch.zeros_like(u), torch.zeros_like(u)
    for view, i in product(range(2), range(n)):
        other = 1 - view
        positive = u[view, i] @ u[other, i]
        pulled = torch.sigmoid(-positive / temperature) / temperature
        logistic[view, i] -= pulled * u[other, i]
        logistic[other, i] -= pulled * u[view, i]
        for j in range(n):
            if j == i:
                continue
            negative = u[view, i] @ u[other, j]
            pushed = torch.sigmoid(negative / temperature) / temperature / (n - 1)
            logistic[view, i] += pushed * u[other, j]
            logistic[other, j] += pushed * u[view, i]
            if positive - negative < margin:
                triplet[view, i] += (u[other, j] - u[other, i]) / (n - 1)
                triplet[other, j] += u[view, i] / (n - 1)
                triplet[other, i] -= u[view, i] / (n - 1)
    for loss, argument, expected in ((nt_logistic, temperature, logistic), (margin_triplet, margin, triplet)):
        leaf = u.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf[0], leaf[1], argument, False), leaf)
        torch.testing.assert_close(grad, expected / (2 * n))


def test_nt_xent_has_the_gradient_of_table_2():
    """Table 2's gradient (P+ - 1) v+ / T + sum P- v- / T of an anchor u, and its terms as the other views see them."""
    views = F.normalize(random_views(2, 3).detach(), dim=2).requires_grad_()
    temperature, z = 0.5, views.detach().flatten(0, 1)
    expected = torch.zeros_like(z)
    for anchor in range(4):
        others = [row for row in range(4) if row != anchor]
        weights = torch.stack([z[anchor] @ z[row] / temperature for row in others]).softmax(0)
        for row, weight in zip(others, weights, strict=True):
            share = (weight - float(row == (anchor + 2) % 4)) / temperature / 4
            expected[anchor] += share * z[row]
            expected[row] += share * z[anchor]
    (grad,) = torch.autograd.grad(nt_xent(views[0], views[1], temperature, False), views)
    torch.testing.assert_close(grad.flatten(0, 1), expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize):
    views = random_views(4, 3, num_views=2)
    labels = torch.tensor([0, 1, 0, -1])
    draw = double(draw_slices("normal", 8, 3, seed=0, step=0))
    for loss in (
        lambda v: nt_logistic(v[0], v[1], 0.5, normalize),
        lambda v: nt_logistic(v[0], v[1], 0.5, normalize, semi_hard=True),
        lambda v: margin_triplet(v[0], v[1], 0.4, normalize),
        lambda v: margin_triplet(v[0], v[1], 0.4, normalize, semi_hard=True),
        lambda v: supcon(v, labels, 0.5, normalize),
        lambda v: generalised_contrastive(v[0], v[1], weight=0.3, normalize=normalize),
        lambda v: generalised_contrastive(v[0], v[1], "normal", weight=0.3, normalize=normalize, draw=draw),
    ):
        torch.autograd.gradcheck(loss, views)


def double(draw: Draw) -> Draw:
    return Draw(*(part.double() for part in draw))


def value_and_grad(value: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    return value.detach(), torch.autograd.grad(value, views)[0]


@pytest.mark.parametrize("semi_hard", [False, True])
def test_some_anchors_at_a_time_equal_all_at_once(semi_hard, monkeypatch):
    monkeypatch.setattr(anchors, "ANCHORS_AT_A_TIME", 7)
    views, labels = random_views(15, 4), torch.arange(15) % 4
    za, zb = views[0], views[1]
    for streamed, dense in (
        (nt_logistic(za, zb, semi_hard=semi_hard), nt_logistic_dense(za, zb, semi_hard=semi_hard)),
        (margin_triplet(za, zb, semi_hard=semi_hard), margin_triplet_dense(za, zb, semi_hard=semi_hard)),
        (supcon(views, labels), supcon_dense(views, labels)),
    ):
        torch.testing.assert_close(value_and_grad(streamed, views), value_and_grad(dense, views))


def test_supcon_equals_the_loop():
    views, labels, temperature = random_views(6, 4, num_views=3), [0, 1, 0, 2, 1, -1], 0.3
    z = F.normalize(views.detach(), dim=2).flatten(0, 1).numpy()
    image = [row % 6 for row in range(18)]
    terms = []
    for i in range(18):
        logits = {j: float(z[i] @ z[j]) / temperature for j in range(18) if j != i}
        log_sum = math.log(math.fsum(map(math.exp, logits.values())))
        same = [j for j in logits if image[j] == image[i] or labels[image[i]] == labels[image[j]]]
        terms.append(math.fsum(log_sum - logits[j] for j in same) / len(same))
    for form in (supcon, supcon_dense):
        assert form(views, torch.tensor(labels), temperature).item() == pytest.approx(math.fsum(terms) / 18, rel=1e-12)


def test_supcon_of_classes_of_one_image_is_nt_xent():
    views = random_views(8, 5, num_views=3)
    expected = value_and_grad(nt_xent_views(views, 0.2), views)
    for labels in (torch.arange(8), torch.full((8,), -1)):
        torch.testing.assert_close(value_and_grad(supcon(views, labels, 0.2), views), expected)


def test_log_sum_exp_of_the_generalised_loss():
    """The authors' formula, written out."""
    views = random_views(6, 4)
    z = F.normalize(views, dim=2)
    rows = z.flatten(0, 1)
    match = ((rows @ rows.T) / 0.5).logsumexp(1) - math.log(4)
    expected = (z[0] - z[1]).square().mean() / 2 + 0.3 * match.mean()
    torch.testing.assert_close(generalised_contrastive(views[0], views[1], weight=0.3, temperature=0.5), expected)


@pytest.mark.parametrize(("prior", "normalize"), [("normal", True), ("normal", False), ("uniform", False)])
def test_sliced_wasserstein_along_each_direction_is_scipys(prior, normalize):
    """In one dimension the distance of order 1 is scipy's; ours is its square for sets a constant apart."""
    draw = double(draw_slices(prior, 7, 3, seed=1, step=4))
    rotation, target = draw.rotation, F.normalize(draw.rows, dim=1) if normalize else draw.rows
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    apart = target + torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    distances = [scipy.stats.wasserstein_distance(apart @ axis, target @ axis) for axis in rotation.T]
    value = sliced_wasserstein(apart, draw, normalize=normalize)
    assert value.item() == pytest.approx(np.mean(np.square(distances)), rel=1e-5)
    assert sliced_wasserstein(target.flip(0), draw, normalize=normalize).item() == pytest.approx(0, abs=1e-15)


def test_draws_depend_on_seed_and_step_alone():
    first = draw_slices("uniform", 400, 3, seed=1, step=2)
    assert all(map(torch.equal, first, draw_slices("uniform", 400, 3, seed=1, step=2)))
    assert not torch.equal(first.rows, draw_slices("uniform", 400, 3, seed=1, step=3).rows)
    assert not torch.equal(first.rows, draw_slices("uniform", 400, 3, seed=2, step=2).rows)
    assert first.rows.abs().max() <= 1 and abs(first.rows.mean()) < 0.1


def test_two_processes_equal_one(tmp_path):
    in_processes(2, tmp_path, check_process)


def check_process(world: DistributedContext) -> None:
    everyone, labels = random_views(12, 6), torch.arange(12) % 5
    own = world.local_slice(12)
    normal, uniform = (double(draw_slices(prior, 24, 6, seed=0, step=0)) for prior in ("normal", "uniform"))

    def losses(views: Tensor, of_labels: Tensor, of: DistributedContext) -> list[Tensor]:
        return [
            nt_logistic(views[0], views[1], 0.3, world=of),
            nt_logistic(views[0], views[1], 0.3, world=of, semi_hard=True),
            margin_triplet(views[0], views[1], 0.4, world=of),
            margin_triplet(views[0], views[1], 0.4, world=of, semi_hard=True),
            supcon(views, of_labels, 0.3, world=of),
            generalised_contrastive(views[0], views[1], weight=0.3, world=of),
            generalised_contrastive(views[0], views[1], "normal", weight=0.3, draw=normal, world=of),
            generalised_contrastive(views[0], views[1], "uniform", normalize=False, draw=uniform, world=of),
        ]

    mine = everyone[:, own].detach().requires_grad_()
    shared = losses(mine, labels[own], world)
    for value, expected in zip(shared, losses(everyone, labels, NO_PROCESSES), strict=True):
        assert abs(value - expected) <= 1e-10 * abs(expected)
        grad, of_everyone = torch.autograd.grad(value, mine)[0], torch.autograd.grad(expected, everyone)[0]
        error = (grad / world.size - of_everyone[:, own]).norm() / of_everyone.norm()
        assert error <= 1e-10, error


def test_one_image_has_no_negatives():
    for loss in (nt_logistic, margin_triplet):
        with pytest.raises(UserError, match="other images"):
            loss(torch.ones(1, 3), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"negatives": "semi-hard"}, "--negatives"),
        ({"loss": "nt-logistic", "margin": 0.4}, "--margin"),
        ({"loss": "margin", "margin": -1.0}, "--margin"),
        ({"prior": "normal"}, "--prior"),
        ({"loss": "generalised", "prior": "uniform"}, "--no-normalize"),
        ({"loss": "dcl", "prior_weight": 2.0}, "--prior-weight"),
        ({"loss": "margin", "queue": 64}, "--queue"),
        ({"loss": "supcon", "queue": 64}, "--queue"),
        ({"queue": 64, "normalize": False}, "--no-normalize"),
        ({"loss": "nt-logistic", "views_per_image": 3}, "--views-per-image"),
        ({"loss": "generalised", "small_crops": "2:16"}, "--small-crops"),
    ],
)
def test_settings_of_another_loss_are_refused(settings, named):
    """By the settings alone, so before an image is read."""
    with pytest.raises(UserError, match=named):
        PretrainConfig(**settings)
