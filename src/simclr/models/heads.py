"""Projection heads and the linear classifier (SimCLR section 4.2; google-research/simclr, model_util.py).

Shapes: B rows, F features of the encoder, D width of the projection.
"""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from simclr.config.encoder import MAX_CHANNELS, Feature
from simclr.errors import UserError
from simclr.models.batchnorm import BatchNorm1d
from simclr.models.init import DENSE_STD, seeded

MAX_LAYERS = 32
"""Of a projection head; the papers' have at most 4."""


class ProjectionHead(nn.Module):
    """Features h to the projection z that the contrastive loss compares.

    Every dense layer is without bias and followed by batch norm, the last one too (the papers do not say so,
    the code does). The last batch norm has no beta and no ReLU after it. Hidden layers are as wide as h. Without
    batch norm, as in MoCo v2 (moco/builder.py), dense layers have biases and begin as torch's.

    Args:
        num_features: F.
        kind: none (z is h), linear (one layer) or nonlinear (`layers` of them).
        layers: Of the nonlinear head: 2 in SimCLR, 3 in SimCLR v2. The others do not use it.
        dim: D; without a head, z is F wide.
        norm: Whether its layers have batch norm.
        reads: Which features of the encoder F counts; None: those that the encoder returns.
        seed: Of the initial weights.

    Raises:
        UserError: An unknown kind, a nonlinear head of one layer, or a width below 1.
    """

    def __init__(
        self,
        num_features: int,
        *,
        kind: Literal["none", "linear", "nonlinear"] = "nonlinear",
        layers: int = 2,
        dim: int = 128,
        norm: bool = True,
        reads: Feature | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in ("none", "linear", "nonlinear"):
            raise UserError(f"The projection head was {kind!r}; it must be none, linear or nonlinear.")
        if layers > MAX_LAYERS:
            raise UserError(f"A projection head of {layers:,} layers was asked for; it has at most {MAX_LAYERS}.")
        if kind == "nonlinear" and layers < 2:
            raise UserError(
                f"A nonlinear projection head of {layers} layers was asked for; it has 2 (SimCLR), 3 (SimCLR "
                "v2) or more, and the linear head is the one of 1 layer."
            )
        if not 1 <= dim <= MAX_CHANNELS:
            raise UserError(f"The projection's width was {dim}; it must be from 1 to {MAX_CHANNELS:,}.")
        num_layers = {"none": 0, "linear": 1, "nonlinear": layers}[kind]
        with seeded(seed, "projection head"):
            layer = _Layer if norm else _PlainLayer
            hidden = [layer(num_features, num_features, last=False) for _ in range(num_layers - 1)]
            last = [layer(num_features, dim, last=True)] if num_layers else []
        self.layers = nn.ModuleList([*hidden, *last])
        self.kind = kind
        self.norm = norm
        self.reads = reads
        self.dim = dim if num_layers else num_features

    def forward(self, h: Tensor) -> Tensor:
        """(B, F) -> (B, D)."""
        return self.first_layers(h, len(self.layers))

    def first_layers(self, h: Tensor, count: int) -> Tensor:
        """H after the first `count` layers: h itself for 0; SimCLR v2 fine-tunes from 1 (`ft_proj_selector`)."""
        for layer in self.layers[:count]:
            h = layer(h)
        return h

    def hiddens(self, h: Tensor) -> list[Tensor]:
        """[h, output of layer 0, ..., z]."""
        outputs = [h]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        return outputs

    def to_dict(self) -> dict[str, Any]:
        """The arguments of which `ProjectionHead(num_features, **arguments)` makes a head of this shape."""
        shape = {"kind": self.kind, "layers": len(self.layers), "dim": self.dim}
        shape |= {} if self.norm else {"norm": False}  # earlier versions read the others
        return shape if self.reads is None else shape | {"reads": self.reads}


class LinearClassifier(nn.Linear):
    """Linear classifier on features, (B, F) -> (B, num_classes).

    Args:
        zero: Begin at zero, as the authors do for fine-tuning; otherwise at N(0, 0.01) and zero biases.
        seed: Of the initial weights.
    """

    is_supervised_head = True  # its role: exempt from weight decay and from LARS's adaptation (authors' run.py)

    def __init__(self, num_features: int, num_classes: int, *, zero: bool = False, seed: int = 0) -> None:
        with seeded(seed, "supervised head"):
            super().__init__(num_features, num_classes)
            nn.init.normal_(self.weight, std=0.0 if zero else DENSE_STD)
            nn.init.zeros_(self.bias)


class _Layer(nn.Module):
    """Dense, batch norm and, unless it is the last, ReLU."""

    def __init__(self, in_features: int, out_features: int, *, last: bool) -> None:
        super().__init__()
        self.dense = _Dense(in_features, out_features)
        self.norm = BatchNorm1d(out_features, beta=not last)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dense(x), relu=not self.last)


class _PlainLayer(nn.Module):
    """Dense with bias and, unless it is the last, ReLU."""

    def __init__(self, in_features: int, out_features: int, *, last: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x)
        return x if self.last else F.relu(x)


class _Dense(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=DENSE_STD)
