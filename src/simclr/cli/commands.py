"""The commands of `simclr` and their flags. Imports no torch: `--help` is answered from here.

Each command names the function that does its work, and the field that holds the settings a recipe may start from.
"""

from typing import NamedTuple

from simclr.studies.options import Study
from simclr.tasks.options.labels import Distill, Evaluate, Finetune
from simclr.tasks.options.pretraining import Plan, Pretrain, Recipes, Resume, Views
from simclr.tasks.options.using import Check, Embed, Export, Import, Predict, Push, Select


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
    "plan": Command(Plan, "simclr.tasks.plan:plan", "config"),
    "pretrain": Command(Pretrain, "simclr.tasks.pretrain:pretrain", "config"),
    "resume": Command(Resume, "simclr.tasks.resume:resume", "config"),
    "evaluate": Command(Evaluate, "simclr.tasks.evaluate:evaluate", "finetune"),
    "select": Command(Select, "simclr.tasks.select:select"),
    "finetune": Command(Finetune, "simclr.tasks.finetune:finetune", "config"),
    "distill": Command(Distill, "simclr.tasks.distill:distill", "config"),
    "check": Command(Check, "simclr.tasks.check:check"),
    "predict": Command(Predict, "simclr.tasks.predicting:predict"),
    "embed": Command(Embed, "simclr.tasks.embed:embed"),
    "import": Command(Import, "simclr.tasks.import_:import_checkpoint"),
    "export": Command(Export, "simclr.tasks.export:export"),
    "push": Command(Push, "simclr.tasks.push:push"),
    "study": Command(Study, "simclr.studies.command:study", "config"),
    "views": Command(Views, "simclr.tasks.views:views", "config"),
    "recipes": Command(Recipes, "simclr.tasks.recipes:recipes"),
}
