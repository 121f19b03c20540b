"""The further operations as compiled loops over finished views in memory: `operations.py` bit for bit, in place.

Shapes: N views, C channels, S x S pixels, channels last.
"""

import math

import numpy as np

from simclr.views.kernels import compiled
from simclr.views.operations import cutout_ends, motion_reach, noise_of
from simclr.views.params import DIRECTIONS, OperationParams
from simclr.views.policy import Policy

_ZERO, _ONE, _HALF, _TWO, _QUARTER = (np.float32(x) for x in (0, 1, 0.5, 2, 0.25))
_BYTE, _BYTES = np.float32(1 / 255), np.float32(255)


def operate(views: np.ndarray, params: OperationParams, policy: Policy) -> None:
    """Apply the further operations to the views (N, S, S, C) float32 in place."""
    first, last = cutout_ends(params.centre, policy.cutout_side, policy.size)
    noisy = np.flatnonzero(params.noise)
    noise = np.empty((0, policy.channels, policy.size, policy.size), np.float32)
    if len(noisy):
        noise = noise_of(params, noisy, policy)
    which = np.full(len(views), -1)
    which[noisy] = np.arange(len(noisy))
    lines = np.array(DIRECTIONS)[params.direction]  # (N, 2)
    lines[~params.motion_blur] = 0
    _operate(
        views, params.equalise, params.solarise, params.sobel, lines, motion_reach(policy.size), params.turns,
        params.cutout, first, last, which, noise,
    )  # fmt: skip


@compiled
def _operate(views, equalised, solarised, edges, lines, reach, turns, cut, first, last, which, noise):
    size, channels = views.shape[1], views.shape[3]
    spare = np.empty((size, size, channels), np.float32)
    for k in range(len(views)):
        view = views[k]
        if equalised[k]:
            for c in range(channels):
                _equalise(view, c)
        if solarised[k]:
            for y in range(size):
                for x in range(size):
                    for c in range(channels):
                        if view[y, x, c] >= _HALF:
                            view[y, x, c] = _ONE - view[y, x, c]
        if edges[k]:
            _sobel(view, spare)
        if lines[k, 0] or lines[k, 1]:
            _motion_blur(view, spare, lines[k, 0], lines[k, 1], reach)
        if turns[k]:
            _rotate(view, spare, turns[k])
        if cut[k]:
            for y in range(first[k, 0], last[k, 0]):
                for x in range(first[k, 1], last[k, 1]):
                    for c in range(channels):
                        view[y, x, c] = _ZERO
        if which[k] >= 0:
            of_view = noise[which[k]]
            for c in range(channels):
                for y in range(size):
                    for x in range(size):
                        view[y, x, c] = min(max(view[y, x, c] + of_view[c, y, x], _ZERO), _ONE)


@compiled
def _equalise(view, c):
    size = len(view)
    counts = np.zeros(256, np.int64)
    for y in range(size):
        for x in range(size):
            counts[int(np.rint(view[y, x, c] * _BYTES))] += 1
    last = 255
    while counts[last] == 0:
        last -= 1
    step = (size * size - counts[last]) // 255
    table = np.empty(256, np.float32)
    below = step // 2
    for value in range(256):
        table[value] = np.float32(min(below // step, 255) if step else value) * _BYTE
        below += counts[value]
    for y in range(size):
        for x in range(size):
            view[y, x, c] = table[int(np.rint(view[y, x, c] * _BYTES))]


@compiled
def _sobel(view, spare):
    size, _, channels = view.shape
    _copy(view, spare)
    for y in range(size):
        above, below = max(y - 1, 0), min(y + 1, size - 1)
        for x in range(size):
            left, right = max(x - 1, 0), min(x + 1, size - 1)
            for c in range(channels):
                across = (
                    (spare[above, right, c] - spare[above, left, c])
                    + (spare[y, right, c] - spare[y, left, c]) * _TWO
                    + (spare[below, right, c] - spare[below, left, c])
                )
                along = (
                    (spare[below, left, c] - spare[above, left, c])
                    + (spare[below, x, c] - spare[above, x, c]) * _TWO
                    + (spare[below, right, c] - spare[above, right, c])
                )
                length = np.float32(math.sqrt(np.float64(across * across + along * along)))
                view[y, x, c] = min(length * _QUARTER, _ONE)


@compiled
def _motion_blur(view, spare, down, right, reach):
    size, _, channels = view.shape
    _copy(view, spare)
    share = np.float32(1 / (2 * reach + 1))
    for y in range(size):
        for x in range(size):
            for c in range(channels):
                total = _ZERO
                for k in range(-reach, reach + 1):
                    row = min(max(y + k * down, 0), size - 1)
                    column = min(max(x + k * right, 0), size - 1)
                    total += spare[row, column, c]
                view[y, x, c] = min(max(total * share, _ZERO), _ONE)


@compiled
def _rotate(view, spare, turns):
    """Quarter turns, anticlockwise."""
    size, _, channels = view.shape
    _copy(view, spare)
    for y in range(size):
        for x in range(size):
            if turns == 1:
                row, column = x, size - 1 - y
            elif turns == 2:
                row, column = size - 1 - y, size - 1 - x
            else:
                row, column = size - 1 - x, y
            for c in range(channels):
                view[y, x, c] = spare[row, column, c]


@compiled
def _copy(view, spare):
    size, _, channels = view.shape
    for y in range(size):
        for x in range(size):
            for c in range(channels):
                spare[y, x, c] = view[y, x, c]
