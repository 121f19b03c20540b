"""Selective kernels and ResNet-D against naive formulas, TensorFlow's pooling rule, and a network without them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import simclr
from helpers import known, parts_of
from simclr.config.encoder import RESNETS
from simclr.models import EncoderConfig, ProjectionHead, build_encoder
from simclr.models import batchnorm as batchnorm_module
from simclr.models.activation_checkpointing import checkpoint_blocks
from simclr.models.batchnorm import track_once
from simclr.models.resnet import ResNet
from simclr.models.selective_kernel import AveragePool, SelectiveKernel
from simclr.weights.folder import save_encoder

SK = EncoderConfig("resnet50", channels=3, size=32, width=0.25, stem="imagenet", sk=True)


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_the_branches_are_mixed_by_a_softmax_of_what_the_image_shows(stride: int, training: bool) -> None:
    torch.manual_seed(1)
    layer = SelectiveKernel(5, 7, stride).double().train(training)
    with torch.no_grad():
        for norm in (layer.branches.norm, layer.squeeze.norm):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                known(tensor).copy_(0.5 + torch.rand_like(known(tensor)))
    naive_parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    statistics = {name: b.clone() for name, b in layer.named_buffers()}  # before training moves them
    x = batch(3, 5, 9, 6, dtype=torch.float64)
    dy = batch(3, 7, *(-(-side // stride) for side in (9, 6)), dtype=torch.float64)

    def norm(x: Tensor, name: str) -> Tensor:
        mean = x.mean((0, 2, 3)) if training else statistics[f"{name}.norm.running_mean"]
        variance = x.var((0, 2, 3), correction=0) if training else statistics[f"{name}.norm.running_var"]
        xhat = (x - mean.view(-1, 1, 1)) / torch.sqrt(variance.view(-1, 1, 1) + 1e-5)
        gamma, beta = (naive_parameters[f"{name}.norm.{key}"].view(-1, 1, 1) for key in ("weight", "bias"))
        return F.relu(gamma * xhat + beta)

    branches = norm(F.conv2d(x, naive_parameters["branches.conv.weight"], stride=stride, padding=1), "branches")
    stacked = branches.unflatten(1, (2, 7))  # (B, 2, C, H, W)
    squeezed = norm(
        F.conv2d(stacked.sum(1).mean((2, 3), keepdim=True), naive_parameters["squeeze.conv.weight"]), "squeeze"
    )
    logits = F.conv2d(squeezed, naive_parameters["weigh.weight"]).unflatten(1, (2, 7))  # (B, 2, C, 1, 1)
    expected = (stacked * logits.softmax(1)).sum(1)

    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.backward(dy)
    expected.backward(dy)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, naive_parameters[name].grad, rtol=1e-9, atol=1e-11, msg=name)


def test_at_least_32_channels_weigh_the_branches() -> None:
    with torch.device("meta"):
        widths = [SelectiveKernel(8, c).squeeze.conv.out_channels for c in (4, 512, 520, 1024)]
    assert widths == [32, 32, 32, 64]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 2), (3, 4), (8, 7), (5, 5), (1, 1)])
def test_average_pools_end_as_tensorflows_do(size: tuple[int, int], stride: int) -> None:
    x = batch(2, 3, *size, dtype=torch.float64)
    height, width = size
    expected = torch.zeros(2, 3, -(-height // stride), -(-width // stride), dtype=torch.float64)
    for i, j in np.ndindex(*expected.shape[2:]):
        window = x[:, :, stride * i : stride * i + 2, stride * j : stride * j + 2]
        values = window.shape[2] * window.shape[3] if stride == 1 else 4  # at stride 2 zeros were put in
        expected[:, :, i, j] = window.sum((2, 3)) / values
    torch.testing.assert_close(AveragePool(stride)(x), expected, rtol=1e-14, atol=0)


def test_basic_blocks_get_the_stem_and_the_shortcuts_alone() -> None:
    with torch.device("meta"):
        plain, resnet = (ResNet(RESNETS["resnet18"], sk=sk) for sk in (False, True))
    stem = (27 * 32 + 9 * 32 * 32 + 9 * 32 * 64) - 49 * 3 * 64 + 2 * (32 + 32)  # three convolutions for one, and norms
    assert sum(p.numel() for p in resnet.parameters()) == sum(p.numel() for p in plain.parameters()) + stem
    assert not any(isinstance(module, SelectiveKernel) for module in resnet.modules())
    projections = [group[0].shortcut for group in parts_of(resnet).groups]
    assert [(type(pool), conv.conv.stride) for pool, conv in projections] == [(AveragePool, (1, 1))] * 4
    assert [pool.stride for pool, _ in projections] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "stem", "width"),
    [("resnet200", "imagenet", 3), ("resnet101", "cifar", 0.3), ("resnet34", "imagenet", 0.5), ("small", "strided", 2)],
)
def test_every_depth_and_width_takes_any_size(name: str, stem: Any, width: float) -> None:
    with torch.device("meta"):
        plain, resnet = (ResNet(RESNETS[name], width=width, stem=stem, channels=1, sk=sk) for sk in (False, True))
        h = resnet(torch.empty(2, 1, 33, 50))
    assert h.shape == (2, plain.num_features)
    if stem != "imagenet":  # the authors change the large stem only
        assert [p.shape for p in resnet.stem.parameters()] == [p.shape for p in plain.stem.parameters()]


def test_on_a_cpu_the_large_norms_run_in_our_kernels_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch = []
    real = batchnorm_module.TensorFlowBatchNorm._by_torch
    monkeypatch.setattr(
        batchnorm_module.TensorFlowBatchNorm, "_by_torch", lambda self, x: by_torch.append(x.numel()) or real(self, x)
    )
    network = build_encoder(SK).to(memory_format=torch.channels_last).train()
    layouts = []
    for block in (block for group in parts_of(network).backbone.groups for block in group):
        block.register_forward_hook(
            lambda module, inputs, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    network(batch(32, 3, 32, 32).to(memory_format=torch.channels_last)).sum().backward()
    assert len(layouts) == 16 and all(layouts)
    assert by_torch and max(by_torch) < batchnorm_module.LEAST_FOR_KERNELS


def test_recomputing_the_blocks_changes_no_bit() -> None:
    results = []
    for recompute in (False, True):
        network = build_encoder(SK, seed=2).to(memory_format=torch.channels_last).train()
        for module in network.modules():  # residual branches begin switched off
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.7)
        if recompute:
            track_once(network)
            checkpoint_blocks(network.backbone)
        network(batch(8, 3, 32, 32).to(memory_format=torch.channels_last)).square().sum().backward()
        results.append([p.grad for p in network.parameters()] + list(network.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_half_precision_stays_so_to_the_end() -> None:
    layer = SelectiveKernel(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(batch(4, 4, 6, 6))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(batch(4, 4, 6, 6)), rtol=0.05, atol=0.05)


def test_the_setting_travels_with_the_weights(tmp_path: Path) -> None:
    encoder = build_encoder(SK, seed=4).eval()
    head = ProjectionHead(encoder.num_features, layers=3)
    save_encoder(encoder, tmp_path, preprocessing="google", origin={}, head=head)
    loaded = simclr.load(tmp_path).encoder
    assert loaded.config == SK
    assert torch.equal(loaded(batch(2, 3, 32, 32)), encoder(batch(2, 3, 32, 32)))


def test_a_description_from_before_selective_kernels_is_read() -> None:
    described = EncoderConfig("resnet50", channels=3, size=32).to_dict()
    assert described.pop("sk") is False
    assert EncoderConfig.from_dict(json.loads(json.dumps(described))) == EncoderConfig("resnet50", channels=3, size=32)
