"""Memory strategies: each against the plain step, in one process and in several, and what it saves."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from helpers import in_processes, known
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses import nt_xent_dense
from simclr.losses.contrastive import ContrastiveLoss
from simclr.methods.simclr import SimCLR
from simclr.models import EncoderConfig, ProjectionHead, build_encoder, set_global_batch_norm
from simclr.models.activation_checkpointing import can_checkpoint, checkpoint_blocks
from simclr.models.batchnorm import track_once
from simclr.training.grad_cache import GradCache
from simclr.training.loop import _over_processes

B = 16


def views(dtype=torch.float64, size=12):
    """Both views of B gray images, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(B, 1, size, size, generator=generator, dtype=torch.float64)
    noise = torch.rand(2, B, 1, size, size, generator=generator, dtype=torch.float64)
    return (0.7 * images + 0.3 * noise).to(dtype)  # (2, B, 1, S, S)


def method_of(name="small", *, size=12, dtype=torch.float64, world=None, head_layers=3):
    width = {"resnet50": 0.25}.get(name, 1.0)
    encoder = build_encoder(EncoderConfig(name, channels=1, size=size, width=width))
    head = ProjectionHead(encoder.num_features, layers=head_layers, dim=8)
    method = SimCLR(
        encoder, head, criterion=ContrastiveLoss(temperature=0.5), loss_scale=2.0, world=world or DistributedContext()
    ).to(dtype)
    with torch.no_grad():
        for parameter in method.parameters():  # the last gamma of each block begins at 0: switch the branches on
            parameter[parameter == 0] = 0.3
    return method.to(memory_format=torch.channels_last)


def without_batch_norm(dropout=0.0, criterion=None):
    """A method whose network treats each image on its own."""
    torch.manual_seed(0)
    encoder: Any = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.LazyLinear(12),
    ).double()
    encoder(views()[0])
    head: Any = nn.Linear(12, 6).double()
    criterion = criterion or ContrastiveLoss(temperature=0.2)
    return SimCLR(encoder, head, criterion=criterion, loss_scale=1.0, world=DistributedContext())


def chunks_of(pair, count):
    return [lambda part=part: tuple(part) for part in pair.chunk(count, dim=1)]


def gradients(method, *inputs):
    method.zero_grad()
    loss, _ = GradCache(method)(*inputs) if callable(inputs[0]) and isinstance(method, SimCLR) else method(*inputs)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in method.named_parameters()}


def naive_gradients(method, pair, count):
    """Chunk after chunk with one graph for all: what gradient caching must equal, at the memory it avoids."""
    method.zero_grad()
    parts = [torch.stack(method.encode(*part)[1].chunk(2)) for part in pair.chunk(count, dim=1)]
    za, zb = torch.cat(parts, dim=1)
    loss = method.loss_scale * nt_xent_dense(za, zb, method.criterion.temperature)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in method.named_parameters()}


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert error <= tolerance, f"{name}: {error:.1e}"


def buffers(method):
    return {name: buffer.clone() for name, buffer in method.named_buffers()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---- gradient caching


@pytest.mark.parametrize("count", [1, 2, 4])
def test_caching_is_exact_without_batch_norm(count):
    method = without_batch_norm()
    whole = gradients(method, *views())
    assert_close(gradients(method, *chunks_of(views(), count)), whole)


@pytest.mark.parametrize("loss", [
    ContrastiveLoss(name="nt-logistic"), ContrastiveLoss(name="margin", semi_hard=True),
    ContrastiveLoss(name="generalised", prior="normal"), ContrastiveLoss(temperature=10, normalize=False),
])  # fmt: skip
def test_caching_is_exact_with_other_losses(loss):
    method = without_batch_norm(criterion=loss)
    whole = gradients(method, *views())
    assert_close(gradients(method, *chunks_of(views(), 4)), whole)


def test_caching_passes_labels_on():
    """Each chunk brings those of its own images."""
    method = without_batch_norm(criterion=ContrastiveLoss(name="supcon"))
    labels = torch.tensor([0, 1, 2, 3, 1, 0, 0, 2] * 2)
    whole = gradients(method, *views(), labels)
    of_chunks = zip(views().chunk(4, dim=1), labels.chunk(4), strict=True)
    chunks = [lambda part=part, own=own: (*part, own) for part, own in of_chunks]
    assert_close(gradients(method, *chunks), whole)
    other = gradients(method, *views(), labels.roll(1))
    assert not torch.equal(other["loss"], whole["loss"])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_caching_with_batch_norm_is_that_of_ghost_batches(count):
    """Gradients as if all chunks had one graph; running statistics as if the chunks had passed one after the other."""
    ghost, method = method_of(), method_of()
    track_once(method)
    expected = naive_gradients(ghost, views(), count)
    assert_close(gradients(method, *chunks_of(views(), count)), expected)
    assert_equal(buffers(method), buffers(ghost))
    assert {int(b) for name, b in method.named_buffers() if "num_batches" in name} == {count}


def test_evaluation_mode_is_exact_too():
    method = method_of().eval()
    assert_close(gradients(method, *chunks_of(views(), 4)), gradients(method, *views()))


def test_random_layers_draw_the_same_in_both_passes():
    ghost, method = without_batch_norm(dropout=0.5), without_batch_norm(dropout=0.5)
    torch.manual_seed(7)
    expected = naive_gradients(ghost, views(), 4)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    assert_close(gradients(method, *chunks_of(views(), 4)), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_autocast_is_the_same_in_both_passes():
    ghost = without_batch_norm().float()
    method = deepcopy(ghost)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [torch.stack(ghost.encode(*part)[1].chunk(2)) for part in views(torch.float32).chunk(4, dim=1)]
        za, zb = torch.cat(parts, dim=1)
        loss = nt_xent_dense(za, zb, ghost.criterion.temperature)
        cached, _ = GradCache(method)(*chunks_of(views(torch.float32), 4))
    loss.backward()
    cached.backward()  # outside autocast, as in the loop
    assert torch.equal(loss, cached)
    for ours, theirs in zip(method.parameters(), ghost.parameters(), strict=True):
        assert (known(ours.grad) - known(theirs.grad)).norm() <= 0.02 * known(
            theirs.grad
        ).norm()  # bf16 sums in another order


@pytest.mark.parametrize("size", [2, 4])
def test_caching_equals_processes_without_global_batch_norm(size, tmp_path):
    in_processes(size, tmp_path, check_ghost_batches)


def test_both_rungs_on_processes_with_global_batch_norm(tmp_path):
    in_processes(2, tmp_path, check_global_batch_norm)


def check_ghost_batches(world):
    """K chunks on one process against K processes, each with a batch norm of its own."""
    local = method_of(world=world)
    own = gradients(local, *views()[:, world.local_slice(B)])
    expected = {name: world.all_reduce_mean(value) for name, value in own.items()}
    alone = method_of()
    track_once(alone)
    assert_close(gradients(alone, *chunks_of(views(), world.size)), expected)
    for name, running in method_of().named_buffers():
        if "running" in name:  # the processes' batches, each known by what it did to the statistics, one after another
            for batch in world.all_gather_rows((dict(local.named_buffers())[name] - 0.9 * running)[None]):
                running = 0.9 * running + batch
            torch.testing.assert_close(dict(alone.named_buffers())[name], running, rtol=1e-10, atol=1e-12)


def check_global_batch_norm(world):
    """Recomputation against the plain step, bit for bit; chunks on two processes against the same chunks on one."""
    own = views()[:, world.local_slice(B)]
    shared = method_of(world=world)
    set_global_batch_norm(shared, world.group)
    again = method_of(world=world)
    set_global_batch_norm(again, world.group)
    checkpoint_blocks(again.encoder.backbone)
    track_once(again)
    assert_equal(gradients(_named(_over_processes(again)), *own), gradients(_named(_over_processes(shared)), *own))
    assert_equal(buffers(again), buffers(shared))

    cached = method_of(world=world)
    set_global_batch_norm(cached, world.group)
    track_once(cached)
    found = gradients(_named(_over_processes(GradCache(cached))), *chunks_of(own, 2))
    by_chunk = views().unflatten(1, (world.size, 2, -1)).transpose(1, 2).flatten(1, 3)  # chunk k of all processes
    assert_close(found, naive_gradients(method_of(), by_chunk, 2))


def _named(parallel):
    """DistributedDataParallel with its module's parameter names."""
    module = parallel.module
    parallel.named_parameters = (module.method if isinstance(module, GradCache) else module).named_parameters
    return parallel


# ---- recomputation


@pytest.mark.parametrize(
    ("name", "size"), [("small", 12), ("resnet50", 36), ("timm/resnet10t", 32), ("timm/test_vit", 160)]
)
def test_recomputing_changes_no_bit(name, size):
    plain = method_of(name, size=size, dtype=torch.float32)
    again = deepcopy(plain)
    checkpoint_blocks(again.encoder.backbone)
    track_once(again)
    pair = views(torch.float32, size)[:, :4]
    torch.manual_seed(0)
    expected = gradients(plain, *pair)
    torch.manual_seed(0)
    assert_equal(gradients(again, *pair), expected)
    assert_equal(buffers(again), buffers(plain))


def test_an_encoder_that_cannot_recompute_is_named():
    encoder = build_encoder(EncoderConfig("timm/darknet17", channels=1, size=64))
    assert not can_checkpoint(encoder.backbone)
    with pytest.raises(UserError, match="--memory was recompute, which this encoder cannot do; try cache"):
        checkpoint_blocks(encoder.backbone)


# ---- what it saves


class _Saved:
    """Most bytes saved for backward at once."""

    alive = peak = 0

    def keep(self, tensor: Tensor):
        return _Kept(self, tensor)


class _Kept:
    def __init__(self, tally, tensor):
        self.tally, self.tensor = tally, tensor
        tally.alive += tensor.nbytes
        tally.peak = max(tally.peak, tally.alive)

    def __del__(self):
        self.tally.alive -= self.tensor.nbytes


def peak_saved(method, *inputs):
    saved = _Saved()
    parameters = {p.data_ptr() for p in method.parameters()}
    with saved_tensors_hooks(
        lambda tensor: tensor if tensor.data_ptr() in parameters else saved.keep(tensor),
        lambda kept: kept.tensor if isinstance(kept, _Kept) else kept,
    ):
        gradients(method, *inputs)
    return saved.peak


def test_saved_bytes_fall_with_each_rung():
    method = method_of(size=24, dtype=torch.float32)
    pair = views(torch.float32, 24)
    plain = peak_saved(method, *pair)
    cached = [peak_saved(method, *chunks_of(pair, count)) for count in (1, 2, 4, 8)]
    assert cached[0] == pytest.approx(plain, rel=0.01)
    for count, peak in zip((2, 4, 8), cached[1:], strict=True):
        assert peak == pytest.approx(plain / count, rel=0.02)
    checkpoint_blocks(method.encoder.backbone)
    assert peak_saved(method, *pair) < plain / 3
