"""What a study is: trainings that differ in the settings under study, and how the paper shows their accuracies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from simclr.errors import UserError

Scale = Literal["cpu", "paper"]
"""Settings of the paper, or those that a small machine trains in minutes."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A classifier that the pretrained encoder becomes, and a student that learns from it.

    Attributes:
        teacher: Options of `finetune`, such as the share of labels.
        student: Options of `distill`; None: the teacher itself is measured.
        start: The student's first weights: new ones, the teacher's own base, or the base of the next seed.
    """

    teacher: Mapping[str, Any]
    student: Mapping[str, Any] | None = None
    start: Literal["new weights", "own base", "another base"] = "new weights"


@dataclass(frozen=True, kw_only=True)
class DrawnClasses:
    """A linear probe on random subsets of the classes.

    Attributes:
        count: Classes of a subset; None: all there are.
        subject: Whose features: the pretrained encoder's, those of random weights of its shape, or the pixels.
    """

    count: int | None
    subject: Literal["encoder", "random", "pixels"] = "encoder"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One bar, one point of a line, or one cell of a matrix.

    Attributes:
        series: Which line or row; empty where there is one.
        point: Which place on the axis, or which column.
        settings: Of the training, on top of the study's.
        evaluation: Options of `evaluate` on top of the study's.
        distillation: Measured in place of the evaluation; None: the encoder is evaluated.
        drawn_classes: Measured in place of the evaluation; None: the encoder is evaluated on all classes.
        paper: Top-1 accuracy in % in the paper; None: not stated as a number.
        candidates: Settings of which the best are chosen by the kNN accuracy within the training images, on the first
            seed; each seed is then trained with them. Empty: there is no choice.
    """

    series: str = ""
    point: str | float
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    distillation: Distillation | None = None
    drawn_classes: DrawnClasses | None = None
    paper: float | None = None
    candidates: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """What `--points` selects it by."""
        point = f"{self.point:g}" if isinstance(self.point, float) else str(self.point)
        return f"{self.series} / {point}" if self.series else point


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of trainings that differ in the settings under study.

    Attributes:
        name: What the command calls it.
        title: What is compared.
        source: Where the paper has it.
        claim: The paper's finding, in a sentence.
        settings: Of every training, a recipe among them.
        arms: In the paper's order.
        evaluation: Options of `evaluate`; "protocol" has the names of the protocols, of which the first is drawn.
        axis: What the points are.
        shape: How it is drawn.
        metric: Of the results, in [0, 1], that is shown.
        second_hand: Whether the paper's values are known from memory or a reader alone, not from its text.
    """

    name: str
    title: str
    source: str
    claim: str
    settings: Mapping[str, Any]
    arms: Sequence[Arm]
    evaluation: Mapping[str, Any] = field(default_factory=lambda: {"protocol": ("linear", "knn")})
    axis: str = ""
    shape: Literal["bars", "lines", "matrix"] = "bars"
    metric: Literal["top1", "kappa"] = "top1"
    second_hand: bool = False

    def selected(self, points: str | None) -> Sequence[Arm]:
        """The arms whose names match one of these patterns, which commas separate (`batch 256 / *`); None: all.

        Raises:
            UserError: A pattern matches no arm.
        """
        if points is None:
            return self.arms
        patterns = [pattern.strip() for pattern in points.split(",")]
        for pattern in patterns:
            if not any(fnmatchcase(arm.name, pattern) for arm in self.arms):
                raise UserError(
                    f"--points was {points}, and {self.name} has no point {pattern!r}; there are "
                    f"{', '.join(arm.name for arm in self.arms)} (a * stands for any text)."
                )
        return [arm for arm in self.arms if any(fnmatchcase(arm.name, pattern) for pattern in patterns)]

    def trainings(self, arm: Arm) -> Iterator[dict[str, Any]]:
        """The settings of each training that may be the arm's: one, or those of its candidates."""
        for candidate in arm.candidates or ({},):
            yield {**self.settings, **arm.settings, **candidate}

    def protocols(self, arm: Arm) -> Sequence[str]:
        """Names of the protocols that the arm is measured by."""
        protocol = {**self.evaluation, **arm.evaluation}["protocol"]
        return [protocol] if isinstance(protocol, str) else list(protocol)
