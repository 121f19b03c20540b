"""Studies of MoCo: against SimCLR over the batch, temperature, momentum, queue, head, and the memory of SimCLR v2.

On a CPU: the encoder, views and optimiser of the recipe `moco-cpu`, for SimCLR too, and features h. The rate is scaled
with the square root of the batch.
"""

from simclr.studies.grid import Study

_RATE = {"lr": 5e-3 / 16, "lr_scaling": "sqrt", "warmup_epochs": 0.5, "knn_every": 0}  # 5e-3 at 256 images
_SIMCLR = {
    "recipe": "cpu", "optimizer": "adamw", "momentum": 0.9, "feature": "h", "scaling": "none", **_RATE,
}  # fmt: skip
_MOCO = {"recipe": "moco-cpu", **_RATE}
_NAMES = {"simclr": _SIMCLR, "moco": _MOCO}

BATCH = Study(
    name="batch",
    title="batch size",
    source="MoCo v2, section 3 and table 2",
    claim="MoCo v2 at batch 256 (67.5 % after 200 epochs) is above SimCLR at 256 (61.9) and at 8,192 (66.6).",
    base={},
    arms={
        f"{name} {size}": {**settings, "batch_size": size}
        for size in (32, 64, 128, 256)
        for name, settings in _NAMES.items()
    },
)

TEMPERATURE = Study(
    name="temperature",
    title="temperature, with the MLP head",
    source="MoCo v2, section 3",
    claim="0.2 (66.2 %) is better than 0.07 (62.9).",
    base=_MOCO,
    arms={f"T {value}": {"temperature": value} for value in (0.07, 0.2)},
)

MOMENTUM = Study(
    name="momentum",
    title="momentum of the key encoder",
    source="MoCo, section 4.1: momentum",
    claim="0.99 to 0.9999 work (57.8 to 59.0 %), 0.9 is worse (55.2), and 0 fails.",
    base=_MOCO,
    arms={f"m {value}": {"ema": value} for value in (0.0, 0.9, 0.99, 0.999)},
)

QUEUE = Study(
    name="queue",
    title="keys in the queue",
    source="MoCo, figure 3; its notebook for CIFAR-10",
    claim="A longer queue is better, and the gain saturates (on CIFAR-10 at 4,096).",
    base=_MOCO,
    arms={f"K {length}": {"queue": length} for length in (256, 1024, 4096)},
)

HEAD = Study(
    name="head",
    title="projection head",
    source="MoCo v2, table 1",
    claim="An MLP head (66.2 %) is better than a linear one (60.6).",
    base=_MOCO,
    arms={"linear": {"head": "linear"}, "MLP": {"head": "nonlinear"}},
)

MEMORY = Study(
    name="memory",
    title="SimCLR with the memory of v2",
    source="SimCLR v2, section 2 and appendix D",
    claim="The memory adds about 1 point at a batch of 4,096.",
    base=_SIMCLR,
    arms={
        f"{name}, batch {size}": {"batch_size": size, **memory}
        for size in (32, 256)
        for name, memory in (("without", {}), ("4,096 keys", {"queue": 4096, "ema": 0.99}))
    },
)

STUDIES = {study.name: study for study in (BATCH, TEMPERATURE, MOMENTUM, QUEUE, HEAD, MEMORY)}
