"""The memory ladder: each rung against the plain step, what it saves, which is chosen, and runs on it."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from simclr import pretrain as pretraining
from simclr.data.source import open_data
from simclr.distributed import World
from simclr.errors import UserError
from simclr.losses import nt_xent_dense
from simclr.memory import Footprint, Line, available, choose, ladder, measure, parse_bytes
from simclr.meter import free_bytes, peak_bytes
from simclr.methods.simclr import SimCLR
from simclr.models import EncoderConfig, ProjectionHead, build_encoder, set_global_batch_norm
from simclr.models.batchnorm import track_once
from simclr.models.recompute import can_recompute, recompute_blocks
from simclr.run import RunFolder, describe_machine
from simclr.train import _over_processes
from test_distributed import in_processes
from test_train import CONFIG, Killed, assert_same, final_state

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
    method = SimCLR(encoder, head, temperature=0.5, loss_scale=2.0, world=world or World()).to(dtype)
    with torch.no_grad():
        for parameter in method.parameters():  # the last gamma of each block begins at 0: switch the branches on
            parameter[parameter == 0] = 0.3
    return method.to(memory_format=torch.channels_last)


def without_batch_norm(dropout=0.0):
    """A method whose network treats each image on its own."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.LazyLinear(12),
    ).double()
    encoder(views()[0])
    return SimCLR(encoder, nn.Linear(12, 6).double(), temperature=0.2, loss_scale=1.0, world=World())


def chunks_of(pair, count):
    return [lambda part=part: tuple(part) for part in pair.chunk(count, dim=1)]


def gradients(method, *inputs):
    method.zero_grad()
    loss, _ = method(*inputs)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in method.named_parameters()}


def naive_gradients(method, pair, count):
    """Chunk after chunk with one graph for all: what gradient caching must equal, at the memory it avoids."""
    method.zero_grad()
    parts = [torch.stack(method.project(*part)[1].chunk(2)) for part in pair.chunk(count, dim=1)]
    za, zb = torch.cat(parts, dim=1)
    loss = method.loss_scale * nt_xent_dense(za, zb, method.temperature)
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
        parts = [torch.stack(ghost.project(*part)[1].chunk(2)) for part in views(torch.float32).chunk(4, dim=1)]
        za, zb = torch.cat(parts, dim=1)
        loss = nt_xent_dense(za, zb, ghost.temperature)
        cached, _ = method(*chunks_of(views(torch.float32), 4))
    loss.backward()
    cached.backward()  # outside autocast, as in the loop
    assert torch.equal(loss, cached)
    for ours, theirs in zip(method.parameters(), ghost.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 0.02 * theirs.grad.norm()  # bf16 sums in another order


@pytest.mark.parametrize("size", [2, 4])
def test_caching_equals_processes_without_global_batch_norm(size, tmp_path):
    in_processes(size, tmp_path, check_processes)


def check_processes(world):
    """K chunks on one process against K processes; and both rungs on several processes with global batch norm."""
    own = views()[:, world.local_slice(B)]

    local = method_of(world=world)  # each process's batch norm for itself
    expected = gradients(_named(_over_processes(local)), *own)
    alone = method_of()
    track_once(alone)
    assert_close(gradients(alone, *chunks_of(views(), world.size)), expected)
    for name, running in method_of().named_buffers():
        if "running" in name:  # the processes' batches, each known by what it did to the statistics, one after another
            for batch in world.all_gather_rows((dict(local.named_buffers())[name] - 0.9 * running)[None]):
                running = 0.9 * running + batch
            torch.testing.assert_close(dict(alone.named_buffers())[name], running, rtol=1e-10, atol=1e-12)

    shared = method_of(world=world)
    set_global_batch_norm(shared, world.group)
    again = method_of(world=world)
    set_global_batch_norm(again, world.group)
    recompute_blocks(again.encoder.backbone)
    track_once(again)
    assert_equal(gradients(_named(_over_processes(again)), *own), gradients(_named(_over_processes(shared)), *own))
    assert_equal(buffers(again), buffers(shared))

    cached = method_of(world=world)
    set_global_batch_norm(cached, world.group)
    track_once(cached)
    found = gradients(_named(_over_processes(cached)), *chunks_of(own, 2))
    by_chunk = views().unflatten(1, (world.size, 2, -1)).transpose(1, 2).flatten(1, 3)  # chunk k of all processes
    assert_close(found, naive_gradients(method_of(), by_chunk, 2))


def _named(parallel):
    """DistributedDataParallel with its module's parameter names."""
    parallel.named_parameters = parallel.module.named_parameters
    return parallel


# ---- recomputation


@pytest.mark.parametrize(
    ("name", "size"), [("small", 12), ("resnet50", 36), ("timm/resnet10t", 32), ("timm/test_vit", 160)]
)
def test_recomputing_changes_no_bit(name, size):
    plain = method_of(name, size=size, dtype=torch.float32)
    again = deepcopy(plain)
    recompute_blocks(again.encoder.backbone)
    track_once(again)
    pair = views(torch.float32, size)[:, :4]
    torch.manual_seed(0)
    expected = gradients(plain, *pair)
    torch.manual_seed(0)
    assert_equal(gradients(again, *pair), expected)
    assert_equal(buffers(again), buffers(plain))


def test_an_encoder_that_cannot_recompute_is_named():
    encoder = build_encoder(EncoderConfig("timm/darknet17", channels=1, size=64))
    assert not can_recompute(encoder.backbone)
    with pytest.raises(UserError, match="--memory was recompute, which this encoder cannot do; try cache"):
        recompute_blocks(encoder.backbone)


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
    recompute_blocks(method.encoder.backbone)
    assert peak_saved(method, *pair) < plain / 3


def test_the_meter_counts_what_lives_at_once():
    def compute():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1
        del a
        c = b.view(10, 100) * 2  # a view is no new memory; two alive
        d = c.clone()  # three alive
        del b, c
        return [d]

    assert peak_bytes(lambda: [compute().pop() * 0][:0]) == 12_000
    assert peak_bytes(compute) == 8_000  # without d, which is handed out


def test_the_count_of_tiny_steps_foretells_a_large_one():
    images = open_data("digits")
    config = replace(CONFIG, size=12, width=1.0)
    method = pretraining.build_method(config, 1, World())
    footprint = measure(method, config, images, torch.float32)
    fresh = pretraining.build_method(config, 1, World())
    pair = torch.rand(2, 100, 1, 12, 12)

    def step():
        fresh(*(part.to(memory_format=torch.channels_last) for part in pair))[0].backward()
        return [p.grad for p in fresh.parameters()]

    assert footprint.plain.at(100) / 1.15 == pytest.approx(peak_bytes(step), rel=0.05)
    assert footprint.recompute.per_image < footprint.plain.per_image


# ---- which rung

FOOTPRINT = Footprint(
    weights=1000, views=10, pixels=1, projections=2, ahead=1,
    plain=Line(fixed=100, per_image=1000), recompute=Line(fixed=100, per_image=400),
)  # fmt: skip


@pytest.mark.parametrize(
    ("n", "budget", "name", "chunk"),
    [
        (4096, 10_000_000, "plain", 0),
        (4096, 4_000_000, "recompute", 0),
        (4096, 1_500_000, "cache", 1024),
        (4096, 100_000, "cache", 64),
        (300, 100_000, "cache", 75),
        (300, 40_000, "cache", 30),
    ],
)
def test_the_first_rung_that_fits_is_chosen_with_the_largest_chunk(n, budget, name, chunk):
    rung = choose(FOOTPRINT, n, budget)
    assert (rung.name, rung.chunk) == (name, chunk) and rung.need <= budget
    assert [r.name for r in ladder(FOOTPRINT, n, budget)] == ["plain", "recompute", "cache"]
    if chunk:
        larger = [c for c in range(chunk + 1, n // 2 + 1) if n % c == 0]
        assert all(FOOTPRINT.need("cache", n, c) > budget for c in larger)


def test_what_fits_nowhere_is_refused_in_words():
    with pytest.raises(UserError, match=r"4,096 images, which need .* even with --memory cache in chunks of 8"):
        choose(FOOTPRINT, 4096, 10_000)
    without = replace(FOOTPRINT, recompute=None)
    assert [rung.name for rung in ladder(without, 64, 1)] == ["plain", "cache"]


def test_amounts_of_memory():
    amounts = ["2GB", "1.5 GiB", "800m", "12345"]
    assert [parse_bytes(text) for text in amounts] == [2_000_000_000, 1_610_612_736, 800_000_000, 12_345]
    for text in ("much", "-1GB", "0", "2 GBs", "i"):
        with pytest.raises(UserError, match="--memory-budget was"):
            parse_bytes(text)


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("simclr.meter._machine_free", lambda: 10**9)
    assert free_bytes(World()) <= 10**9 and available(World()) <= 9 * 10**8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(World()) <= 10**9 // 4


# ---- runs


@pytest.fixture(scope="module")
def images():
    return open_data("digits").subset(np.arange(150))


def train(images, config, path, **settings):
    origin = None if path.exists() else pretraining.origin_of(images, "digits", {}, describe_machine())
    run = RunFolder(path)
    return run, pretraining.pretrain(images, config, run, World(), origin=origin, **settings)


SHORT = replace(CONFIG, epochs=3, workers=1)


def test_a_cached_run_is_resumed_bit_for_bit_on_the_rung_it_began_on(images, tmp_path, monkeypatch, capsys):
    """Killed in a first and in a second pass; the second call has all the memory it wants and must not use it."""
    footprint = measure(pretraining.build_method(SHORT, 1, World()), SHORT, images, torch.float32)
    budget = footprint.need("cache", 32, 16)
    run, outcome = train(images, SHORT, tmp_path / "whole", memory_budget=budget)
    assert outcome.finished
    said = capsys.readouterr().err
    saved = run.config
    assert (saved.memory, saved.chunk) == ("cache", 16) and "Memory: cache, 2 chunks of 16 images" in said

    real = pretraining.make_views
    for passes in (37, 22, None):
        made = iter(range(10_000))

        def views(*args, made=made, passes=passes, **kwargs):
            if next(made) == passes:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(pretraining, "make_views", views)
        try:
            again, _ = train(images, SHORT, tmp_path / "killed", memory_budget=budget if passes == 37 else None)
        except Killed:
            continue
    assert again.config == saved
    assert_same(final_state(again), final_state(run))


def test_recomputing_leaves_a_run_as_it_is(images, tmp_path):
    runs = [train(images, replace(SHORT, memory=memory), tmp_path / memory)[0] for memory in ("plain", "recompute")]
    assert_same(final_state(runs[0]), final_state(runs[1]))


@pytest.mark.parametrize(("memory", "chunk", "advice"), [("plain", 0, "recompute"), ("cache", 8, "cache --chunk 4")])
def test_running_out_of_memory_is_said_in_words(images, tmp_path, monkeypatch, memory, chunk, advice):
    def views(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pretraining, "make_views", views)
    with pytest.raises(UserError, match=f"ran out of memory with --memory {memory}.*--memory {advice},"):
        train(images, replace(CONFIG, memory=memory, chunk=chunk), tmp_path / "run")


def test_a_chunk_must_divide_the_batch_and_belong_to_caching():
    with pytest.raises(UserError, match="--chunk was 8; it must be 0, unless --memory is cache"):
        replace(CONFIG, chunk=8)
    with pytest.raises(UserError, match="--chunk was 5; it must divide the 32 images"):
        pretraining.check_settings(replace(CONFIG, memory="cache", chunk=5), World())


# ---- the plan


def test_the_plan_of_a_run(tmp_path, monkeypatch, capsys):
    from simclr import cli

    def simclr(*arguments):
        monkeypatch.setattr("sys.argv", ["simclr", *map(str, arguments)])
        cli.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    flags = ["digits", "--width", "0.5", "--batch-size", "64", "--workers", "1"]
    table = simclr("plan", *flags, "--json", "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert "1,438 images, gray" in table and "plain" in table.split("<- pretrain takes this")[0].splitlines()[-1]
    assert [rung["name"] for rung in plan["rungs"]] == ["plain", "recompute", "cache"]
    assert plan["choice"] == "plain" and plan["steps"] == 1438 * 150 // 64 + 1
    for rung in plan["rungs"]:
        assert rung["fits"] and rung["timed_at"] in (32, 64)
        assert rung["run_seconds"] == pytest.approx(rung["step_seconds"] * plan["steps"])
    needs = [rung["need_bytes"] for rung in plan["rungs"]]
    assert needs == sorted(needs, reverse=True)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]

    # a run on the budget of the last rung takes it, and its checkpoint is as large as foretold
    between = f"{(needs[1] + needs[2]) // 2}"
    table = simclr("plan", *flags, "--memory-budget", between)
    assert "does not fit" in table and "cache" in table.split("<- pretrain takes this")[0].splitlines()[-1]
    simclr("pretrain", *flags, "--memory-budget", between, "--epochs", "1", "--out", "run", "--knn-every", "0")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["memory"] == "cache" and config["chunk"] == 32
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert checkpoint.stat().st_size == pytest.approx(plan["checkpoint_bytes"], rel=0.1)
