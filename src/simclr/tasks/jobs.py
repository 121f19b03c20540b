"""What each sub-command does, once its arguments are known to be good."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr import distributed
from simclr.config.pretrain import PretrainConfig, changed_on_resume
from simclr.config.recipes import RECIPES, Recipe, choose_recipe, find_recipe, settings_for
from simclr.data.images import Images
from simclr.data.readers.named import NAMES
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.tasks import pretrain as pretraining
from simclr.tasks.opening import as_begun, lasting, open_aloud, require_writable, write
from simclr.tasks.plan import plan as plan_run
from simclr.training.device import same_threads
from simclr.training.loop import Outcome
from simclr.training.memory import parse_bytes
from simclr.training.progress import say
from simclr.training.run import RunFolder, describe_machine, hold, open_run

if TYPE_CHECKING:
    from simclr.tasks.options.pretraining import Plan, Pretrain, Recipes, Resume, Views

FlagsOver = Callable[[PretrainConfig], PretrainConfig]


def pretrain(args: "Pretrain", flags_over: FlagsOver) -> None:
    """`simclr pretrain DATA`: open the images, settle the settings, train."""
    out = args.out or Path("runs") / Path(args.data).resolve().stem.replace(":", "-")
    RunFolder(out).refuse_existing()
    if Path(args.data).is_dir() and Path(args.data).resolve() in out.resolve().parents:
        raise UserError(f"The run {out} would lie inside the images' folder {args.data}; give another --out.")
    recipe = find_recipe(args.recipe) if args.recipe else None
    options: dict[str, Any] = {
        "strict": args.strict,
        "labels": str(args.labels_file.resolve()) if args.labels_file else None,
        "pack": _lasting_pack(args.pack),
        "side": args.pack_side,
    }
    source = lasting(args.data)
    budget = parse_bytes(args.memory_budget) if args.memory_budget else None
    with distributed.joined(args.config.device) as world:
        asked = flags_over(recipe.config if recipe else PretrainConfig())
        pretraining.check_settings(asked, world)
        with hold(out, world):
            images = open_aloud(source, world, channels=asked.channels, **options)
            config = _settled(recipe, images, flags_over, world)
            origin = pretraining.origin_of(images, source, options, describe_machine())
            outcome = pretraining.pretrain(images, config, RunFolder(out), world, origin=origin, memory_budget=budget)
    _leave(outcome, world)


def resume(args: "Resume", flags_over: FlagsOver) -> None:
    """`simclr resume RUN`: go on, refusing whatever would change the result."""
    run = open_run(args.run)
    saved = run.config
    config = flags_over(saved)
    changed = changed_on_resume(saved, config)
    if changed:
        what = ", ".join(f"--{n.replace('_', '-')} from {getattr(saved, n)} to {getattr(config, n)}" for n in changed)
        raise UserError(
            f"Changing {what} would change the result of {args.run}; leave it out to go on as the run began, or start "
            "a new run with --recipe " + str(args.run / "config.json") + "."
        )
    origin = run.origin
    finished = f"{args.run} has already reached its end; the encoder is in {run.encoder}."
    run.refuse_changed_settings()
    if run.is_finished:
        say(finished)
        return
    with distributed.joined(config.device) as world, hold(run.path, world):
        if world.on_main(lambda: run.is_finished):  # another process has brought it to its end since
            say(finished, main=world.is_main)
            return
        same_threads(int(origin["machine"]["cpu_threads"]), world)
        source = lasting(args.data) if args.data else _known_place(origin, args.run)
        options = origin["data"]["options"] | ({"pack": args.pack} if args.pack else {})
        images = open_aloud(source, world, channels=config.channels, **options)
        images = as_begun(images, origin["data"], world)
        pretraining.same_data(images, origin, args.run, main=world.is_main)
        outcome = pretraining.pretrain(images, config, run, world)
    _leave(outcome, world)


def plan(args: "Plan", flags_over: FlagsOver) -> None:
    """`simclr plan DATA`: a table on standard output, and a JSON file on request."""
    if args.json is not None:
        require_writable(args.json)
    recipe = find_recipe(args.recipe) if args.recipe else None
    budget = parse_bytes(args.memory_budget) if args.memory_budget else None
    with distributed.joined(args.config.device) as world:
        asked = flags_over(recipe.config if recipe else PretrainConfig())
        pretraining.check_settings(asked, world)
        images = open_aloud(args.data, world, channels=asked.channels)
        name = (recipe or choose_recipe(images, on_gpu=world.device.type == "cuda")[0]).name
        config = _settled(recipe, images, flags_over, world)
        planned = plan_run(images, config, world, recipe=name, budget=budget)
    print(planned.table())
    if args.json is not None:
        write(args.json, (json.dumps(planned.to_dict(), indent=2) + "\n").encode())


def views(args: "Views", flags_over: FlagsOver) -> None:
    """`simclr views DATA`: images and their views as a picture."""
    from simclr.reports.pictures import draw_views

    for name in ("images", "columns"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} was {getattr(args, name)}; it must be at least 1.")
    require_writable(args.out)
    recipe = find_recipe(args.recipe) if args.recipe else None
    world = DistributedContext()
    channels = flags_over(recipe.config if recipe else PretrainConfig()).channels
    images = open_aloud(args.data, world, channels=channels, pack=args.pack)
    config = _settled(recipe, images, flags_over, world)
    policy = pretraining.policy_of(config, images.channels)
    write(args.out, draw_views(images, policy, rows=args.images, columns=args.columns, seed=config.seed))
    say(f"The picture is in {args.out}.")


def recipes(args: "Recipes") -> None:
    """`simclr recipes`: every recipe, complete."""
    for recipe in [find_recipe(args.name)] if args.name else RECIPES.values():
        print(f"{recipe.name}: {recipe.summary}")
        for label, text in (("command", recipe.command), ("cost", recipe.cost), ("expect", recipe.expect)):
            print(f"  {label:<9}{text}")
        print("  settings " + " ".join(f"{name}={value}" for name, value in asdict(recipe.config).items()))
        print()


def _settled(recipe: Recipe | None, images: Images, flags_over: FlagsOver, world: DistributedContext) -> PretrainConfig:
    aloud = partial(say, main=world.is_main)
    return settings_for(recipe, images, flags_over, on_gpu=world.device.type == "cuda", say=aloud)


def _lasting_pack(pack: str) -> str:
    return pack if pack in ("auto", "off") else str(Path(pack).expanduser().resolve())


def _known_place(origin: dict[str, Any], run: Path) -> str:
    """Where the run's images were, if they still are."""
    source = origin["data"]["source"]
    if source.partition(":")[0] not in NAMES and not Path(source).exists():
        raise UserError(f"{run} was trained on {source}, which is no longer there; name its new place with --data.")
    return source


def _leave(outcome: Outcome, world: DistributedContext) -> None:
    """After a signal, tell the shell, so that `&&` stops too; torchrun makes its own report of its processes."""
    if outcome.signal is not None and world.size == 1:
        raise SystemExit(128 + outcome.signal)
