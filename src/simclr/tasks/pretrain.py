"""`simclr pretrain DATA`: open the images, settle the settings, train."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from simclr import distributed
from simclr.config.overrides import Overrides
from simclr.config.pretrain import PretrainConfig, refuse_unused_head_settings
from simclr.config.recipes import Recipe, find_recipe, settings_for
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.methods import method_name
from simclr.methods.method import Method
from simclr.tasks.initial import open_initial
from simclr.tasks.opening import DataOptions, lasting, open_aloud
from simclr.tasks.pretrain_images import check_settings, manifest_of, pretrain_images
from simclr.training.lock import hold
from simclr.training.memory import parse_bytes
from simclr.training.progress import say
from simclr.training.run import RunFolder

if TYPE_CHECKING:
    from simclr.tasks.options.pretraining import Pretrain


def pretrain(options: "Pretrain", overrides: Overrides, method: type[Method] | None = None) -> RunFolder:
    """Learn an encoder from unlabelled images; the folder of the run.

    Args:
        method: A class of the caller's; None: what the settings name.

    Raises:
        UserError: Images, settings and folder do not go together, memory or disk are full, or the loss is not
            finite.
        Stopped: A signal asked to stop; `simclr resume` continues.
    """
    out = options.out or Path("runs") / Path(options.data).resolve().stem.replace(":", "-")
    run = RunFolder(out)
    run.refuse_existing()
    if Path(options.data).is_dir() and Path(options.data).resolve() in out.resolve().parents:
        raise UserError(f"The run {out} would lie inside the images' folder {options.data}; give another --out.")
    if method is not None:
        overrides = Overrides({**overrides.values, "method": method_name(method)})
    recipe = find_recipe(options.recipe) if options.recipe else None
    opened = DataOptions.of(options)
    source = lasting(options.data)
    budget = parse_bytes(options.memory_budget) if options.memory_budget else None
    with distributed.joined(options.config.device) as world:
        settings = overrides(recipe.config if recipe else PretrainConfig())
        initial, overrides = open_initial(settings, overrides, main=world.is_main)
        settings = overrides(settings)
        refuse_unused_head_settings(overrides.values, settings)
        check_settings(settings, world, method)
        with hold(out, world):
            images = open_aloud(source, world, opened.reading(world, channels=settings.channels), labels=opened.labels)
            config = settled(recipe, images, overrides, world)
            manifest = manifest_of(images, source, asdict(opened), config.method)
            pretrain_images(
                images, config, run, world, manifest=manifest, memory_budget=budget, method=method, initial=initial
            )
    return run


def settled(recipe: Recipe | None, images: Images, overrides: Overrides, world: DistributedContext) -> PretrainConfig:
    """The complete settings for these images, and what is to be said of them."""
    aloud = partial(say, main=world.is_main)
    return settings_for(recipe, images, overrides, on_gpu=world.device.type == "cuda", say=aloud)
