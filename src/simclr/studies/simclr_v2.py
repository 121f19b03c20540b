"""Studies of SimCLR v2 (Chen et al. 2020, arXiv:2006.10029) as grids of trainings.

Values of the paper are top-1 accuracies on ImageNet in %.
"""

from collections.abc import Callable, Mapping
from typing import Any

from simclr.studies.scales import base_v2, pick
from simclr.studies.study import Arm, Distillation, Scale, Study

_FINE_TUNED = {
    ("resnet50", 1.0, False): (57.9, 68.4, 76.3),
    ("resnet50", 1.0, True): (64.5, 72.1, 78.7),
    ("resnet50", 2.0, False): (66.3, 73.9, 79.1),
    ("resnet50", 2.0, True): (70.6, 77.0, 81.3),
    ("resnet101", 1.0, False): (62.1, 71.4, 78.2),
    ("resnet101", 1.0, True): (68.3, 75.1, 80.6),
    ("resnet101", 2.0, False): (69.1, 75.8, 80.7),
    ("resnet101", 2.0, True): (73.2, 78.8, 82.4),
    ("resnet152", 1.0, False): (64.0, 73.0, 79.3),
    ("resnet152", 1.0, True): (70.0, 76.5, 81.3),
    ("resnet152", 2.0, False): (70.2, 76.6, 81.1),
    ("resnet152", 2.0, True): (74.2, 79.4, 82.9),
    ("resnet152", 3.0, True): (74.9, 80.1, 83.1),
}
"""Network, width, selective kernels -> fine-tuned on 1, 10 and 100 % of the labels (table 1)."""


def model_size(scale: Scale) -> Study:
    """Networks of different size, fine-tuned on few and on many labels."""
    shares = pick(scale, cpu=("1%", "10%"), paper=("1%", "10%", "100%"))
    paper = [
        (f"{name} {width:g}x{' SK' * sk}", {"encoder": name, "width": width, "sk": sk}, values)
        for (name, width, sk), values in _FINE_TUNED.items()
    ]
    cpu = [(f"small {width:g}x", {"encoder": "small", "width": width}, (None, None)) for width in (0.5, 1.0, 2.0)]
    settings = {**base_v2(scale), **pick(scale, cpu={"head_layers": 3}, paper={})}
    return Study(
        name="v2-table-1",
        title="model size and share of the labels, fine-tuned",
        source="SimCLR v2, table 1 and figure 1",
        claim="The fewer the labels, the more a larger network gains.",
        settings=settings,
        arms=[
            Arm(
                series=name,
                point=share,
                settings=network,
                paper=values[k],
                evaluation={"labels": None if share == "100%" else share},
            )
            for name, network, values in pick(scale, cpu=cpu, paper=paper)
            for k, share in enumerate(shares)
        ],
        evaluation={"protocol": "finetune"},
        axis="labels",
        shape="lines",
    )


def head_depth(scale: Scale) -> Study:
    """Layers of the projection head, and the layer that fine-tuning begins from."""
    recipe = pick(scale, cpu={}, paper={"finetune_recipe": "v2-1%"})  # of all heads, whatever their depth
    return Study(
        name="v2-figure-5",
        title="layers of the projection head and layer of fine-tuning",
        source="SimCLR v2, figure 5",
        claim="With 1 % of the labels a deeper head, fine-tuned from its first layer, is better than a shallow one "
        "(+14 % from two layers and h to three and the first layer).",
        settings=base_v2(scale),
        arms=[
            Arm(
                series=f"{layers} layers",
                point=f"layer {layer}",
                settings={"head_layers": layers},
                evaluation={"finetune": {"head_layer": layer}},
            )
            for layers in (2, 3, 4)
            for layer in range(layers)
        ],
        evaluation={"protocol": "finetune", "labels": "1%", **recipe},
        axis="fine-tuned from",
        shape="lines",
    )


_WAYS: Mapping[str, tuple[Mapping[str, Any], tuple[float | None, float | None]]] = {
    "labels alone": ({"only_labels": True, "labels": "100%", "alpha": 0.0}, (12.3, 52.0)),
    "labels and teacher on labelled images": ({"only_labels": True, "labels": "100%", "alpha": 0.5}, (23.6, 66.2)),
    "labels and teacher on all images": ({"labels": True, "alpha": 0.5}, (69.0, 75.1)),
    "teacher on labelled images": ({"only_labels": True}, (None, None)),
    "teacher on all images": ({}, (68.9, 74.3)),
}
"""What a student learns from: options of `distill`, True standing for the share of labels (`labels` are a share of the
images of `only_labels`); the paper's accuracies with 1 and 10 % of the labels."""


def distillation(scale: Scale) -> Study:
    """What a small student gains from a teacher that was fine-tuned on few labels.

    The paper's weight of the labels beside the teacher is not known here, and 0.5 is taken. On a CPU every student
    makes equally many steps; the student has 7/16 of its teacher's width, and so a fifth of its parameters.
    """
    shares = pick(scale, cpu=("1%",), paper=("1%", "10%"))
    student = pick(
        scale,
        cpu={"encoder": "small", "width": 7 / 16, "stem": "strided", "epochs": 0, "min_steps": 1500},
        paper={"encoder": "resnet50", "recipe": "v2-distill"},
    )
    network = pick(scale, cpu={}, paper={"width": 2.0, "sk": True})
    teachers = {"1%": 70.6, "10%": 77.0}
    arms = []
    for k, share in enumerate(shares):
        teacher = {"labels": share}
        arms.append(
            Arm(series=share, point="the teacher", paper=teachers[share], distillation=Distillation(teacher=teacher))
        )
        for way, (options, paper) in _WAYS.items():
            given = {name: share if value is True else value for name, value in options.items()}
            plan = Distillation(teacher=teacher, student={**student, "temperature": 1.0, **given})
            arms.append(Arm(series=share, point=way, paper=paper[k], distillation=plan))
    return Study(
        name="v2-table-2",
        title="what a small student learns from",
        source="SimCLR v2, table 2",
        claim="A teacher on all images is worth far more than the labels, and labels beside it add nothing.",
        settings={**base_v2(scale), **network},
        arms=arms,
        evaluation={"protocol": "classifier"},
        axis="the student learns from",
        second_hand=True,
    )


STUDIES: Mapping[str, Callable[[Scale], Study]] = {
    "v2-table-1": model_size,
    "v2-figure-5": head_depth,
    "v2-table-2": distillation,
}
