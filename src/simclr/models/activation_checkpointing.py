"""Activation checkpointing: keep the inputs of blocks only and run each block again in backward.

Source: Chen et al. 2016 (arXiv:1604.06174).

A step takes about a third longer, one more forward, and holds one block's activations at a time. The loss, its
gradients and the batch-norm statistics stay those of the whole batch, on a CPU bit for bit.
"""

from torch import nn

from simclr.errors import UserError
from simclr.models.resnet import ResNet


def can_checkpoint(backbone: nn.Module) -> bool:
    """Whether `checkpoint_blocks` knows how to; some models of timm do not."""
    if isinstance(backbone, ResNet):
        return True
    try:  # those of timm that cannot refuse only when it is turned on
        backbone.set_grad_checkpointing(True)  # pyrefly: ignore[not-callable]
    except (AttributeError, AssertionError):
        return False
    backbone.set_grad_checkpointing(False)  # pyrefly: ignore[not-callable]
    return True


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Let training recompute the blocks of an encoder's backbone, in place; `track_once` must go with it.

    Raises:
        UserError: A model of timm that cannot.
    """
    if not can_checkpoint(backbone):
        raise UserError("--memory was recompute, which this encoder cannot do; try cache, or another encoder.")
    if isinstance(backbone, ResNet):
        backbone.recompute = True
    else:
        backbone.set_grad_checkpointing(True)  # pyrefly: ignore[not-callable]
