"""Earlier names of settings, flags and values, which are still accepted: the only list of them. Imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any

FIELDS = {"keep": "max_checkpoints", "least_steps": "min_steps", "views": "augmentation"}
"""Setting -> its present name, in configuration files and, as --keep for `keep`, on the command line."""
VALUES = {"memory": {"recompute": "checkpointing", "cache": "grad-cache"}}
"""Present setting -> earlier value -> present value."""


def rename_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings read from a file, under their present names and values."""
    renamed = {FIELDS.get(name, name): value for name, value in values.items()}
    return {name: _present(name, value) for name, value in renamed.items()}


def rename_flags(arguments: list[str], say: Callable[[str], None]) -> list[str]:
    """Command-line arguments under their present names; `say` is told once about each earlier name.

    A flag may carry a prefix, as `--finetune.least-steps`, and its value after an equals sign or as the next argument.
    """
    renamed: list[str] = []
    name = ""  # of the flag that the next argument belongs to
    for argument in arguments:
        if not argument.startswith("--"):
            renamed.append(_say_if_changed(f"--{name}" if name else "", argument, str(_present(name, argument)), say))
            name = ""
            continue
        flag, equals, value = argument.removeprefix("--").partition("=")
        prefix, dot, leaf = flag.rpartition(".")
        earlier = leaf.replace("-", "_")
        name = FIELDS.get(earlier, earlier)
        present = prefix + dot + (name.replace("_", "-") if earlier in FIELDS else leaf)
        _say_if_changed("", f"--{flag}", f"--{present}", say)
        if equals:
            value = _say_if_changed(f"--{present}", value, str(_present(name, value)), say)
        renamed.append(f"--{present}{equals}{value}")
    return renamed


def _present(name: str, value: Any) -> Any:
    return VALUES[name].get(value, value) if name in VALUES and isinstance(value, str) else value


def _say_if_changed(flag: str, given: str, present: str, say: Callable[[str], None]) -> str:
    if given != present:
        say(f"{flag} {given} is now called {present}; the earlier name still works.".lstrip())
    return present
