"""`simclr recipes`: every recipe, complete."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from simclr.config.recipes import RECIPES, find_recipe

if TYPE_CHECKING:
    from simclr.tasks.options.pretraining import Recipes


def recipes(options: "Recipes") -> None:
    """Print recipes with their settings, command, cost and expected result."""
    for recipe in [find_recipe(options.name)] if options.name else RECIPES.values():
        print(f"{recipe.name}: {recipe.summary}")
        for label, text in (("command", recipe.command), ("cost", recipe.cost), ("expect", recipe.expect)):
            print(f"  {label:<9}{text}")
        print("  settings " + " ".join(f"{name}={value}" for name, value in asdict(recipe.config).items()))
        print()
