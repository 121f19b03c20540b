"""The distillation loss against cross-entropy, a naive formula and its gradient on paper."""

import math

import pytest
import torch
import torch.nn.functional as F

from helpers import known
from simclr.losses import distillation


def logits(seed: int, *, rows: int = 6, classes: int = 5) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, dtype=torch.float64, generator=draw)


def naive(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> torch.Tensor:
    """The paper's double sum, term by term."""
    total = student.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        p_s, p_t = (s / tau).exp() / (s / tau).exp().sum(), (t / tau).exp() / (t / tau).exp().sum()
        for y in range(len(s)):
            total = total - p_t[y] * p_s[y].log()
    return total / len(student)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_equals_the_formula_and_its_gradient_on_paper(tau):
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss = distillation(student, teacher, tau)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = naive(student, teacher, tau)
    (of_formula,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, of_formula, rtol=1e-10, atol=1e-14)
    on_paper = ((student / tau).softmax(1) - (teacher / tau).softmax(1)) / tau / len(student)
    torch.testing.assert_close(gradient, on_paper.detach(), rtol=1e-10, atol=1e-14)


def test_a_one_hot_teacher_is_cross_entropy():
    student, targets = logits(0).requires_grad_(), torch.tensor([4, 0, 1, 1, 3, 2])
    certain = 1000 * F.one_hot(targets, 5).double()  # whose softmax is one-hot to the last bit
    ours, theirs = distillation(student, certain, 1.0), F.cross_entropy(student, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student), rtol=1e-12, atol=1e-15
    )


def test_is_the_teachers_entropy_where_they_agree_and_no_gradient_reaches_the_teacher():
    even = torch.zeros(3, 8, requires_grad=True)
    assert distillation(even + 5, even).item() == pytest.approx(math.log(8), rel=1e-6)
    student = torch.zeros(3, 8, requires_grad=True)
    distillation(student, even + 1).backward()
    assert even.grad is None and known(student.grad).abs().max() < 1e-7


def test_half_precision_and_extreme_logits_are_computed_in_fp32():
    """At tau 0.1 these logits reach 10,000; exp of them has no fp32 value."""
    student, teacher = (100 * logits(seed) for seed in (0, 1))
    half = distillation(student.bfloat16(), teacher.bfloat16(), 0.1)
    assert half.dtype == torch.float32
    expected = distillation(student.bfloat16().double(), teacher.bfloat16().double(), 0.1)
    assert half.item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert distillation(student.bfloat16(), teacher.bfloat16(), 0.1).item() == half.item()
