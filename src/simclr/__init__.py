"""SimCLR (Chen et al. 2020, arXiv:2002.05709) as real software.

`import simclr` is light: torch is imported only when something that needs it is used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SimCLR", "UserError", "__version__", "load"]

from simclr.errors import UserError

if TYPE_CHECKING:
    from simclr.sklearn import SimCLR
    from simclr.weights.folder import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from simclr.weights.folder import load

        return load
    if name == "SimCLR":
        from simclr.sklearn import SimCLR

        return SimCLR
    raise AttributeError(f"module 'simclr' has no attribute {name!r}")
