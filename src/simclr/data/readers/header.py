"""Shape of an image from the header of its file: what decoding will return, or why it cannot.

No pixel is decoded except where the header does not determine the shape: an image with a palette is gray or colour
depending on the entries that its pixels use, and a PNG file may state its orientation after the pixels.
"""

import io
import struct
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from simclr.data.readers.decode import allowed_formats, decoded, reason_of_damage, refusal, unfit_file

Shape = tuple[int, int, int]
"""Height, width and channels (1 or 3), as `decode_file` returns them without a limit to the side."""

_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""
_MAX_CHUNKS = 100_000  # of a PNG file that are looked at
_KEYWORD_BYTES = 80  # of a PNG text chunk: at most 79 and a null byte


def read_header(path: Path) -> Shape | str:
    """Shape of a file's decoded pixels, or a few words that say why there are none."""
    try:
        if problem := unfit_file(path):
            return problem
        with open(path, "rb") as file:
            return parse_header(file)
    except Exception as error:  # as in decode_file
        return reason_of_damage(error)


def parse_header(file: BinaryIO) -> Shape | str:
    """As `read_header`, of a file that is open, or of its bytes in memory."""
    try:
        with Image.open(file, formats=allowed_formats()) as image:
            if problem := refusal(image, file):
                return problem
            if image.mode in ("P", "PA") or (image.format == "PNG" and _states_turn_late(file)):
                pixels = decoded(image)
                return pixels if isinstance(pixels, str) else (pixels.shape[0], pixels.shape[1], pixels.shape[2])
            width, height = image.size
            if _is_sideways(image):
                width, height = height, width
            is_gray = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
            return height, width, 1 if is_gray else 3
    except Exception as error:  # Pillow's readers raise nearly every kind of error on damaged bytes
        return reason_of_damage(error)


def _is_sideways(image: Image.Image) -> bool:
    """Whether `to_pixels` will exchange height and width as Pillow states them before decoding."""
    if isinstance(image, TiffImageFile):  # newer versions of Pillow state the size of the turned image
        turned = image.tag_v2.get(ExifTags.Base.Orientation) in _SIDEWAYS
        return turned and image.size == (image.tag_v2.get(IMAGEWIDTH), image.tag_v2.get(IMAGELENGTH))
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation) in _SIDEWAYS  # PNG's own would decode
    except Exception:  # a damaged EXIF block says nothing, as in to_pixels
        return False


def _states_turn_late(file: BinaryIO) -> bool:
    """Whether a PNG file has EXIF or XMP after its pixels, which Pillow reads only when it decodes."""
    place = file.tell()
    try:
        file.seek(8)
        pixels_seen = False
        for _ in range(_MAX_CHUNKS):
            head = file.read(8)
            if len(head) < 8:
                return False
            length, kind = struct.unpack(">I4s", head)
            if pixels_seen and kind == b"eXIf":
                return True
            if pixels_seen and kind in (b"tEXt", b"zTXt", b"iTXt"):
                keyword = file.read(min(length, _KEYWORD_BYTES)).partition(b"\0")[0].lower()
                if b"exif" in keyword or b"xmp" in keyword:
                    return True
                length -= min(length, _KEYWORD_BYTES)
            pixels_seen |= kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
        return True
    finally:
        file.seek(place)
