"""Label-free measures against their formulas, term by term."""

import math

import numpy as np
import pytest
import torch

from simclr.losses import alignment, contrastive_accuracy_and_entropy, effective_rank, metrics, uniformity


@pytest.fixture
def views() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    za = torch.randn(37, 6, dtype=torch.float64, generator=draw)
    return za, za + 0.7 * torch.randn(37, 6, dtype=torch.float64, generator=draw)


def unit(z: torch.Tensor) -> np.ndarray:
    return z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)


@pytest.mark.parametrize("chunk", [1, 10, 1024])
def test_accuracy_and_entropy(views, monkeypatch, chunk):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    a, b = map(unit, views)
    hits, entropies = [], []
    for i in range(len(a)):
        p = np.array([math.exp(float(a[i] @ b[j]) / 0.2) for j in range(len(b))])
        p /= p.sum()
        hits.append(p.argmax() == i)
        entropies.append(-sum(q * math.log(q + 1e-8) for q in p))
    accuracy, entropy = contrastive_accuracy_and_entropy(views[0], views[1], 0.2)
    assert 0 < np.mean(hits) < 1
    assert accuracy.item() == pytest.approx(np.mean(hits), abs=1e-12)
    assert entropy.item() == pytest.approx(np.mean(entropies), rel=1e-12)


def test_accuracy_and_entropy_at_their_limits():
    certain = 10 * torch.eye(5)
    accuracy, entropy = contrastive_accuracy_and_entropy(certain, certain, 0.01)
    assert accuracy.item() == 1 and entropy.item() == pytest.approx(0, abs=1e-6)
    alike = torch.ones(5, 3)
    accuracy, entropy = contrastive_accuracy_and_entropy(alike, alike)
    assert accuracy.item() == pytest.approx(1 / 5) and entropy.item() == pytest.approx(math.log(5), rel=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment(views, alpha):
    a, b = map(unit, views)
    expected = np.mean([np.linalg.norm(u - v) ** alpha for u, v in zip(a, b, strict=True)])
    assert alignment(views[0], views[1], alpha).item() == pytest.approx(expected)
    assert alignment(views[0], 3 * views[0]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 10, 1024])
def test_uniformity(views, monkeypatch, chunk):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    distances = torch.pdist(torch.from_numpy(unit(views[0])))
    expected = (-2 * distances**2).exp().mean().log()
    torch.testing.assert_close(uniformity(views[0]), expected)
    assert uniformity(torch.ones(4, 3)).item() == pytest.approx(0, abs=1e-6)


def test_effective_rank():
    orthonormal = torch.linalg.qr(torch.randn(40, 9, generator=torch.Generator().manual_seed(0)))[0]
    assert effective_rank(orthonormal).item() == pytest.approx(9, rel=1e-4)
    assert effective_rank(orthonormal[:, :1] @ torch.ones(1, 9)).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(40, 9)).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.full((4, 3), math.nan)).isnan()


def test_effective_rank_of_unequal_directions():
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    h = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert effective_rank(h).item() == pytest.approx(expected, rel=1e-5)
