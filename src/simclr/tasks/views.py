"""`simclr views DATA`: images and their views as a picture."""

from typing import TYPE_CHECKING

from simclr.config.overrides import Overrides
from simclr.config.pretrain import PretrainConfig
from simclr.config.recipes import find_recipe, settings_for
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.methods import find_method
from simclr.tasks.initial import open_initial
from simclr.tasks.opening import DataOptions, open_aloud, require_writable, write
from simclr.tasks.pretrain_views import check_small_crops, check_views, policies_of, views_of
from simclr.training.progress import say

if TYPE_CHECKING:
    from simclr.tasks.options.pretraining import Views


def views(options: "Views", overrides: Overrides) -> None:
    """Draw rows of images with their views."""
    from simclr.reports.pictures import draw_views

    for name, number in (("images", options.images), ("columns", options.columns)):
        if number is not None and number < 1:
            raise UserError(f"--{name} was {number}; it must be at least 1.")
    require_writable(options.out)
    recipe = find_recipe(options.recipe) if options.recipe else None
    world = DistributedContext()
    settings = overrides(recipe.config if recipe else PretrainConfig())
    _, overrides = open_initial(settings, overrides, pretrained=False)
    settings = overrides(settings)
    method = find_method(settings.method)
    check_views(settings, method)
    reading = DataOptions(pack=options.pack).reading(world, channels=settings.channels)
    images = open_aloud(options.data, world, reading)
    config = settings_for(recipe, images, overrides, on_gpu=False, say=lambda _: None)  # all sentences are on training
    check_small_crops(config)
    policies = policies_of(config, images.channels, views_of(config, method))
    write(options.out, draw_views(images, policies, rows=options.images, columns=options.columns, seed=config.seed))
    say(f"The picture is in {options.out}.")
