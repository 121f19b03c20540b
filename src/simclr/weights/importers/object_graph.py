"""TensorFlow 2's checkpoints of the authors' model under the names that TensorFlow 1 gave its variables.

Such a checkpoint holds, under `_CHECKPOINTABLE_OBJECT_GRAPH`, the objects of the program that saved it: nodes whose
edges are attributes' names, and at its variables the key under which each one's numbers lie
(tensorflow/core/protobuf/trackable_object_graph.proto). A variable's key is whatever path TensorFlow met first, in a
SavedModel some `trainable_variables_list/7`, so the attributes are followed instead
(google-research/simclr, tf2/resnet.py and model.py): in the order of TF1's numbers, which are those of creation.
"""

from array import array
from collections.abc import Iterator

from simclr.models.external.protobuf import Malformed, bytes_of, fields, number_of, varint
from simclr.weights.importers.tensor_bundle import TensorBundle

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_NODE = 1 << 3 | 2  # the only field of the graph, a message
_MOST_ITEMS = 256  # of one of the model's lists; the longest is ResNet-152's third group with 36 blocks
_MOST_BYTES = 4 << 20  # those of the largest models have one or two million
_MOST_PASSES = 50  # of the bytes; the authors' models take fewer than one
_MOST_PARSED = 8 << 20  # bytes in all passes: some seconds
# Where a layer of the lists keeps what has variables; those of a selective kernel stand before the general ones.
_CONV, _NORM = "conv2d", "batch_normalization"
_PARTS = (
    (_CONV, ("conv2d_fixed_padding", "conv2d")),
    (_NORM, ("batch_norm_relu", "bn")),
    (_CONV, ("conv2d_0",)),
    (_NORM, ("batch_norm_relu_1", "bn")),
    (_CONV, ("conv2d_1",)),
    (_CONV, ("conv2d",)),
    (_NORM, ("bn",)),
)
_VARIABLES = {_CONV: ("kernel",), _NORM: ("gamma", "beta", "moving_mean", "moving_variance")}


class ObjectGraph:
    """The model in a checkpoint.

    Attributes:
        keys: TF1's name -> key in the checkpoint, for every variable that the model's attributes lead to.
        averages: Whether the shortcuts average before they project, as ResNet-D's do; TF1's names do not tell.

    Raises:
        UserError: The graph is damaged.
    """

    def __init__(self, bundle: TensorBundle) -> None:
        message = bundle.read_string(OBJECT_GRAPH)
        try:
            self._nodes = _Nodes(message)
            self.keys: dict[str, str] = {}
            self.averages = False
            self._walk()
        except Malformed as error:
            raise bundle.error(str(error)) from None
        lost = [key for key in self.keys.values() if key not in bundle.entries]
        if lost:
            raise bundle.error(f"its object graph names the variable {lost[0]}, which is not there")

    def _walk(self) -> None:
        find = self._nodes.find
        model = find(0, "model")
        model = 0 if model is None else model  # the model may have been saved by itself
        numbers = dict.fromkeys(_VARIABLES, 0)
        for layer in self._layers(find(model, "resnet_model")):
            for kind, path in _PARTS:
                part = find(layer, *path)
                if part is not None:
                    number = numbers[kind]
                    self._take(part, f"base_model/{kind}{f'_{number}' if number else ''}/", _VARIABLES[kind])
                    numbers[kind] += 1
        layers = list(self._items(find(model, "_projection_head", "linear_layers")))
        for j, layer in enumerate(layers):
            place = f"head_contrastive/{'l' if len(layers) == 1 else 'nl'}_{j}/"
            self._take(find(layer, "dense"), f"{place}dense/", ("kernel", "bias"))
            self._take(find(layer, "bn_relu", "bn"), f"{place}{_NORM}/", _VARIABLES[_NORM])
        dense = find(model, "supervised_head", "linear_layer", "dense")
        self._take(dense, "head_supervised/linear_layer/dense/", ("kernel", "bias"))
        step = self._nodes.key(find(0, "global_step"))
        if step is not None:
            self.keys["global_step"] = step

    def _layers(self, resnet: int | None) -> Iterator[int]:
        """Every layer of the encoder in the order of creation: a block's shortcut first."""
        find, items = self._nodes.find, self._items
        yield from items(find(resnet, "initial_conv_relu_max_pool"))
        for group in items(find(resnet, "block_groups")):
            for block in items(find(group, "layers")):
                shortcut = list(items(find(block, "projection_layers"))) or list(items(find(block, "shortcut_layers")))
                if shortcut and find(shortcut[0], "conv2d") is None:
                    self.averages = True
                yield from shortcut
                yield from items(find(block, "conv_relu_dropblock_layers"))
                yield from items(find(block, "conv2d_bn_layers"))

    def _items(self, node: int | None) -> Iterator[int]:
        """The objects of a list."""
        for i in range(_MOST_ITEMS):
            item = self._nodes.find(node, str(i))
            if item is None:
                return
            yield item
        raise Malformed(f"a list of its object graph has more than {_MOST_ITEMS} layers")

    def _take(self, node: int | None, place: str, variables: tuple[str, ...]) -> None:
        for variable in variables:
            key = self._nodes.key(self._nodes.find(node, variable))
            if key is not None:
                self.keys[place + variable] = key


class _Nodes:
    """The nodes of a TrackableObjectGraph; each is parsed when it is asked for, so little is held beside the message.

    A node's field 1 is a child (1 the number of its node, 2 the name of the attribute), its field 2 an attribute of its
    own (1 its name, 3 the key of its numbers).
    """

    def __init__(self, message: bytes) -> None:
        if len(message) > _MOST_BYTES:
            raise Malformed(f"its object graph has {len(message)} bytes")
        self._message = message
        self._allowance = min(_MOST_PASSES * len(message), _MOST_PARSED)
        self._begins, self._ends = array("Q"), array("Q")
        position = 0
        while position < len(message):
            tag, position = varint(message, position)
            length, position = varint(message, position)
            if tag != _NODE or position + length > len(message):
                raise Malformed("its object graph is none")
            self._begins.append(position)
            position += length
            self._ends.append(position)

    def find(self, node: int | None, *path: str) -> int | None:
        """The node that the attributes lead to, if there is one."""
        for name in path:
            for field, value in self._fields(node):
                if field == 1:
                    child = dict(fields(bytes_of(value)))
                    if child.get(2) == name.encode():
                        node = number_of(child.get(1, 0))
                        break
            else:
                return None
        return node

    def key(self, node: int | None) -> str | None:
        """Under which name the numbers of a variable's node lie in the checkpoint."""
        for field, value in self._fields(node):
            if field == 2:
                attribute = dict(fields(bytes_of(value)))
                if attribute.get(1) == b"VARIABLE_VALUE":
                    return bytes_of(attribute.get(3, b"")).decode(errors="replace")
        return None

    def _fields(self, node: int | None) -> Iterator[tuple[int, int | bytes]]:
        if node is None:
            return iter(())
        if node >= len(self._begins):
            raise Malformed("its object graph is none")
        begin, end = self._begins[node], self._ends[node]
        self._allowance -= 2 + end - begin
        if self._allowance < 0:  # a model within itself would have no end
            raise Malformed("its object graph runs in circles")
        return fields(self._message[begin:end])
