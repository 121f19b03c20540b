"""NT-Xent for more than two views and DCL: the definition against loops, the fast forms against the definition."""

import math
import os
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import in_processes, parts_of
from simclr import UserError
from simclr.config.pretrain import PretrainConfig
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.losses import nt_xent, nt_xent_dense, nt_xent_views, nt_xent_views_dense
from simclr.losses.nt_xent import nt_xent_views_streamed
from simclr.losses.operands import Operands
from simclr.losses.streamed import others_logsumexp
from simclr.tasks.pretrain_images import build_task
from simclr.training.run import RunFolder

FORMS = [nt_xent_views_dense, nt_xent_views_streamed]
TEMPERATURES = [0.01, 0.03, 0.1, 0.5, 1.0]


def random_views(num_views: int, num_images: int, width: int) -> Tensor:
    """(V, n, D) correlated views, a leaf in fp64."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(1, num_images, width, dtype=torch.float64, generator=draw)
    noise = torch.randn(num_views, num_images, width, dtype=torch.float64, generator=draw)
    return (images + noise).requires_grad_()


def naive(views: Tensor, temperature: float, decoupled: bool) -> float:
    """One pair of views at a time."""
    z = (views / views.norm(dim=2, keepdim=True)).tolist()
    rows = [(v, i) for v in range(len(z)) for i in range(len(z[0]))]

    def s(a, b):
        return math.fsum(x * y for x, y in zip(z[a[0]][a[1]], z[b[0]][b[1]], strict=True)) / temperature

    terms = []
    for anchor in rows:
        for positive in rows:
            if positive[1] != anchor[1] or positive == anchor:
                continue
            others = [row for row in rows if (row[1] != anchor[1] if decoupled else row != anchor)]
            largest = max(s(anchor, row) for row in others)
            log_sum = largest + math.log(math.fsum(math.exp(s(anchor, row) - largest) for row in others))
            terms.append(log_sum - s(anchor, positive))
    return math.fsum(terms) / len(terms)


def value_and_grad(loss, views: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    value = loss(views, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, views)[0]


@pytest.mark.parametrize("loss", FORMS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("num_views", "num_images"), [(2, 2), (2, 5), (3, 4), (4, 3)])
def test_equals_the_loops(loss, num_views, num_images, temperature, decoupled):
    views = random_views(num_views, num_images, 5)
    expected = naive(views.detach(), temperature, decoupled)
    assert loss(views, temperature, decoupled=decoupled).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("num_views", "num_images", "normalize"), [(2, 300, True), (3, 230, True), (5, 120, False)])
def test_streamed_equals_dense(num_views, num_images, normalize, temperature, decoupled):
    views = random_views(num_views, num_images, 12)
    got = value_and_grad(nt_xent_views_streamed, views, temperature, normalize, decoupled=decoupled)
    expected = value_and_grad(nt_xent_views_dense, views, temperature, normalize, decoupled=decoupled)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_images", [20, 400])
def test_two_views_are_nt_xent(num_images):
    za, zb = random_views(2, num_images, 8).unbind()
    expected = nt_xent_dense(za, zb, 0.2)
    torch.testing.assert_close(nt_xent_views(torch.stack([za, zb]), 0.2), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(nt_xent(za, zb, 0.2), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_images", [20, 400])
def test_the_partner_is_all_that_decoupling_leaves_out(num_images):
    """exp(DCL's log-sum) + exp(the positive) = exp(NT-Xent's log-sum), row by row."""
    za, zb = random_views(2, num_images, 8).unbind()
    z = torch.stack([za, zb], 1).flatten(0, 1)  # views of an image are neighbours
    apart = others_logsumexp(z, 2.0, bounded=False, group=2)
    positives = (za * zb).sum(1).repeat_interleave(2) / 2.0
    torch.testing.assert_close(apart.logaddexp(positives), others_logsumexp(z, 2.0, bounded=False))
    expected = apart.mean() - positives.mean()
    torch.testing.assert_close(nt_xent(za, zb, 2.0, False, decoupled=True), expected)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("tile", [1, 4, 7, 12, 100])
def test_groups_and_tiles(tile, bounded):
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(24, 5, dtype=torch.float64, generator=draw).requires_grad_()
    weights = torch.randn(24, dtype=torch.float64, generator=draw)
    image = torch.arange(24) // 3
    expected = (z @ z.T / 0.7).masked_fill(image[:, None] == image, -math.inf).logsumexp(1)
    got = others_logsumexp(z, 0.7, bounded=bounded, group=3, tile=tile)
    torch.testing.assert_close(got, expected)
    (expected_grad,) = torch.autograd.grad(expected @ weights, z)
    (grad,) = torch.autograd.grad(got @ weights, z)
    torch.testing.assert_close(grad, expected_grad)


def test_gradcheck():
    views = random_views(3, 4, 3)
    for decoupled in (False, True):
        torch.autograd.gradcheck(lambda v, d=decoupled: nt_xent_views_streamed(v, 0.3, decoupled=d), views)


@pytest.mark.parametrize("loss", FORMS)
def test_equal_views_of_equal_images(loss):
    views = torch.ones(3, 300, 4)
    assert loss(views, 0.1).item() == pytest.approx(math.log(899), rel=1e-5)
    assert loss(views, 0.1, decoupled=True).item() == pytest.approx(math.log(897), rel=1e-5)


def test_what_has_no_loss_is_refused():
    with pytest.raises(UserError, match="at least two views"):
        nt_xent_views(torch.ones(1, 4, 3))
    with pytest.raises(UserError, match="other images"):
        nt_xent(torch.ones(1, 3), torch.ones(1, 3), decoupled=True)
    with pytest.raises(UserError, match="temperature"):
        nt_xent_views(torch.ones(3, 4, 3), 0.0)


@pytest.mark.parametrize(("name", "decoupled"), [("nt-xent", False), ("dcl", True)])
def test_the_setting_chooses_the_loss(tmp_path, name, decoupled):
    images = open_data("digits").subset(np.arange(12))
    config = PretrainConfig(size=8, encoder="small", batch_size=8, loss=name, loss_scale=1.0)
    task = build_task(images, config, RunFolder(tmp_path / "run"), DistributedContext())
    views = task.batch(0)
    loss, _ = task.method(*views)
    with torch.no_grad():
        method = parts_of(task.method)
    za, zb = method.head(method.encoder(torch.cat(views))).chunk(2)
    assert loss.item() == pytest.approx(nt_xent(za, zb, 0.1, decoupled=decoupled).item(), rel=1e-5)


def test_two_processes_equal_one(tmp_path):
    in_processes(2, tmp_path, check_processes)


def check_processes(world: DistributedContext) -> None:
    """torch's tiles in fp64, and the Triton kernels (in the interpreter) in fp32."""
    for num_views, decoupled in ((2, True), (3, False), (3, True)):
        check_process(world, num_views, decoupled, torch.float64, 1e-10)
    if "TRITON_INTERPRET" in os.environ:
        import conftest  # noqa: F401, which prepares the interpreter, in this process too

        module = sys.modules["simclr.losses.nt_xent"]
        module.operands_for = lambda views: Operands.FP32  # pyrefly: ignore[missing-attribute]
        for decoupled in (False, True):
            check_process(world, 3, decoupled, torch.float32, 1e-5)


def check_process(
    world: DistributedContext, num_views: int, decoupled: bool, dtype: torch.dtype, tolerance: float
) -> None:
    views = random_views(num_views, 12, 6)
    expected, expected_grad = value_and_grad(nt_xent_views_dense, views, 0.2, decoupled=decoupled)
    own = world.local_slice(12)
    mine = views[:, own].detach().to(dtype).requires_grad_()
    value, grad = value_and_grad(nt_xent_views, mine, 0.2, world=world, decoupled=decoupled)
    assert abs(value - expected) <= tolerance * abs(expected)
    error = (grad / world.size - expected_grad[:, own]).norm() / expected_grad[:, own].norm()
    assert error <= tolerance, (error, num_views, decoupled, dtype)
