"""SimCLR (Chen et al. 2020, arXiv:2002.05709) as real software.

    run = simclr.pretrain("photos/", out="runs/photos", epochs=100)
    run.evaluate("photos/", protocol="knn,linear")
    features = simclr.load("runs/photos").embed(images)

`import simclr` is light: torch is imported only when something that needs it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Method",
    "Run",
    "SimCLR",
    "Stopped",
    "UserError",
    "__version__",
    "distill",
    "embed",
    "evaluate",
    "finetune",
    "load",
    "open_data",
    "pretrain",
    "resume",
    "select",
]

from simclr.errors import Stopped, UserError

if TYPE_CHECKING:
    from simclr.data.opening import open_data
    from simclr.methods.method import Method
    from simclr.sklearn import SimCLR
    from simclr.tasks.api import Run, distill, embed, evaluate, finetune, pretrain, resume, select
    from simclr.weights.folder import load

_PLACES = {
    "Method": "simclr.methods.method",
    "SimCLR": "simclr.sklearn",
    "load": "simclr.weights.folder",
    "open_data": "simclr.data.opening",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'simclr' has no attribute {name!r}")
    return getattr(import_module(_PLACES.get(name, "simclr.tasks.api")), name)
