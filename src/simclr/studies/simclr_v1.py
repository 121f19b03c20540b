"""Studies of SimCLR (Chen et al. 2020, arXiv:2002.05709): its tables and figures as grids of trainings.

Values of the paper are top-1 accuracies on ImageNet in %, of a linear classifier on a ResNet-50.
"""

from collections.abc import Callable, Mapping
from typing import Any

from simclr.studies.scales import base, evaluation, pick
from simclr.studies.study import Arm, Scale, Study


def supervised_settings(scale: Scale) -> Mapping[str, Any]:
    """Of a supervised network beside contrastive ones; at the paper's scale with the authors' rate and weight decay."""
    rate = pick(scale, cpu={}, paper={"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "epochs": 90})
    return {"method": "supervised", **rate}


def table_1(scale: Scale) -> Study:
    """Strength of the colour distortion."""
    paper = {"1/8": 59.6, "1/4": 61.0, "1/2": 62.6, "1": 63.2, "1 + blur": 64.5}
    supervised = {"1/8": 77.0, "1/4": 76.7, "1/2": 76.5, "1": 75.7, "1 + blur": 75.4}
    labelled = supervised_settings(scale)
    strengths = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "1": 1.0, "1 + blur": 1.0}
    return Study(
        name="table-1",
        title="strength of the colour distortion",
        source="SimCLR, table 1",
        claim="Stronger colour distortion is better for contrastive learning; it does nothing for supervised learning.",
        settings=base(scale),
        evaluation=evaluation(scale),
        arms=[
            Arm(
                series="SimCLR",
                point=name,
                paper=paper[name],
                settings={"strength": strengths[name], "blur": 0.5 if name.endswith("blur") else 0.0},
            )
            for name in strengths
        ]
        + [
            Arm(
                series="supervised",
                point=name,
                paper=supervised[name],
                settings={**labelled, "strength": strengths[name], "blur": 0.5 if name.endswith("blur") else 0.0},
            )
            for name in strengths
        ],
        axis="strength",
    )


def table_4(scale: Scale) -> Study:
    """Losses, each with the best of a few learning rates and of its own parameter."""
    rates = pick(scale, cpu=(1.0, 0.3), paper=(0.01, 0.1, 0.3, 0.5, 1.0))
    unit = pick(scale, cpu=5e-3 / 16, paper=1.0)
    temperatures = [{"temperature": value} for value in pick(scale, cpu=(0.2, 0.5), paper=(0.1, 0.2, 0.5, 1.0))]
    margins = [{"margin": value} for value in pick(scale, cpu=(0.4, 0.8), paper=(0.0, 0.4, 0.8, 1.6))]
    losses = {
        "margin": (50.9, {"loss": "margin"}, margins),
        "NT-Logistic": (51.6, {"loss": "nt-logistic"}, temperatures),
        "margin (semi-hard)": (57.5, {"loss": "margin", "negatives": "semi-hard"}, margins),
        "NT-Logistic (semi-hard)": (57.9, {"loss": "nt-logistic", "negatives": "semi-hard"}, temperatures),
        "NT-Xent": (63.9, {"loss": "nt-xent"}, temperatures),
    }
    settings = base(scale)
    return Study(
        name="table-4",
        title="loss",
        source="SimCLR, table 4",
        claim="NT-Xent is better than NT-Logistic and margin losses, which semi-hard mining helps.",
        settings={**settings, "knn_every": settings.get("epochs", 100)},
        evaluation=evaluation(scale),
        arms=[
            Arm(
                point=name,
                settings=loss,
                paper=paper,
                candidates=[{"lr": rate * unit, **own} for rate in rates for own in parameters],
            )
            for name, (paper, loss, parameters) in losses.items()
        ],
        axis="loss",
    )


def table_5(scale: Scale) -> Study:
    """Temperature and l2 normalisation."""
    normalised = {0.05: 59.7, 0.1: 64.4, 0.5: 60.7, 1.0: 58.0}
    return Study(
        name="table-5",
        title="temperature and l2 normalisation",
        source="SimCLR, table 5",
        claim="Without l2 normalisation contrastive accuracy is higher and the representation is worse; the "
        "temperature matters.",
        settings=base(scale),
        evaluation=evaluation(scale),
        arms=[
            *(
                Arm(series="normalised", point=value, settings={"temperature": value}, paper=paper)
                for value, paper in normalised.items()
            ),
            *(
                Arm(
                    series="not normalised",
                    point=value,
                    paper=paper,
                    settings={"temperature": value, "normalize": False},
                )
                for value, paper in ((10.0, 57.2), (100.0, 57.0))
            ),
        ],
        axis="temperature",
    )


_PAIRS = {
    "crop": (33.1, 33.9, 56.3, 46.0, 39.9, 35.0, 30.2),
    "cutout": (32.2, 25.6, 33.9, 40.0, 26.5, 25.2, 22.4),
    "colour": (55.8, 35.5, 18.8, 21.0, 11.4, 16.5, 20.8),
    "sobel": (46.2, 40.6, 20.9, 4.0, 9.3, 6.2, 4.2),
    "noise": (38.8, 25.8, 7.5, 7.6, 9.8, 9.8, 9.6),
    "blur": (35.1, 25.2, 16.6, 5.8, 9.7, 2.6, 6.7),
    "rotation": (30.0, 22.5, 20.7, 4.3, 9.7, 6.5, 2.6),
}
"""First operation -> accuracy with each operation as the second, in the same order (figure 5, read off)."""


def figure_5(scale: Scale) -> Study:
    """Operations on one branch, alone and in pairs.

    Operations have one order here, so a pair is one point; its value of the paper is the mean of both orders.
    """
    names = list(_PAIRS)
    return Study(
        name="figure-5",
        title="operations on one branch, alone and in pairs",
        source="SimCLR, figure 5",
        claim="No single operation suffices, and crop with colour distortion is by far the best pair.",
        settings={**base(scale), "shared_crop": True, "branch_b": "identity", "flip": 0.0},
        evaluation=evaluation(scale),
        arms=[
            Arm(
                series=first,
                point=second,
                settings={"augment": first if first == second else f"{first},{second}"},
                paper=(_PAIRS[first][names.index(second)] + _PAIRS[second][k]) / 2,
            )
            for k, first in enumerate(names)
            for second in names[k:]
        ],
        shape="matrix",
        second_hand=True,
    )


def figure_7(scale: Scale) -> Study:
    """Depth and width of the network."""
    networks = pick(
        scale, cpu=("resnet10", "resnet18"), paper=("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    )
    widths = pick(scale, cpu=(0.125, 0.25, 0.5), paper=(1.0, 2.0, 4.0))
    stem = pick(scale, cpu={"stem": "strided"}, paper={})
    return Study(
        name="figure-7",
        title="depth and width",
        source="SimCLR, figure 7",
        claim="Deeper and wider networks are better, and gain more without labels than with them.",
        settings={**base(scale), **stem},
        evaluation=evaluation(scale),
        arms=[
            Arm(series=f"{name}{after}", point=width, settings={"encoder": name, "width": width, **method})
            for after, method in (("", {}), (" supervised", supervised_settings(scale)))
            for name in networks
            for width in widths
        ],
        axis="width",
        shape="lines",
    )


def figure_8(scale: Scale) -> Study:
    """Projection heads and their output dimension."""
    dims = pick(scale, cpu=(32, 128, 512), paper=(32, 64, 128, 256, 512, 1024, 2048))
    paper = {"linear": 61.5, "nonlinear": 65.0}
    return Study(
        name="figure-8",
        title="projection head and its output dimension",
        source="SimCLR, figure 8",
        claim="A nonlinear head is better than a linear one (3 points), which is better than none (10 points); the "
        "output dimension hardly matters; h is better than z (10 points).",
        settings=base(scale),
        evaluation=evaluation(scale),
        arms=[
            *(
                Arm(series=head, point=dim, settings={"head": head, "head_dim": dim}, paper=paper[head])
                for head in ("nonlinear", "linear")
                for dim in dims
            ),
            Arm(series="none", point="all of h", settings={"head": "none"}, paper=50.0),
            *(
                Arm(
                    series="z of nonlinear",
                    point=dim,
                    settings={"head": "nonlinear", "head_dim": dim},
                    evaluation={"layer": "z"},
                )
                for dim in dims
            ),
        ],
        axis="output dimension",
        second_hand=True,
    )


_BY_BATCH = {
    256: ((57.5, 62.8), (61.9, 64.3), (64.7, 65.7), (66.6, 66.5)),
    512: ((60.7, 63.8), (64.0, 65.6), (66.2, 66.7), (67.8, 67.4)),
    1024: ((62.8, 64.3), (65.3, 66.1), (67.2, 67.2), (68.5, 68.3)),
    2048: ((64.0, 64.7), (66.1, 66.8), (68.1, 67.9), (68.9, 68.8)),
    4096: ((64.6, 64.5), (66.5, 66.8), (68.2, 68.0), (68.9, 69.1)),
    8192: ((64.8, 64.8), (66.6, 67.0), (67.8, 68.3), (69.0, 69.1)),
}
"""Batch size -> accuracy after 100, 200, 400 and 800 epochs, with linear and with square-root scaling (table B.1)."""
_EPOCHS = (100, 200, 400, 800)


def figure_9(scale: Scale) -> Study:
    """Batch size and length of the training."""
    return Study(
        name="figure-9",
        title="batch size and epochs",
        source="SimCLR, figure 9 and table B.1",
        claim="Larger batches are better where training is short, and longer training closes the gap.",
        settings=base(scale),
        evaluation=evaluation(scale),
        arms=[
            Arm(
                series=f"batch {batch}",
                point=f"{epochs} epochs",
                settings={"batch_size": batch, "epochs": epochs},
                paper=paper,
            )
            for batch, epochs, paper in pick(
                scale,
                cpu=[(batch, epochs, None) for batch in (32, 64, 128, 256) for epochs in (2, 4, 8)],
                paper=[
                    (batch, epochs, values[0])
                    for batch, row in _BY_BATCH.items()
                    for epochs, values in zip(_EPOCHS, row, strict=True)
                ],
            )
        ],
        axis="length of the training",
    )


def table_b1(scale: Scale) -> Study:
    """How the learning rate grows with the batch."""
    rates = pick(
        scale,
        cpu={"linear": {"lr": 5e-3, "lr_scaling": "linear"}, "square root": {"lr": 5e-3 / 16, "lr_scaling": "sqrt"}},
        paper={"linear": {"lr": 0.3, "lr_scaling": "linear"}, "square root": {"lr": 0.075, "lr_scaling": "sqrt"}},
    )
    grid = pick(
        scale,
        cpu=[(batch, epochs, (None, None)) for batch in (32, 64, 128, 256) for epochs in (4,)],
        paper=[
            (batch, epochs, values)
            for batch, row in _BY_BATCH.items()
            for epochs, values in zip(_EPOCHS, row, strict=True)
        ],
    )
    return Study(
        name="table-b.1",
        title="scaling of the learning rate with the batch",
        source="SimCLR, table B.1",
        claim="Square-root scaling is better for small batches and short trainings; the two are equal at 4,096.",
        settings=base(scale),
        evaluation=evaluation(scale),
        arms=[
            Arm(
                series=name,
                point=f"batch {batch} for {epochs} epochs",
                paper=values[k],
                settings={"batch_size": batch, "epochs": epochs, **rate},
            )
            for k, (name, rate) in enumerate(rates.items())
            for batch, epochs, values in grid
        ],
    )


def table_b3(scale: Scale) -> Study:
    """Supervised networks with the views of contrastive training."""
    views = {
        "crop": {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0},
        "crop and colour": {"blur": 0.0},
        "crop and colour and blur": {"blur": 0.5},
    }
    paper = {90: (76.5, 75.6, 75.3), 500: (76.2, 76.5, 76.7), 1000: (75.8, 75.2, 76.4)}
    here: dict[int, tuple[float | None, ...]] = {4: (None,) * 3, 16: (None,) * 3}
    return Study(
        name="table-b.3",
        title="views of supervised networks",
        source="SimCLR, table B.3",
        claim="Colour distortion and blur do nothing for a supervised network, but in long trainings.",
        settings={**base(scale), **supervised_settings(scale)},
        evaluation=evaluation(scale),
        arms=[
            Arm(series=name, point=f"{epochs} epochs", settings={**own, "epochs": epochs}, paper=values[k])
            for k, (name, own) in enumerate(views.items())
            for epochs, values in pick(scale, cpu=here, paper=paper).items()
        ],
        shape="lines",
    )


def figure_b7(scale: Scale) -> Study:
    """Temperature, batch size and length on CIFAR-10."""
    batches = pick(scale, cpu=(64, 256), paper=(256, 512, 1024, 2048, 4096))
    lengths = pick(scale, cpu=(4, 8), paper=(100, 300, 500, 1000))
    recipe = pick(scale, cpu={}, paper={"recipe": "cifar-r50"})
    return Study(
        name="figure-b.7",
        title="temperature, batch size and epochs on CIFAR-10",
        source="SimCLR, appendix B.9",
        claim="A temperature of 0.5 is best after more than 300 epochs at every batch size; 0.1 gains with the batch.",
        settings={**base(scale), **recipe},
        evaluation=evaluation(scale),
        arms=[
            Arm(
                series=f"temperature {temperature:g} at batch {batch}",
                point=f"{epochs} epochs",
                settings={"temperature": temperature, "batch_size": batch, "epochs": epochs},
            )
            for temperature in (0.1, 0.5, 1.0)
            for batch in batches
            for epochs in lengths
        ],
        shape="lines",
    )


STUDIES: Mapping[str, Callable[[Scale], Study]] = {
    "table-1": table_1,
    "table-4": table_4,
    "table-5": table_5,
    "figure-5": figure_5,
    "figure-7": figure_7,
    "figure-8": figure_8,
    "figure-9": figure_9,
    "table-b.1": table_b1,
    "table-b.3": table_b3,
    "figure-b.7": figure_b7,
}
