"""A network that names classes: encoder, the first layers of the projection head, a linear classifier.

SimCLR fine-tunes from h, head layer 0; SimCLR v2 from the output of head layer 1 where labels are few (section 2 and
figure 5 of arXiv:2006.10029; `ft_proj_selector` in google-research/simclr).

Shapes: B images, C channels, S x S pixels, K classes.
"""

import torch
from torch import Tensor, nn

from simclr.config.encoder import TIMM, TORCHVISION, EncoderConfig
from simclr.errors import UserError
from simclr.models.encoder import Encoder, build_encoder, read_as
from simclr.models.heads import LinearClassifier, ProjectionHead


class Classifier(nn.Module):
    """(B, C, S, S) in [0, 1] -> (B, K) logits in the precision of the weights, whatever the autocast.

    Attributes:
        encoder: The encoder.
        head: The projection head if any of its layers is used, else None; layers beyond `head_layer` are idle.
        head_layer: How many layers of the head come before the classifier.
        linear: The classifier proper; it begins at zero, so that all classes are equally likely.

    Raises:
        UserError: The head does not have so many layers, there is none, or it reads other features (`read_for`).
    """

    def __init__(self, encoder: Encoder, head: ProjectionHead | None, num_classes: int, *, head_layer: int = 0) -> None:
        super().__init__()
        require_head_layer(head, head_layer)
        self.encoder = encoder
        self.head = head if head_layer else None
        returned = encoder.config.feature + ("" if encoder.scaling is None else f", {encoder.config.scaling}")
        if self.head is not None and self.head.reads not in (None, returned):
            raise UserError(
                f"The projection head reads {self.head.reads}, and the encoder returns {returned}; they do not fit "
                "together."
            )
        self.head_layer = head_layer
        at_the_end = self.head is not None and head_layer == len(self.head.layers)
        width = self.head.dim if self.head is not None and at_the_end else encoder.num_features
        self.linear = LinearClassifier(width, num_classes, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        features = self.features(x)
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(features.to(self.linear.weight.dtype))

    def features(self, x: Tensor) -> Tensor:
        """What the linear classifier reads."""
        h = self.encoder(x)  # (B, F)
        return h if self.head is None else self.head.first_layers(h, self.head_layer)


def read_for(encoder: Encoder, head: ProjectionHead | None) -> Encoder:
    """The encoder with the features that the head reads, itself where those are the ones that it returns."""
    return encoder if head is None or head.reads is None else read_as(encoder, head.reads)


def pretrained_classifier(name: str, *, size: int) -> Classifier:
    """A pretrained model of timm or torchvision, encoder and linear classifier, in inference mode.

    Args:
        name: timm/NAME or torchvision/NAME.
        size: Of the images that it is given, in pixels.

    Raises:
        UserError: There is no such model, its weights cannot be had, or it does not end in a linear classifier.
    """
    encoder = build_encoder(EncoderConfig(name, channels=3, size=size), pretrained=True)
    if name.startswith(TIMM):
        from simclr.models.external.timm_bridge import timm_classifier  # timm takes a second to import

        last = timm_classifier(name.removeprefix(TIMM), channels=3, size=size)
    else:
        from simclr.models.external.torchvision_bridge import torchvision_classifier

        last = torchvision_classifier(name.removeprefix(TORCHVISION), channels=3)
    if last.in_features != encoder.num_features:
        raise UserError(
            f"{name} does not classify by a linear layer on its {encoder.num_features} features; take another model."
        )
    network = Classifier(encoder, None, last.out_features)
    with torch.no_grad():
        network.linear.weight.copy_(last.weight)
        if last.bias is not None:
            network.linear.bias.copy_(last.bias)
    return network.eval()


def usual_names(count: int) -> tuple[list[str], bool]:
    """Names for classes that came without: ImageNet's WordNet identifiers for 1,000 (then True), else numbers."""
    if count != 1000:
        return [str(i) for i in range(count)], False
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names(), True


def require_head_layer(head: ProjectionHead | None, layer: int) -> None:
    """Refuse a layer that the projection head does not have."""
    if layer < 0:
        raise UserError(f"--head-layer was {layer}; it must be at least 0, where 0 is the encoder's own output.")
    if layer > 0 and head is None:
        raise UserError(
            f"--head-layer was {layer}, and this encoder came without a projection head; take 0, or a run of "
            "`simclr pretrain`."
        )
    if head is not None and layer > len(head.layers):
        raise UserError(
            f"--head-layer was {layer}, and the projection head has {len(head.layers)} layers; give at most that many."
        )
