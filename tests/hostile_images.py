"""Writes files of images that are damaged or hostile."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {
    "jpg": ("JPEG", {}), "png": ("PNG", {}), "gif": ("GIF", {}), "bmp": ("BMP", {}), "webp": ("WEBP", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}), "tiff": ("TIFF", {}), "ppm": ("PPM", {}), "jp2": ("JPEG2000", {}),
}  # fmt: skip


def encoded(ending: str, size: int = 24) -> bytes:
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    name, options = FORMATS[ending]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    """The start of a PNG file that claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def make_hostile(root: Path) -> int:
    """Write files that are damaged in many ways; returns how many have an image's ending."""
    root.mkdir()
    rng = np.random.default_rng(20)
    files: dict[str, bytes] = {}
    for ending in FORMATS:
        whole = encoded(ending)
        for i in range(8):
            files[f"cut{i}.{ending}"] = whole[: int(rng.integers(1, len(whole)))]
        for i in range(12):
            flipped = bytearray(whole)
            # Half of the flips in the first bytes, where the headers are; 1 to 8 of them.
            for where in rng.integers(0, len(whole) if i % 2 else 64, rng.integers(1, 9)):
                flipped[where] ^= 1 << int(rng.integers(8))
            files[f"flip{i}.{ending}"] = bytes(flipped)
        files[f"zeros.{ending}"] = bytes(500)
        files[f"noise.{ending}"] = rng.bytes(500)
        files[f"empty.{ending}"] = b""
        files[f"text.{ending}"] = b"<html>404 not found</html>"
        files[f"upper.{ending.upper()}"] = whole
        files[f"tail.{ending}"] = whole + rng.bytes(100)
    files["png_in.jpg"], files["gif_in.png"] = encoded("png"), encoded("gif")
    files["script.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n"
    end = png_chunk(b"IEND", b"")
    files["huge.png"] = png_header(100_000, 100_000) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + end
    files["wide.png"] = png_header(2**31 - 1, 1) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + end
    files["none.png"] = png_header(0, 5) + png_chunk(b"IDAT", zlib.compress(b"")) + end
    files["header.png"] = png_header(5, 5)
    dense = png_chunk(b"IDAT", zlib.compress(bytes((12_000 // 8 + 1) * 12_000), 9)) + end
    files["bomb.png"] = png_header(12_000, 12_000, bits=1, kind=0) + dense  # 144 million pixels in 18 kB
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))
    files["text_bomb.png"] = encoded("png")[:33] + text + encoded("png")[33:]
    files["huge.gif"] = b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded("gif")[10:]
    files["huge.bmp"] = encoded("bmp")[:18] + struct.pack("<ii", 90_000, 90_000) + encoded("bmp")[26:]
    files["huge.ppm"] = b"P6 99999 99999 255\n" + bytes(100)
    canvas = (16_383).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + canvas + encoded("webp")[12:]
    files["huge.webp"] = b"RIFF" + struct.pack("<I", len(extended) + 4) + b"WEBP" + extended
    for name, content in files.items():
        (root / name).write_bytes(content)
    return len(files)
