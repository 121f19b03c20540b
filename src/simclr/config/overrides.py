"""Settings that a user gives on top of a recipe's: checked, and said in one sentence where they are wrong."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike, fspath
from typing import Any, TypeVar

from simclr.config.deprecated import rename_settings
from simclr.errors import UserError

Config = TypeVar("Config")
"""A frozen dataclass of settings."""


@dataclass(frozen=True)
class Overrides:
    """Settings that were given, by name; called with settings, it gives those with its own on top."""

    values: Mapping[str, Any]

    def __call__(self, config: Config) -> Config:
        """The settings with those that were given on top; a new object, checked as a whole.

        Raises:
            UserError: There is no setting of that name, or a value is of a wrong type or out of range.
        """
        values = rename_settings(self.values)
        if not values:
            return config
        known = [f.name for f in fields(config)]  # pyrefly: ignore[bad-argument-type]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"perhaps {near[0]} is meant" if near else f"there are {', '.join(known)}"
                raise UserError(f"There is no setting {name!r}; {hint}.")
        return validated(type(config), asdict(config) | values)  # pyrefly: ignore[bad-argument-type]


def validated(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The settings of these values.

    Raises:
        UserError: A value is missing, of a wrong type, or out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    plain = {name: _plain(value) for name, value in values.items()}
    try:
        return TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(wrong := first.get("ctx", {}).get("error"), UserError):
            raise wrong from None
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{where} was {first['input']!r}: {first['msg'].rstrip('.')}.") from None


def _plain(value: Any) -> Any:
    """A number of NumPy's as Python's, and a path as text."""
    if isinstance(value, PathLike):
        return fspath(value)
    return value.item() if hasattr(value, "item") else value
