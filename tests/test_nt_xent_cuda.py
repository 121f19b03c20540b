"""The Triton kernels of NT-Xent against fp64, in Triton's interpreter where there is no GPU."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from simclr.losses import nt_xent_dense, nt_xent_views_dense, operands
from simclr.losses.nt_xent import l2_normalize, nt_xent_views_streamed
from simclr.losses.operands import Operands

pytest.importorskip("triton")

from simclr.losses import cuda, cuda_bank

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = cuda.Launch(32, 16, 4, 1)
TEMPERATURES = [0.01, 0.03, 0.1, 0.5, 1.0]


def rows(num_rows: int, width: int, normalize: bool = True) -> Tensor:
    z = torch.randn(num_rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return l2_normalize(z) if normalize else z


def definition(z: Tensor, temperature: float, group: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    """L of each row and the gradient of grad . L, in fp64."""
    z = z.clone().requires_grad_()
    image = torch.arange(len(z)) // group
    log_sums = (z @ z.T / temperature).masked_fill(image[:, None] == image, -math.inf).logsumexp(1)
    return log_sums.detach(), torch.autograd.grad(log_sums @ grad, z)[0]


def by_kernels(
    z: Tensor, temperature: float, grad: Tensor, *, own: slice | None = None, group: int = 1, bounded: bool,
    precision: Operands = Operands.FP32, others: Tensor | None = None, launch: cuda.Launch = TILE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same from the kernels; `others` are L of all rows where `own` is a part."""
    settings = {"group": group, "bounded": bounded, "operands": precision, "launch": launch}
    own = own or slice(0, len(z))
    z = z.float().to(DEVICE)
    log_sums = cuda.log_sums(z, temperature, own, **settings)
    everyones = log_sums if others is None else others.float().to(DEVICE)
    dz = cuda.gradients(z, everyones, grad.float().to(DEVICE), temperature, own, **settings)
    return log_sums.cpu(), dz.cpu()


def assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Absolute error of L, error of the gradient relative to its norm."""
    assert (got[0] - expected[0]).abs().max() <= tolerance * max(1, expected[0].abs().max())
    assert (got[1] - expected[1]).norm() <= tolerance * expected[1].norm()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("num_rows", "width"), [(2, 3), (64, 16), (3 * 32 + 5, 24)])
@pytest.mark.parametrize(("precision", "tolerance"), [(Operands.FP32, 2e-7), (Operands.SPLIT, 1e-5)])
def test_equals_the_definition(num_rows, width, temperature, precision, tolerance):
    z = rows(num_rows, width)
    grad = torch.linspace(-1, 2, num_rows, dtype=torch.float64)  # each row has its own say, of either sign
    expected = definition(z, temperature, 1, grad)
    got = by_kernels(z, temperature, grad, bounded=temperature >= 0.03, precision=precision)
    assert_close(got, expected, tolerance * max(10, 1 / temperature))


@pytest.mark.parametrize("bounded", [True, False])
def test_bands_and_strips_do_not_matter(monkeypatch, bounded):
    monkeypatch.setattr(cuda, "BAND", 64)
    monkeypatch.setattr(cuda, "STRIP", 3)
    z, grad = rows(141, 8), torch.linspace(-1, 2, 141, dtype=torch.float64)
    assert_close(by_kernels(z, 0.5, grad, bounded=bounded), definition(z, 0.5, 1, grad), 2e-6)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("group", [1, 3, 12])
def test_a_part_of_the_rows_equals_the_whole(monkeypatch, group, bounded):
    """What each process of a distributed run does; tiles divide neither parts nor groups."""
    monkeypatch.setattr(cuda, "BAND", 32)
    z, grad = rows(144, 10), torch.linspace(-1, 2, 144, dtype=torch.float64)
    expected = definition(z, 0.3, group, grad)
    for first, last in ((0, 36), (36, 84), (84, 144)):
        own = slice(first, last)
        got = by_kernels(z, 0.3, grad, own=own, group=group, bounded=bounded, others=expected[0])
        assert_close(got, (expected[0][own], expected[1][own]), 2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_duplicates_and_opposites(temperature):
    """Rows that are all alike, and exp(-1/t) and exp(1/t) in one row."""
    z, grad = rows(1, 8).repeat(70, 1), torch.full((70,), 1 / 70, dtype=torch.float64)
    log_sums, _ = by_kernels(z, temperature, grad, bounded=temperature >= 0.03)
    assert log_sums.tolist() == pytest.approx([1 / temperature + math.log(69)] * 70, rel=1e-6)
    z[::2] *= -1
    got = by_kernels(z, temperature, grad, bounded=temperature >= 0.03)
    assert_close(got, definition(z, temperature, 1, grad), 1e-6 / temperature)


def test_dot_products_without_a_bound():
    z, grad = 30 * rows(50, 6, normalize=False), torch.ones(50, dtype=torch.float64)
    assert_close(by_kernels(z, 0.5, grad, bounded=False), definition(z, 0.5, 1, grad), 1e-3)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # from the interpreter's own maximum
@pytest.mark.parametrize("bounded", [True, False])
def test_is_deterministic_and_hides_no_nan(bounded):
    z, grad = rows(90, 12), torch.ones(90, dtype=torch.float64)
    first = by_kernels(z, 0.1, grad, bounded=bounded)
    again = by_kernels(z, 0.1, grad, bounded=bounded)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    z[40, 3] = math.nan
    log_sums, dz = by_kernels(z, 0.1, grad, bounded=bounded)
    assert log_sums.isnan().all() and dz.isnan().all()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_the_whole_loss(monkeypatch, temperature, num_views, decoupled):
    monkeypatch.setattr(sys.modules["simclr.losses.nt_xent"], "operands_for", lambda views: Operands.FP32)
    views = rows(num_views * 21, 10).view(num_views, 21, 10)
    expected = loss_and_grad(nt_xent_views_dense, views, temperature, decoupled)
    got = loss_and_grad(nt_xent_views_streamed, views.float().to(DEVICE), temperature, decoupled)
    torch.testing.assert_close(got[0].cpu().double(), expected[0], rtol=1e-5, atol=1e-5)
    assert (got[1].cpu() - expected[1]).norm() <= 1e-5 * expected[1].norm()


def test_bf16_projections_have_the_exact_loss_of_their_rounded_unit_rows(monkeypatch):
    """Also where positive pairs fill the sums, and the gradient is what is left of large terms."""
    monkeypatch.setattr(sys.modules["simclr.losses.nt_xent"], "operands_for", lambda views: Operands.BF16)
    first = rows(40, 32)
    views = torch.stack([first, first + 0.01 * rows(80, 32)[40:]]).bfloat16()
    rounded = l2_normalize(views.float()).bfloat16().double().requires_grad_()
    expected = nt_xent_dense(rounded[0], rounded[1], 0.1, False)
    got = nt_xent_views_streamed(views.to(DEVICE), 0.1)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def loss_and_grad(loss, views: Tensor, temperature: float, decoupled: bool) -> tuple[Tensor, Tensor]:
    views = views.clone().requires_grad_()
    value = loss(views, temperature, decoupled=decoupled)
    return value.detach(), torch.autograd.grad(value, views)[0]


def test_a_cpu_and_fp64_have_no_kernels():
    assert operands.operands_for(torch.ones(2, 3, 4)) is None
    if DEVICE == "cuda":
        assert operands.operands_for(torch.ones(2, 3, 4, device=DEVICE)) is Operands.SPLIT
        assert operands.operands_for(torch.ones(2, 3, 4, device=DEVICE, dtype=torch.float64)) is None
        assert operands.operands_for(torch.ones(2, 3, 257, device=DEVICE)) is None


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from simclr.losses import cuda, cuda_tiles

def shared_memory(kernel, capability, pieces, width, tile, **constants):
    constants |= {"WIDTH": width, "PIECES": pieces, "ROWS": tile.rows, "COLUMNS": tile.columns, "BOUNDED": True}
    pointers = {"of_rows", "of_columns", "weights", "logs", "out"}
    kind = lambda name: "*fp32" if name in pointers else "fp32" if "scale" in name else "i32"
    signature = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names} | {"z": "*bf16"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if "*" in signature[name]}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared

room, pieces, width = 232448, 2, 128  # an H100's shared memory
tile = cuda_tiles.largest_tile(pieces * width * 2, room)
assert shared_memory(cuda._sums_kernel, 90, pieces, width, tile, STRIP=cuda.STRIP) <= room
assert shared_memory(cuda._gradients_kernel, 90, pieces, width, tile) <= room
"""


def test_kernels_compile_and_fit_into_a_gpu(tmp_path):
    """The compiler needs no GPU; a process of its own, because here Triton may be an interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("num_rows", "num_keys", "width"), [(1, 1, 3), (5, 70, 16), (37, 101, 24)])
@pytest.mark.parametrize(("precision", "tolerance"), [(Operands.FP32, 2e-7), (Operands.SPLIT, 1e-5)])
def test_sums_over_a_bank_equal_the_definition(num_rows, num_keys, width, temperature, precision, tolerance):
    z, bank = rows(num_rows, width), rows(num_rows + num_keys, width)[num_rows:]
    s = z @ bank.T / temperature
    log_sums, means = cuda_bank.log_sums_and_means(
        z.float().to(DEVICE), bank.float().to(DEVICE), temperature, operands=precision, launch=TILE
    )
    assert_close(
        (log_sums.cpu(), means.cpu()), (s.logsumexp(1), s.softmax(1) @ bank), tolerance * max(10, 1 / temperature)
    )


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_strips_of_the_bank_do_not_matter(monkeypatch, programs):
    monkeypatch.setattr(cuda_bank, "PROGRAMS", programs)
    z, bank = rows(40, 8), rows(240, 8)[40:]
    s = z @ bank.T / 0.2
    results = cuda_bank.log_sums_and_means(
        z.float().to(DEVICE), bank.float().to(DEVICE), 0.2, operands=Operands.FP32, launch=TILE
    )
    assert_close((results[0].cpu(), results[1].cpu()), (s.logsumexp(1), s.softmax(1) @ bank), 2e-6)
