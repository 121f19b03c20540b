"""Methods: modules that turn a batch into a loss and metrics; training/loop.py trains any of them."""

from importlib import import_module

from simclr.errors import UserError
from simclr.methods.method import Method

__all__ = ["NAMES", "find_method", "method_name"]

NAMES = {
    "simclr": "simclr.methods.simclr:SimCLR",
    "moco": "simclr.methods.moco:MoCo",
    "supervised": "simclr.methods.supervised:Supervised",
}
"""Methods that `simclr pretrain --method` knows by name, each as module:class."""


def find_method(name: str) -> type[Method]:
    """The method of a name, or the class of module:class.

    Raises:
        UserError: There is no such name, or the class cannot be imported or is no method.
    """
    place = NAMES.get(name, name)
    module, colon, qualified = place.partition(":")
    if not colon:
        raise UserError(f"There is no method {name!r}; there are {', '.join(NAMES)}, or give MODULE:CLASS of your own.")
    try:
        found: object = import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(
            f"The method {name} cannot be imported; start Python where {module} can be, or give its class to the "
            "method parameter of simclr.pretrain or simclr.resume."
        )
    return found


def method_name(method: type[Method]) -> str:
    """How settings and run.json name a method: by its name here, or as module:class."""
    place = f"{method.__module__}:{method.__qualname__}"
    return next((name for name, known in NAMES.items() if known == place), place)
