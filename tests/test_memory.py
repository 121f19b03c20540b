"""Memory: how it is counted, which strategy is chosen, runs on it, and the plan before a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import SMALL_RUN, Killed, assert_same, final_state, known
from simclr.data.opening import open_data
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.tasks import pretrain_images as pretraining
from simclr.training.memory import Footprint, Line, available, choose, list_strategies, measure, parse_bytes
from simclr.training.meter import free_bytes, peak_bytes
from simclr.training.run import RunFolder

# ---- counting


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
    config = replace(SMALL_RUN, size=12, width=1.0)
    method = pretraining.build_method(config, 1, DistributedContext())
    footprint = measure(method, config, images, torch.float32)
    fresh = pretraining.build_method(config, 1, DistributedContext())
    pair = torch.rand(2, 100, 1, 12, 12)

    def step():
        fresh(*(part.to(memory_format=torch.channels_last) for part in pair))[0].backward()
        return [known(p.grad) for p in fresh.parameters()]

    assert footprint.plain.at(100) / 1.15 == pytest.approx(peak_bytes(step), rel=0.05)
    assert known(footprint.recompute).per_image < footprint.plain.per_image


# ---- which strategy

FOOTPRINT = Footprint(
    weights=1000, views=10, pixels=1, projections=2, ahead=1,
    plain=Line(fixed=100, per_image=1000), recompute=Line(fixed=100, per_image=400),
)  # fmt: skip


@pytest.mark.parametrize(
    ("n", "budget", "name", "chunk"),
    [
        (4096, 10_000_000, "plain", 0),
        (4096, 4_000_000, "checkpointing", 0),
        (4096, 1_500_000, "grad-cache", 1024),
        (4096, 100_000, "grad-cache", 64),
        (300, 100_000, "grad-cache", 75),
        (300, 40_000, "grad-cache", 30),
    ],
)
def test_the_first_rung_that_fits_is_chosen_with_the_largest_chunk(n, budget, name, chunk):
    strategy = choose(FOOTPRINT, n, budget)
    assert (strategy.name, strategy.chunk) == (name, chunk) and strategy.need <= budget
    assert [r.name for r in list_strategies(FOOTPRINT, n, budget)] == ["plain", "checkpointing", "grad-cache"]
    if chunk:
        larger = [c for c in range(chunk + 1, n // 2 + 1) if n % c == 0]
        assert all(FOOTPRINT.need("grad-cache", n, c) > budget for c in larger)


def test_what_fits_nowhere_is_refused_in_words():
    with pytest.raises(UserError, match=r"4,096 images, which need .* even with --memory grad-cache in chunks of 8"):
        choose(FOOTPRINT, 4096, 10_000)
    without = replace(FOOTPRINT, recompute=None)
    assert [strategy.name for strategy in list_strategies(without, 64, 1)] == ["plain", "grad-cache"]


def test_amounts_of_memory():
    amounts = ["2GB", "1.5 GiB", "800m", "12345"]
    assert [parse_bytes(text) for text in amounts] == [2_000_000_000, 1_610_612_736, 800_000_000, 12_345]
    for text in ("much", "-1GB", "0", "2 GBs", "i"):
        with pytest.raises(UserError, match="--memory-budget was"):
            parse_bytes(text)


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr("simclr.data.pack.place._machine_free", lambda: 10**9)
    assert free_bytes(DistributedContext()) <= 10**9 and available(DistributedContext()) <= 9 * 10**8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(DistributedContext()) <= 10**9 // 4


# ---- runs


@pytest.fixture(scope="module")
def images():
    return open_data("digits").subset(np.arange(150))


def train(images, config, path, **settings):
    manifest = None if path.exists() else pretraining.manifest_of(images, "digits", {})
    run = RunFolder(path)
    return run, pretraining.pretrain_images(images, config, run, DistributedContext(), manifest=manifest, **settings)


SHORT = replace(SMALL_RUN, epochs=3, workers=1)


def test_a_cached_run_is_resumed_bit_for_bit_on_the_rung_it_began_on(images, tmp_path, monkeypatch, capsys):
    """Killed in a first and in a second pass; the second call has all the memory it wants and must not use it."""
    footprint = measure(pretraining.build_method(SHORT, 1, DistributedContext()), SHORT, images, torch.float32)
    budget = footprint.need("grad-cache", 32, 16)
    run, outcome = train(images, SHORT, tmp_path / "whole", memory_budget=budget)
    assert outcome.finished
    said = capsys.readouterr().err
    saved = run.config
    assert (saved.memory, saved.chunk) == (
        "grad-cache",
        16,
    ) and "Memory: gradient caching, 2 chunks of 16 images" in said

    real, again = pretraining.make_views, None
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
    assert known(again).config == saved
    assert_same(final_state(again), final_state(run))


def test_recomputing_leaves_a_run_as_it_is(images, tmp_path, capsys):
    plain, _ = train(images, replace(SHORT, memory="plain"), tmp_path / "plain")
    again, _ = train(images, replace(SHORT, memory="checkpointing"), tmp_path / "checkpointing", memory_budget=1)
    assert "The memory budget decides nothing: --memory is checkpointing" in capsys.readouterr().err
    assert_same(final_state(plain), final_state(again))


@pytest.mark.parametrize(
    ("memory", "chunk", "advice"), [("plain", 0, "checkpointing"), ("grad-cache", 8, "grad-cache --chunk 4")]
)
def test_running_out_of_memory_is_said_in_words(images, tmp_path, monkeypatch, memory, chunk, advice):
    def views(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pretraining, "make_views", views)
    with pytest.raises(UserError, match=f"ran out of memory with --memory {memory}.*--memory {advice},"):
        train(images, replace(SMALL_RUN, memory=memory, chunk=chunk), tmp_path / "run")


def test_a_chunk_must_divide_the_batch_and_belong_to_caching():
    with pytest.raises(UserError, match="--chunk was 8; it must be 0, unless --memory is grad-cache"):
        replace(SMALL_RUN, chunk=8)
    with pytest.raises(UserError, match="--chunk was 5; it must divide the 32 images"):
        pretraining.check_settings(replace(SMALL_RUN, memory="grad-cache", chunk=5), DistributedContext())


# ---- the plan


def test_the_plan_of_a_run(tmp_path, monkeypatch, capsys):
    from simclr.cli.main import main

    def simclr(*arguments):
        monkeypatch.setattr("sys.argv", ["simclr", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    flags = ["digits", "--width", "0.5", "--batch-size", "64", "--workers", "1"]
    table = simclr("plan", *flags, "--json", "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert "1,438 images, gray" in table and "plain" in table.split("<- chosen by pretrain")[0].splitlines()[-1]
    assert [strategy["name"] for strategy in plan["strategies"]] == ["plain", "checkpointing", "grad-cache"]
    assert plan["choice"] == "plain" and plan["steps"] == 1438 * 150 // 64 + 1
    for strategy in plan["strategies"]:
        assert strategy["fits"] and strategy["timed_at"] in (32, 64)
        assert strategy["run_seconds"] == pytest.approx(strategy["step_seconds"] * plan["steps"])
    needs = [strategy["need_bytes"] for strategy in plan["strategies"]]
    assert needs == sorted(needs, reverse=True)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]

    # a run on the budget of the last strategy takes it, and its checkpoint is as large as foretold
    between = f"{(needs[1] + needs[2]) // 2}"
    table = simclr("plan", *flags, "--memory-budget", between)
    assert "does not fit" in table and "grad-cache" in table.split("<- chosen by pretrain")[0].splitlines()[-1]
    simclr("pretrain", *flags, "--memory-budget", between, "--epochs", "1", "--out", "run", "--knn-every", "0")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["memory"] == "grad-cache" and config["chunk"] == 32
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert checkpoint.stat().st_size == pytest.approx(plan["checkpoint_bytes"], rel=0.1)
