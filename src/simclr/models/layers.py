"""Any layer of a network as features: h, a stage of the ResNet, a layer of the projection head (`--layer`).

SimCLR compares h with z = g(h) (section 4.2, figure 8 and B.4); SimCLR v2 fine-tunes from the head's layers, which the
authors number alike (`ft_proj_selector` in google-research/simclr).

Shapes: B images, C channels, S x S pixels, F features of the layer.
"""

import re

from torch import Tensor, nn

from simclr.errors import UserError, shown
from simclr.models.classifier import read_for
from simclr.models.encoder import Encoder, read_as
from simclr.models.heads import ProjectionHead
from simclr.models.resnet import ResNet

LAYERS = "h, z, head.K (K layers of the projection head, 0 or more) or stageK (K from 1 to 4)"
"""The names of layers, for sentences."""


class LayerOutput(nn.Module):
    """Images in [0, 1] to the output of one layer, (B, C, S, S) -> (B, num_features).

    Layers are h, the last stage averaged over the image, whatever features the encoder returns; stageK, the same of
    stage K; head.K, what comes out of the first K layers of the projection head, each with its batch norm and ReLU, so
    that head.0 is what the head reads; and z, what comes out of the last, before l2 normalisation.

    Attributes:
        name: The layer; z for the last one of the head.
        encoder: With the features that the layer is computed from.
        head: The projection head, where the layer is one of its layers; else None.
        head_layer: Layers of the head that are passed through.
        config: Of the encoder.
        num_features: F.
        is_default: Whether the layer is what the encoder that was given returns anyway.

    Args:
        encoder: The network, frozen as it is; its weights are shared.
        head: Its projection head, if it has one.
        layer: The layer's name.
        who: Whose network it is, for sentences.

    Raises:
        UserError: There is no such layer, or the network does not have it.
    """

    def __init__(self, encoder: Encoder, head: ProjectionHead | None, layer: str, *, who: str) -> None:
        super().__init__()
        require_layer(layer)
        _require_part(encoder, head, layer, who)
        self.name = layer
        self.head_layer = self._stage = 0
        if reads_head(layer):
            assert head is not None
            self.encoder, depth = read_for(encoder, head), len(head.layers)
            self.head_layer = depth if layer == "z" else _number(layer)
            if self.head_layer > depth:
                raise UserError(
                    f"--layer was {layer}, and the projection head of {who} has {depth} "
                    f"{'layer' if depth == 1 else 'layers'}; give head.0 to head.{depth}."
                )
            self.name = "z" if 0 < self.head_layer == depth else f"head.{self.head_layer}"
        else:
            self.encoder = read_as(encoder, "h")
            self._stage = 0 if layer == "h" else _number(layer)
        self.head = head if self.head_layer else None
        self.config = self.encoder.config
        self.is_default = self.encoder is encoder and not self.head_layer and not self._stage
        self.num_features = self._width()

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch of images; those of the encoder's `forward` where the layer is h.

        Raises:
            UserError: As of the encoder.
        """
        if self._stage:
            backbone = self.encoder.backbone
            assert isinstance(backbone, ResNet)
            return backbone.stage(self.encoder.normalised(x), self._stage).mean((2, 3))
        features = self.encoder(x)
        return features if self.head is None else self.head.first_layers(features, self.head_layer)

    def _width(self) -> int:
        """F."""
        if self._stage:
            assert isinstance(self.encoder.backbone, ResNet)
            return self.encoder.backbone.stage_channels[self._stage - 1]
        return self.head.dim if self.head is not None and self.name == "z" else self.encoder.num_features


def require_layer(layer: str) -> None:
    """Reject what is no name of a layer.

    Raises:
        UserError: The sentence lists the names.
    """
    if not re.fullmatch(r"h|z|head\.\d{1,3}|stage[1-4]", layer):
        raise UserError(f"--layer was {shown(layer)!r}; give {LAYERS}.")


def reads_head(layer: str) -> bool:
    """Whether a layer is one of the projection head's, or what the head reads."""
    return layer == "z" or layer.startswith("head.")


def _require_part(encoder: Encoder, head: ProjectionHead | None, layer: str, who: str) -> None:
    """Reject a layer of a part that the network does not have."""
    if next(encoder.parameters(), None) is None:
        raise UserError(
            f"--layer was {layer}, and {who} is a file of which onnxruntime computes the features that were exported; "
            "leave --layer out, or give the folder that the file was made of."
        )
    if reads_head(layer) and head is None:
        others = "h" if encoder.config.is_external else "h or stage1 to stage4"
        raise UserError(f"--layer was {layer}, and {who} has no projection head; give {others}.")
    if layer.startswith("stage") and not isinstance(encoder.backbone, ResNet):
        raise UserError(
            f"--layer was {layer}, which is a stage of our ResNets, and {who} is {encoder.config.name}; give h."
        )


def _number(layer: str) -> int:
    return int(re.sub(r"\D", "", layer))
