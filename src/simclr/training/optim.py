"""How the weights move: LARS as the authors use it, SGD, AdamW and Muon.

`Lars` implements lars_optimizer.py of google-research/simclr (You et al. 2017, arXiv:1708.03888, as SimCLR
section 2.2 uses it). It differs from most ports in three ways: the learning rate and the trust ratio are
folded into the momentum buffer ("classic" momentum), the trust ratio is taken after weight decay and without
epsilon, and parameters exempt from adaptation move by the full learning rate.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from simclr.errors import UserError

__all__ = ["Lars", "Muon", "OptimizerName", "build_optimizer", "param_groups", "set_lr"]

OptimizerName = Literal["lars", "sgd", "adamw", "muon"]
Tensors = list[Tensor] | tuple[Tensor, ...]


def build_optimizer(
    name: OptimizerName,
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    supervised: bool = False,
    decay_all: bool = False,
) -> torch.optim.Optimizer:
    """Optimiser over the trainable parameters of `module`, which must already be on its device.

    Args:
        name: "lars", "sgd" (the authors' `momentum`), "adamw" or "muon".
        module: All that is trained: encoder, projection head, and supervised head if there is one.
        lr: Learning rate of the first step; `set_lr` changes it.
        weight_decay: Of the parameters that `param_groups` does not exempt. Decoupled for "adamw" and "muon".
        momentum: Of LARS, SGD and Muon; the first beta of AdamW, whose second is 0.999.
        nesterov: Whether the momentum of SGD is Nesterov's.
        supervised: Decay what the authors decay where labels are learned (`supervised_groups`).
        decay_all: Decay every trainable parameter.

    Raises:
        UserError: Unknown name, or a module with nothing to train.
    """
    groups = supervised_groups(name, module, weight_decay) if supervised else param_groups(module, weight_decay)
    if decay_all:
        groups = [group | {"weight_decay": weight_decay} for group in groups]
    # The fused kernels of SGD and AdamW make one pass over memory; elsewhere torch chooses foreach or a loop.
    fused = True if {p.device.type for g in groups for p in g["params"]} <= {"cpu", "cuda"} else None
    if name == "lars":
        return Lars(groups, lr, momentum=momentum)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=momentum, nesterov=nesterov and momentum > 0, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(momentum, 0.999), fused=fused)
    if name == "muon":
        return Muon(groups, lr, momentum=momentum)
    raise UserError(f"optimizer {name!r} is unknown: choose lars, sgd, adamw or muon")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group; on a GPU rounded to fp32, which a CUDA graph reads it in."""
    if optimizer.param_groups[0]["params"][0].is_cuda:
        lr = float(np.float32(lr))
    for group in optimizer.param_groups:
        group["lr"] = lr


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters of `module` in one group that decays and adapts and one that does neither.

    Exempt are the parameters of normalisation layers, biases (any parameter of at most one dimension) and
    everything inside a module whose attribute `is_supervised_head` is true. Role decides, not name; a
    parameter that two modules share is exempt if it is so in either.

    Raises:
        UserError: Nothing to train.
    """
    exempt = {id(p) for p in _exempt_parameters(module)}
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("the model has no parameter to train: unfreeze at least one")
    groups = [
        {
            "params": [p for p in trainable if id(p) not in exempt],
            "weight_decay": weight_decay,
            "adapt": True,
        },
        {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def supervised_groups(name: OptimizerName, module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """As `param_groups`, with the weight decay of the authors' supervised training and fine-tuning.

    Their loss carries an l2 term (model_util.py, add_weight_decay): under LARS over the classifier's weight alone,
    which LARS itself exempts; under the other optimisers over every trainable parameter but those of batch norm,
    biases and the classifier included. AdamW decays the latter too, decoupled.

    Raises:
        UserError: Nothing to train.
    """
    groups = param_groups(module, weight_decay)
    chosen = _classifier_weights(module) if name == "lars" else _all_but_normalisation(module)
    decaying = {id(p) for p in chosen}
    exempt = [p for group in groups if not group["adapt"] for p in group["params"]]
    split = [
        *(group for group in groups if group["adapt"]),
        {
            "params": [p for p in exempt if id(p) in decaying],
            "weight_decay": weight_decay,
            "adapt": False,
        },
        {"params": [p for p in exempt if id(p) not in decaying], "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in split if group["params"]]


_NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _exempt_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    if getattr(module, "is_supervised_head", False) or isinstance(module, _NORMALISATION):
        yield from module.parameters()
        return
    yield from (p for p in module.parameters(recurse=False) if p.ndim <= 1)
    for child in module.children():
        yield from _exempt_parameters(child)


def _classifier_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    for layer in module.modules():
        if getattr(layer, "is_supervised_head", False):
            yield from (p for p in layer.parameters() if p.ndim > 1)


def _all_but_normalisation(module: nn.Module) -> Iterator[nn.Parameter]:
    if not isinstance(module, _NORMALISATION):
        yield from module.parameters(recurse=False)
        for child in module.children():
            yield from _all_but_normalisation(child)


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with the authors' momentum.

    With g the gradient plus `weight_decay` x w, and trust = `trust_coefficient` x |w| / |g| (1 where either
    norm is 0 and in groups with `adapt` false), the norms being those of a whole parameter:

        classic:  v <- momentum v + lr trust g;  w <- w - v            (Nesterov: w - momentum v - lr trust g)
        popular:  v <- momentum v + g;           w <- w - lr trust u   (u = v; Nesterov: u = momentum v + g;
                                                                        the trust ratio is then that of u)

    Args:
        params: Parameters or groups; a group's flag `adapt` (default true) turns layer adaptation on.
        lr: Learning rate; a group may have its own.
        momentum: Decay of the buffer v.
        weight_decay: Added to the gradient before anything else; a group may have its own.
        trust_coefficient: The authors' `eeta`.
        classic_momentum: Whether learning rate and trust ratio go into the buffer.
        nesterov: Whether to look one step ahead.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        classic_momentum: bool = True,
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "classic_momentum": classic_momentum,
            "nesterov": nesterov,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient. Nothing is read back from the device."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        momentum, classic = group["momentum"], group["classic_momentum"]
        buffers = [self._buffer(p) for p in params]
        gradients = [p.grad for p in params if p.grad is not None]
        grads = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
        if classic:
            grads = _scaled(grads, params, group)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        update = torch._foreach_add(grads, buffers, alpha=momentum) if group["nesterov"] else buffers
        if not classic:
            update = _scaled(update, params, group)
        torch._foreach_sub_(params, update)

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is made orthogonal; AdamW for everything else.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon, with the scale of Liu et al. 2025 (arXiv:2502.16982, section
    2.2), which gives updates the root mean square of AdamW's, so that one rate serves both. With g the gradient of a
    weight of `out` rows (a convolution's kernel is out x (in k k)) in a group whose `adapt` is true:

        v <- momentum v + (1 - momentum) g;     u = momentum v + (1 - momentum) g      (Nesterov's look ahead)
        w <- (1 - lr weight_decay) w - lr 0.2 sqrt(max(out, in k k)) orthogonal(u)

    Parameters of one dimension, and groups that do not adapt, move by AdamW with the betas (momentum, 0.999).

    Args:
        params: Parameters or groups.
        lr: Learning rate; a group may have its own.
        momentum: As above.
        weight_decay: Decoupled; a group may have its own.
    """

    SECOND_BETA = 0.999
    EPSILON = 1e-8

    def __init__(self, params: Iterable[Any], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": True}
        super().__init__(params, defaults | {"capturable": True})  # steps are counted on the device, as torch calls it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient. Nothing is read back from the device."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                move = self._orthogonal if group["adapt"] and param.ndim > 1 else self._adam
                update = move(param, param.grad, group["momentum"])
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * group["lr"])

    def _orthogonal(self, param: Tensor, grad: Tensor, momentum: float) -> Tensor:
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        velocity = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        matrix = grad.lerp(velocity, momentum).flatten(1)  # (out, in k k)
        return orthogonalised(matrix).reshape(param.shape) * (0.2 * max(matrix.shape) ** 0.5)

    def _adam(self, param: Tensor, grad: Tensor, momentum: float) -> Tensor:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        count = state["step"].double()  # 0.999 to the power of few steps is near 1
        mean = state["exp_avg"].lerp_(grad, 1 - momentum)
        square = state["exp_avg_sq"].lerp_(grad * grad, 1 - self.SECOND_BETA)
        mean = mean / (1 - momentum**count)
        return mean / ((square / (1 - self.SECOND_BETA**count)).sqrt() + self.EPSILON)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest matrix (m, n) whose shorter side is orthonormal: singular values become 0.7 to 1.2.

    Five steps of the quintic Newton-Schulz iteration of Jordan et al., in the matrix's own precision.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def _scaled(updates: Tensors, params: list[Tensor], group: dict[str, Any]) -> Tensors:
    """Each update times the learning rate and, where the group adapts, its trust ratio."""
    if not group["adapt"]:
        return torch._foreach_mul(updates, group["lr"])
    weight_norms = torch.stack(torch._foreach_norm(params))  # (P,) for P parameters
    update_norms = torch.stack(torch._foreach_norm(updates))  # (P,)
    ratios = group["trust_coefficient"] * weight_norms / update_norms
    trust = torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)
    return torch._foreach_mul(updates, (group["lr"] * trust).unbind())
