"""Loss, gradients, LARS and schedule against numbers from the authors' own code (tests/reference)."""

import json

import numpy as np
import pytest
import torch

from simclr.losses import contrastive_accuracy_and_entropy, nt_xent, nt_xent_dense
from simclr.losses.nt_xent import nt_xent_streamed
from simclr.optim import Lars, set_lr
from simclr.schedule import learning_rate, peak_lr, warmup_steps

EXEMPT = ("batch_normalization", "bias", "head_supervised")


@pytest.mark.parametrize("loss", [nt_xent, nt_xent_dense, nt_xent_streamed])
def test_loss_and_gradient(reference, loss):
    """Theirs is the mean over first views plus the mean over second views: twice ours."""
    data = np.load(reference / "ntxent.npz")
    for k in range(int(data["count"])):
        z = torch.tensor(data[f"z{k}"], requires_grad=True)
        value = 2 * loss(*z.chunk(2), float(data[f"temperature{k}"]), bool(data[f"normalize{k}"]))
        value.backward()
        assert value.item() == pytest.approx(float(data[f"loss{k}"]), rel=1e-5), k
        expected = torch.tensor(data[f"grad{k}"])
        assert (z.grad - expected).norm() <= 1e-5 * expected.norm(), k
        assert (z.grad - expected).abs().max() <= 1e-5 * expected.abs().max(), k


def test_contrastive_accuracy_and_entropy(reference):
    data = np.load(reference / "ntxent.npz")
    for k in range(int(data["count"])):
        views = torch.tensor(data[f"z{k}"]).chunk(2)
        settings = float(data[f"temperature{k}"]), bool(data[f"normalize{k}"])
        accuracy, entropy = contrastive_accuracy_and_entropy(*views, *settings)
        assert accuracy.item() == pytest.approx(float(data[f"contrast_acc{k}"]), abs=1e-6), k
        assert entropy.item() == pytest.approx(float(data[f"contrast_entropy{k}"]), rel=1e-5, abs=1e-6), k


def test_lars(reference):
    data = np.load(reference / "lars.npz")
    exempt = [any(part in name for part in EXEMPT) for name in data["names"]]
    for c, case in enumerate(json.loads(str(text)) for text in data["cases"]):
        params = [torch.tensor(data[f"init{i}"], requires_grad=True) for i in range(len(exempt))]
        adapted = [param for param, out in zip(params, exempt, strict=True) if not out]
        others = [param for param, out in zip(params, exempt, strict=True) if out]
        optimizer = Lars(
            [
                {"params": adapted, "weight_decay": float(data["weight_decay"])},
                {"params": others, "weight_decay": 0.0, "adapt": False},
            ],
            lr=0.0,
            momentum=float(data["momentum"]),
            trust_coefficient=float(data["eeta"]),
            classic_momentum=case["classic_momentum"],
            nesterov=case["use_nesterov"],
        )
        for t, lr in enumerate(data["lrs"]):
            set_lr(optimizer, float(lr))
            for i, param in enumerate(params):
                param.grad = torch.tensor(data[f"grad{i}_{t}"])
            optimizer.step()
            for i, param in enumerate(params):
                expected = data[f"case{c}_param{i}_{t}"]
                np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_learning_rate(reference):
    data = np.load(reference / "lr_schedule.npz")
    for k in range(int(data["count"])):
        config = json.loads(str(data[f"config{k}"]))
        num_examples, batch_size = config["num_examples"], config["batch_size"]
        peak = peak_lr(config["base_lr"], batch_size, config["scaling"])
        warmup = warmup_steps(num_examples, config["warmup_epochs"], batch_size)
        rates = [
            learning_rate(int(step), peak=peak, warmup_steps=warmup, total_steps=config["total_steps"])
            for step in data[f"step{k}"]
        ]
        # Theirs are fp32, so the error is of the order of the peak and not of the rate.
        np.testing.assert_allclose(rates, data[f"lr{k}"], rtol=1e-6, atol=1e-6 * max(peak, 1.0))
