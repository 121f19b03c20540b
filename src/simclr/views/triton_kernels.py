"""The Triton kernels of `views/cuda.py`: uint8 images and one `VIEW` record a view in, finished views out.

    make_kernel   one program a view: resize, colours, grayscale; views without blur are then finished
    blur_kernel   one program a blurred view: rows in place, then columns

Each number is reached by the operations of `reference.py` in the same order, all but the sum of the mean that contrast
needs. So the launch must forbid fused multiply-adds (enable_fp_fusion=False), and divisions round to nearest. That is
more than a matter of last bits: TensorFlow rounds the offset of bicubic taps to 1/1024, where a last bit can
decide between two neighbours.

A view of more than one tile with contrast is resized twice: that costs less than keeping its floats. All that varies
between views and batches is read from the records, so that nothing but size, channels and preset is compiled anew.

Shapes: C channels, S x S pixels of a view, T taps of the resize filter.
"""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from simclr.views.params import BRIGHTNESS, HUE, SATURATION

VIEW = [
    ("offset", np.int64),  # of the crop's first byte in the pixels
    ("row_bytes", np.int32),  # from one row of the image to the next
    ("length", np.int32, (2,)),  # height, width of the crop
    ("resized", np.int32, (2,)),  # what the crop is resized to
    ("begin", np.int32, (2,)),  # where in that the view begins
    ("scale", np.float32, (2,)),  # length / resized
    ("flip", np.int32),
    ("early", np.int32),  # how many jitter steps come before contrast
    ("stretch", np.int32),  # whether contrast changes anything
    ("steps", np.int32, (4,)),  # the jitter operations in order; those that change nothing are NOTHING
    ("factors", np.float32, (4,)),  # of the steps
    ("gray", np.int32),
    ("plane", np.int32),  # which plane awaits its blur; -1 for a view without
    ("reach", np.int32),  # taps of the blur on each side of its centre
    ("blurred", np.int32),  # not of this view: record k tells the row of the k-th blurred view
]
"""What makes a view; the weights of its blur follow, centre first, float32."""

NOTHING = 4
"""A step that only clips."""

_WORD = 4  # bytes
_PLACES: dict[str, Any] = dict(np.dtype(VIEW).fields or {})  # (type, first byte) of each field


def _word(name: str) -> tl.constexpr:
    return tl.constexpr(_PLACES[name][1] // _WORD)


_OFFSET, _ROW_BYTES, _LENGTH, _RESIZED = (_word(name) for name in ("offset", "row_bytes", "length", "resized"))
_BEGIN, _SCALE, _FLIP, _EARLY = (_word(name) for name in ("begin", "scale", "flip", "early"))
_STRETCH, _STEPS, _FACTORS, _GRAY = (_word(name) for name in ("stretch", "steps", "factors", "gray"))
_PLANE, _REACH, _BLURRED = (_word(name) for name in ("plane", "reach", "blurred"))
_TAPS = tl.constexpr(np.dtype(VIEW).itemsize // _WORD)

_BRIGHTNESS, _SATURATION, _HUE = (tl.constexpr(operation) for operation in (BRIGHTNESS, SATURATION, HUE))
_Y, _X = tl.constexpr(0), tl.constexpr(1)
_BYTE = tl.constexpr(1 / 255)
_SIXTH = tl.constexpr(1 / 6)
_TINY = tl.constexpr(1e-12)
_OFFSETS = tl.constexpr(1024)  # of bicubic taps: offsets are multiples of 1/1024
_TO_INTEGER = tl.constexpr(2.0**23)  # adding it rounds a smaller positive float to an integer, halves to even


@triton.jit
def make_kernel(
    pixels,
    views,
    keys,
    planes,
    out,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GOOGLE: tl.constexpr,
    ADD: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make the view of one record: into its row of `out`, or, where a blur is to come, unblurred into its plane.

    Args:
        pixels: uint8, all images, channels last.
        views: (N, WORDS) int32 words of the records.
        keys: (3, 3, 1025, 4) float32 weights of bicubic taps: how many of them fall outside the crop before and
            after it, offset, tap.
        planes: (blurred views, S, S, C) float32.
        out: (N, S, S, C).
        BLOCK: pixels of a tile.
    """
    PIXELS: tl.constexpr = SIZE * SIZE
    view = tl.program_id(0).to(tl.int64)
    record = views + view * WORDS
    early = tl.load(record + _EARLY)
    stretch = tl.load(record + _STRETCH)

    sum_r = tl.zeros((BLOCK,), tl.float32)
    sum_g = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, stretch * PIXELS, BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        r, g, b = _resize(pixels, record, keys, tl.minimum(pixel, PIXELS - 1), SIZE, CHANNELS, GOOGLE)
        r, g, b = _adjust(record, 0, early, r, g, b, CHANNELS, GOOGLE, ADD)
        inside = pixel < PIXELS
        if GOOGLE:
            sum_r += tl.where(inside, r, 0.0)
            sum_g += tl.where(inside, g, 0.0)
            sum_b += tl.where(inside, b, 0.0)
        else:
            sum_r += tl.where(inside, _luma(r, g, b, CHANNELS), 0.0)
    mean_r = tl.sum(sum_r, axis=0) * (1 / PIXELS)
    if GOOGLE:
        mean_g = tl.sum(sum_g, axis=0) * (1 / PIXELS)
        mean_b = tl.sum(sum_b, axis=0) * (1 / PIXELS)
    else:
        mean_g = mean_r
        mean_b = mean_r

    plane = tl.load(record + _PLANE)
    for first in range(0, PIXELS, BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        r, g, b = _resize(pixels, record, keys, tl.minimum(pixel, PIXELS - 1), SIZE, CHANNELS, GOOGLE)
        r, g, b = _adjust(record, 0, early, r, g, b, CHANNELS, GOOGLE, ADD)
        if stretch != 0:
            factor = _float(record + _FACTORS + early)
            r = _contrast(r, mean_r, factor, GOOGLE)
            g = _contrast(g, mean_g, factor, GOOGLE)
            b = _contrast(b, mean_b, factor, GOOGLE)
            r, g, b = _adjust(record, early + 1, 4, r, g, b, CHANNELS, GOOGLE, ADD)
        if tl.load(record + _GRAY) != 0:
            r = _luma(r, g, b, CHANNELS)
            g = r
            b = r
        r, g, b = _clip(r), _clip(g), _clip(b)
        if plane < 0:
            _store(out + view * (PIXELS * CHANNELS), pixel, r, g, b, PIXELS, CHANNELS)
        else:
            _store(planes + plane.to(tl.int64) * (PIXELS * CHANNELS), pixel, r, g, b, PIXELS, CHANNELS)


@triton.jit
def blur_kernel(
    views,
    planes,
    out,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GOOGLE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blur one plane into its view's row of `out`; destroys the plane. Arguments are those of `make_kernel`.

    Rows are blurred in place, each tile (BLOCK floats, wider than the blur reaches) written only once the next one
    has read what it needs of it.
    """
    ROW: tl.constexpr = SIZE * CHANNELS
    LENGTH: tl.constexpr = SIZE * ROW
    LAST: tl.constexpr = (LENGTH - 1) // BLOCK * BLOCK
    plane = tl.program_id(0).to(tl.int64)
    view = tl.load(views + plane * WORDS + _BLURRED).to(tl.int64)
    record = views + view * WORDS
    source = planes + plane * LENGTH

    lane = tl.arange(0, BLOCK)
    waiting = _blur(source, record, lane, lane % ROW // CHANNELS, CHANNELS, SIZE, LENGTH, GOOGLE)
    for first in range(BLOCK, LENGTH, BLOCK):
        at = first + lane
        blurred = _blur(source, record, at, at % ROW // CHANNELS, CHANNELS, SIZE, LENGTH, GOOGLE)
        tl.debug_barrier()  # all threads have read before one writes
        tl.store(source + (at - BLOCK), waiting)
        waiting = blurred
    tl.debug_barrier()
    tl.store(source + (LAST + lane), waiting, mask=LAST + lane < LENGTH)
    tl.debug_barrier()  # all rows are written before one thread reads columns
    for first in range(0, LENGTH, BLOCK):
        at = first + lane
        blurred = _clip(_blur(source, record, at, at // ROW, ROW, SIZE, LENGTH, GOOGLE))
        tl.store(out + view * LENGTH + at, blurred.to(out.dtype.element_ty), mask=at < LENGTH)


# --- resize -----------------------------------------------------------------------------------------------------------


@triton.jit
def _resize(pixels, record, keys, pixel, SIZE: tl.constexpr, CHANNELS: tl.constexpr, GOOGLE: tl.constexpr):
    """Red, green and blue of the view's pixels (BLOCK,): the crop's rows are summed, then columns of that."""
    low = tl.load(record + _OFFSET).to(tl.int64) & 0xFFFFFFFF
    crop = pixels + (tl.load(record + _OFFSET + 1).to(tl.int64) << 32 | low)
    y, x = pixel // SIZE, pixel % SIZE
    if tl.load(record + _FLIP) != 0:
        x = SIZE - 1 - x
    if GOOGLE:
        r, g, b = _bicubic(crop, record, keys, y, x, CHANNELS)
    else:
        r, g, b = _bilinear(crop, record, y, x, CHANNELS)
    return r, g, b


@triton.jit
def _bicubic(crop, record, keys, y, x, CHANNELS: tl.constexpr):
    row_bytes = tl.load(record + _ROW_BYTES)
    height, width = tl.load(record + _LENGTH + _Y), tl.load(record + _LENGTH + _X)
    top, weights = _bicubic_taps(record, keys, _Y, y)
    left, column_weights = _bicubic_taps(record, keys, _X, x)
    # taps outside the crop weigh nothing, and are read from its border
    row0 = _within(top, height) * row_bytes
    row1 = _within(top + 1, height) * row_bytes
    row2 = _within(top + 2, height) * row_bytes
    row3 = _within(top + 3, height) * row_bytes
    w0, w1, w2, w3 = tl.load(weights), tl.load(weights + 1), tl.load(weights + 2), tl.load(weights + 3)
    r = tl.zeros_like(w0)
    g = tl.zeros_like(w0)
    b = tl.zeros_like(w0)
    for t in range(4):
        weight = tl.load(column_weights + t)
        at = _within(left + t, width) * CHANNELS
        r += weight * _column(crop, row0 + at, row1 + at, row2 + at, row3 + at, w0, w1, w2, w3)
        if CHANNELS == 3:
            at += 1
            g += weight * _column(crop, row0 + at, row1 + at, row2 + at, row3 + at, w0, w1, w2, w3)
            at += 1
            b += weight * _column(crop, row0 + at, row1 + at, row2 + at, row3 + at, w0, w1, w2, w3)
    if CHANNELS == 1:
        g = r
        b = r
    return r, g, b


@triton.jit
def _bicubic_taps(record, keys, AXIS: tl.constexpr, position):
    """First of four taps and where their weights lie, for positions (BLOCK,) of the view's rows or columns."""
    length = tl.load(record + _LENGTH + AXIS)
    # float32 and this order of operations are TensorFlow's
    position = (position + tl.load(record + _BEGIN + AXIS)).to(tl.float32)
    centre = (position + 0.5) * _float(record + _SCALE + AXIS) - 0.5
    left = tl.floor(centre)
    offset = (centre - left) * _OFFSETS + _TO_INTEGER - _TO_INTEGER
    second = left.to(tl.int32)
    before, after = tl.maximum(1 - second, 0), tl.maximum(second + 3 - length, 0)
    case = (before * 3 + after) * (_OFFSETS + 1) + offset.to(tl.int32)
    return second - 1, keys + case * 4


@triton.jit
def _within(index, length):
    return tl.minimum(tl.maximum(index, 0), length - 1)


@triton.jit
def _column(crop, a0, a1, a2, a3, w0, w1, w2, w3):
    x0 = tl.load(crop + a0).to(tl.float32) * _BYTE
    x1 = tl.load(crop + a1).to(tl.float32) * _BYTE
    x2 = tl.load(crop + a2).to(tl.float32) * _BYTE
    x3 = tl.load(crop + a3).to(tl.float32) * _BYTE
    return w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3


@triton.jit
def _bilinear(crop, record, y, x, CHANNELS: tl.constexpr):
    row_bytes = tl.load(record + _ROW_BYTES)
    height, width = tl.load(record + _LENGTH + _Y), tl.load(record + _LENGTH + _X)
    top, top_distance, row_total, row_half, row_step, num_rows = _triangle_taps(record, _Y, y)
    left, left_distance, column_total, column_half, column_step, num_columns = _triangle_taps(record, _X, x)
    r = tl.zeros_like(row_total)
    g = tl.zeros_like(row_total)
    b = tl.zeros_like(row_total)
    for i in range(num_columns):
        share = _triangle(left + i, left_distance + i * column_step, column_half, width)
        weight = tl.div_rn(share.to(tl.float32), column_total)
        column = crop + tl.minimum(left + i, width - 1) * CHANNELS
        r_column = tl.zeros_like(r)
        g_column = tl.zeros_like(r)
        b_column = tl.zeros_like(r)
        for j in range(num_rows):
            row_share = _triangle(top + j, top_distance + j * row_step, row_half, height)
            row_weight = tl.div_rn(row_share.to(tl.float32), row_total)
            at = column + tl.minimum(top + j, height - 1) * row_bytes
            r_column += row_weight * (tl.load(at).to(tl.float32) * _BYTE)
            if CHANNELS == 3:
                g_column += row_weight * (tl.load(at + 1).to(tl.float32) * _BYTE)
                b_column += row_weight * (tl.load(at + 2).to(tl.float32) * _BYTE)
        r += weight * r_column
        g += weight * g_column
        b += weight * b_column
    if CHANNELS == 1:
        g = r
        b = r
    return r, g, b


@triton.jit
def _triangle_taps(record, AXIS: tl.constexpr, position):
    """Taps of Pillow's filter in whole numbers, in units of 1 / (2 * resized) of the crop's pixels.

    Returns:
        First tap (BLOCK,), how far its centre lies beyond the position's, the sum of the weights (float32), half
        the width of the triangle, the distance between taps, and the number of taps.
    """
    length, resized = tl.load(record + _LENGTH + AXIS), tl.load(record + _RESIZED + AXIS)
    half = 2 * tl.maximum(length, resized)
    step = 2 * resized
    centre = (2 * (position + tl.load(record + _BEGIN + AXIS)) + 1).to(tl.int64) * length  # very long images need 64
    first = (tl.maximum(centre - half + resized, 0) // step).to(tl.int32)
    distance = ((2 * first + 1).to(tl.int64) * resized - centre).to(tl.int32)
    num_taps = (half + resized - 1) // resized
    total = tl.zeros_like(first)
    for t in range(num_taps):
        total += _triangle(first + t, distance + t * step, half, length)
    return first, distance, total.to(tl.float32), half, step, num_taps


@triton.jit
def _triangle(index, distance, half, length):
    return tl.where(index < length, tl.maximum(half - tl.abs(distance), 0), 0)


# --- colour -----------------------------------------------------------------------------------------------------------


@triton.jit
def _adjust(record, begin, end, r, g, b, CHANNELS: tl.constexpr, GOOGLE: tl.constexpr, ADD: tl.constexpr):
    """Brightness, saturation and hue, for the steps of the jitter from `begin` to `end`, clipped after each."""
    for step in range(begin, end):
        operation = tl.load(record + _STEPS + step)
        factor = _float(record + _FACTORS + step)
        if operation == _BRIGHTNESS:
            if ADD:
                r, g, b = r + factor, g + factor, b + factor
            else:
                r, g, b = r * factor, g * factor, b * factor
        if CHANNELS == 3:
            if operation == _SATURATION:
                if GOOGLE:
                    r, g, b = _scale_saturation(r, g, b, factor)
                else:
                    r, g, b = _blend_saturation(r, g, b, factor)
            if operation == _HUE:
                r, g, b = _shift_hue(r, g, b, factor)
        r, g, b = _clip(r), _clip(g), _clip(b)
    return r, g, b


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _luma(r, g, b, CHANNELS: tl.constexpr):
    if CHANNELS == 3:
        luma = r * 0.2989 + g * 0.587 + b * 0.114
    else:
        luma = r
    return luma


@triton.jit
def _contrast(x, mean, factor, GOOGLE: tl.constexpr):
    if GOOGLE:
        stretched = (x - mean) * factor + mean
    else:
        stretched = x * factor + mean * (1.0 - factor)
    return _clip(stretched)


@triton.jit
def _scale_saturation(r, g, b, factor):
    high = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    scale = tl.minimum(tl.div_rn(high, tl.maximum(high - low, _TINY)), factor)  # S of HSV is at most 1
    return high - (high - r) * scale, high - (high - g) * scale, high - (high - b) * scale


@triton.jit
def _blend_saturation(r, g, b, factor):
    gray = (r * 0.2989 + g * 0.587 + b * 0.114) * (1.0 - factor)
    return r * factor + gray, g * factor + gray, b * factor + gray


@triton.jit
def _shift_hue(r, g, b, turns):
    high = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    chroma = high - low
    inverse = tl.div_rn(tl.full(r.shape, 1.0, tl.float32), tl.maximum(chroma, _TINY))
    near_red, near_green, near_blue = (g - b) * inverse, (b - r) * inverse + 2.0, (r - g) * inverse + 4.0
    sector = tl.where(high == r, near_red, tl.where(high == g, near_green, near_blue))  # sixths of a turn
    sector += turns * 6.0
    sector -= tl.floor(sector * _SIXTH) * 6.0  # into [0, 6)
    r = _clip(tl.abs(sector - 3.0) - 1.0) * chroma + low
    g = _clip(2.0 - tl.abs(sector - 2.0)) * chroma + low
    b = _clip(2.0 - tl.abs(sector - 4.0)) * chroma + low
    return r, g, b


@triton.jit
def _store(row, pixel, r, g, b, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    inside = pixel < PIXELS
    at = row + pixel * CHANNELS
    tl.store(at, r.to(row.dtype.element_ty), mask=inside)
    if CHANNELS == 3:
        tl.store(at + 1, g.to(row.dtype.element_ty), mask=inside)
        tl.store(at + 2, b.to(row.dtype.element_ty), mask=inside)


# --- blur -------------------------------------------------------------------------------------------------------------


@triton.jit
def _blur(
    source, record, at, place, STEP: tl.constexpr, SIZE: tl.constexpr, LENGTH: tl.constexpr, GOOGLE: tl.constexpr
):
    """Weighted sums of the floats around `at`, `place` pixels from the border, along rows or columns."""
    inside = at < LENGTH
    taps = record + _TAPS
    total = tl.load(source + at, mask=inside, other=0.0) * _float(taps)
    for d in range(1, tl.load(record + _REACH) + 1):
        if GOOGLE:  # zeros beyond the border
            before = tl.load(source + (at - d * STEP), mask=inside & (place >= d), other=0.0)
            after = tl.load(source + (at + d * STEP), mask=inside & (place + d < SIZE), other=0.0)
        else:  # the mirror image
            to_before = tl.abs(place - d) - place
            to_after = tl.minimum(place + d, 2 * (SIZE - 1) - place - d) - place
            before = tl.load(source + (at + to_before * STEP), mask=inside, other=0.0)
            after = tl.load(source + (at + to_after * STEP), mask=inside, other=0.0)
        total += (before + after) * _float(taps + d)
    return total


@triton.jit
def _float(word):
    """The float32 whose bits a record's word holds."""
    return tl.load(word).to(tl.float32, bitcast=True)
