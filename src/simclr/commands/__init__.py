"""The commands of `simclr` and their flags. Imports no torch: `--help` is answered from here.

Each command names the function that does its work, and the field that holds the settings a recipe may start from.
"""

from typing import NamedTuple

from simclr.commands.labels import Distill, Evaluate, Finetune
from simclr.commands.pretraining import Plan, Pretrain, Recipes, Resume, Views
from simclr.commands.using import Embed, Export, Import, Predict, Push


class Command(NamedTuple):
    """One command.

    Attributes:
        flags: Its arguments.
        job: module:function; takes them, and, where there are settings, `over(settings)`: those with the flags on top.
        settings: The field of the settings; None: it has none.
    """

    flags: type
    job: str
    settings: str | None = None


COMMANDS: dict[str, Command] = {
    "plan": Command(Plan, "simclr.jobs:plan", "config"),
    "pretrain": Command(Pretrain, "simclr.jobs:pretrain", "config"),
    "resume": Command(Resume, "simclr.jobs:resume", "config"),
    "evaluate": Command(Evaluate, "simclr.evaluate:evaluate", "finetune"),
    "finetune": Command(Finetune, "simclr.finetuning:finetune_run", "config"),
    "distill": Command(Distill, "simclr.distilling:distill", "config"),
    "predict": Command(Predict, "simclr.predicting:predict"),
    "embed": Command(Embed, "simclr.jobs:embed"),
    "import": Command(Import, "simclr.importing:import_checkpoint"),
    "export": Command(Export, "simclr.exporting.export:export"),
    "push": Command(Push, "simclr.exporting.hub:push"),
    "views": Command(Views, "simclr.jobs:views", "config"),
    "recipes": Command(Recipes, "simclr.jobs:recipes"),
}
