"""Encoders and heads: sizes and parameter counts of the authors' code, initial values, shapes, and what is refused."""

import json
import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from scipy.stats import kstest, truncnorm
from torch import nn

from helpers import known, parts_of
from simclr.config.encoder import RESNETS
from simclr.errors import UserError
from simclr.models import EncoderConfig, LinearClassifier, ProjectionHead, build_encoder
from simclr.models.resnet import ResNet, SameMaxPool
from simclr.training.optim import param_groups

# Counted by running the authors' code: (name, width, stem) -> trainable, and with moving statistics.
ENCODER_COUNTS = {
    ("resnet18", 1, "imagenet"): (11_180_736, 11_190_464),
    ("resnet34", 1, "imagenet"): (21_288_896, 21_306_048),
    ("resnet50", 1, "imagenet"): (23_508_032, 23_561_152),
    ("resnet50", 2, "imagenet"): (93_907_072, 94_013_312),
    ("resnet50", 4, "imagenet"): (375_378_176, 375_590_656),
    ("resnet101", 1, "imagenet"): (42_500_160, 42_605_504),
    ("resnet101", 2, "imagenet"): (169_771_136, 169_981_824),
    ("resnet152", 1, "imagenet"): (58_143_808, 58_295_232),
    ("resnet152", 2, "imagenet"): (232_253_568, 232_556_416),
    ("resnet18", 1, "cifar"): (11_173_056, 11_182_784),
    ("resnet50", 1, "cifar"): (23_500_352, 23_553_472),
}
# The same with selective kernels: (name, width) -> trainable, and with moving statistics.
SK_COUNTS = {
    ("resnet50", 1): (35_215_584, 35_277_408),
    ("resnet50", 2): (140_306_048, 140_428_864),
    ("resnet101", 1): (64_662_304, 64_786_144),
    ("resnet101", 2): (257_132_224, 257_377_984),
    ("resnet152", 1): (88_940_896, 89_119_584),
    ("resnet152", 2): (353_398_528, 353_752_896),
    ("resnet152", 3): (794_704_160, 795_235_360),
}
# (features, layers) -> trainable, with a projection of width 128.
HEAD_COUNTS = {
    (2048, 2): 4_460_672,
    (2048, 3): 8_659_072,
    (512, 2): 328_832,
    (512, 3): 592_000,
    (4096, 3): 34_095_232,
}


def num_trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("encoder", "counts"), ENCODER_COUNTS.items(), ids=str)
def test_parameter_counts_of_encoders(encoder: tuple[str, int, Any], counts: tuple[int, int]) -> None:
    name, width, stem = encoder
    with torch.device("meta"):
        resnet = ResNet(RESNETS[name], width=width, stem=stem)
    assert counts_of(resnet) == counts


@pytest.mark.parametrize(("encoder", "counts"), SK_COUNTS.items(), ids=str)
def test_parameter_counts_with_selective_kernels(encoder: tuple[str, int], counts: tuple[int, int]) -> None:
    with torch.device("meta"):
        resnet = ResNet(RESNETS[encoder[0]], width=encoder[1], sk=True)
    assert counts_of(resnet) == counts


def counts_of(resnet: ResNet) -> tuple[int, int]:
    statistics = sum(b.numel() for b in resnet.buffers() if b.is_floating_point())
    return num_trainable(resnet), num_trainable(resnet) + statistics


@pytest.mark.parametrize(("head", "count"), HEAD_COUNTS.items(), ids=str)
def test_parameter_counts_of_heads(head: tuple[int, int], count: int) -> None:
    with torch.device("meta"):
        assert num_trainable(ProjectionHead(head[0], layers=head[1])) == count


def test_resnet200_has_its_blocks() -> None:
    with torch.device("meta"):
        resnet = ResNet(RESNETS["resnet200"])
    assert [len(group) for group in parts_of(resnet).groups] == [3, 24, 36, 3]
    assert resnet(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 2048)


def test_equals_torchvisions_resnet50_but_for_the_max_pool() -> None:
    ours, theirs = ResNet(RESNETS["resnet50"]), torchvision.models.resnet50(weights=None)
    for norm in (module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(known(tensor), 0.5, 1.0)
    parts_of(theirs).maxpool, parts_of(theirs).fc = SameMaxPool(), nn.Identity()
    theirs.load_state_dict({torchvisions_name(name): tensor for name, tensor in ours.state_dict().items()})
    x = torch.rand(2, 3, 67, 50)
    h, expected = ours.eval()(x), theirs.eval()(x)
    torch.testing.assert_close(h / expected.norm(), expected / expected.norm(), rtol=0, atol=1e-6)


def torchvisions_name(name: str) -> str:
    name = name.replace("stem.0.conv", "conv1").replace("stem.0.norm", "bn1")
    name = name.replace("shortcut.conv", "downsample.0").replace("shortcut.norm", "downsample.1")
    name = re.sub(r"groups\.(\d)", lambda match: f"layer{int(match[1]) + 1}", name)
    return re.sub(
        r"residual\.(\d)\.(conv|norm)",
        lambda match: f"{'conv' if match[2] == 'conv' else 'bn'}{int(match[1]) + 1}",
        name,
    )


@pytest.mark.parametrize("size", [(1, 2), (3, 4), (7, 8), (32, 33)])
def test_max_pool_pads_as_tensorflow_does(size: tuple[int, int]) -> None:
    x = torch.randn(1, 1, *size)
    outputs = [math.ceil(side / 2) for side in size]
    # TensorFlow's rule: what the last window lacks, half of it (rounded down) before and the rest after.
    lacking = [(output - 1) * 2 + 3 - side for side, output in zip(size, outputs, strict=True)]
    expected = torch.empty(1, 1, *outputs)
    for i, j in np.ndindex(*outputs):
        top, left = 2 * i - lacking[0] // 2, 2 * j - lacking[1] // 2
        expected[0, 0, i, j] = x[0, 0, max(top, 0) : top + 3, max(left, 0) : left + 3].max()
    assert torch.equal(SameMaxPool()(x), expected)


@pytest.mark.parametrize("stem", ["cifar", "strided", "imagenet"])
@pytest.mark.parametrize(("name", "width", "features"), [("small", 1, 128), ("resnet10", 0.3, 153)])
@pytest.mark.parametrize("size", [(8, 8), (9, 15)])
def test_any_channels_and_sizes(stem: Any, name: str, width: float, features: int, size: tuple[int, int]) -> None:
    for channels in (1, 4):
        resnet = ResNet(RESNETS[name], width=width, stem=stem, channels=channels)
        h = resnet(torch.rand(2, channels, *size))
        assert h.shape == (2, features) == (2, resnet.num_features)
        assert h.isfinite().all()


def test_each_convolution_cuts_its_own_fractional_channels() -> None:
    with torch.device("meta"):
        resnet = ResNet(RESNETS["resnet50"], width=0.3)
    first = parts_of(resnet).groups[0][0]
    assert first.residual[0].conv.out_channels == int(64 * 0.3)
    assert first.residual[2].conv.out_channels == first.shortcut.conv.out_channels == int(4 * 64 * 0.3)


def test_small_is_small() -> None:
    encoder = build_encoder(EncoderConfig("small", channels=1, size=28))
    assert [group[0].residual[0].conv.out_channels for group in parts_of(encoder).backbone.groups] == [16, 32, 64, 128]
    assert encoder.num_features == 128


def test_the_stem_follows_the_size() -> None:
    def kernel(size: int, stem: Any = "auto") -> int:
        encoder = build_encoder(EncoderConfig("small", channels=3, size=size, stem=stem))
        return parts_of(encoder).backbone.stem[0].conv.kernel_size[0]

    assert [kernel(32), kernel(33), kernel(96, "cifar"), kernel(32, "imagenet")] == [3, 7, 3, 7]


def test_the_strided_stem_is_every_second_position_of_the_plain_one() -> None:
    configs = [
        EncoderConfig("small", channels=1, size=9, stem="cifar"),
        EncoderConfig("small", channels=1, size=9, stem="strided"),
    ]
    plain, strided = (parts_of(build_encoder(config)).backbone.stem for config in configs)
    x = torch.randn(2, 1, 9, 9)
    assert torch.allclose(strided[0].conv(x), plain[0].conv(x)[..., ::2, ::2], atol=1e-6)


def test_convolutions_begin_as_truncated_normals_of_variance_one_over_fan_in() -> None:
    encoder = build_encoder(EncoderConfig("resnet18", channels=3, size=32), seed=3)
    convs = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.bias is None for conv in convs)
    normalised = []
    for conv in convs:
        normalised.append(conv.weight.detach().flatten() * math.sqrt(conv.weight[0].numel()))
    pooled = torch.cat(normalised)  # each of variance 1
    cut = 2 / 0.87962566103423978
    assert abs(float(pooled.var()) - 1) < 0.002  # 4 standard errors over 11 million draws are 0.002
    assert abs(float(pooled.mean())) < 0.002
    assert 0.999 * cut < float(pooled.abs().max()) <= cut * (1 + 1e-6)
    # Kolmogorov-Smirnov distance to the truncated normal, on a million draws
    draws = (pooled[torch.randperm(len(pooled), generator=torch.Generator().manual_seed(0))[: 10**6]]).numpy()
    distance = kstest(draws * 0.87962566103423978, truncnorm(-2, 2).cdf).statistic
    assert distance < 0.002


def test_batch_norms_begin_at_one_and_the_last_of_each_block_at_zero() -> None:
    for name in ("resnet18", "resnet50"):
        resnet = ResNet(RESNETS[name], width=0.125)
        blocks = [block for group in parts_of(resnet).groups for block in group]
        last = {id(block.residual[-1].norm) for block in blocks}
        for norm in (module for module in resnet.modules() if isinstance(module, nn.BatchNorm2d)):
            assert (norm.weight == (0 if id(norm) in last else 1)).all()
            assert (norm.bias == 0).all()
            assert (norm.eps, norm.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("name", ["small", "timm/test_resnet", "timm/test_vit"])
def test_the_seed_decides_the_weights_and_nothing_else_is_drawn(name: str) -> None:
    config = EncoderConfig(name, channels=3, size=32)
    before = torch.get_rng_state()
    first, again, other = (build_encoder(config, seed=seed) for seed in (1, 1, 2))
    head, same_head, other_head = (parts_of(ProjectionHead(128, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)  # nor does the global generator's state matter
    later = build_encoder(config, seed=1)
    for ours in (again, later):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), ours.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert torch.equal(head.layers[0].dense.weight, same_head.layers[0].dense.weight)
    assert not torch.equal(head.layers[0].dense.weight, other_head.layers[0].dense.weight)


def test_nonlinear_head_is_dense_batch_norm_relu_and_ends_in_batch_norm() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(24, layers=3, dim=7, seed=5)
    for layer in parts_of(head).layers:
        nn.init.uniform_(layer.norm.weight, 0.5, 2.0)
        if layer.norm.bias is not None:
            nn.init.normal_(layer.norm.bias)
    h = torch.randn(16, 24)
    expected = [h]
    for index, layer in enumerate(parts_of(head).layers):
        x = expected[-1] @ layer.dense.weight.T
        x = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5) * layer.norm.weight
        expected.append(x if index == 2 else F.relu(x + layer.norm.bias))
    hiddens = head.hiddens(h)
    assert [tuple(hidden.shape) for hidden in hiddens] == [(16, 24), (16, 24), (16, 24), (16, 7)]
    for ours, naive in zip(hiddens, expected, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)
    assert torch.equal(head.eval()(h), head.hiddens(h)[-1])
    assert sorted(name.split(".", 2)[2] for name, _ in head.named_parameters()) == sorted(
        ["dense.weight", "norm.weight", "norm.bias"] * 2 + ["dense.weight", "norm.weight"]
    )


def test_linear_and_absent_heads() -> None:
    h = torch.randn(6, 5)
    none, linear = ProjectionHead(5, kind="none"), ProjectionHead(5, kind="linear", dim=3)
    assert none(h) is h
    assert none.dim == 5
    assert len(none.hiddens(h)) == 1
    assert linear(h).shape == (6, 3)
    assert len(linear.hiddens(h)) == 2
    assert num_trainable(linear) == 5 * 3 + 3


def test_dense_layers_begin_at_a_hundredth() -> None:
    weight = parts_of(ProjectionHead(512, seed=1)).layers[0].dense.weight.detach()
    assert abs(float(weight.std()) / 0.01 - 1) < 0.01
    classifier, zero = LinearClassifier(512, 300, seed=1), LinearClassifier(512, 300, zero=True)
    assert abs(float(classifier.weight.detach().std()) / 0.01 - 1) < 0.01
    assert not classifier.bias.any()
    assert not zero.weight.any()


def test_the_optimizer_tells_the_supervised_head_and_batch_norm_by_their_roles() -> None:
    model = nn.Sequential(ProjectionHead(8, layers=3, seed=1), LinearClassifier(128, 10))
    adapted, exempt = param_groups(model, weight_decay=1e-4)
    assert [p.ndim for p in adapted["params"]] == [2, 2, 2]  # the dense layers of the projection head
    assert len(exempt["params"]) == 5 + 2


def test_pixels_are_normalised_only_where_the_config_says_so() -> None:
    x = torch.rand(2, 3, 8, 8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    plain = build_encoder(EncoderConfig("small", channels=3, size=8)).eval()
    normalising = build_encoder(EncoderConfig("small", channels=3, size=8, mean=mean, std=std)).eval()
    column = (1, 3, 1, 1)
    expected = plain((x - torch.tensor(mean).view(column)) / torch.tensor(std).view(column))
    assert torch.equal(normalising(x), expected)
    assert plain.state_dict().keys() == normalising.state_dict().keys()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 1, 8, 8), "expects 3 channels and was given 1"),
        (torch.rand(3, 8, 8), "x\\[None\\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "x.float\\(\\) / 255"),
    ],
)
def test_an_encoder_refuses_what_it_was_not_made_for(x: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(EncoderConfig("small", channels=3, size=8))(x)


def test_a_config_survives_json() -> None:
    config = EncoderConfig(
        "resnet18", channels=1, size=28, width=0.5, stem="imagenet", sk=True, mean=(0.5,), std=(0.2,)
    )
    assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet-50"}, "did you mean resnet50"),
        ({"name": "timm/"}, "timm/NAME"),
        ({"name": "efficientnet_b0"}, "timm/NAME"),
        ({"width": 0}, "greater than 0"),
        ({"width": float("nan")}, "greater than 0"),
        ({"name": "small", "width": 0.01}, "at least 0.0625"),
        ({"channels": 0}, "from 1 to"),
        ({"size": 32.0}, "whole number"),
        ({"stem": "none"}, "auto, cifar, strided, imagenet"),
        ({"name": "timm/test_resnet", "stem": "cifar"}, "stem at auto"),
        ({"name": "timm/test_resnet", "width": 2.0}, "width at 1"),
        ({"mean": (0.5,) * 3}, "give both"),
        ({"mean": (0.5,), "std": (0.5,)}, "one per channel, 3"),
        ({"mean": (0.5,) * 3, "std": (0.0,) * 3}, "greater than 0"),
        ({"feature": "z"}, "must be one of h, stage4"),
        ({"name": "timm/x", "feature": "stage4"}, "of our ResNets"),
        ({"depth": 50}, "depth is unknown"),
        ({"sk": 0.0625}, "true or false"),
        ({"name": "timm/test_resnet", "sk": True}, "selective kernels are made for our ResNets"),
        ({"name": "torchvision/resnet50", "sk": True}, "selective kernels are made for our ResNets"),
        ({"name": "small", "width": 0.1, "sk": True}, "at least 0.125"),
    ],
    ids=str,
)
def test_a_config_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EncoderConfig.from_dict({"name": "resnet18", "channels": 3, "size": 32} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mlp"}, "none, linear or nonlinear"),
        ({"layers": 1}, "2 \\(SimCLR\\)"),
        ({"dim": 0}, "from 1 to"),
    ],
)
def test_a_head_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProjectionHead(8, **settings)


def test_the_config_imports_no_torch() -> None:
    code = "import sys, simclr.models, simclr.config.encoder; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "mobilenetv3_small_050"])
def test_timm_models(name: str) -> None:
    encoder = build_encoder(EncoderConfig(f"timm/{name}", channels=1, size=32)).eval()
    x = torch.rand(2, 1, 32, 32)
    h = encoder(x)
    assert h.shape == (2, encoder.num_features)
    assert torch.equal(h, encoder.backbone(x))  # no mean and std without pretrained weights
    assert isinstance(encoder.backbone, type(timm.create_model(name)))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet51", 32, "did you mean timm/resnet"),
        ("test_vit", 33, "33 pixels"),
    ],
)
def test_timm_says_what_is_wrong(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(EncoderConfig(f"timm/{name}", channels=3, size=size))


def test_pretrained_weights_bring_their_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    without_network = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: without_network(name, **more))
    color = build_encoder(EncoderConfig("timm/resnet10t", channels=3, size=32), pretrained=True)
    gray = build_encoder(EncoderConfig("timm/resnet10t", channels=1, size=32), pretrained=True)
    assert color.config.mean == (0.485, 0.456, 0.406)
    assert gray.config.mean == pytest.approx((0.449,))
    assert gray.config.std == pytest.approx((0.226,))


def test_pretrained_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no pretrained weights for resnet18"):
        build_encoder(EncoderConfig("resnet18", channels=3, size=32), pretrained=True)
    absent = next(name for name in timm.list_models() if not timm.models.is_model_pretrained(name))
    with pytest.raises(UserError, match=f"timm has no pretrained weights for {absent}"):
        build_encoder(EncoderConfig(f"timm/{absent}", channels=3, size=32), pretrained=True)

    def offline(*_: object, **__: object) -> nn.Module:
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"could not be fetched .*Name or service not known.*random weights"):
        build_encoder(EncoderConfig("timm/resnet10t", channels=3, size=32), pretrained=True)
