"""What each sub-command does, once its arguments are known to be good."""

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from simclr import distributed
from simclr import pretrain as pretraining
from simclr.checkpoint import write_atomically
from simclr.config import PretrainConfig, changed_on_resume
from simclr.data.images import Channels, Images, Split
from simclr.data.named import NAMES
from simclr.data.source import open_data
from simclr.distributed import World
from simclr.errors import UserError
from simclr.evaluate import evaluate as evaluate_encoder
from simclr.evaluate import split_data
from simclr.evaluation.knn import KNN_K, KNN_TEMPERATURE
from simclr.features import extract
from simclr.memory import parse_bytes
from simclr.plan import plan as plan_run
from simclr.progress import counting, say
from simclr.recipes import RECIPES, Recipe, choose_recipe, find_recipe, fit_recipe
from simclr.run import RunFolder, describe_machine, open_run
from simclr.train import Outcome
from simclr.weights import Embedder, load

if TYPE_CHECKING:
    from simclr import cli

FlagsOver = Callable[[PretrainConfig], PretrainConfig]


def pretrain(args: "cli.Pretrain", flags_over: FlagsOver) -> None:
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
    source = _lasting(args.data)
    budget = parse_bytes(args.memory_budget) if args.memory_budget else None
    world = distributed.start(args.config.device)
    try:
        asked = flags_over(recipe.config if recipe else PretrainConfig())
        pretraining.check_settings(asked, world)
        images = _open(source, world, channels=asked.channels, **options)
        config = _settle(recipe, images, flags_over, world)
        origin = pretraining.origin_of(images, source, options, describe_machine())
        outcome = pretraining.pretrain(images, config, RunFolder(out), world, origin=origin, memory_budget=budget)
    finally:
        distributed.stop()
    _leave(outcome, world)


def resume(args: "cli.Resume", flags_over: FlagsOver) -> None:
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
    if run.summary.exists():
        say(f"{args.run} has already reached its end; the encoder is in {run.encoder}.")
        return
    world = distributed.start(config.device)
    try:
        _same_threads(origin, world)
        source = _lasting(args.data) if args.data else _known_place(origin, args.run)
        options = origin["data"]["options"] | ({"pack": args.pack} if args.pack else {})
        images = _open(source, world, channels=config.channels, **options)
        pretraining.same_data(images, origin, args.run)
        outcome = pretraining.pretrain(images, config, run, world)
    finally:
        distributed.stop()
    _leave(outcome, world)


def plan(args: "cli.Plan", flags_over: FlagsOver) -> None:
    """`simclr plan DATA`: a table on standard output, and a JSON file on request."""
    if args.json is not None:
        _require_writable(args.json)
    recipe = find_recipe(args.recipe) if args.recipe else None
    budget = parse_bytes(args.memory_budget) if args.memory_budget else None
    world = distributed.start(args.config.device)
    try:
        asked = flags_over(recipe.config if recipe else PretrainConfig())
        pretraining.check_settings(asked, world)
        images = _open(args.data, world, channels=asked.channels)
        name = (recipe or choose_recipe(images, on_gpu=world.device.type == "cuda")[0]).name
        config = _settle(recipe, images, flags_over, world)
        planned = plan_run(images, config, world, recipe=name, budget=budget)
    finally:
        distributed.stop()
    print(planned.table())
    if args.json is not None:
        _write(args.json, (json.dumps(planned.to_dict(), indent=2) + "\n").encode())


def evaluate(args: "cli.Evaluate") -> None:
    """`simclr evaluate RUN DATA`: a table on standard output, and a JSON file and a picture on request."""
    if args.seed < 0:
        raise UserError(f"--seed was {args.seed}; it must be at least 0.")
    for path in (args.json, args.picture):
        if path is not None:
            _require_writable(path)
    device = _device(args.device)
    model = load(args.run, device=device)
    train, test = _open_for(model, args)
    split = split_data(train, test, seed=args.seed, labels=args.labels)
    say(f"Evaluating on {train.name}: {split.how}.")
    if test is None:
        _warn_if_seen(args.run, train)
    results = evaluate_encoder(
        model.encoder,
        split,
        semantics=model.preprocessing,
        seed=args.seed,
        progress=lambda text: say(f"  {text}"),
    )
    _print_table(results, len(split.test))
    if args.json is not None:
        protocol = {
            "data": args.data, "split": split.how, "seed": args.seed, "labels": args.labels,
            "knn": {"k": KNN_K, "temperature": KNN_TEMPERATURE, "similarity": "cosine"},
            "linear": "multinomial logistic regression on standardised frozen features, l2 chosen on training rows",
        }  # fmt: skip
        _write(args.json, (json.dumps({**results, "protocol": protocol}, indent=2) + "\n").encode())
    if args.picture is not None:
        from simclr.report import draw_evaluation

        metrics = RunFolder(args.run).read_metrics()
        _write(args.picture, draw_evaluation(model, split, results, metrics))
        say(f"The picture is in {args.picture}.")


def embed(args: "cli.Embed") -> None:
    """`simclr embed RUN DATA --out FILE.npz`: features, keys and labels of every image of every split."""
    _require_writable(args.out)
    model = load(args.run, device=_device(args.device))
    images, _ = _open_for(model, args, split="all")
    with counting("Embedding") as progress:
        features = extract(model.encoder, images, semantics=model.preprocessing, progress=progress)
    arrays: dict[str, np.ndarray] = {"features": features, "keys": np.array(list(images.keys))}
    if images.labels is not None:
        arrays["labels"] = images.labels  # -1: no label
        if images.classes is not None:
            arrays["classes"] = np.array(images.classes)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    _write(args.out, buffer.getvalue())
    say(f"{len(images):,} features of width {features.shape[1]} are in {args.out}.")


def views(args: "cli.Views", flags_over: FlagsOver) -> None:
    """`simclr views DATA`: images and their views as a picture."""
    from simclr.report import draw_views

    for name in ("images", "columns"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} was {getattr(args, name)}; it must be at least 1.")
    _require_writable(args.out)
    recipe = find_recipe(args.recipe) if args.recipe else None
    world = World()
    channels = flags_over(recipe.config if recipe else PretrainConfig()).channels
    images = _open(args.data, world, channels=channels, pack=args.pack)
    config = _settle(recipe, images, flags_over, world)
    policy = pretraining.policy_of(config, images.channels)
    _write(args.out, draw_views(images, policy, rows=args.images, columns=args.columns, seed=config.seed))
    say(f"The picture is in {args.out}.")


def recipes(args: "cli.Recipes") -> None:
    """`simclr recipes`: every recipe, complete."""
    for recipe in [find_recipe(args.name)] if args.name else RECIPES.values():
        print(f"{recipe.name}: {recipe.summary}")
        for label, text in (("command", recipe.command), ("cost", recipe.cost), ("expect", recipe.expect)):
            print(f"  {label:<9}{text}")
        print("  settings " + " ".join(f"{name}={value}" for name, value in asdict(recipe.config).items()))
        print()


def _settle(recipe: Recipe | None, images: Images, flags_over: FlagsOver, world: World) -> PretrainConfig:
    """The complete settings: recipe, bent to the images where no flag says otherwise, under the flags."""
    if recipe is None:
        recipe, why = choose_recipe(images, on_gpu=world.device.type == "cuda")
        say(f"Recipe {recipe.name} ({why}); --recipe chooses another.", main=world.is_main)
    if images.channels == 1 and flags_over(recipe.config).channels == "auto":
        say(
            "Gray views: no hue, no saturation, no grayscale. --channels 3 makes three equal channels.",
            main=world.is_main,
        )
    fitted, sentences = fit_recipe(recipe, images)
    config = flags_over(fitted)
    for name, sentence in sentences.items():
        if getattr(config, name) == getattr(fitted, name):
            say(sentence, main=world.is_main)
    if config.optimizer != fitted.optimizer and config.lr == fitted.lr:
        say(
            f"The rate of {config.lr:g} (scaling {config.lr_scaling}) was chosen for {fitted.optimizer}, not for "
            f"{config.optimizer}; give --lr and --lr-scaling.",
            main=world.is_main,
        )
    longest = config.epochs / 10
    if config.epochs < fitted.epochs and config.warmup_epochs == fitted.warmup_epochs > longest:
        say(
            f"Warm-up of {longest:g} epochs: a tenth of this short run.",
            main=world.is_main,
        )
        config = replace(config, warmup_epochs=longest)
    return config


def _open(
    source: str,
    world: World,
    *,
    split: Split = "train",
    channels: Channels = "auto",
    strict: bool = False,
    labels: str | None = None,
    pack: str = "auto",
    side: int | None = None,
    known: Sequence[str] = (),
) -> Images:
    """Open data and say aloud what there is to say, but for what is `known`."""
    with counting("Reading images", main=world.is_main) as progress:
        images = open_data(
            source, split=split, channels=channels, strict=strict, labels=Path(labels) if labels else None,
            workers=os.cpu_count() or 1, progress=progress, pack=pack, side=side,
            say=partial(say, main=world.is_main),
        )  # fmt: skip
    for note in images.notes:
        if note not in known:
            say(note, main=world.is_main)
    return images


def _open_for(
    model: Embedder, args: "cli.Evaluate | cli.Embed", *, split: Split = "train"
) -> tuple[Images, Images | None]:
    """Data as the encoder expects it, shrunk as its run shrank it, and its own test part where it has one."""
    side = args.pack_side
    if side is None and (args.run / "run.json").is_file() and Path(args.data).expanduser().is_dir():
        side = open_run(args.run).origin["data"]["options"].get("side")
    labels = str(args.labels_file) if args.labels_file else None
    images = _fit_channels(_open(args.data, World(), split=split, labels=labels, pack=args.pack, side=side), model)
    if split == "all" or not images.has_own_split:
        return images, None
    test = _open(args.data, World(), split="test", labels=labels, pack=args.pack, side=side, known=images.notes)
    return images, _fit_channels(test, model)


def _fit_channels(images: Images, model: Embedder) -> Images:
    """Gray images as colour ones for an encoder of colour; the reverse would lose something and is refused."""
    wanted = model.encoder.config.channels
    if images.channels > wanted:
        raise UserError(
            f"The encoder expects {wanted}-channel images and {images.name} is in colour; give it gray images, or "
            "pretrain with --channels 3."
        )
    return replace(images, channels=wanted)


def _warn_if_seen(run: Path, images: Images) -> None:
    """Say so where images that are about to be split took part, unlabelled, in pretraining."""
    if not (run / "run.json").is_file():
        return
    if open_run(run).origin["data"]["fingerprint"] == images.fingerprint:
        say("The encoder saw these test images, without labels, while it was pretrained; new images may do worse.")


def _same_threads(origin: dict[str, Any], world: World) -> None:
    """Sums on a CPU depend on the number of threads: take the number that the run began with."""
    began = int(origin["machine"]["cpu_threads"])
    if world.device.type == "cpu" and torch.get_num_threads() != began:
        say(f"Using {began} CPU threads, as the run did when it began.", main=world.is_main)
        torch.set_num_threads(began)


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device was {name}; it must be auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device was cuda, but torch sees no GPU here; use cpu or auto.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _lasting(source: str) -> str:
    """What the user typed, such that it means the same from every folder."""
    name, colon, place = source.partition(":")
    if name in NAMES:
        return f"{name}:{Path(place).expanduser().resolve()}" if colon else source
    return str(Path(source).expanduser().resolve())


def _lasting_pack(pack: str) -> str:
    return pack if pack in ("auto", "off") else str(Path(pack).expanduser().resolve())


def _known_place(origin: dict[str, Any], run: Path) -> str:
    """Where the run's images were, if they still are."""
    source = origin["data"]["source"]
    if source.partition(":")[0] not in NAMES and not Path(source).exists():
        raise UserError(f"{run} was trained on {source}, which is no longer there; name its new place with --data.")
    return source


def _leave(outcome: Outcome, world: World) -> None:
    """After a signal, tell the shell, so that `&&` stops too; torchrun makes its own report of its processes."""
    if outcome.signal is not None and world.size == 1:
        raise SystemExit(128 + outcome.signal)


def _print_table(results: dict[str, dict[str, float]], num_test: int) -> None:
    print(f"{'features':<10}{'kNN':>8}{'linear':>9}")
    for name, row in results.items():
        print(f"{name:<10}{row['knn']:>8.2%}{row['linear']:>9.2%}")
    print(f"kNN: k {KNN_K}, temperature {KNN_TEMPERATURE}, cosine. Linear: logistic regression on frozen features.")
    print(
        f"Test images: {num_test:,}, so the standard error of an accuracy is at most {50 / num_test**0.5:.1f} points."
    )


def _require_writable(path: Path) -> None:
    """Fail before the work and not after it."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written; give another path.")


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another path.") from None
