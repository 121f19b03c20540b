"""How far the training of saved weights had come, and what a user is told where it had not reached its end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


class UnfinishedTraining(UserWarning):
    """Weights were loaded whose training had not reached its end."""


@dataclass(frozen=True)
class TrainingProgress:
    """The step that weights were saved after, and the step at which their training ends."""

    step: int
    total_steps: int

    @property
    def finished(self) -> bool:
        """Whether the training has reached its end."""
        return self.step >= self.total_steps

    @property
    def text(self) -> str:
        """In words: "step 40 of 100"."""
        return f"step {self.step:,} of {self.total_steps:,}"

    def warning(self, name: object) -> str:
        """A sentence about unfinished weights.

        Args:
            name: Where they lie.
        """
        return (
            f"The training of {name} is unfinished: these weights are from {self.text}; let it reach its end before "
            "you rely on results."
        )

    def to_dict(self) -> dict[str, int]:
        """The fields of the record that lies beside the weights."""
        return {"step": self.step, "total_steps": self.total_steps}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self | None:
        """What a record states; None where it states neither, as of imported weights.

        Raises:
            ValueError: The two numbers are not counts of steps, or one of them is missing.
        """
        step, total = record.get("step"), record.get("total_steps")
        if step is None and total is None:
            return None
        if type(step) is not int or type(total) is not int or not 0 <= step <= total:
            raise ValueError(f"step is {step!r:.40} and total_steps {total!r:.40}, which are no counts of steps")
        return cls(step, total)
