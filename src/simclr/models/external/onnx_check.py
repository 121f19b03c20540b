"""What an ONNX file may hold before onnxruntime is given it, checked on the bytes of the file alone.

The files that `simclr export` writes are one graph of plain operators with their weights inside. Refused is what
would read other files (external data), call code of others (operators of other domains), or may never end (loops and
whatever else has a graph within it). Field numbers are those of onnx/onnx.proto.
"""

from simclr.models.external.protobuf import Malformed, fields

MAX_FIELDS = 1_000_000
"""Of all messages that are looked into; a Vision Transformer of 24 blocks has 50,000."""

_EXTERNAL = 1  # TensorProto.DataLocation
_DOMAINS = (b"", b"ai.onnx")
# Message -> field -> the message in it; each is visited wherever it stands.
_WITHIN = {
    "model": {7: "graph", 14: "metadata"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 22: "sparse", 23: "sparse"},
    "metadata": {},
    "tensor": {},
}
_REFUSED = {
    ("model", 20): "it describes a training",
    ("model", 25): "it has functions of its own",
    ("attribute", 6): "it has a graph within its graph (Loop, If, Scan)",
    ("attribute", 11): "it has a graph within its graph (Loop, If, Scan)",
    ("tensor", 13): "it keeps numbers in another file (external data)",
}


def check_onnx(content: bytes) -> dict[str, str]:
    """Refuse a file that is more than a graph with its weights.

    Returns:
        Its metadata, key -> value.

    Raises:
        Malformed: What is wrong with the file, as a part of a sentence.
    """
    waiting: list[tuple[str, memoryview]] = [("model", memoryview(content))]
    allowance, metadata = MAX_FIELDS, {}
    while waiting:
        kind, message = waiting.pop()
        texts = {}
        for field, value in fields(message):
            allowance -= 1
            if allowance < 0:
                raise Malformed(f"it has more than {MAX_FIELDS:,} entries")
            if (kind, field) in _REFUSED:
                raise Malformed(_REFUSED[kind, field])
            if isinstance(value, int):
                if (kind, field, value) == ("tensor", 14, _EXTERNAL):
                    raise Malformed(_REFUSED["tensor", 13])
                continue
            if kind == "node" and field == 7 and bytes(value) not in _DOMAINS:
                raise Malformed("it has operators of its own")
            if kind == "metadata":
                texts[field] = value
            elif field in _WITHIN[kind]:
                waiting.append((_WITHIN[kind][field], memoryview(value)))
        if kind == "metadata":
            key, text = (bytes(texts.get(field, b"")).decode(errors="replace") for field in (1, 2))
            metadata[key] = text
    return metadata
