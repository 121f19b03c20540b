"""NT-Xent against a double loop, and its fast forms against its definition."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr import UserError
from simclr.losses import nt_xent, nt_xent_dense
from simclr.losses.nt_xent import nt_xent_streamed
from simclr.losses.streamed import CPU_TILE, others_logsumexp

TEMPERATURES = [0.01, 0.03, 0.1, 0.5, 1.0]


def naive_nt_xent(za: np.ndarray, zb: np.ndarray, temperature: float, normalize: bool) -> float:
    """Equation 1 of the paper, one similarity at a time."""
    z = [row / np.linalg.norm(row) if normalize else row for row in np.concatenate([za, zb]).astype(np.float64)]
    total = 0.0
    for i in range(len(z)):
        partner = (i + len(za)) % len(z)
        terms = [float(z[i] @ z[k]) / temperature for k in range(len(z)) if k != i]
        largest = max(terms)
        log_sum = largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
        total += log_sum - float(z[i] @ z[partner]) / temperature
    return total / len(z)


def random_views(num_images: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Two correlated views, as leaves."""
    draw = torch.Generator().manual_seed(seed)
    za = torch.randn(num_images, width, dtype=torch.float64, generator=draw)
    zb = za + torch.randn(num_images, width, dtype=torch.float64, generator=draw)
    return [za.to(dtype).requires_grad_(), zb.to(dtype).requires_grad_()]


def value_and_grads(loss: Any, views: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    value = loss(*views, *args)
    return value.detach(), torch.cat(torch.autograd.grad(value, views))


@pytest.mark.parametrize("loss", [nt_xent_dense, nt_xent_streamed])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("num_images", "width"), [(1, 3), (2, 1), (7, 5), (20, 16)])
def test_equals_the_double_loop(loss, normalize, temperature, num_images, width):
    za, zb = random_views(num_images, width)
    expected = naive_nt_xent(za.detach().numpy(), zb.detach().numpy(), temperature, normalize)
    assert loss(za, zb, temperature, normalize).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("num_images", [1, 2, 256, 300, 525])
def test_streamed_equals_dense(num_images, temperature, normalize):
    views = random_views(num_images, 24)
    value, grads = value_and_grads(nt_xent_streamed, views, temperature, normalize)
    expected, expected_grads = value_and_grads(nt_xent_dense, views, temperature, normalize)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("loss", [nt_xent_dense, nt_xent_streamed])
def test_fp32_is_close_to_fp64(loss, temperature, normalize):
    single = random_views(400, 32, torch.float32)
    double = [view.detach().double().requires_grad_() for view in single]
    value, grads = value_and_grads(loss, single, temperature, normalize)
    expected, expected_grads = value_and_grads(nt_xent_dense, double, temperature, normalize)
    assert value.dtype == torch.float32
    # A logit of size s carries an error of about s x 1e-7, and so do the value and each softmax weight.
    largest = (1.0 if normalize else 80.0) / temperature
    assert abs(value.item() - expected.item()) <= 5e-7 * max(largest, expected.item())
    assert (grads - expected_grads).norm() <= max(1e-6, 2e-7 * largest) * expected_grads.norm()


@pytest.mark.parametrize("loss", [nt_xent_dense, nt_xent_streamed])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_similarities(loss, temperature):
    """All views alike; and every image opposed to every second one: exp(-1/t) and exp(1/t) in one row."""
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    alike = row.repeat(350, 1).requires_grad_()
    value, grads = value_and_grads(loss, [alike, alike.detach().clone().requires_grad_()], temperature)
    assert value.item() == pytest.approx(math.log(699), rel=1e-5)
    assert grads.abs().max() < 1e-5 / temperature

    signs = torch.ones(350, 1)
    signs[::2] = -1
    opposed = [(row * signs).requires_grad_(), (row * signs).requires_grad_()]
    value, grads = value_and_grads(loss, opposed, temperature)
    expected = math.log(349 + 350 * math.exp(-2 / temperature))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert grads.isfinite().all()

    strangers = [row.requires_grad_(), (-row.detach()).requires_grad_()]  # one image whose views are opposed
    value, _ = value_and_grads(loss, strangers, temperature)
    assert value.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("tile", [1, 3, 4, 12, 100])
def test_tiles_do_not_matter(tile, bounded):
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(12, 5, dtype=torch.float64, generator=draw).requires_grad_()
    weights = torch.randn(12, dtype=torch.float64, generator=draw)  # each row has its own say, of either sign
    logits = (z @ z.T / 0.7).masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    expected = logits.logsumexp(1)
    got = others_logsumexp(z, 0.7, bounded=bounded, tile=tile)
    torch.testing.assert_close(got, expected)
    (expected_grad,) = torch.autograd.grad(expected @ weights, z)
    (grad,) = torch.autograd.grad(got @ weights, z)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("bounded", [True, False])
def test_gradcheck(bounded):
    z = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.autograd.gradcheck(lambda z: others_logsumexp(z, 0.5, bounded=bounded, tile=3), z)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_of_the_loss(normalize):
    torch.autograd.gradcheck(lambda a, b: nt_xent_streamed(a, b, 0.3, normalize), random_views(4, 3))
    torch.autograd.gradcheck(lambda a, b: nt_xent_dense(a, b, 0.3, normalize), random_views(4, 3))


def test_order_of_images_and_of_views_does_not_matter():
    za, zb = random_views(31, 6)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(3))
    expected = nt_xent(za, zb)
    torch.testing.assert_close(nt_xent(za[order], zb[order]), expected)
    torch.testing.assert_close(nt_xent(zb, za), expected)


def test_a_zero_row_has_a_finite_gradient():
    """TensorFlow's l2_normalize takes squared norms from 1e-12: a dead projection is a zero row, not 0 / 0."""
    for loss in (nt_xent_dense, nt_xent_streamed):
        za, zb = random_views(5, 4)
        za.data[2] = 0
        value, grads = value_and_grads(loss, [za, zb])
        assert value.isfinite() and grads.isfinite().all()


@pytest.mark.parametrize("num_images", [100, 700])
def test_not_a_number_is_not_hidden(num_images):
    za, zb = random_views(num_images, 4)
    za.data[num_images // 2, 1] = math.nan
    assert nt_xent(za, zb).isnan()


def test_size_chooses_the_form_and_not_the_result():
    for num_images in (319, 320):
        views = random_views(num_images, 8)
        torch.testing.assert_close(nt_xent(views[0], views[1]), nt_xent_dense(views[0], views[1]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_streamed_is_deterministic(temperature):
    views = random_views(900, 32, torch.float32)
    first = value_and_grads(nt_xent_streamed, views, temperature)
    for _ in range(3):
        again = value_and_grads(nt_xent_streamed, views, temperature)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_streamed_never_holds_the_similarity_matrix(temperature):
    num_images, width = 1500, 16
    rows = 2 * num_images
    views = random_views(num_images, width, torch.float32)
    with LargestTensor() as streamed:
        nt_xent(views[0], views[1], temperature).backward()
    assert streamed.elements <= max(rows * width, CPU_TILE**2) < rows**2 / 30
    with LargestTensor() as dense:
        nt_xent_dense(views[0], views[1], temperature).backward()
    assert dense.elements == rows**2  # the measure does see what happens in backward and forward


@pytest.mark.parametrize("num_images", [40, 400])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_autocast_changes_nothing(num_images, temperature):
    views = random_views(num_images, 16, torch.float32)
    expected, expected_grads = value_and_grads(nt_xent, views, temperature)
    with torch.autocast("cpu", torch.bfloat16):
        value = nt_xent(views[0], views[1], temperature)
    grads = torch.cat(torch.autograd.grad(value, views))
    assert torch.equal(value.detach(), expected) and torch.equal(grads, expected_grads)


def test_autocast_around_a_streamed_backward_changes_nothing():
    views = random_views(400, 16, torch.float32)
    expected = value_and_grads(nt_xent_streamed, views, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_grads(nt_xent_streamed, views, 0.1)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("num_images", [40, 400])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_projections_have_fp32_logits(num_images, dtype):
    views = random_views(num_images, 16, dtype)
    exact = [view.detach().float() for view in views]
    value = nt_xent(views[0], views[1])
    assert value.dtype == torch.float32
    assert torch.equal(value.detach(), nt_xent(exact[0], exact[1]))
    assert all(grad.dtype == dtype for grad in torch.autograd.grad(value, views))


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(UserError, match="temperature"):
        nt_xent(torch.ones(2, 3), torch.ones(2, 3), temperature)


@pytest.mark.parametrize(
    ("shape_a", "shape_b"), [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((2, 3, 1), (2, 3, 1)), ((3,), (3,))]
)
def test_views_that_do_not_fit_are_refused(shape_a, shape_b):
    with pytest.raises(UserError, match="shapes"):
        nt_xent(torch.ones(shape_a), torch.ones(shape_b))


def test_an_empty_batch_is_refused():
    with pytest.raises(UserError, match="at least one image"):
        nt_xent(torch.ones(0, 3), torch.ones(0, 3))
