"""Batch norm, addition and ReLU in one pass each way, compiled for the CPU.

A small encoder on a CPU spends a third of its step on passes over memory between its convolutions. Here a batch
norm followed by a ReLU, and the end of a residual block, read and write each activation as seldom as they can:

    moments      reads x
    normalize    reads x (and the shortcut), writes relu(gamma xhat + beta + shortcut)
    sums         reads dy, the output and x
    input_grad   reads dy, the output and x, writes dx (and the shortcut's gradient)

Threads are Numba's, which on Linux are those of torch's own OpenMP: after a convolution they spin, ready for work,
where any other thread would have to take the core from them.

Sums are taken in fp32 over 32 rows and in fp64 over those; they depend on the number of threads in their last bits,
as torch's own do.

Shapes: channels-last activations of n values per channel lie in memory as (n, C), and are treated as (n / K, K C),
so that the inner loops are long; a vector per channel is repeated K times for them.
"""

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

LEAST_COLUMNS = 512
"""K C is at least this where n allows it: the inner loops then cost more than what surrounds them."""
_BLOCK = 32  # rows whose sums are fp32
_LEAST_SHARE = 1 << 18  # values worth a thread of their own
_ZERO = np.float32(0)
_one_at_a_time = Lock()  # of Numba's ways to run threads one, taken where there is no OpenMP, bears no two callers


def _start_threads() -> None:
    """Start Numba's threads now, and give torch back its own number of threads.

    Their start sets OpenMP's number, which is torch's too, to that of the cores: a process that torchrun or
    OMP_NUM_THREADS gave one thread would go on with all of them from its first batch norm on, to other bits.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(numba.get_num_threads())
    torch.set_num_threads(threads)


_start_threads()


@np.errstate(over="ignore", invalid="ignore")  # NaN and infinity are looked for once a step, and said in a sentence
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased variance (C,) of channels-last fp32 x (B, C, H, W), in fp32."""
    rows, folds = _rows(x), _folds(x)
    columns = folds * x.shape[1]
    # Sums are of differences to a first guess of the mean, lest a large mean drown the variance.
    guess = rows.reshape(-1, x.shape[1])[:_BLOCK].mean(0)  # (C,)
    pilot = _repeated(guess, folds)
    shares = _shares(len(rows) // columns, columns)
    partial_sums = np.zeros((len(shares), 2, columns))
    _in_threads(_moments_shared, shares, rows, columns, pilot, partial_sums)
    first, second = partial_sums.sum(0).reshape(2, folds, -1).sum(1) / (len(rows) // x.shape[1])  # (C,) each, fp64
    mean, variance = first + guess, np.maximum(second - first * first, 0)
    return torch.from_numpy(mean).float(), torch.from_numpy(variance).float()


def normalize(x: Tensor, scale: Tensor, shift: Tensor, other: Tensor | None, relu: bool) -> Tensor:
    """Scale x + shift (+ other), rectified if asked: (B, C, H, W), channels-last like x and `other`."""
    folds, out = _folds(x), torch.empty_like(x)
    rows, target = _rows(x), _rows(out)
    beside = target if other is None else _rows(other)
    columns = folds * x.shape[1]
    a, b = (_repeated(v.detach().numpy(), folds) for v in (scale, shift))
    shares = _shares(len(rows) // columns, columns)
    _in_threads(_normalize_shared, shares, rows, columns, a, b, beside, other is not None, relu, target)
    return out


@np.errstate(over="ignore", invalid="ignore")
def sums(dy: Tensor, out: Tensor | None, x: Tensor, mean: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of dy and of dy xhat, (C,) each in fp32; dy counts where `out` (if there is a ReLU) is positive."""
    folds = _folds(x)
    rows, gradient = _rows(x), _rows(dy)
    columns = folds * x.shape[1]
    centre = _repeated(mean.numpy(), folds)
    shares = _shares(len(rows) // columns, columns)
    partial_sums = np.zeros((len(shares), 2, columns))
    mask = gradient if out is None else _rows(out)
    _in_threads(_sums_shared, shares, gradient, mask, out is not None, rows, columns, centre, partial_sums)
    sum_dy, sum_dy_x = torch.from_numpy(partial_sums.sum(0).reshape(2, folds, -1).sum(1))  # (C,) each, fp64
    return sum_dy.float(), (sum_dy_x * inverse_std).float()


def input_grad(
    dy: Tensor, out: Tensor | None, x: Tensor, a: Tensor, b: Tensor, c: Tensor, *, with_other: bool
) -> tuple[Tensor, Tensor | None]:
    """A dy + b x + c where dy is masked as in `sums`, and the masked dy itself: the gradient of what was added."""
    folds, dx = _folds(x), torch.empty_like(x)
    rows, gradient = _rows(x), _rows(dy)
    masked = with_other and out is not None
    dother = torch.empty_like(x) if masked else None
    mask = gradient if out is None else _rows(out)
    columns = folds * x.shape[1]
    vectors = [_repeated(v.numpy(), folds) for v in (a, b, c)]
    target = _rows(dx)
    beside = target if dother is None else _rows(dother)
    shares = _shares(len(rows) // columns, columns)
    _in_threads(
        _input_grad_shared, shares, gradient, mask, out is not None, rows, columns, *vectors, target, beside, masked
    )
    return dx, dother if masked else (dy if with_other else None)


def _folds(x: Tensor) -> int:
    """K, a power of two that divides n."""
    channels, folds = x.shape[1], 1
    n = x.numel() // channels
    while folds * channels < LEAST_COLUMNS and n % (2 * folds) == 0:
        folds *= 2
    return folds


def _rows(x: Tensor) -> np.ndarray:
    """The memory of a channels-last tensor, as one row of numbers."""
    return x.detach().permute(0, 2, 3, 1).view(-1).numpy()


def _repeated(vector: np.ndarray, folds: int) -> np.ndarray:
    """(C,) -> (K C,). With dozens of layers a step, what surrounds the kernels counts: this takes a microsecond."""
    repeated = np.empty((folds, len(vector)), np.float32)
    repeated[:] = vector
    return repeated.ravel()


def _shares(num_rows: int, columns: int) -> np.ndarray:
    """(k, 2) first and last row of each part; k, which decides the bits, is torch's number of threads at most."""
    threads = max(1, min(torch.get_num_threads(), num_rows * columns // _LEAST_SHARE))
    edges = [num_rows * i // threads for i in range(threads + 1)]
    return np.array([edges[:-1], edges[1:]], np.int64).T.copy()


def _in_threads(kernel: Callable, shares: np.ndarray, *arguments: Any) -> None:
    """Call a kernel with a thread for each share, as far as there are cores."""
    with _one_at_a_time:
        before = numba.get_num_threads()
        numba.set_num_threads(min(len(shares), before))
        kernel(shares, *arguments)
        numba.set_num_threads(before)


def _compile(function: Callable, *, parallel: bool = False) -> Callable:
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}, "parallel": parallel}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # Numba found no folder that it may write to
        return numba.njit(**settings)(function)


_in_parallel = partial(_compile, parallel=True)


@_compile
def _moments(x, columns, first, last, pilot, out):
    s1, s2 = np.empty(columns, np.float32), np.empty(columns, np.float32)
    width = np.uint64(columns)
    for top in range(first, last, _BLOCK):
        for j in range(width):
            s1[j] = s2[j] = _ZERO
        for r in range(top, min(top + _BLOCK, last)):
            at = np.uint64(r) * width
            for j in range(width):
                d = x[at + j] - pilot[j]
                s1[j] += d
                s2[j] += d * d
        for j in range(width):
            out[0, j] += s1[j]
            out[1, j] += s2[j]


@_compile
def _normalize(x, columns, first, last, scale, shift, other, add, relu, out):
    width = np.uint64(columns)
    for r in range(first, last):
        at = np.uint64(r) * width
        if add:
            for j in range(width):
                out[at + j] = x[at + j] * scale[j] + shift[j] + other[at + j]
        else:
            for j in range(width):
                out[at + j] = x[at + j] * scale[j] + shift[j]
        if relu:
            for j in range(width):
                y = out[at + j]
                out[at + j] = _ZERO if y < _ZERO else y  # keeps what is not a number


@_compile
def _sums(dy, mask, masked, x, columns, first, last, mean, out):
    s1, s2 = np.empty(columns, np.float32), np.empty(columns, np.float32)
    width = np.uint64(columns)
    for top in range(first, last, _BLOCK):
        for j in range(width):
            s1[j] = s2[j] = _ZERO
        for r in range(top, min(top + _BLOCK, last)):
            at = np.uint64(r) * width
            if masked:
                for j in range(width):
                    d = dy[at + j] if mask[at + j] > _ZERO else _ZERO
                    s1[j] += d
                    s2[j] += d * (x[at + j] - mean[j])
            else:
                for j in range(width):
                    d = dy[at + j]
                    s1[j] += d
                    s2[j] += d * (x[at + j] - mean[j])
        for j in range(width):
            out[0, j] += s1[j]
            out[1, j] += s2[j]


@_compile
def _input_grad(dy, mask, masked, x, columns, first, last, a, b, c, out, other, with_other):
    width = np.uint64(columns)
    for r in range(first, last):
        at = np.uint64(r) * width
        if with_other:
            for j in range(width):
                d = dy[at + j] if mask[at + j] > _ZERO else _ZERO
                other[at + j] = d
                out[at + j] = d * a[j] + x[at + j] * b[j] + c[j]
        elif masked:
            for j in range(width):
                d = dy[at + j] if mask[at + j] > _ZERO else _ZERO
                out[at + j] = d * a[j] + x[at + j] * b[j] + c[j]
        else:
            for j in range(width):
                out[at + j] = dy[at + j] * a[j] + x[at + j] * b[j] + c[j]


@_in_parallel
def _moments_shared(shares, x, columns, pilot, out):
    for i in numba.prange(len(shares)):
        _moments(x, columns, shares[i, 0], shares[i, 1], pilot, out[i])


@_in_parallel
def _normalize_shared(shares, x, columns, scale, shift, other, add, relu, out):
    for i in numba.prange(len(shares)):
        _normalize(x, columns, shares[i, 0], shares[i, 1], scale, shift, other, add, relu, out)


@_in_parallel
def _sums_shared(shares, dy, mask, masked, x, columns, mean, out):
    for i in numba.prange(len(shares)):
        _sums(dy, mask, masked, x, columns, shares[i, 0], shares[i, 1], mean, out[i])


@_in_parallel
def _input_grad_shared(shares, dy, mask, masked, x, columns, a, b, c, out, other, with_other):
    for i in numba.prange(len(shares)):
        _input_grad(dy, mask, masked, x, columns, shares[i, 0], shares[i, 1], a, b, c, out, other, with_other)
