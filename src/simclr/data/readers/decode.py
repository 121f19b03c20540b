"""Decode one image file to uint8 pixels, or state why that fails.

Whatever Pillow reads becomes gray (H, W, 1) or RGB (H, W, 3): the first frame, turned as its EXIF tag says,
alpha composited on white, 16 bits rounded to 8. Colour profiles (ICC) are not applied. Pillow narrows
16-bit *colour* files itself, by dropping the low byte. Files are not trusted: sizes are read
from the header before any pixel is decoded, only raster formats are tried (an EPS file would start
Ghostscript), and every error becomes a reason.
"""

import os
import re
import stat
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from simclr.errors import UserError
from simclr.files import Stamp, stamp_of

MAX_PIXELS = 100_000_000
"""An image whose header claims more is refused as a decompression bomb; the largest cameras have about it."""
MAX_FILE_BYTES = 1 << 30
"""No image within MAX_PIXELS needs a file this large, and some of Pillow's readers read it whole."""
MAX_SCANS = 100
"""Of a progressive JPEG: every scan goes over all pixels again, even one of a few bytes, so that 400 scans in a small
file take a minute. Encoders write 6 to 20; libtiff has the same limit."""
MAX_SCANNED_PIXELS = 2_000_000_000
"""Scans times pixels of a progressive JPEG: 20 scans of an image of MAX_PIXELS, some 3 s."""
BACKGROUND = 255
"""Gray value (of every channel) behind transparent pixels: white, as on the pages they are made for."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
# fmt: off
ENDINGS = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".avif",
])
# fmt: on
DECODER = f"{PIL.__version__}/{features.version('jpg')}/1"
"""What decides an image's pixels beside its file: Pillow, its JPEG library, and the rules of this file, whose number
goes up with any change of them."""
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""Neither a byte that was escaped within a scan nor a restart marker."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class TransientReason(str):
    """A reason that comes from the machine and not from the file, such as a lack of memory; a retry may succeed."""


class Changed(TransientReason):
    """The reason for refusing a file whose content is not the expected one."""


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Ordered map with `workers` threads, for decoding; a bounded number of results is ahead of the consumer.

    Pillow releases the interpreter lock while it decodes, so threads suffice.
    """
    silence_pillow()
    if workers < 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def decode_image(source: Path | Image.Image) -> np.ndarray:
    """One file or Pillow image as (H, W, 1 or 3) uint8 pixels.

    Raises:
        UserError: it cannot be read; the sentence says why.
    """
    silence_pillow()
    pixels = (refusal(source) or decoded(source)) if isinstance(source, Image.Image) else decode_file(source)
    if isinstance(pixels, str):
        raise UserError(f"{source} cannot be used as an image: {pixels}.")
    return pixels


def decode_file(path: Path, side: int | None = None, expected: Stamp | None = None) -> np.ndarray | str:
    """(H, W, 1 or 3) uint8 pixels of a file, or a few words that say why there are none.

    Args:
        side: Images whose shorter side is longer are shrunk to it (`shrink`).
        expected: What the file's stamp has to be before and after it is read; else the reason is a `Changed`.
    """
    try:
        if problem := unfit_file(path):
            return problem
        with open(path, "rb") as file, Image.open(file, formats=allowed_formats()) as image:
            before = stamp_of(os.fstat(file.fileno()))
            pixels = refusal(image, file) or decoded(image)
            if expected is not None and not (before == expected == stamp_of(os.fstat(file.fileno()))):
                return Changed("changed while it was read")
        return pixels if side is None or isinstance(pixels, str) else shrink(pixels, side)
    except Exception as error:  # Pillow's readers raise nearly every kind of error on damaged bytes
        return reason_of_damage(error)


def shrunk_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width after `shrink`."""
    shorter = min(height, width)
    if shorter <= side:
        return height, width
    return (height * side + shorter // 2) // shorter, (width * side + shorter // 2) // shorter  # to the nearest


def shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """(H, W, C) pixels with their shorter side at most `side`, by Pillow's antialiased bicubic filter."""
    height, width, channels = pixels.shape
    new_height, new_width = shrunk_size(height, width, side)
    if (new_height, new_width) == (height, width):
        return pixels
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    small = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    return np.array(small).reshape(new_height, new_width, channels)


def to_pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 1 or 3) uint8 pixels of a Pillow image of any mode; 1 where its mode, or its palette, is gray.

    16-bit values map 65535 to 255, and wider integers are clipped to 16 bits first. Floats are clipped to
    [0, 1] where none is above 1, else to [0, 255].

    Raises:
        ValueError: float pixels that are not numbers. Pillow's own errors pass through.
    """
    image.load()
    image = _upright(image)
    mode, see_through = image.mode, image.has_transparency_data
    if mode.startswith("I"):
        return _from_integers(image)
    if mode == "F":
        return _from_floats(np.asarray(image))
    if mode in ("LA", "La") or (mode in ("1", "L") and see_through):
        return composite(np.asarray(image.convert("LA")))
    if see_through:
        pixels = composite(np.asarray(image.convert("RGBA")))
    elif mode in ("1", "L"):
        return np.array(image.convert("L"))[..., None]
    else:
        pixels = np.array(image.convert("RGB"))
    if mode in ("P", "PA") and (pixels == pixels[..., :1]).all():
        return pixels[..., :1].copy()
    return pixels


def composite(pixels: np.ndarray) -> np.ndarray:
    """(..., C + 1) uint8 pixels with alpha last -> (..., C) over BACKGROUND, rounded to the nearest."""
    result = np.empty((*pixels.shape[:-1], pixels.shape[-1] - 1), np.uint8)
    step = max(1, (1 << 20) // max(1, pixels[:1].size))  # not all at once: 16-bit values of 100 million pixels take GiB
    for begin in range(0, len(pixels), step):
        part = pixels[begin : begin + step]
        colour, alpha = part[..., :-1].astype(np.uint16), part[..., -1:].astype(np.uint16)
        # At most 255 * 255 + 127, which 16 bits hold; no half can occur, as 255 is odd.
        result[begin : begin + step] = (colour * alpha + BACKGROUND * (255 - alpha) + 127) // 255
    return result


def unfit_file(path: Path) -> str | None:
    """Why a file of this kind or size is no image; None where it may be one."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"  # opening a FIFO would wait for ever
    if status.st_size == 0:
        return "empty file"
    if status.st_size > MAX_FILE_BYTES:
        return f"file of {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}"
    return None


def refusal(image: Image.Image, file: BinaryIO | None = None) -> str | None:
    """Why an opened image is not to be decoded, judging by its header; None where it may be.

    Args:
        file: Where it comes from, to count the scans of a progressive JPEG.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"decompression bomb: {width} x {height} pixels, more than {MAX_PIXELS:,}"
    if width * height == 0:
        return f"no pixels: {width} x {height}"
    return None if file is None else _too_many_scans(image, file)


def decoded(image: Image.Image) -> np.ndarray | str:
    """Pixels of an image that `refusal` has passed, or the reason why there are none."""
    try:
        return to_pixels(image)
    except Exception as error:  # as in decode_file
        return reason_of_damage(error)


def _too_many_scans(image: Image.Image, file: BinaryIO) -> str | None:
    """Why a progressive JPEG would take too long to decode; None for one that would not, and for other files."""
    if "progressive" not in image.info or not isinstance(image, JpegImageFile):
        return None
    limit = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(1, image.width * image.height))
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    if content.count(b"\xff\xda") <= limit or _count_scans(content, limit) <= limit:
        return None
    return f"progressive JPEG of more than {limit} scans at {image.width} x {image.height} pixels"


def _count_scans(content: bytes, limit: int) -> int:
    """Scans of a JPEG's first image, at most `limit` + 1; bytes within a segment, such as a thumbnail, do not count."""
    scans = place = 0
    while scans <= limit and (marker := _JPEG_MARKER.search(content, place)):
        place = marker.end()
        marker = content[place - 1]
        if marker == 0xD9:  # end of image
            break
        if marker not in (0x01, 0xD8):  # others bring a segment, which begins with its length
            scans += marker == 0xDA
            place += max(2, int.from_bytes(content[place : place + 2], "big"))
    return scans


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # a damaged EXIF block says nothing about the pixels: show them as viewers do
        return image


def _from_integers(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.int32)  # (H, W)
    gray = ((values.clip(0, 65535) + 128) // 257).astype(np.uint8)  # nearest of v / 257; 65535 = 255 * 257
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray[values == key] = BACKGROUND
    return gray[..., None]


def _from_floats(values: np.ndarray) -> np.ndarray:
    if np.isnan(values).any():
        raise ValueError("pixels that are not numbers (NaN)")
    unit = values.max() <= 1
    scaled = values.clip(0, 1) * 255 if unit else values.clip(0, 255)
    return np.rint(scaled).astype(np.uint8)[..., None]


def reason_of_damage(error: Exception) -> str:
    """A few words for what Pillow or the system raised."""
    text = str(error).strip().split("\n")[0][:100]
    text = text if text.isprintable() else ascii(text)
    if isinstance(error, UnidentifiedImageError):
        return "not a readable image"
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb: more than {MAX_PIXELS:,} pixels"  # from Pillow's own, higher limit
    if isinstance(error, MemoryError):
        return TransientReason("needs more memory than there is")
    if isinstance(error, OSError) and error.errno is not None:
        return TransientReason((error.strerror or text).lower())
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return "truncated"
    return f"damaged: {text or type(error).__name__}"


@cache
def allowed_formats() -> list[str]:
    """Those of FORMATS that this Pillow reads."""
    Image.init()  # all readers, once: Pillow imports them at the first use, which threads would do together
    return [name for name in FORMATS if name in Image.OPEN]


def silence_pillow() -> None:
    """Ignore the warnings of Pillow's readers about unusual files, which `-W error` would turn into errors.

    The filter is never removed: `warnings.catch_warnings` swaps a list of the whole process, and with
    batches decoded in one thread and another using it too, either could restore a list that the other
    has left.
    """
    wanted = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if wanted not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    allowed_formats()
