"""The papers' linear probe: a linear classifier on frozen features, trained on crops and flips (SimCLR B.6).

Batch norm is in inference mode, which the authors' TF1 code and the paper intend and their TF2 code does not reach
(docs/fidelity.md). Nesterov momentum, lr 0.1 x batch / 256 without warm-up, 90 epochs, no regularisation.

Every epoch passes all images through the encoder. With few images the exact optimum on features of the central crop
(evaluation/logistic.py) takes seconds instead, and needs no learning rate; `choose_linear_solver` says which suits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from simclr.config.finetune import FINETUNE_RECIPES, FinetuneConfig
from simclr.data.images import Images
from simclr.distributed import DistributedContext
from simclr.evaluation.finetune import Finetuned, finetune
from simclr.models.encoder import Encoder
from simclr.views.policy import AugmentationPreset

MAX_ROWS_FOR_OPTIMUM = 100_000  # features of width 2,048 then take 0.8 GB


def linear(
    encoder: Encoder,
    train: Images,
    test: Images,
    config: FinetuneConfig = FINETUNE_RECIPES["linear"],
    *,
    seed: int,
    preset: AugmentationPreset = "google",
    world: DistributedContext | None = None,
    run: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Finetuned:
    """Train a linear classifier on the frozen encoder by SGD, and test it.

    Arguments and errors are those of `finetune`; `config` trains the classifier alone.
    """
    assert config.tune_from == "none" and config.head_layer == 0, config
    return finetune(
        encoder, None, train, test, config,
        seed=seed, preset=preset, world=world, run=run, progress=progress,
    )  # fmt: skip


def choose_linear_solver(num_images: int) -> Literal["sgd", "optimum"]:
    """The solver that suits this number of training images.

    Returns:
        "sgd" on crops as in the paper, or "optimum": the exact one on cached features of the central crop.
    """
    return "optimum" if num_images <= MAX_ROWS_FOR_OPTIMUM else "sgd"
