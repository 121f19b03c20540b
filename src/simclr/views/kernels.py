"""The compiled inner loops of `views/cpu.py`: one uint8 image and one `VIEW` record in, one finished view out.

A view is made in at most three passes over planes that stay in a core's cache: resize and the colour operations up
to contrast (which needs the mean of the whole view), the other operations, and blur.

Each number is reached by the operations of `reference.py` in the same order, without contraction to fused
multiply-adds, so that the pixels are the reference's bit for bit.

All that is compiled stands in this one file, because Numba's cache notices a change of the file of a function but
not of what the function calls. Indices are unsigned where that spares the test for negative ones, which would keep
the compiler from using vector instructions.

Shapes: C channels, S x S view, T taps (a multiple of 4) of the resize filter; planes (C * S * S,) float32 hold one
channel after the other.
"""

import math
from collections.abc import Callable

import llvmlite.ir
import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from simclr.views.params import BRIGHTNESS, CONTRAST, HUE, SATURATION

VIEW = np.dtype(
    [
        ("address", np.int64),  # of the image's first byte; its pixels are C bytes apart
        ("row_bytes", np.int64),  # from one row of the image to the next
        ("corner", np.int64, (2,)),  # y, x of the crop in the image
        ("length", np.int64, (2,)),  # height, width of the crop
        ("resized", np.int64, (2,)),  # what the crop is resized to
        ("begin", np.int64, (2,)),  # where in that the view begins
        ("order", np.int64, (4,)),
        ("brightness", np.float32),
        ("contrast", np.float32),
        ("saturation", np.float32),
        ("hue", np.float32),
        ("flip", np.bool_),
        ("jitter", np.bool_),
        ("gray", np.bool_),
        ("blur", np.bool_),
    ],
    align=True,
)
"""What makes a view: where its image lies in memory, and one row of ViewParams."""

_STRIP_PIXELS = 1024  # of a view that pass through the operations together: 12 KB, a quarter of a first-level cache
_LEFT = 2  # pixels of zeros before a row of the image, for taps outside the crop

_ZERO, _ONE, _HALF, _TINY = np.float32(0), np.float32(1), np.float32(0.5), np.float32(1e-12)
_TWO, _THREE, _FOUR, _SIX, _SIXTH = (np.float32(x) for x in (2, 3, 4, 6, 1 / 6))
_STEPS = np.float32(1024)  # TensorFlow rounds the offset of bicubic taps to a multiple of 1/1024
_BYTE = np.float32(1 / 255)
_RED, _GREEN, _BLUE = (np.float32(x) for x in (0.2989, 0.587, 0.114))
_U0, _U1, _U2, _U3, _U4 = (np.uint64(x) for x in range(5))


def compiled(function: Callable) -> Callable:
    """Numba's form of a function, kept on the disk where that is possible."""
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # Numba found no folder that it may write to
        return numba.njit(nogil=True, error_model="numpy")(function)


@intrinsic
def _bytes_at(_context, address):
    """An address as a pointer that numba.carray takes."""

    def pointer(_target, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], llvmlite.ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(address), pointer


@compiled
def render_views(views, blur_kernels, size, channels, google, add, out):
    """Make `out[k]`, pixels in [0, 1], from `views[k]`.

    Args:
        views: (N,) VIEW.
        blur_kernels: (N, radius + 1) float32, one half of each view's kernel, its centre first.
        google: whether the preset are google's; else they are torchvision's.
        add: whether brightness is added rather than multiplied.
        out: (N, S * S * C) float32: rows of pixels, channels last.
    """
    width, most_taps = 1, 4
    for k in range(len(views)):
        width = max(width, views[k].length[1])
        for axis in range(2):
            most_taps = max(most_taps, _num_taps(views[k].length[axis], views[k].resized[axis], google))
    base, weight = np.empty((2, size), np.int64), np.empty((2, most_taps * size), np.float32)
    num_taps = np.empty(2, np.int64)
    gather = np.empty(size, np.uint32)
    line = np.zeros((_LEFT + width + most_taps) * channels, np.float32)
    ring = np.zeros(most_taps * channels * width, np.float32)
    in_ring, slots = np.empty(most_taps, np.int64), np.empty(most_taps, np.uint64)
    pixels = size * size
    planes, spare = np.empty(channels * pixels, np.float32), np.empty(channels * pixels + size, np.float32)
    padded, rows = np.empty(size + 2 * blur_kernels.shape[1], np.float32), np.empty((channels, size), np.float32)
    means, steps = np.zeros(channels, np.float32), np.empty(4, np.int64)
    strip = max(1, _STRIP_PIXELS // size)  # rows

    for k in range(len(views)):
        view, flat = views[k], out[k]
        for axis in range(2):
            num_taps[axis] = _num_taps(view.length[axis], view.resized[axis], google)
            flip = view.flip and axis == 1
            _taps(
                view.length[axis], view.resized[axis], view.begin[axis], flip, google, num_taps[axis], base[axis],
                weight[axis],
            )  # fmt: skip
        for i in range(size):
            gather[i] = (base[1, i] + _LEFT) * channels
        for t in range(num_taps[0]):
            in_ring[t] = -1
        crop = view.address + view.corner[0] * view.row_bytes + view.corner[1] * channels
        height, width = view.length[0], view.length[1]
        clip_first, num_steps = _plan_jitter(view, channels, add, steps)
        contrast_at = 0
        while contrast_at < num_steps and steps[contrast_at] != CONTRAST:
            contrast_at += 1

        for top in range(0, size, strip):
            bottom = min(size, top + strip)
            for y in range(top, bottom):
                _resize_row(
                    crop, view.row_bytes, height, width, y, size, channels, num_taps, base[0], weight[0], gather,
                    weight[1], line, ring, in_ring, slots, planes,
                )  # fmt: skip
            first, last = top * size, bottom * size
            if clip_first:
                _clip_planes(planes, pixels, channels, first, last)
            for j in range(contrast_at):
                _adjust(steps[j], view, google, add, planes, pixels, channels, first, last)
            if contrast_at == num_steps:
                _finish(view, planes, pixels, channels, first, last, flat)

        if contrast_at < num_steps:
            _contrast_means(planes, pixels, channels, google, spare, means)
            for top in range(0, size, strip):
                first, last = top * size, min(size, top + strip) * size
                for c in range(channels):
                    plane = planes[c * pixels + first : c * pixels + last]
                    _contrast(plane, view.contrast, means[c], google)
                for j in range(contrast_at + 1, num_steps):
                    _adjust(steps[j], view, google, add, planes, pixels, channels, first, last)
                _finish(view, planes, pixels, channels, first, last, flat)

        if view.blur:
            _blur(planes, size, channels, view.gray, blur_kernels[k], google, padded, spare, rows, flat)


# --- resize -----------------------------------------------------------------------------------------------------------


@compiled
def _num_taps(length, resized, google):
    """Taps of the filter, padded to a multiple of 4 by taps of weight 0."""
    return 4 if google else (int(2 * max(length / resized, 1.0)) + 4) // 4 * 4


@compiled
def _taps(length, resized, begin, flip, google, num_taps, base, weight):
    """First tap (S,) and weights (T * S,) of the view's rows or columns: those of `resize.py`, bit for bit."""
    size = len(base)
    for i in range(size):
        at = size - 1 - i if flip else i
        if google:
            base[at] = _bicubic_taps(length, resized, begin + i, size, weight[at:])
        else:
            base[at] = _bilinear_taps(length, resized, begin + i, num_taps, size, weight[at:])


@compiled
def _bicubic_taps(length, resized, position, stride, weight):
    # float32 and this order of operations are TensorFlow's
    scale = np.float32(length) / np.float32(resized)
    centre = (np.float32(position) + _HALF) * scale - _HALF
    left = np.floor(centre)
    offset = np.rint((centre - left) * _STEPS) / _STEPS
    first = int(left) - 1
    w0, w1 = _keys(offset + _ONE, first, length), _keys(offset, first + 1, length)
    w2, w3 = _keys(_ONE - offset, first + 2, length), _keys(_TWO - offset, first + 3, length)
    total = w0 + w1 + w2 + w3
    weight[0], weight[stride], weight[2 * stride], weight[3 * stride] = w0 / total, w1 / total, w2 / total, w3 / total
    return first


@compiled
def _keys(distance, index, length):
    """Keys' kernel; 0 for a tap outside the crop."""
    if not 0 <= index < length:
        return 0.0
    d = np.float64(distance)
    if d < 1:
        return (1.5 * d - 2.5) * (d * d) + 1
    return ((-0.5 * d + 2.5) * d - 4) * d + 2


@compiled
def _bilinear_taps(length, resized, position, num_taps, stride, weight):
    scale = length / resized
    support = max(scale, 1.0)
    centre = (position + 0.5) * scale
    first = max(math.floor(centre - support + 0.5), 0)
    last = min(math.floor(centre + support + 0.5), length)
    total = 0.0
    for t in range(last - first):
        total += max(1 - abs(first + t + 0.5 - centre) / support, 0.0)
    for t in range(num_taps):
        inside = first + t < last
        weight[t * stride] = max(1 - abs(first + t + 0.5 - centre) / support, 0.0) / total if inside else 0.0
    return first


@compiled
def _resize_row(
    crop, row_bytes, height, width, y, size, channels, num_taps, row_base, row_weight, gather, column_weight, line,
    ring, in_ring, slots, planes,
):  # fmt: skip
    """Row y of the view, into its planes: rows of the crop are summed, and then columns of that sum.

    The crop's rows stay as floats in a ring of T, where the next row of the view finds most of its own.
    """
    for t in range(num_taps[0]):
        row = min(max(row_base[y] + t, 0), height - 1)
        slot = row % num_taps[0]
        slots[t] = slot * width * channels
        if in_ring[slot] != row and row_weight[t * size + y] != 0:
            in_ring[slot] = row
            pixels = _bytes_at(crop + row * row_bytes)  # pyrefly: ignore[missing-argument]  # Numba gives the context
            _to_floats(numba.carray(pixels, (width * channels,), np.uint8), ring, slots[t])
    for t in range(0, num_taps[0], 4):
        at = t * size + y
        _add_rows(
            ring, slots[t], slots[t + 1], slots[t + 2], slots[t + 3],
            row_weight[at], row_weight[at + size], row_weight[at + 2 * size], row_weight[at + 3 * size],
            line, np.uint64(_LEFT * channels), np.uint64(width * channels), t == 0,
        )  # fmt: skip
    _add_columns(
        line, gather, column_weight, np.uint64(num_taps[1]), np.uint64(channels), np.uint64(size), planes,
        np.uint64(y * size),
    )  # fmt: skip


@compiled
def _to_floats(source, ring, slot):
    for i in range(np.uint64(len(source))):
        ring[slot + i] = np.float32(source[i]) * _BYTE


@compiled
def _add_rows(ring, a0, a1, a2, a3, w0, w1, w2, w3, line, begin, length, is_first):
    for i in range(length):
        value = _ZERO if is_first else line[begin + i]
        value += w0 * ring[a0 + i]
        value += w1 * ring[a1 + i]
        value += w2 * ring[a2 + i]
        line[begin + i] = value + w3 * ring[a3 + i]


@compiled
def _add_columns(line, gather, weight, num_taps, channels, size, planes, begin):
    """From a row as wide as the crop, its channels interleaved, to C rows of the view's width."""
    for c in range(channels):
        to = c * size * size + begin
        for t in range(_U0, num_taps, _U4):
            a0, w0 = t * channels + c, t * size
            a1, a2, a3 = a0 + channels, a0 + _U2 * channels, a0 + _U3 * channels
            w1, w2, w3 = w0 + size, w0 + _U2 * size, w0 + _U3 * size
            for i in range(size):
                at = gather[i]
                value = planes[to + i] if t else _ZERO
                value += weight[w0 + i] * line[a0 + at]
                value += weight[w1 + i] * line[a1 + at]
                value += weight[w2 + i] * line[a2 + at]
                planes[to + i] = value + weight[w3 + i] * line[a3 + at]


# --- colour -----------------------------------------------------------------------------------------------------------


@compiled
def _plan_jitter(view, channels, add, steps):
    """Put the operations that change something into `steps`, in their order; say whether a clip precedes them."""
    if not view.jitter:
        return False, 0
    clip_first, n = False, 0
    for j in range(4):
        operation = view.order[j]
        if operation == BRIGHTNESS:
            neutral = view.brightness == (0 if add else 1)
        elif operation == CONTRAST:
            neutral = view.contrast == 1
        elif operation == SATURATION:
            neutral = view.saturation == 1 or channels == 1
        else:
            neutral = view.hue == 0 or channels == 1
        if not neutral:
            steps[n] = operation
            n += 1
        elif n == 0:
            clip_first = True  # an operation at its neutral value still clips
    return clip_first, n


@compiled
def _adjust(operation, view, google, add, planes, pixels, channels, first, last):
    """Brightness, saturation or hue of a strip of pixels."""
    if operation == BRIGHTNESS:
        for c in range(channels):
            _brightness(planes[c * pixels + first : c * pixels + last], view.brightness, add)
    else:
        red, green, blue = _colours(planes, pixels, first, last)
        if operation == HUE:
            _shift_hue(red, green, blue, view.hue)
        elif google:
            _scale_saturation(red, green, blue, view.saturation)
        else:
            _blend_saturation(red, green, blue, view.saturation)


@compiled
def _colours(planes, pixels, first, last):
    green, blue = pixels, 2 * pixels
    return planes[first:last], planes[green + first : green + last], planes[blue + first : blue + last]


@compiled
def _clip(x):
    return min(max(x, _ZERO), _ONE)


@compiled
def _clip_planes(planes, pixels, channels, first, last):
    for c in range(channels):
        plane = planes[c * pixels + first : c * pixels + last]
        for i in range(len(plane)):
            plane[i] = _clip(plane[i])


@compiled
def _brightness(plane, amount, add):
    if add:
        for i in range(len(plane)):
            plane[i] = _clip(plane[i] + amount)
    else:
        for i in range(len(plane)):
            plane[i] = _clip(plane[i] * amount)


@compiled
def _luma(red, green, blue):
    return red * _RED + green * _GREEN + blue * _BLUE


@compiled
def _contrast_means(planes, pixels, channels, google, spare, means):
    """Means (C,) about which contrast stretches: of each channel (google) or of the grayscale view."""
    if google or channels == 1:
        for c in range(channels):
            plane = planes[c * pixels : (c + 1) * pixels]
            for i in range(pixels):
                spare[i] = plane[i]
            means[c] = _sum(spare, pixels) * np.float32(1 / pixels)
    else:
        green, blue = planes[pixels:], planes[2 * pixels :]
        for i in range(pixels):
            spare[i] = _luma(planes[i], green[i], blue[i])
        mean = _sum(spare, pixels) * np.float32(1 / pixels)
        for c in range(channels):
            means[c] = mean


@compiled
def _sum(x, length):
    """Sum by halving, as in the reference; destroys x."""
    while length > 1:
        half = np.uint64(length // 2)
        for i in range(half):
            x[i] += x[half + i]
        if length % 2:
            x[0] += x[length - 1]
        length = length // 2
    return x[0]


@compiled
def _contrast(plane, factor, mean, google):
    if google:
        for i in range(len(plane)):
            plane[i] = _clip((plane[i] - mean) * factor + mean)
    else:
        rest = mean * (_ONE - factor)
        for i in range(len(plane)):
            plane[i] = _clip(plane[i] * factor + rest)


@compiled
def _scale_saturation(red, green, blue, factor):
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        high, low = max(max(r, g), b), min(min(r, g), b)
        scale = min(high / max(high - low, _TINY), factor)  # S of HSV is at most 1
        red[i] = _clip(high - (high - r) * scale)
        green[i] = _clip(high - (high - g) * scale)
        blue[i] = _clip(high - (high - b) * scale)


@compiled
def _blend_saturation(red, green, blue, factor):
    rest = _ONE - factor
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        gray = _luma(r, g, b) * rest
        red[i], green[i], blue[i] = _clip(r * factor + gray), _clip(g * factor + gray), _clip(b * factor + gray)


@compiled
def _shift_hue(red, green, blue, turns):
    shift = turns * _SIX
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        high, low = max(max(r, g), b), min(min(r, g), b)
        chroma = high - low
        inverse = _ONE / max(chroma, _TINY)
        near_red, near_green, near_blue = (g - b) * inverse, (b - r) * inverse + _TWO, (r - g) * inverse + _FOUR
        sector = near_red if high == r else (near_green if high == g else near_blue)  # sixths of a turn
        sector += shift
        sector -= np.floor(sector * _SIXTH) * _SIX  # into [0, 6)
        red[i] = _clip(_clip(abs(sector - _THREE) - _ONE) * chroma + low)
        green[i] = _clip(_clip(_TWO - abs(sector - _TWO)) * chroma + low)
        blue[i] = _clip(_clip(_TWO - abs(sector - _FOUR)) * chroma + low)


@compiled
def _finish(view, planes, pixels, channels, first, last, flat):
    """Grayscale; then clip for the blur to come, or write the finished pixels."""
    is_gray = view.gray and channels == 3
    if is_gray:
        red, green, blue = _colours(planes, pixels, first, last)
        for i in range(len(red)):
            red[i] = _luma(red[i], green[i], blue[i])
    if view.blur:
        _clip_planes(planes, pixels, 1 if is_gray else channels, first, last)
    elif channels == 1:
        _write_gray(planes[first:last], flat[first:])
    else:
        green, blue = (0, 0) if is_gray else (pixels, 2 * pixels)
        _write(
            planes[first:last], planes[green + first : green + last], planes[blue + first : blue + last],
            flat[first * channels :],
        )  # fmt: skip


@compiled
def _write_gray(plane, flat):
    for i in range(len(plane)):
        flat[i] = _clip(plane[i])


@compiled
def _write(red, green, blue, flat):
    for i in range(np.uint64(len(red))):
        flat[_U3 * i], flat[_U3 * i + _U1], flat[_U3 * i + _U2] = _clip(red[i]), _clip(green[i]), _clip(blue[i])


# --- blur -------------------------------------------------------------------------------------------------------------


@compiled
def _blur(planes, size, channels, gray, kernel, google, padded, spare, rows, flat):
    """Blur rows, then columns. Beyond the border are zeros (google) or the mirror image (torchvision)."""
    radius = len(kernel) - 1
    reach = radius
    while kernel[reach] == 0:
        reach -= 1
    blurred = 1 if gray else channels
    width = np.uint64(size)
    for row in range(blurred * size):
        source = planes[row * size : (row + 1) * size]
        for i in range(size):
            padded[radius + i] = source[i]
        for d in range(1, reach + 1):
            padded[radius - d] = 0 if google else source[d]
            padded[radius + size - 1 + d] = 0 if google else source[size - 1 - d]
        _add_pairs_in_row(padded, np.uint64(radius), kernel, reach, spare, np.uint64(row * size), width)
    zeros = blurred * size  # a row beyond the planes
    for i in range(size):
        spare[zeros * size + i] = 0
    for y in range(size):
        for c in range(blurred):
            row = rows[c]
            at = (c * size + y) * size
            for i in range(size):
                row[i] = spare[at + i] * kernel[0]
            for d in range(1, reach + 1):
                above, below = y - d, y + d
                if google:
                    above = c * size + above if above >= 0 else zeros
                    below = c * size + below if below < size else zeros
                else:
                    above, below = c * size + abs(above), c * size + min(below, 2 * (size - 1) - below)
                _add_pair(spare, np.uint64(above * size), np.uint64(below * size), kernel[d], row)
        if channels == 1:
            _write_gray(rows[0], flat[y * size :])
        else:
            second, third = (0, 0) if gray else (1, 2)
            _write(rows[0], rows[second], rows[third], flat[y * size * 3 :])


@compiled
def _add_pairs_in_row(padded, centre, kernel, reach, blurred, begin, size):
    weight = kernel[0]
    for i in range(size):
        blurred[begin + i] = padded[centre + i] * weight
    for d in range(_U1, np.uint64(reach + 1)):
        before, after, weight = centre - d, centre + d, kernel[d]
        for i in range(size):
            blurred[begin + i] += (padded[before + i] + padded[after + i]) * weight


@compiled
def _add_pair(x, first, second, weight, row):
    for i in range(np.uint64(len(row))):
        row[i] += (x[first + i] + x[second + i]) * weight
