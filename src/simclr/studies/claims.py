"""Claims of Nguyen, Nguyen & Le 2021 (arXiv:2108.00587) about SimCLR v2, as comparisons.

The numbers of that paper are in no text that we could read: these are its questions, and not its tables.
"""

from collections.abc import Callable, Mapping

from simclr.studies.scales import base_v2, pick
from simclr.studies.study import Arm, Distillation, DrawnClasses, Scale, Study

_DEPTHS: Mapping[str | int, str] = {
    "none": "classifier alone",
    4: "head and classifier",
    3: "block group 4 on",
    2: "block group 3 on",
    1: "block group 2 on",
    "all": "whole network",
}
"""What is trained, as `tune_from` takes it, and in words."""


def depth(scale: Scale) -> Study:
    """How much of the network is fine-tuned, and from which layer of the projection head."""
    recipe = pick(scale, cpu={"finetune_recipe": "small"}, paper={})
    return Study(
        name="claims-depth",
        title="what is fine-tuned",
        source="arXiv:2108.00587, depth of fine-tuning",
        claim="The question: how much of the network should be fine-tuned, with few and with many labels?",
        settings=base_v2(scale),
        arms=[
            Arm(
                series=f"{words} (head layer {layer})",
                point=share,
                evaluation={
                    "labels": None if share == "100%" else share,
                    "finetune": {"tune_from": part, "head_layer": layer},
                },
            )
            for part, words in _DEPTHS.items()
            for layer in (0, 1)
            for share in ("1%", "10%", "100%")
        ],
        evaluation={"protocol": "finetune", **recipe},
        axis="labels",
        shape="lines",
    )


def same_base(scale: Scale) -> Study:
    """Whether distillation works better where student and teacher come from the same pretrained base."""
    teacher = {"labels": "10%"}
    length = pick(scale, cpu={}, paper={"recipe": "v2-distill"})
    half = pick(
        scale,
        cpu={"encoder": "small", "width": 0.5, "stem": "strided"},
        paper={"encoder": "resnet50", "width": 0.5},
    )
    students: Mapping[str, Distillation] = {
        "the teacher": Distillation(teacher=teacher),
        "the same base": Distillation(teacher=teacher, student=length, start="own base"),
        "the base of another seed": Distillation(teacher=teacher, student=length, start="another base"),
        "new weights": Distillation(teacher=teacher, student=length),
        "new weights half as wide": Distillation(teacher=teacher, student={**length, **half}),
    }
    return Study(
        name="claims-base",
        title="what a student begins from",
        source="arXiv:2108.00587, base of the student",
        claim="The question: does distillation work better where student and teacher share their pretrained base?",
        settings=base_v2(scale),
        arms=[Arm(point=name, distillation=_at_one_temperature(plan)) for name, plan in students.items()],
        evaluation={"protocol": "classifier"},
        axis="the student begins from",
    )


def classes(scale: Scale) -> Study:
    """Whether transfer is better where the target has fewer classes: one frozen encoder, a linear probe."""
    return Study(
        name="claims-classes",
        title="number of classes, kappa",
        source="arXiv:2108.00587, number of classes",
        claim="The question: is transfer better, beyond what chance explains, where the target has fewer classes?",
        settings=base_v2(scale),
        arms=[
            Arm(
                series=subject,
                point="all classes" if count is None else f"{count} classes",
                drawn_classes=DrawnClasses(count=count, subject=subject),
            )
            for subject in ("encoder", "random", "pixels")
            for count in (2, 5, None)
        ],
        evaluation={"protocol": "linear, drawn classes"},
        axis="classes of the target",
        shape="lines",
        metric="kappa",
    )


def _at_one_temperature(plan: Distillation) -> Distillation:
    """By itself `distill` takes another temperature for a student of the teacher's shape than for a smaller one."""
    student = None if plan.student is None else {**plan.student, "temperature": 1.0, "head_layer": 0}
    return Distillation(teacher=plan.teacher, student=student, start=plan.start)


STUDIES: Mapping[str, Callable[[Scale], Study]] = {
    "claims-depth": depth, "claims-base": same_base, "claims-classes": classes,
}  # fmt: skip
