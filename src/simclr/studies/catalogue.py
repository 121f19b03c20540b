"""All studies by name."""

import difflib
from collections.abc import Callable, Mapping

from simclr.errors import UserError
from simclr.studies import claims, moco, simclr_v1, simclr_v2
from simclr.studies.study import Scale, Study

STUDIES: Mapping[str, Callable[[Scale], Study]] = {
    **simclr_v1.STUDIES, **simclr_v2.STUDIES, **moco.STUDIES, **claims.STUDIES,
}  # fmt: skip
"""Name -> the study at a scale."""

SECTIONS = {"b.1": "table-b.1", "b.3": "table-b.3", "b.9": "figure-b.7"}
"""Section of the appendix -> the study of its table or figure."""


def find_study(name: str, scale: Scale) -> Study:
    """The study of that name.

    Raises:
        UserError: There is none, or not at this scale.
    """
    name = SECTIONS.get(name, name)
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f" Perhaps {near[0]} is meant." if near else ""
        raise UserError(f"There is no study {name!r}; there are {', '.join(STUDIES)}.{hint}")
    return STUDIES[name](scale)
