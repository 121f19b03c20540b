"""Protobuf's wire format, as far as checkpoints need it: varints and the fields of messages, in files of strangers."""

from collections.abc import Iterator


class Malformed(Exception):
    """What is wrong with a file, as a part of a sentence."""


def fields(message: bytes | memoryview) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in the order of the file, numbers unsigned; those of a view of bytes are views.

    Raises:
        Malformed: The message is cut off, or is none.
    """
    position = 0
    while position < len(message):
        tag, position = varint(message, position)
        wire = tag & 7
        if wire == 0:
            value, position = varint(message, position)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, position = varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise Malformed("an entry of it is no message")
        raw = message[position : position + length]
        if len(raw) < length:
            raise Malformed("an entry of it is cut off")
        position += length
        yield tag >> 3, raw if wire == 2 else int.from_bytes(raw, "little")  # pyrefly: ignore


def varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """Seven bits a byte, lowest first; the top bit says that more follow. Returns the number and what is next."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        number |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return number, position
    raise Malformed("a number in it does not end")


def number_of(value: int | bytes) -> int:
    """A number that must not be negative; protobuf writes negative ones as 64 bits with the top one set."""
    if isinstance(value, bytes) or value >= 1 << 63:
        raise Malformed("an entry of it has an impossible number")
    return value


def bytes_of(value: int | bytes) -> bytes:
    """A message or a text."""
    if isinstance(value, int):
        raise Malformed("an entry of it is no message")
    return value
