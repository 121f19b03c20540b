"""The method that learns from labels: its loss and gradients, what is frozen, which features the classifier reads."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import known, parts_of
from simclr import UserError
from simclr.config.encoder import EncoderConfig
from simclr.distributed import DistributedContext
from simclr.methods.supervised import Classify
from simclr.models.classifier import Classifier
from simclr.models.encoder import build_encoder
from simclr.models.heads import ProjectionHead
from simclr.training.optim import build_optimizer

NUM_CLASSES = 5


def network(head_layer=0, layers=3):
    encoder = build_encoder(EncoderConfig("small", channels=1, size=8, width=0.5), seed=1)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):  # residual branches begin switched off
            nn.init.uniform_(module.weight, 0.5, 1.5)
    head = ProjectionHead(encoder.num_features, layers=layers, dim=12, seed=2)
    return Classifier(encoder, head, NUM_CLASSES, head_layer=head_layer)


def batch(n=24, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=draw, dtype=torch.float64).to(dtype)
    return x, torch.randint(NUM_CLASSES, (n,), generator=draw)


def test_an_untrained_classifier_finds_all_classes_equally_likely():
    model = Classify(network(), world=DistributedContext())
    x, targets = batch()
    loss, metrics = model(x, targets, detail=True)
    assert not model.network(x).any()
    assert loss.item() == pytest.approx(math.log(NUM_CLASSES), rel=1e-6)
    assert metrics["accuracy"] == (targets == 0).float().mean()  # the first of equal logits wins
    assert set(model(x, targets)[1]) == {"loss"}


@pytest.mark.parametrize("head_layer", [0, 1, 2, 3])
def test_loss_and_gradients_are_those_of_the_naive_formula(head_layer):
    model = Classify(network(head_layer), world=DistributedContext()).double()
    nn.init.normal_(model.network.linear.weight)
    plain = copy.deepcopy(model.network)
    x, targets = batch(dtype=torch.float64)
    loss, _ = model(x, targets)
    loss.backward()

    features = plain.encoder(x)
    if head_layer:
        features = known(plain.head).hiddens(features)[head_layer]
    logits = features @ plain.linear.weight.T + plain.linear.bias  # (24, 5)
    expected = (torch.logsumexp(logits, 1) - logits[torch.arange(len(x)), targets]).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for (name, ours), theirs in zip(model.network.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_head_layer_one_is_dense_batch_norm_and_relu_after_h():
    model = network(head_layer=1).eval()
    nn.init.normal_(model.linear.weight)
    x, _ = batch()
    layer = parts_of(known(model.head)).layers[0]
    dense = model.encoder(x) @ layer.dense.weight.T
    norm = layer.norm
    hidden = F.relu((dense - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias)
    torch.testing.assert_close(model(x), F.linear(hidden, model.linear.weight, model.linear.bias))


def stages(network):
    """The network's parts from input to output."""
    backbone = network.encoder.backbone
    parts = {"stem": backbone.stem} | {f"group {i + 1}": group for i, group in enumerate(backbone.groups)}
    return parts | {f"head {i + 1}": layer for i, layer in enumerate(network.head.layers)} | {"linear": network.linear}


@pytest.mark.parametrize(
    ("tune_from", "trained"),
    [
        ("all", ["stem", "group 1", "group 2", "group 3", "group 4", "head 1", "linear"]),
        (0, ["group 1", "group 2", "group 3", "group 4", "head 1", "linear"]),
        (1, ["group 2", "group 3", "group 4", "head 1", "linear"]),
        (3, ["group 4", "head 1", "linear"]),
        (4, ["head 1", "linear"]),
        ("none", ["linear"]),
    ],
)
@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_exactly_what_is_to_be_trained_changes(tune_from, trained, optimizer):
    """Three steps with weight decay: parameters and buffers of frozen parts keep every bit."""
    model = Classify(network(head_layer=1), tune_from=tune_from, world=DistributedContext())
    model.eval()
    model.train()  # as after a look at the test images
    nn.init.normal_(model.network.linear.weight)
    before = copy.deepcopy(model.network.state_dict())
    opt = build_optimizer(optimizer, model, lr=0.5, weight_decay=0.01, supervised=True)
    for step in range(3):
        opt.zero_grad()
        model(*batch(seed=step))[0].backward()
        opt.step()
    now = model.network.state_dict()
    for name, part in stages(model.network).items():
        prefix = next(f"{path}." for path, module in model.network.named_modules() if module is part)
        inside = [path for path in now if path.startswith(prefix)]
        changed = [path for path in inside if not torch.equal(now[path], before[path])]
        assert inside and changed == (inside if name in trained else []), name


def test_frozen_means_the_features_do_not_depend_on_the_batch():
    model = Classify(network(), tune_from="none", world=DistributedContext())
    x, _ = batch()
    torch.testing.assert_close(model.network.features(x)[:3], model.network.features(x[:3]), rtol=1e-5, atol=1e-6)
    model = Classify(network(), tune_from=3, world=DistributedContext())
    assert not torch.allclose(model.network.features(x)[:3], model.network.features(x[:3]), rtol=1e-2)


def test_block_groups_are_asked_only_of_an_encoder_that_has_them():
    encoder = build_encoder(EncoderConfig("timm/test_vit", channels=1, size=32))
    with pytest.raises(UserError, match=r"after block group 2.*timm/test_vit has no such"):
        Classify(Classifier(encoder, None, 3), tune_from=2, world=DistributedContext())
    model = Classify(Classifier(encoder, None, 3), tune_from=4, world=DistributedContext())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "network.linear.weight",
        "network.linear.bias",
    ]


@pytest.mark.parametrize(("layer", "message"), [(-1, "at least 0"), (4, "has 3 layers")])
def test_a_layer_that_the_head_lacks_is_refused(layer, message):
    with pytest.raises(UserError, match=message):
        network(head_layer=layer)
    with pytest.raises(UserError, match="without a projection head"):
        Classifier(network().encoder, None, 3, head_layer=1)


def test_a_linear_head_leads_to_a_classifier_on_z():
    encoder = network().encoder
    model = Classifier(encoder, ProjectionHead(encoder.num_features, kind="linear", dim=7), 3, head_layer=1).eval()
    assert model(batch()[0]).shape == (24, 3) and model.linear.in_features == 7


def test_logits_are_fp32_under_autocast():
    model = network().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch()[0]).dtype == torch.float32
