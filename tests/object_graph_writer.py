"""TensorFlow 2 checkpoints of the authors' model, so that tests need no TensorFlow: variables by TF1's names go in.

Attributes' names are those of google-research/simclr, tf2/resnet.py and model.py; the messages are written from
tensorflow/core/protobuf/trackable_object_graph.proto.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bundle_writer import field, write_bundle

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
BOTTLENECK, BASIC = "conv_relu_dropblock_layers", "conv2d_bn_layers"


def write_tf2(prefix: Path, variables: Mapping[str, np.ndarray], **layout: Any) -> dict[str, str]:
    """Write a checkpoint of `variables`, and return the attributes' path of each of TF1's names.

    A variable's key is its path, as in a checkpoint of training.
    """
    paths = attributes(variables, **layout)
    content = {paths[name] + VALUE: array for name, array in variables.items() if name in paths}
    graph = object_graph({path: path + VALUE for path in paths.values()})
    write_bundle(prefix, content | {"_CHECKPOINTABLE_OBJECT_GRAPH": graph, "save_counter" + VALUE: np.array(1)})
    return paths


def attributes(
    variables: Mapping[str, np.ndarray], *, blocks: tuple[int, ...], bottleneck: bool, sk: bool, stem_convs: int
) -> dict[str, str]:
    """TF1's name -> path of attributes, by walking over the network as the authors' classes build it."""
    modules: list[tuple[str, str]] = []  # "conv" or "norm", and where it is
    stem = "model/resnet_model/initial_conv_relu_max_pool"
    for i in range(stem_convs):
        last = i == stem_convs - 1
        modules += [("conv", f"{stem}/{2 * i}/conv2d"), ("norm", f"{stem}/{2 * i + 1 + last}/bn")]  # Identity between
    for group, count in enumerate(blocks):
        for block in range(count):
            place = f"model/resnet_model/block_groups/{group}/layers/{block}"
            if block == 0:
                name = "projection_layers" if bottleneck else "shortcut_layers"
                first = (1 + (group > 0)) if sk else 0  # padding where there is a stride, and the average
                modules += [("conv", f"{place}/{name}/{first}/conv2d"), ("norm", f"{place}/{name}/{first + 1}/bn")]
            layers = f"{place}/{BOTTLENECK if bottleneck else BASIC}"
            if not bottleneck:
                modules += [(kind, f"{layers}/{i}/{leaf}") for i, (kind, leaf) in enumerate(_PAIR * 2)]
                continue
            modules += [("conv", f"{layers}/0/conv2d"), ("norm", f"{layers}/1/bn")]
            if sk:
                at = f"{layers}/3"
                modules += [("conv", f"{at}/conv2d_fixed_padding/conv2d"), ("norm", f"{at}/batch_norm_relu/bn")]
                modules += [
                    ("conv", f"{at}/conv2d_0"),
                    ("norm", f"{at}/batch_norm_relu_1/bn"),
                    ("conv", f"{at}/conv2d_1"),
                ]
            else:
                modules += [("conv", f"{layers}/3/conv2d"), ("norm", f"{layers}/4/bn")]
            after = 5 if sk else 6  # a DropBlock stands between
            modules += [("conv", f"{layers}/{after}/conv2d"), ("norm", f"{layers}/{after + 1}/bn")]
    paths, numbers = {}, {"conv": 0, "norm": 0}
    for kind, path in modules:
        number = f"_{numbers[kind]}" if numbers[kind] else ""
        numbers[kind] += 1
        if kind == "conv":
            paths[f"base_model/conv2d{number}/kernel"] = f"{path}/kernel"
        else:
            for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
                paths[f"base_model/batch_normalization{number}/{leaf}"] = f"{path}/{leaf}"
    for name in variables:
        part, _, rest = name.partition("/")
        if part == "head_contrastive" and not name.endswith("Momentum"):
            layer, _, leaf = rest.partition("/")
            leaf = leaf.replace("batch_normalization", "bn_relu/bn")
            paths[name] = f"model/_projection_head/linear_layers/{layer.rpartition('_')[2]}/{leaf}"
        elif part == "head_supervised" and not name.endswith("Momentum"):
            paths[name] = f"model/supervised_head/{rest}"
    return paths | {"global_step": "global_step"}


def object_graph(keys: Mapping[str, str]) -> bytes:
    """The message: path of attributes -> the key of the variable that it leads to."""
    tree: dict = {}
    for path in keys:
        node = tree
        for name in path.split("/"):
            node = node.setdefault(name, {})
    nodes: list[tuple[str, dict]] = [("", tree)]
    messages = []
    for path, children in nodes:  # grows as it goes: breadth first, as TensorFlow numbers them
        message = b""
        numbers = [int(name) for name in children if name.isdecimal()]
        for i in range(max(numbers, default=-1) + 1):
            children.setdefault(str(i), {})  # a layer without variables
        for name, child in children.items():
            message += field(1, field(1, len(nodes)) + field(2, name.encode()))
            nodes.append((f"{path}/{name}".lstrip("/"), child))
        if path in keys:
            message += field(2, field(1, b"VARIABLE_VALUE") + field(2, b"any/name") + field(3, keys[path].encode()))
        messages.append(field(1, message))
    return b"".join(messages)


_PAIR = (("conv", "conv2d"), ("norm", "bn"))
