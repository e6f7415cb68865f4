"""A trial's id is what decides its result: one trial has one id however it is spelled, and two trials have two."""

import json
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from loralab.adapters.lora import LoRA
from loralab.config import identity
from loralab.config.build import trial_id, trial_spec
from loralab.config.compose import compose, plain
from loralab.config.identity import difference, settings_key
from loralab.config.places import data_root
from loralab.records import record

KNOWN = Path(__file__).with_name("spec_defaults.json")


def of(*words):
    return trial_id(compose(list(words)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["adapter.lora_alpha=16"], ["adapter.lora_alpha=16.0"]),
        (["optimizer.lr=1e-3"], ["optimizer.lr=0.001"]),
        (["optimizer.lr=0.001"], []),  # the default
        (["adapter.target_modules=[q_proj,v_proj]"], ["adapter.target_modules=['q_proj','v_proj']"]),
        (["adapter.target_modules=[q_proj,v_proj]"], ["adapter.target_modules=[v_proj,q_proj]"]),
        (["adapter.modules_to_save=score"], ["adapter.modules_to_save=[score]"]),
        (["data.limit=null"], []),
        (["model.dropout=0"], ["model.dropout=0.0"]),
        (["quantization=nf4_double"], ["quantization=nf4", "quantization.double_quant=true"]),
        (["optimizer=adamw_8bit"], ["optimizer.name=adamw_8bit"]),
        (["trainer=cpu"], ["trainer.accelerator=cpu"]),
        (["trainer.test=true"], []),
        (["logger=none", "callbacks=none", "plan=default", "plan.record=false"], []),
        (["hydra.run.dir=elsewhere"], []),
        (["memory.snapshot=a"], ["memory.snapshot=b"]),
        (["quantization=nf4", "quantization.dequantize=per_use"], ["quantization=nf4"]),  # the same bits
        (["quantization=nf4", "quantization.dequantize=resident"], ["quantization=nf4"]),
        (["data=files", "data.train=./a//b.jsonl"], ["data=files", "data.train=a/b.jsonl"]),
        (["model.name_or_path=base/"], ["model.name_or_path=base"]),
    ],
    ids=lambda words: " ".join(words) or "-",
)
def test_one_trial_spelled_twice_has_one_id(one, other):
    assert of(*one) == of(*other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["seed=0"], ["seed=1"]),
        (["seed=1234567890123"], ["seed=1234567890124"]),
        (["optimizer.lr=1e-3"], ["optimizer.lr=1.0000001e-3"]),
        (["optimizer.betas=[0.9,0.99]"], ["optimizer.betas=[0.99,0.9]"]),
        (["adapter.target_modules=[q_proj]"], ["adapter.target_modules=q_proj"]),  # a list; a regular expression
        (["adapter=full"], []),
        (["quantization=fp4"], ["quantization=nf4"]),
        (["metric=val/perplexity"], []),
        (["trainer.gradient_clip_val=null"], []),
        (["data=files", "data.train=a.jsonl"], ["data=files", "data.train=/a.jsonl"]),
        (["data=files", "data.train=a.jsonl", "data.prompt=a//b", "data.target=c"],
         ["data=files", "data.train=a.jsonl", "data.prompt=a/b", "data.target=c"]),
        (["+adapter.rank_pattern.a=2", "+adapter.rank_pattern.b=3"],
         ["+adapter.rank_pattern.b=3", "+adapter.rank_pattern.a=2"]),  # the first that matches counts
    ],
    ids=lambda words: " ".join(words) or "-",
)  # fmt: skip
def test_two_trials_have_two_ids(one, other):
    assert of(*one) != of(*other)


def test_an_id_is_ten_hex_digits_and_that_of_the_built_trial():
    config = compose(["adapter.r=3"])
    assert trial_spec(config, Path()).id == trial_id(config) == trial_id(plain(config))
    assert len(trial_id(config)) == 10
    assert int(trial_id(config), 16) >= 0


def test_settings_of_no_trial_have_an_id_too():
    assert of("adapter.r=0") != of("adapter.r=-1")


def test_a_later_versions_new_key_renames_no_trial():
    changes = {"__module__": "loralab.adapters.lora"}
    later = make_dataclass(
        "LoRA", [("use_dora", bool, field(default=False))], bases=(LoRA,), frozen=True, namespace=changes
    )
    assert difference(later(r=4), "adapter") == difference(LoRA(r=4), "adapter") == ["LoRA", {"r": 4}]
    assert difference(later(), "adapter") is difference(LoRA(), "adapter") is None
    assert difference(later(r=4, use_dora=True), "adapter") != difference(LoRA(r=4), "adapter")


def test_a_module_that_moves_renames_no_trial_and_a_users_own_class_is_another():
    moved = dataclass(frozen=True)(type("LoRA", (LoRA,), {"__module__": "loralab.adapters.low_rank"}))
    own = dataclass(frozen=True)(type("LoRA", (LoRA,), {"__module__": "mine"}))
    assert difference(moved(), "adapter") is None
    assert difference(own(), "adapter") == ["mine.LoRA", {}]


def test_the_schema_is_part_of_an_id(monkeypatch):
    before = of()
    monkeypatch.setattr(identity, "SCHEMA", record.SCHEMA + 1)
    assert of() != before


def defaults():
    """{class: {field: default}} of every spec that conf/ names, as far as ids depend on them."""
    found = {}
    for path in sorted((data_root() / "conf").rglob("*/*.yaml")):
        section = path.relative_to(data_root() / "conf").parts[0]
        if section in identity.USUAL:
            module, _, name = OmegaConf.load(path)._target_.rpartition(".")
            cls = getattr(import_module(module), name)
            volatile = identity.VOLATILE_KEYS.get(section, ())
            found[name] = {one.name: identity.plain(_default(one)) for one in fields(cls) if one.name not in volatile}
    return found


def _default(one):
    if one.default_factory is not MISSING:
        return one.default_factory()
    return "required" if one.default is MISSING else one.default


def test_a_changed_default_raises_the_schema():
    """Ids say what differs from the defaults, so an id under other defaults would mean another trial.

    New keys may be added freely. After a change of a default raise record.SCHEMA and run this file with python.
    """
    known, now = json.loads(KNOWN.read_text()), defaults()
    changed = [
        f"{name}.{key}: {value!r} was {known['defaults'][name][key]!r}"
        for name, own in now.items()
        for key, value in own.items()
        if key in known["defaults"].get(name, {}) and known["defaults"][name][key] != value
    ]
    assert known["schema"] == record.SCHEMA
    assert not changed


@pytest.mark.parametrize("words", [["adapter.lora_alpha=16"], ["trainer.test=true"], ["logger=none"]])
def test_settings_that_are_spelled_alike_are_known_without_building_anything(words):
    assert settings_key(plain(compose(words))) == settings_key(plain(compose([])))
    assert settings_key(plain(compose(["seed=1"]))) != settings_key(plain(compose([])))


def test_a_record_holds_its_settings_so_that_they_are_found_again(tmp_path):
    content = plain(compose(["data.limit=3", "optimizer.lr=1e-30", "+model.config.note=hf_aaaaaaaaaaaa"]))
    entry = record.blank("a", config=content)
    record.write(tmp_path, {**entry, "status": "completed"})
    assert settings_key(record.read(tmp_path)["config"]) == settings_key(content)


if __name__ == "__main__":
    KNOWN.write_text(json.dumps({"schema": record.SCHEMA, "defaults": defaults()}, indent=1) + "\n")
