"""Checkpoints of PyTorch that were made to hang a reader or to take its memory, each of few bytes: name -> content."""

import io
import pickle
import struct
import zipfile

from torch.serialization import MAGIC_NUMBER

LAUGHS = b"(U\x03lolt" + b"q\x64h\x64h\x64\x87" * 60
"""A tuple of three of the tuple before it, sixty levels deep: 3**60 texts in 430 bytes of pickle."""
LAUGHS_DOUBLED = b"(U\x03lolt" + b"22\x87" * 60
"""The same without the memo."""
DEEP = b"]" + b"\x85" * 100_000
"""A tuple within a tuple within a tuple: 100,000 levels."""
GLOBAL = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"ctorch\nFloatStorage\n"


def text(content: str) -> bytes:
    raw = content.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def storage(
    key: bytes = text("0"), kind: bytes = STORAGE, count: bytes = b"K\x04", word: bytes = text("storage")
) -> bytes:
    """Instructions that push a storage."""
    return b"(" + word + kind + key + text("cpu") + count + b"tQ"


def tensor(
    stored: bytes | None = None, offset: bytes = b"K\0", shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85"
) -> bytes:
    """Instructions that push a tensor."""
    return GLOBAL + b"(" + (storage() if stored is None else stored) + offset + shape + stride + b"\x89}tR"


def state(*items: bytes) -> bytes:
    """A pickle of a dictionary of these instructions, keys and values in turn."""
    return b"\x80\x02}(" + b"".join(items) + b"u."


def archive(program: bytes, records: dict[str, bytes] | None = None, twice: bool = False) -> bytes:
    """torch.save's zip format."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3\n")  # without it torch's own reader refuses the archive
        for name, content in ({"0": bytes(16)} if records is None else records).items():
            file.writestr(f"archive/data/{name}", content)
    raw = buffer.getvalue()
    return raw.replace(b"archive/data/1", b"archive/data/0") if twice else raw


def legacy(program: bytes, keys: bytes, rest: bytes = b"") -> bytes:
    """torch.save's format before 1.6."""
    return (
        b"".join(pickle.dumps(part, 2) for part in (MAGIC_NUMBER, 1001, {}))
        + program
        + b"\x80\x02"
        + keys
        + b"."
        + rest
    )


NAME = text("conv1.weight")
LONG = b"\x8b" + struct.pack("<I", 30_000) + b"\x7f" * 30_000  # an integer of 72,000 digits
ORDERED = b"ccollections\nOrderedDict\n"
COPIES = (
    ORDERED + b"(}(" + b"".join(text(f"{i}") + b"N" for i in range(10_000)) + b"utRq\x000"
    + ORDERED + b"q\x010h\x00\x85q\x020" + b"h\x01h\x02R" * 20_000
)  # fmt: skip
"""A dictionary of 10,000 entries, copied 20,000 times."""
COPIES_IN_A_LIST = (
    b"](}q\x00(" + b"".join(text(f"{i}") + b"N" for i in range(10_000)) + b"u"
    + ORDERED + b"q\x01h\x00\x85q\x02R" + b"h\x01h\x02R" * 20_000 + b"e"
)  # fmt: skip
"""The same by instructions that torch's own reader follows."""
TERABYTE = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
PROGRAMS = {
    "a module's name of texts without end": state(NAME, LAUGHS + text("x") + b"\x93"),
    "a class's name of texts without end": state(NAME, text("torch") + LAUGHS + b"\x93"),
    "a key of texts without end": state(LAUGHS, b"K\x01"),
    "a tensor under such a key": state(LAUGHS, tensor()),
    "a key of doubled texts without end": state(LAUGHS_DOUBLED, b"K\x01"),
    "a call of texts without end": state(NAME, LAUGHS + b")R"),
    "attributes for texts without end": state(NAME, LAUGHS + b"}b"),
    "a storage's class of texts without end": state(NAME, tensor(storage(kind=LAUGHS))),
    "a storage's key of texts without end": state(NAME, tensor(storage(key=LAUGHS))),
    "a storage's word of texts without end": state(NAME, tensor(storage(word=LAUGHS))),
    "a storage's length of texts without end": state(NAME, tensor(storage(count=LAUGHS))),
    "a storage's length of 72,000 digits": state(NAME, tensor(storage(count=LONG))),
    "a key of 72,000 digits": state(LONG, tensor()),
    "a shape of texts without end": state(NAME, tensor(shape=LAUGHS)),
    "a stride of texts without end": state(NAME, tensor(stride=LAUGHS)),
    "an offset of texts without end": state(NAME, tensor(offset=LAUGHS)),
    "an offset of 72,000 digits": state(NAME, tensor(offset=LONG)),
    "a shape of a terabyte": state(NAME, tensor(shape=TERABYTE + b"\x85")),
    "a storage of a terabyte": state(NAME, tensor(storage(count=TERABYTE))),
    "an object of 100,000 levels": state(NAME, DEEP),
    "a key of 100,000 levels": state(DEEP, tensor()),
    "a key of 900,000 tuples within one another": state(b")" + b"\x85" * 900_000, tensor()),
    "a list within itself": state(NAME, b"]q\x00h\x00a", text("b"), tensor()),
    "a dictionary within itself": b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s.",
    "copies of a dictionary": state(NAME, COPIES),
    "copies of a dictionary in a list": state(NAME, COPIES_IN_A_LIST),
    "a bytearray of a terabyte": state(NAME, b"c__builtin__\nbytearray\n" + TERABYTE + b"\x85R"),
    "a tensor that its class makes of a terabyte": state(NAME, b"ctorch\nFloatTensor\n" + TERABYTE + b"\x85R"),
    "a storage that its class makes of a terabyte": state(
        NAME, b"ctorch.storage\nUntypedStorage\n" + TERABYTE + b"\x85R"),
    "100 tensors of a gigabyte each": state(
        *(text(f"{i}") + b"ctorch\nFloatTensor\n" + b"J\0\0\0\x10\x85R" for i in range(100))),
    "a name of 1,000,000 characters": state(text("x" * 1_000_000), tensor()),
    "a name that colours the terminal": state(text("conv1.\x1b[31mweight"), tensor()),
    "2,000,000 instructions": b"\x80\x02" + b"N" * 2_000_000 + b".",
    "2,000,000 dictionaries": b"\x80\x02" + b"}" * 2_000_000 + b".",
    "a text of 256 GB": b"\x80\x04\x8d" + struct.pack("<Q", 256 << 30) + b"x.",
    "bytes of 2**63": b"\x80\x04\x8e" + struct.pack("<Q", (1 << 63) - 1) + b"x.",
    "a frame of 2**63": b"\x80\x04\x95" + struct.pack("<Q", (1 << 63) - 1) + b"N.",
    "an empty stack": b"\x80\x02t.",
    "nothing on the memo": b"\x80\x02h\x05.",
}  # fmt: skip

FILES = {
    **{f"zip, {name}": archive(program) for name, program in PROGRAMS.items()},
    **{f"legacy, {name}": legacy(program, b"]" + text("0") + b"a", struct.pack("<Q", 4) + bytes(16))
       for name, program in PROGRAMS.items()},
    "13 bytes that ask for 256 GB": b"\x80\x04\x8e" + struct.pack("<Q", 256 << 30) + b"q.",
    "a magic number of texts without end": b"\x80\x02" + LAUGHS + b".",
    "legacy, storages' keys of texts without end": legacy(state(NAME, tensor()), b"](" + LAUGHS + b"e"),
    "legacy, a storage of a terabyte that is there": legacy(
        state(NAME, tensor(storage(count=TERABYTE))), b"]" + text("0") + b"a",
        struct.pack("<Q", 1 << 40) + bytes(16)),
    "zip, a record twice": archive(state(NAME, tensor()), {"0": bytes(16), "1": bytes(16)}, twice=True),
    "zip, a pickle in parts that are missing": archive(state(NAME, tensor()), {}),
}  # fmt: skip
