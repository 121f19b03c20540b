"""L-BFGS for l2-regularised logistic regression, preconditioned: what `logistic.py` minimises, and how.

torch.optim.LBFGS and SciPy's do the same without the two things that make a path of 45 l2 values cheap:

- **The features' eigenbasis.** There the Hessian is close to diagonal, c_k s_j + l2 with s_j the variance along
  eigenvector j and c_k the mean of p (1 - p) of class k, and its inverse is where L-BFGS starts. The penalty does not
  see a rotation. Fewer rows than features span no more directions than there are rows, so a wide problem shrinks.
- **Curvature pairs that outlive a value of l2.** The change of gradient along a step s is that of the cross entropy,
  which does not know l2, plus l2 s. So pairs found at one value hold at the next.

Shapes: n rows, F features, K classes, K' of which can be fitted, R directions of the basis. A point is (K', R + 1),
with the intercepts in its last column.
"""

import math
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from simclr.errors import UserError

MEMORY = 30  # curvature pairs; with 10 the path takes half as many evaluations again
EIGEN_LIMIT = 4096  # directions; a decomposition of 4,096 takes 20 s on a core, and eight times that for twice as many
MAX_STEPS = 2000
MAX_HALVINGS = 30

Pairs = deque[tuple[Tensor, Tensor]]
"""Steps, and by how much the gradient of the cross entropy changed along each."""


class Problem:
    """Features, targets and the loss, in float64 on a device, where making it takes some 24 n F bytes.

    Args:
        features: (n, F), finite.
        targets: (n,) classes 0 .. K-1, for one softmax over the classes; or (n, K) of 1, 0 and -1 (ignored), for a
            binary regression a class.

    Raises:
        UserError: Fewer than two classes occur, or no class has images with and without it.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, num_classes: int, device: torch.device | str) -> None:
        self.num_classes = num_classes
        self.binary = targets.ndim == 2
        labels = torch.tensor(np.ascontiguousarray(targets), device=device)
        self.absent = torch.full((num_classes,), -torch.inf, device=device).double()  # intercepts of what is not fitted
        if self.binary:
            known = labels >= 0
            positive, counts = (labels == 1).sum(0), known.sum(0)  # (K,), (K,)
            self.fitted = (positive > 0) & (positive < counts)
            self.absent[(positive == counts) & (counts > 0)] = torch.inf
            if not self.fitted.any():
                raise UserError("No class has images with it and images without it to learn from; check the labels.")
            self.rows = (known.double() / counts.clamp(min=1))[:, self.fitted]  # (n, K') weight of each row
            self.targets = (labels == 1).double()[:, self.fitted]  # (n, K')
        else:
            self.fitted = torch.bincount(labels, minlength=num_classes) > 0
            if self.fitted.sum() < 2:
                raise UserError("There is a single class to learn from; a classifier needs images of two or more.")
            self.targets = (self.fitted.cumsum(0) - 1)[labels][:, None]  # (n, 1) among the classes that occur

        x = torch.tensor(np.ascontiguousarray(features), dtype=torch.float64, device=device)  # (n, F)
        self.mean = x.mean(0)
        x = x - self.mean
        self.basis = _eigenbasis(x)  # (F, R), or None for the features' own
        self.x = x if self.basis is None else x @ self.basis  # (n, R)
        self.spread = self.x.square().mean(0)  # (R,)

    def value(self, point: Tensor, l2: float) -> tuple[float, Tensor, Tensor]:
        """Objective, gradient (K', R + 1), and curvature c_k (K', 1) of the cross entropy along class k's score."""
        weights, n = point[:, :-1], len(self.x)
        z = torch.addmm(point[:, -1], self.x, weights.T)  # (n, K')
        if self.binary:
            p = z.sigmoid()
            loss = ((softplus(z) - self.targets * z) * self.rows).sum()
            residual = (p - self.targets) * self.rows
            curvature = (p * (1 - p) * self.rows).sum(0)
        else:
            normaliser = z.logsumexp(1, keepdim=True)
            loss = (normaliser - z.gather(1, self.targets)).sum() / n
            p = (z - normaliser).exp()
            curvature = (p * (1 - p)).mean(0)
            residual = p.scatter_add_(1, self.targets, -torch.ones_like(normaliser)) / n
        gradient = torch.cat([residual.T @ self.x + l2 * weights, residual.sum(0)[:, None]], 1)
        return float(loss + l2 / 2 * weights.square().sum()), gradient, curvature[:, None]

    def origin(self) -> Tensor:
        """The point where all is 0."""
        return self.x.new_zeros(int(self.fitted.sum()), self.x.shape[1] + 1)

    def point(self, coefficients: np.ndarray, intercepts: np.ndarray) -> Tensor:
        """The point at these weights, (K, F) and (K,), of all classes; an infinite intercept starts at 0."""
        weights = torch.as_tensor(coefficients).to(self.x)[self.fitted]  # (K', F)
        offset = torch.as_tensor(intercepts).to(self.x)[self.fitted] + weights @ self.mean
        if self.basis is not None:
            weights = weights @ self.basis
        return torch.cat([weights, offset.nan_to_num(0, 0, 0)[:, None]], 1)

    def weights(self, point: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients (K, F) and intercepts (K,) of all classes; those of a softmax's classes are centred."""
        weights = point[:, :-1] if self.basis is None else point[:, :-1] @ self.basis.T  # (K', F)
        offset = point[:, -1] - weights @ self.mean
        if not self.binary:  # adding the same to every class changes nothing: one of many equal solutions
            offset = offset - offset.mean()
        coefficients = weights.new_zeros(self.num_classes, weights.shape[1])
        coefficients[self.fitted] = weights
        intercepts = self.absent.clone()
        intercepts[self.fitted] = offset
        return coefficients.cpu().numpy(), intercepts.cpu().numpy()


def _eigenbasis(x: Tensor) -> Tensor | None:
    """Eigenvectors (F, R) of the features' covariance; None where finding them would take too long."""
    n, num_features = x.shape
    if min(n, num_features) > EIGEN_LIMIT:
        return None
    if num_features <= n:
        return torch.linalg.eigh(x.T @ x)[1]
    squares, left = torch.linalg.eigh(x @ x.T)  # (n,), (n, n)
    spanned = squares > squares[-1] * n * torch.finfo(x.dtype).eps  # the penalty keeps all others at 0
    return x.T @ (left[:, spanned] / squares[spanned].sqrt())


def minimise(
    problem: Problem,
    l2: float,
    start: Tensor,
    pairs: Pairs,
    tol: float,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, bool]:
    """The solution at one l2, and whether the gradient's norm came down to `tol`; adds to `pairs`.

    Args:
        progress: Called in each step with the share of the way from the first gradient's norm to `tol`, on a
            logarithmic axis, in [0, 1].
    """
    penalty = torch.full_like(start[:1], l2)  # (1, R + 1)
    penalty[:, -1] = 0  # intercepts are free
    point = start
    value, gradient, curvature = problem.value(point, l2)
    first = 1 / (curvature.clamp(min=1e-12) * torch.cat([problem.spread, problem.spread.new_ones(1)]) + penalty)
    begun = float(gradient.norm())
    for _ in range(MAX_STEPS):
        norm = float(gradient.norm())
        if norm <= tol:
            return point, True
        if progress is not None:
            progress(min(1.0, max(0.0, math.log(max(begun / norm, 1e-300)) / math.log(begun / tol))))
        direction = -_inverse_hessian(gradient, [(s, y + penalty * s) for s, y in pairs], first)
        slope, length = float((gradient * direction).sum()), 1.0
        for _ in range(MAX_HALVINGS):
            new_value, new_gradient, _ = problem.value(point + length * direction, l2)
            if new_value <= value + 1e-4 * length * slope + 1e-13 * abs(value):  # the last: rounding
                break
            length /= 2
        else:
            return point, False
        step = length * direction
        change = new_gradient - gradient
        if float((step * change).sum()) > 0:
            pairs.append((step, change - penalty * step))
        point, value, gradient = point + step, new_value, new_gradient
    return point, False


def _inverse_hessian(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]], first: Tensor) -> Tensor:
    """L-BFGS's estimate of inverse Hessian x gradient (Nocedal and Wright 2006, algorithm 7.4), from `first` on."""
    q, steps = gradient, []
    for s, y in reversed(pairs):
        rho = 1 / (s * y).sum()
        alpha = rho * (s * q).sum()
        q = q - alpha * y
        steps.append((rho, alpha))
    if pairs:
        s, y = pairs[-1]
        first = first * ((s * y).sum() / (y * first * y).sum())
    q = first * q
    for (s, y), (rho, alpha) in zip(pairs, reversed(steps), strict=True):
        q = q + s * (alpha - rho * (y * q).sum())
    return q
