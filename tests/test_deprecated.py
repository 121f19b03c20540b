"""Earlier names of settings, flags and values are still accepted, and say so."""

import json
from dataclasses import asdict, fields

from simclr.config.deprecated import FIELDS, VALUES, rename_flags
from simclr.config.distill import DistillConfig
from simclr.config.finetune import FinetuneConfig
from simclr.config.pretrain import PretrainConfig, load_config, settings_digest


def test_flags_are_renamed_and_each_is_said_once():
    said = []
    given = [
        "digits",
        "--keep",
        "3",
        "--memory=cache",
        "--finetune.least-steps",
        "5",
        "--memory",
        "recompute",
        "--views",
    ]
    assert rename_flags(given, said.append) == [
        "digits", "--max-checkpoints", "3", "--memory=grad-cache", "--finetune.min-steps", "5",
        "--memory", "checkpointing", "--augmentation",
    ]  # fmt: skip
    assert len(said) == 5 and said[0] == "--keep is now called --max-checkpoints; the earlier name still works."
    assert said[1] == "--memory cache is now called grad-cache; the earlier name still works."


def test_present_flags_and_values_pass_unchanged():
    given = ["cache", "keep", "--size", "48", "--out=a=b", "--no-global-bn", "--memory", "plain", "-h"]
    said = []
    assert rename_flags(given, said.append) == given and not said


def test_settings_of_an_earlier_run_open_and_have_their_digest(tmp_path):
    before = asdict(PretrainConfig(augmentation="torchvision", memory="checkpointing", max_checkpoints=7))
    before["keep"], before["views"] = before.pop("max_checkpoints"), before.pop("augmentation")
    before["memory"] = "recompute"
    (tmp_path / "config.json").write_text(json.dumps(before))
    config = load_config(tmp_path / "config.json")
    assert (config.max_checkpoints, config.augmentation, config.memory) == (7, "torchvision", "checkpointing")
    assert settings_digest(before) == settings_digest(before | {"keep": 2})  # free on resume, then as now
    assert settings_digest(before) != settings_digest(before | {"views": "google"})


def test_every_present_name_is_a_setting():
    known = {f.name for kind in (PretrainConfig, FinetuneConfig, DistillConfig) for f in fields(kind)}
    assert set(FIELDS.values()) | set(VALUES) <= known and not set(FIELDS) & known
