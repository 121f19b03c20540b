"""A network with weights from a file of a stranger: names, shapes and types are compared before memory is taken.

The network is built on torch's "meta" device, which takes neither memory nor time for weights, compared with what the
file says that it holds, and then given the file's tensors instead of copies of initial values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from simclr.config.encoder import EncoderConfig
from simclr.errors import UserError, shown
from simclr.models.encoder import Encoder, build_encoder
from simclr.models.safetensors_file import TensorInfo


def sketch_encoder(config: EncoderConfig) -> Encoder:
    """The encoder of `config` without memory for its weights: names, shapes and types are those of the real one.

    Raises:
        UserError: As `build_encoder`.
    """
    with torch.device("meta"):
        return build_encoder(config)


def require_same(expected: Mapping[str, Tensor], stored: Mapping[str, TensorInfo], name: object) -> None:
    """Refuse a file that does not hold exactly the tensors of a network.

    Args:
        expected: The network's state.
        name: The file, for the sentence.

    Raises:
        UserError: A tensor is missing, beside what the network has, or of another shape or type.
    """
    sentence = f"{name} does not hold the weights of the network that its record describes:"
    missing, others = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    shapes = {key: (stored[key].shape, tuple(tensor.shape)) for key, tensor in expected.items() if key in stored}
    require_match(sentence, missing, others, shapes)
    for key, tensor in expected.items():
        if stored[key].dtype != tensor.dtype:
            raise UserError(f"{sentence} {key} has the type {stored[key].dtype} and should have {tensor.dtype}.")


def require_match(
    sentence: str,
    missing: Sequence[str],
    others: Sequence[str],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Reject weights whose names or shapes are not those of a network.

    Args:
        sentence: The beginning of the message.
        missing: Names in the network that the file lacks.
        others: Names in the file that the network lacks.
        shapes: Name -> shape in the file, and in the network.
    """
    for names, what in ((missing, "it lacks"), (others, "it also has")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{sentence} {what} {shown(', '.join(names[:3]), 200)}{more}.")
    for name, (stored, expected) in shapes.items():
        if stored != expected:
            raise UserError(f"{sentence} {name} has shape {stored} and should have {expected}.")


def restore_encoder(encoder: Encoder, read: Callable[[str], Tensor]) -> Encoder:
    """A sketched encoder with its weights, in inference mode.

    Args:
        encoder: From `sketch_encoder`, and found the same as the file by `require_same`.
        read: Name in the encoder's state -> its numbers, in memory of their own.
    """
    state = {name: read(name) for name in encoder.state_dict()}
    encoder.load_state_dict(state, assign=True)
    if any(tensor.is_meta for tensor in _tensors(encoder)):  # what a model computes when it is built, such as positions
        encoder = build_encoder(encoder.config)
        encoder.load_state_dict(state)
    return encoder.eval()


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, and tensors that are plain attributes of modules."""
    yield from chain(network.parameters(), network.buffers())
    for module in network.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))
