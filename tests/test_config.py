"""Settings: documented, refused in words, saved and read back; recipes: complete and chosen for the data."""

import ast
import inspect
import itertools
import json
import re
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from helpers import SMALL_RUN
from simclr.config.finetune import FinetuneConfig
from simclr.config.pretrain import PretrainConfig, changed_on_resume, load_config, refuse_unused_head_settings
from simclr.config.recipes import RECIPES, choose_recipe, find_recipe, fit_recipe, settings_for
from simclr.errors import UserError


class Facts:
    """What a recipe is chosen by."""

    def __init__(self, n, side, channels=3):
        self.sizes = np.full((n, 2), side)
        self.channels = channels

    def __len__(self):
        return len(self.sizes)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_survives_being_saved(recipe, tmp_path):
    recipe.config.save(tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == recipe.config
    assert find_recipe(str(tmp_path / "config.json")).config == recipe.config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sizes": 3}', "sizes"),
        ('{"size": "big"}', "size"),
        ('{"size": -1}', "--size was -1; it must be at least 4"),
        ('{"optimizer": "adam"}', "optimizer"),
        ('{"temperature": NaN}', "NaN is no number"),
        ("[]", "holds a list in place of an object"),
        ("not json", "no valid JSON"),
    ],
)
def test_a_bad_settings_file_names_what_is_wrong(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "config.json")


def test_every_setting_is_documented():
    documented = set()
    for kind in PretrainConfig.__mro__[:-1]:
        (definition,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(definition, ast.ClassDef)
        documented |= {
            first.target.id
            for first, second in itertools.pairwise(definition.body)
            if isinstance(first, ast.AnnAssign)
            and isinstance(first.target, ast.Name)
            and isinstance(second, ast.Expr)
            and isinstance(second.value, ast.Constant)
        }
    assert {f.name for f in fields(PretrainConfig)} == documented


def test_every_setting_is_used(simclr, tmp_path, monkeypatch):
    """A short run of colour images reads each of them, beside copies and checks of the settings themselves."""
    names = {f.name for f in fields(PretrainConfig)}
    used = set()
    plain = object.__getattribute__

    def read(self, name):
        if name in names:
            frame = sys._getframe(1)
            reader = frame.f_globals["__name__"]
            of_schedule = frame.f_code.co_name in ("steps", "peak", "learning_rate")
            if reader.startswith("simclr.") and (of_schedule or not reader.startswith("simclr.config.")):
                used.add(name)
        return plain(self, name)

    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8))
    config = replace(SMALL_RUN, epochs=1, warmup_epochs=0, memory="grad-cache", chunk=8)
    config.save(tmp_path / "recipe.json")
    monkeypatch.setattr(PretrainConfig, "__getattribute__", read)
    code, _, said = simclr(
        "pretrain", tmp_path / "a.npz", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "run"
    )
    assert code == 0, said
    assert names - used == set()


def test_what_may_change_on_resume():
    saved = PretrainConfig()
    assert changed_on_resume(saved, replace(saved, workers=7, max_checkpoints=5)) == []
    assert changed_on_resume(saved, replace(saved, lr=0.1, seed=1, workers=7)) == ["lr", "seed"]


@pytest.mark.parametrize(
    ("n", "side", "on_gpu", "name"),
    [
        (1797, 8, False, "digits"),
        (60_000, 28, False, "cpu"),
        (500, 3000, False, "cpu"),
        (50_000, 32, True, "cifar"),
        (20_000, 400, True, "photos"),
        (1_281_167, 400, True, "imagenet-v1"),
    ],
)
def test_a_recipe_is_chosen_and_the_choice_explained(n, side, on_gpu, name):
    recipe, why = choose_recipe(Facts(n, side), on_gpu=on_gpu)
    assert recipe.name == name
    assert f"{n:,}" in why and str(side) in why


def test_a_recipe_is_bent_to_few_and_small_images_and_says_so():
    config, said = fit_recipe(RECIPES["cpu"], Facts(100, 20))
    assert (config.size, config.batch_size) == (20, 64)
    assert set(said) == {"size", "batch_size", "epochs"}
    assert 100 * config.epochs / 64 == pytest.approx(RECIPES["cpu"].min_steps, rel=0.01)
    config, said = fit_recipe(RECIPES["cpu"], Facts(60_000, 200))
    assert config == RECIPES["cpu"].config and not said


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no recipe 'imagenet'.*digits, cpu"):
        find_recipe("imagenet")


def test_recipes_hold_the_papers_numbers():
    cifar, imagenet = RECIPES["cifar"].config, RECIPES["imagenet-v1"].config
    assert (cifar.lr, cifar.weight_decay, cifar.temperature, cifar.strength, cifar.batch_size, cifar.epochs) == (
        1.0, 1e-4, 0.5, 0.5, 512, 1000,
    )  # fmt: skip
    assert (imagenet.lr, imagenet.weight_decay, imagenet.temperature, imagenet.batch_size, imagenet.head_layers) == (
        0.3, 1e-6, 0.1, 4096, 2,
    )  # fmt: skip
    v2 = [RECIPES[name].config for name in ("v2-r50", "v2-r101-2x-sk", "v2-r152-3x-sk")]
    assert [(c.encoder, c.width, c.sk) for c in v2] == [
        ("resnet50", 1.0, False), ("resnet101", 2.0, True), ("resnet152", 3.0, True),
    ]  # fmt: skip
    for c in v2:  # peak rate 6.4, warm-up over 5 % of the epochs
        assert (c.lr * c.batch_size**0.5, c.lr_scaling, c.warmup_epochs / c.epochs) == (6.4, "sqrt", 0.05)
        assert (c.weight_decay, c.temperature, c.batch_size, c.epochs, c.head_layers) == (1e-4, 0.1, 4096, 800, 3)
    r50, advice = RECIPES["cifar-r50"].config, RECIPES["cifar-small-batch"].config
    assert (r50.brightness, r50.weight_decay, r50.batch_size, r50.temperature) == ("add", 1e-6, 1024, 0.5), "v1, B.9"
    assert (advice.lr, advice.lr_scaling, advice.head_layers, advice.head_dim, advice.temperature) == (
        0.2, "sqrt", 2, 64, 0.2,
    ), "issue 166"  # fmt: skip
    advice = RECIPES["imagenet-small-batch"].config
    assert (advice.lr, advice.lr_scaling, advice.head_dim, advice.temperature) == (0.075, "sqrt", 128, 0.2), "issue 166"
    v2_cifar = RECIPES["cifar-v2"].config
    assert (v2_cifar.epochs, v2_cifar.batch_size, v2_cifar.temperature, v2_cifar.head_layers, v2_cifar.queue) == (
        800, 512, 0.2, 2, 0,
    )  # fmt: skip
    assert json.dumps(cifar.loss_scale) == json.dumps(imagenet.loss_scale) == "2.0"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_what_a_recipe_quotes_is_said_to_be_quoted(recipe):
    """No recipe for ImageNet or CIFAR-10 has been run to its end by this code."""
    if not {"cifar10", "IMAGENET/train"} & set(recipe.command.split()):
        return
    assert re.search(r"not reproduced here|not measured", recipe.expect)
    if "not reproduced" in recipe.expect:
        assert re.search(r"^the (authors'|paper's|notebook's) \d", recipe.expect), "whose figure it is"


@pytest.mark.parametrize(
    ("given", "saved", "expected"),
    [
        ({"head": "none", "head_dim": 32}, {}, "--head-dim was 32, and --head is none"),
        ({"head": "linear", "head_layers": 3}, {}, "--head-layers was 3, and --head is linear, which has one layer"),
        ({"head": "none", "head_layers": 3}, {}, "--head-layers was 3, and --head is none, which has no layer"),
        ({"head_layers": 3}, {"head": "linear"}, "--head-layers was 3, and --head is linear"),
        ({"head": "linear", "head_layers": 1}, {}, None),
        ({"head": "linear", "head_dim": 32}, {}, None),
        ({"head": "linear"}, {"head_layers": 3}, None),  # of a recipe, whose nonlinear head has three
        ({"head": "none"}, {"head_dim": 64}, None),
        ({"head_dim": 32, "head_layers": 4}, {}, None),
    ],
)
def test_settings_that_the_chosen_head_has_not_are_refused(given, saved, expected):
    config = replace(PretrainConfig(**saved), **given)
    if expected is None:
        refuse_unused_head_settings(given, config)
    else:
        with pytest.raises(UserError, match=expected):
            refuse_unused_head_settings(given, config)


def test_a_later_setting_is_no_part_of_results_that_it_does_not_change():
    """Results and unfinished trainings of versions without it stay valid."""
    before, after = FinetuneConfig(), FinetuneConfig(nesterov=False, lr_decay="steps")
    assert {"nesterov", "lr_decay"} & before.result_fields().keys() == set()
    assert after.result_fields() == before.result_fields() | {"nesterov": False, "lr_decay": "steps"}


def test_features_chosen_for_a_recipes_own_encoder_do_not_go_to_another():
    def features(**flags: Any) -> tuple[str, str | None]:
        config = settings_for(
            RECIPES["cpu"], Facts(60_000, 28), lambda config: replace(config, **flags), on_gpu=False, say=lambda _: None
        )
        return config.feature, config.head_reads

    assert features() == features(width=2.0) == ("stages1-4", "h")
    assert features(encoder="timm/resnet18") == features(encoder="resnet50") == ("h", None)
    assert features(encoder="resnet18", feature="stage4") == ("stage4", None)
