"""LARS against its formula written per tensor in NumPy, and the roles of parameters."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simclr import UserError
from simclr.models.heads import LinearClassifier
from simclr.training.optim import Lars, Muon, build_optimizer, param_groups, set_lr


def lars_in_numpy(w, grads, lrs, *, wd, adapt, classic, nesterov, momentum=0.9, coefficient=0.001):
    """One parameter through all steps."""

    def trust(update):
        weight_norm, update_norm = np.linalg.norm(w.ravel()), np.linalg.norm(update.ravel())
        if not adapt or weight_norm == 0 or update_norm == 0:
            return 1.0
        return coefficient * weight_norm / update_norm

    v = np.zeros_like(w)
    for grad, lr in zip(grads, lrs, strict=True):
        g = grad + wd * w
        if classic:
            step = lr * trust(g) * g
            v = momentum * v + step
            w = w - (momentum * v + step if nesterov else v)
        else:
            v = momentum * v + g
            update = momentum * v + g if nesterov else v
            w = w - lr * trust(update) * update
    return w


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("classic", [True, False])
@pytest.mark.parametrize("wd", [0.0, 0.01])
def test_lars_equals_its_formula(wd, classic, nesterov):
    draw = np.random.default_rng(0)
    shapes = [(4, 3, 2, 2), (5, 4), (6,), (3, 3)]
    weights = [draw.normal(size=shape) for shape in shapes]
    weights[3][:] = 0  # a zero weight has trust 1
    lrs = [0.0, 0.3, 1.0, 0.1]
    grads = [[draw.normal(size=shape) for shape in shapes] for _ in lrs]
    grads[1][1][:] = 0  # so has a zero gradient

    params = [torch.tensor(w, requires_grad=True) for w in weights]
    optimizer = Lars(
        [{"params": params[:2] + params[3:], "weight_decay": wd}, {"params": params[2:3], "adapt": False}],
        0.0,
        classic_momentum=classic,
        nesterov=nesterov,
    )
    for lr, gradients in zip(lrs, grads, strict=True):
        set_lr(optimizer, lr)
        for param, grad in zip(params, gradients, strict=True):
            param.grad = torch.tensor(grad)
        optimizer.step()

    for i, (param, weight) in enumerate(zip(params, weights, strict=True)):
        history = [gradients[i] for gradients in grads]
        settings = {"wd": 0.0 if i == 2 else wd, "adapt": i != 2, "classic": classic, "nesterov": nesterov}
        expected = lars_in_numpy(weight, history, lrs, **settings)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-12, atol=1e-15)


def test_lars_leaves_gradients_and_idle_parameters_alone():
    used, idle = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    used.grad = torch.full((3, 2), 2.0)
    optimizer = Lars([used, idle], 0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(used.grad, torch.full((3, 2), 2.0))
    assert torch.equal(idle, torch.ones(3, 2)) and idle not in optimizer.state


def network() -> nn.Module:
    classifier = nn.Linear(4, 3)
    vars(classifier)["is_supervised_head"] = True
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        classifier,
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_a_saved_optimizer_goes_on_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    model = network()
    optimizer = build_optimizer(name, model, lr=0.1, weight_decay=1e-2)
    train(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, optimizer, range(3, 6))

    resumed = network()
    state = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    again = build_optimizer(name, resumed, lr=99.0, weight_decay=99.0)
    again.load_state_dict(state["optimizer"])
    train(resumed, again, range(3, 6))
    for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_roles_and_not_names_decide():
    model: Any = network()
    adapted, exempt = param_groups(model, 1e-4)
    assert [p.shape for p in adapted["params"]] == [model[0].weight.shape, model[4].weight.shape]
    assert (adapted["adapt"], adapted["weight_decay"]) == (True, 1e-4)
    assert (exempt["adapt"], exempt["weight_decay"]) == (False, 0.0)
    together = {id(p) for group in (adapted, exempt) for p in group["params"]}
    assert together == {id(p) for p in model.parameters()}
    assert len(adapted["params"]) + len(exempt["params"]) == len(together)
    assert any(p is model[6].weight for p in exempt["params"])


def test_frozen_and_shared_parameters():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    first.bias.requires_grad_(False)
    adapted, exempt = param_groups(model, 0.1)
    assert len(adapted["params"]) == 1 and len(exempt["params"]) == 1
    model.requires_grad_(False)
    with pytest.raises(UserError, match="unfreeze"):
        param_groups(model, 0.1)
    (only,) = param_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert only["adapt"]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_every_parameter_of_a_timm_model_has_one_role(name):
    import timm

    model = timm.create_model(name, num_classes=0)
    groups = param_groups(model, 0.1)
    sizes = [len(group["params"]) for group in groups]
    assert sum(sizes) == len(list(model.parameters()))
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim <= 1 for p in groups[1]["params"])


def test_build_optimizer():
    model = network()
    sgd = build_optimizer("sgd", model, lr=0.1, weight_decay=0.01)
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in sgd.param_groups)
    assert isinstance(build_optimizer("adamw", model, lr=0.1, weight_decay=0.01), torch.optim.AdamW)
    lars = build_optimizer("lars", model, lr=0.1, weight_decay=0.01, momentum=0.8)
    assert [group["adapt"] for group in lars.param_groups] == [True, False]
    set_lr(lars, 0.25)
    assert all(group["lr"] == 0.25 and group["momentum"] == 0.8 for group in lars.param_groups)
    with pytest.raises(UserError, match="adagrad"):
        build_optimizer("adagrad", model, lr=0.1, weight_decay=0.01)  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_each_optimizer_learns(name):
    torch.manual_seed(0)
    model = network()
    before = copy.deepcopy(model)
    train(model, build_optimizer(name, model, lr=0.02, weight_decay=1e-4), range(40))
    x = torch.randn(64, 3, 3, 3)
    assert model(x).square().mean() < 0.5 * before(x).square().mean()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("lars", {"encoder.weight", "classifier.weight"}),
        ("sgd", {"encoder.weight", "encoder.bias", "classifier.weight", "classifier.bias"}),
        ("adamw", {"encoder.weight", "encoder.bias", "classifier.weight", "classifier.bias"}),
    ],
)
def test_training_on_labels_decays_what_the_authors_decay(name, decayed):
    """Their l2 term leaves out batch norm alone; LARS has its own, and only the classifier's weight beside it."""
    model = nn.ModuleDict({"encoder": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "frozen": nn.Linear(2, 2)})
    model["classifier"] = LinearClassifier(4, 2)
    model["frozen"].requires_grad_(False)
    groups = build_optimizer(name, model, lr=1.0, weight_decay=0.1, supervised=True).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = {path: decay_of.get(id(p)) for path, p in model.named_parameters()}
    assert {path for path, decay in names.items() if decay == 0.1} == decayed
    assert {path for path, decay in names.items() if decay is None} == {"frozen.weight", "frozen.bias"}
    adapted = {id(p) for group in groups if group["adapt"] for p in group["params"]}
    assert {path for path, p in model.named_parameters() if id(p) in adapted} == {"encoder.weight"}


def quadratic(module: nn.Module) -> torch.Tensor:
    """A loss whose gradients differ from step to step and from weight to weight."""
    return sum(((p - torch.arange(p.numel()).view(p.shape) / p.numel()) ** 4).sum() for p in module.parameters())  # pyrefly: ignore[bad-return]


def test_muon_moves_what_is_no_matrix_as_adamw_does():
    ours = nn.BatchNorm1d(7, dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    optimizers = (
        Muon(ours.parameters(), 0.01, momentum=0.9, weight_decay=0.1),
        torch.optim.AdamW(theirs.parameters(), 0.01, betas=(0.9, 0.999), weight_decay=0.1),
    )
    for _ in range(5):
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            quadratic(module).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 3, 3, 3)])
def test_muon_turns_the_gradient_into_the_nearest_orthogonal_matrix(shape):
    """The update has the singular vectors of the gradient, and singular values near 1 times rate and scale."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    before = weight.detach().clone()
    weight.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    Muon([weight], 0.1, weight_decay=0.5).step()
    rows, columns = shape[0], before[0].numel()
    moved = (before * (1 - 0.1 * 0.5) - weight.detach()).view(rows, columns) / (0.1 * 0.2 * max(rows, columns) ** 0.5)
    left, _, right = torch.linalg.svd(weight.grad.view(rows, columns), full_matrices=False)
    values = left.T @ moved @ right.T
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.25
    torch.testing.assert_close(values, values.diagonal().diag(), rtol=0, atol=1e-9)
