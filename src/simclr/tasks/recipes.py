"""`simclr recipes`: every recipe, complete."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from simclr.config.finetune import FINETUNE_RECIPES, FINETUNE_SUMMARIES
from simclr.config.recipes import RECIPES, find_recipe
from simclr.config.training import TrainingConfig

if TYPE_CHECKING:
    from simclr.tasks.options.pretraining import Recipes


def recipes(options: "Recipes") -> None:
    """Print recipes: of pretraining with command, cost and expected result, of fine-tuning with their source."""
    if options.name in FINETUNE_RECIPES:
        _print_finetuning([options.name])
        return
    for recipe in [find_recipe(options.name)] if options.name else RECIPES.values():
        print(f"{recipe.name}: {recipe.summary}")
        for label, text in (("command", recipe.command), ("cost", recipe.cost), ("expect", recipe.expect)):
            print(f"  {label:<9}{text}")
        print("  settings " + _settings(recipe.config))
        print()
    if not options.name:
        print("Of fine-tuning, for --finetune-recipe:\n")
        _print_finetuning(list(FINETUNE_RECIPES))


def _print_finetuning(names: list[str]) -> None:
    for name in names:
        print(f"{name}: {FINETUNE_SUMMARIES[name]}")
        print("  settings " + _settings(FINETUNE_RECIPES[name]))
        print()


def _settings(config: TrainingConfig) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())
