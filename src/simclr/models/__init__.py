"""Encoders and heads: the authors' ResNet, any timm model, projection heads, batch norm over all processes.

Importing the package, or `config.encoder`, does not import torch.
"""

from typing import TYPE_CHECKING, Any

from simclr.config.encoder import EncoderConfig

if TYPE_CHECKING:
    from simclr.models.batchnorm import set_global_batch_norm
    from simclr.models.encoder import Encoder, build_encoder
    from simclr.models.heads import LinearClassifier, ProjectionHead

__all__ = [
    "Encoder",
    "EncoderConfig",
    "LinearClassifier",
    "ProjectionHead",
    "build_encoder",
    "set_global_batch_norm",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'simclr.models' has no attribute {name!r}")
    from simclr.models import batchnorm, encoder, heads

    return next(vars(module)[name] for module in (encoder, heads, batchnorm) if name in vars(module))
