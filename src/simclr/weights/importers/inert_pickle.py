"""Pickles read without running them.

A pickle is a program; here its instructions are read by `pickletools` and followed on a stack of our own on which
nothing is ever imported or called: containers become containers, tensors become descriptions of where their numbers
lie, and whatever else the file would build becomes `Opaque`. So Lightning's checkpoints are read too, though they hold
objects of classes that are not installed.

A pickle of a few bytes can describe containers of containers that would take years to print, hash or compare, so the
type of a value is checked before the value is looked at, and no container is ever turned into text, hashed, compared or
copied. What a pickle takes is bounded by the number of its instructions, and that by `MAX_INSTRUCTIONS`.
"""

import pickletools
import warnings
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

import torch

from simclr.errors import UserError, shown
from simclr.models.external.protobuf import Malformed

MAX_INSTRUCTIONS = 1_000_000
"""Of one pickle; a checkpoint of 3,000 tensors has about 100,000. Each makes at most one object of 250 bytes."""

MAX_BYTES = 64 << 20
"""Of the pickles of one file, without the numbers of its tensors; large checkpoints have 1 MB. A text may take four
times its bytes in memory."""

_MAX_NAME = 200  # characters of a module, a class or a storage's key
_MAX_DIMENSIONS = 8
_MAX_NUMBER = 1 << 62  # of offsets, sizes and integer keys; larger integers are slow to hash
_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_REBUILD = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
_PARAMETER = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
# What training code keeps beside weights; of other modules no name is tolerated, though none would be called.
_KNOWN = {
    "__main__", "argparse", "collections", "datetime", "enum", "functools", "lightly", "lightning", "lightning_fabric",
    "lightning_utilities", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "solo", "torch", "torchvision",
    "typing",
}  # fmt: skip
_HARMLESS = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
    "slice", "str", "tuple",
    "long", "unicode", "xrange",  # what protocol 2, torch.save's, writes for int, str and range
}  # fmt: skip

_CONSTANTS = {
    "BINBYTES", "BINBYTES8", "BINFLOAT", "BININT", "BININT1", "BININT2", "BINSTRING", "BINUNICODE", "BINUNICODE8",
    "BYTEARRAY8", "FLOAT", "INT", "LONG", "LONG1", "LONG4", "SHORT_BINBYTES", "SHORT_BINSTRING", "SHORT_BINUNICODE",
    "STRING", "UNICODE",
}  # fmt: skip
"""Instructions that push the number or the text in them."""


class Opaque:
    """Something that the file would have built by calling a function, and that nobody needs."""


class Storage(NamedTuple):
    """The bytes of one or several tensors."""

    key: str
    dtype: torch.dtype
    count: int


class Lazy(NamedTuple):
    """A tensor that was not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def follow(file: BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """What the pickle at the file's position describes; afterwards the file stands behind it.

    Args:
        storages: Takes up every storage that the pickle names, by key, also those of objects that become `Opaque`.

    Raises:
        UserError: It names something of a module that has no business in a checkpoint.
        ValueError and others: It is no pickle.
    """
    machine = _Machine({} if storages is None else storages)
    with warnings.catch_warnings(action="ignore"):  # of odd escapes in texts
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count >= MAX_INSTRUCTIONS:
                raise Malformed(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    raise Malformed("its pickle does not end")


class _Machine:
    """The stack and the memo of one pickle, and what each instruction does to them."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._mark = object()
        self._storages = storages

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction, by its name in `pickletools`; whatever is not listed here is refused."""
        if name in _CONSTANTS:
            self.stack.append(argument)
        elif not (self._keep(name, argument) or self._contain(name) or self._call(name, argument)):
            raise Malformed(f"its pickle has the instruction {name}")

    def _since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not self._mark:
            items.append(item)
        return items[::-1]

    def _keep(self, name: str, argument: Any) -> bool:
        """Instructions of the stack, the memo and constants."""
        stack = self.stack
        match name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(argument)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[int(argument)])
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "MARK":
                stack.append(self._mark)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "PROTO" | "FRAME":
                pass
            case _:
                return False
        return True

    def _contain(self, name: str) -> bool:
        """Instructions of containers; sets become `Opaque`, for their items would be hashed."""
        stack = self.stack
        match name:
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(Opaque())
            case "DICT":
                stack.append(dict(_pairs(self._since_mark())))
            case "LIST":
                stack.append(self._since_mark())
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "FROZENSET":
                self._since_mark()
                stack.append(Opaque())
            case "APPEND":
                _extend(stack, [stack.pop()])
            case "APPENDS" | "ADDITEMS":
                _extend(stack, self._since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                items = self._since_mark()
                _set(stack[-1], items)
            case _:
                return False
        return True

    def _call(self, name: str, argument: Any) -> bool:
        """Instructions that name classes, call them or refer to storages."""
        stack = self.stack
        match name:
            case "GLOBAL":
                stack.append(_Name(_allowed(*argument.split(" ", 1))))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_Name(_allowed(module, attribute)))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_result(function, arguments))
            case "NEWOBJ_EX":
                del stack[-3:]
                stack.append(Opaque())
            case "OBJ":
                self._since_mark()
                stack.append(Opaque())
            case "INST":
                _allowed(*argument.split(" ", 1))
                self._since_mark()
                stack.append(Opaque())
            case "BUILD":
                stack.pop()  # the attributes of an object
            case "BINPERSID":
                stored = _persistent(stack.pop())
                if isinstance(stored, Storage):
                    self._storages[stored.key] = stored
                stack.append(stored)
            case _:
                return False
        return True


class _Name(str):
    """A class or function, by its full name."""


def _allowed(module: Any, name: Any) -> str:
    if not (isinstance(module, str) and isinstance(name, str) and max(len(module), len(name)) <= _MAX_NAME):
        raise Malformed("its pickle names a class by something that is no name")
    top = module.partition(".")[0]
    harmless = top in ("builtins", "__builtin__") and name in _HARMLESS
    if top in _KNOWN or harmless or (module, name) in (("_codecs", "encode"), ("copyreg", "_reconstructor")):
        return f"{module}.{name}"
    raise UserError(
        f"The checkpoint's pickle would call {shown(module)}.{shown(name)}, which weights do not need; nothing "
        "of it was run. If you trust the file, load it where it was made and save its state_dict alone."
    )


def _result(function: Any, arguments: Any) -> Any:
    """What a call of one of torch's own functions would give; of all others nothing."""
    arguments = arguments if isinstance(arguments, tuple) else ()
    if not isinstance(function, _Name):
        return Opaque()
    if str(function) == "collections.OrderedDict":
        return arguments[0] if arguments and isinstance(arguments[0], dict) else {}  # not copied: it may be huge
    if function in _REBUILD and len(arguments) >= 4 and isinstance(arguments[0], Storage):
        storage, offset, shape, stride = arguments[:4]
        if not _are_sizes(shape) or not _are_sizes(stride) or not _are_sizes((offset,)) or len(shape) != len(stride):
            raise Malformed("a tensor's shape makes no sense")
        return Lazy(storage, offset, shape, stride)
    if function in _PARAMETER and arguments and isinstance(arguments[0], Lazy):
        return arguments[0]
    return Opaque()


def _are_sizes(numbers: Any) -> bool:
    """Whether it is a tuple of a few integers that are not negative."""
    if type(numbers) is not tuple or len(numbers) > _MAX_DIMENSIONS:
        return False
    return all(type(number) is int and 0 <= number < _MAX_NUMBER for number in numbers)


def _persistent(identity: Any) -> Storage | Opaque:
    """What torch's persistent identities name: ('storage', class, key, device, count[, view]) or, before 1.6, a module.

    The latter are ('module', class, file, source), of a network that was pickled as a whole.
    """
    if type(identity) is tuple and len(identity) == 4 and isinstance(identity[0], str) and identity[0] == "module":
        return Opaque()
    if type(identity) is not tuple or not 5 <= len(identity) <= 6:
        raise Malformed("its pickle refers to something that is no storage")
    word, kind, key, _, count = identity[:5]
    if not (isinstance(word, str) and word == "storage" and isinstance(key, str) and len(key) <= _MAX_NAME):
        raise Malformed("its pickle refers to something that is no storage")
    dtype = _DTYPES.get(kind.rpartition(".")[2]) if isinstance(kind, _Name) else None
    if dtype is None or not _are_sizes((count,)):
        raise Malformed("a storage has an unknown type or an impossible length")
    if len(identity) > 5 and identity[5] is not None:
        raise Malformed("a storage is a part of another, as torch before 0.4 wrote it")
    return Storage(key, dtype, count)


def _extend(stack: list[Any], items: list[Any]) -> None:
    if isinstance(stack[-1], list):
        stack[-1].extend(items)


def _set(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        target.update(_pairs(items))


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Keys and values; a key of another kind than state dicts have is left out, for its hash may take for ever."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str) or (isinstance(key, int) and -_MAX_NUMBER < key < _MAX_NUMBER):
            yield key, value
