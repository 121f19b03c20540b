"""Studies of MoCo: against SimCLR over the batch, temperature, momentum, queue, head, and the memory of SimCLR v2.

On a CPU: the encoder, views and optimiser of the recipe `moco-cpu`, for SimCLR too, and features h. The rate is scaled
with the square root of the batch.
"""

from collections.abc import Callable, Mapping
from functools import partial

from simclr.errors import UserError
from simclr.studies.scales import RATE, SIMCLR_ON_A_CPU
from simclr.studies.study import Arm, Scale, Study

_MOCO = {"recipe": "moco-cpu", **RATE}
_NAMES = {"SimCLR": SIMCLR_ON_A_CPU, "MoCo": _MOCO}

BATCH = Study(
    name="moco-batch",
    title="batch size",
    source="MoCo v2, section 3 and table 2",
    claim="MoCo v2 at batch 256 (67.5 % after 200 epochs) is above SimCLR at 256 (61.9) and at 8,192 (66.6).",
    settings={},
    arms=[
        Arm(series=name, point=size, settings={**settings, "batch_size": size})
        for name, settings in _NAMES.items()
        for size in (32, 64, 128, 256)
    ],
    axis="batch size",
    shape="lines",
)

TEMPERATURE = Study(
    name="moco-temperature",
    title="temperature, with the MLP head",
    source="MoCo v2, section 3",
    claim="0.2 (66.2 %) is better than 0.07 (62.9).",
    settings=_MOCO,
    arms=[
        Arm(point=value, settings={"temperature": value}, paper=paper) for value, paper in ((0.07, 62.9), (0.2, 66.2))
    ],
    axis="temperature",
)

MOMENTUM = Study(
    name="moco-momentum",
    title="momentum of the key encoder",
    source="MoCo, section 4.1: momentum",
    claim="0.99 to 0.9999 work (57.8 to 59.0 %), 0.9 is worse (55.2), and 0 fails.",
    settings=_MOCO,
    arms=[
        Arm(point=value, settings={"ema": value}, paper=paper)
        for value, paper in ((0.0, None), (0.9, 55.2), (0.99, 57.8), (0.999, 59.0))
    ],
    axis="momentum",
)

QUEUE = Study(
    name="moco-queue",
    title="keys in the queue",
    source="MoCo, figure 3; its notebook for CIFAR-10",
    claim="A longer queue is better, and the gain saturates (on CIFAR-10 at 4,096).",
    settings=_MOCO,
    arms=[Arm(point=length, settings={"queue": length}) for length in (256, 1024, 4096)],
    axis="keys",
)

HEAD = Study(
    name="moco-head",
    title="projection head",
    source="MoCo v2, table 1",
    claim="An MLP head (66.2 %) is better than a linear one (60.6).",
    settings=_MOCO,
    arms=[
        Arm(point="linear", settings={"head": "linear"}, paper=60.6),
        Arm(point="MLP", settings={"head": "nonlinear"}, paper=66.2),
    ],
    axis="head",
)

MEMORY = Study(
    name="v2-memory",
    title="SimCLR with the memory of v2",
    source="SimCLR v2, section 2 and appendix D",
    claim="The memory adds about 1 point at a batch of 4,096.",
    settings=SIMCLR_ON_A_CPU,
    arms=[
        Arm(series=name, point=size, settings={"batch_size": size, **memory})
        for name, memory in (("without", {}), ("4096 keys", {"queue": 4096, "ema": 0.99}))
        for size in (32, 256)
    ],
    axis="batch size",
)


def _on_a_cpu(study: Study, scale: Scale) -> Study:
    if scale != "cpu":
        raise UserError(f"The study {study.name} has settings for a CPU alone; leave --scale out.")
    return study


STUDIES: Mapping[str, Callable[[Scale], Study]] = {
    study.name: partial(_on_a_cpu, study) for study in (BATCH, TEMPERATURE, MOMENTUM, QUEUE, HEAD, MEMORY)
}
