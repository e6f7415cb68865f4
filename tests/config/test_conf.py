"""Every option and every trial of every sweep composes, builds, and lists all its keys."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from loralab.cli.sweep import sweep_arguments
from loralab.config import sweep_files
from loralab.config.build import SPECS, build, trial_id, trial_spec
from loralab.config.compose import as_yaml, compose, plain, sweep_axes
from loralab.config.places import data_root
from loralab.config.words import quoted
from loralab.scheduling.axes import at_ends
from loralab.scheduling.dimension import search_of
from loralab.scheduling.rounds import of_axes

CONF = data_root() / "conf"
WHOLE = ("experiment", "method")  # settings of several groups
OPTIONS = sorted(
    (path.relative_to(CONF).parts[0], str(path.relative_to(CONF / path.relative_to(CONF).parts[0]).with_suffix("")))
    for path in CONF.rglob("*/*.yaml")
    if not {"hydra", *WHOLE} & set(path.relative_to(CONF).parts)
)
SWEEPS = sorted(path.stem for path in (data_root() / "sweeps").glob("*.yaml"))  # those of papers: test_papers
GIVEN = {
    "hf": ["model.name_or_path=somewhere"],
    "files": ["data.train=t.jsonl"],
    "chat": ["data.train=t.jsonl"],
    "hub": ["data.name=x"],
}


def test_there_is_something_to_test():
    assert len(OPTIONS) > 30
    assert "quickstart" in SWEEPS


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["/".join(pair) for pair in OPTIONS])
def test_every_option_builds_and_lists_every_key_of_its_spec(group, option, monkeypatch):
    monkeypatch.setattr("loralab.config.loggers.find_spec", lambda name: name)  # extras need not be installed
    config = compose([f"{group}={option}", *GIVEN.get(option, [])])
    if group not in SPECS:  # callbacks are made anew for each fit; trial_spec tries each once
        trial_spec(config, Path())
        return
    content = plain(config)
    node = content[group]
    spec = build(node, group)
    if not str(node.get("_target_")).startswith("loralab."):  # Lightning's loggers have arguments of their own
        return
    passed = {"decisive", "passed"} if group == "trainer" else set()  # +trainer.NAME
    assert set(node) - {"_target_", "strategy"} == {one.name for one in fields(spec)} - passed
    assert group != "adapter" or spec.method == option  # as tables and records name it


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["/".join(pair) for pair in OPTIONS])
def test_every_option_says_in_its_first_line_what_it_is(group, option):
    first = (CONF / group / f"{option}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith((".", "?"))


@pytest.mark.parametrize(
    "path", [path for group in WHOLE for path in (CONF / group).rglob("*.yaml")], ids=lambda path: path.stem
)
def test_settings_of_several_groups_say_what_they_are_and_compose(path):
    package, first, command = path.read_text().splitlines()[:3]
    assert package == "# @package _global_"
    assert (first[:2], first[-1]) == ("# ", ".")
    group, *parts = path.relative_to(CONF).with_suffix("").parts
    assert f"+{group}={'/'.join(parts)}" in command
    assert trial_spec(compose([f"+{group}={'/'.join(parts)}"]), Path()).adapter is not None


def trials(name):
    """The overrides of each trial of one seed: what a seed makes of an id is test_identity's."""
    words = quoted([word for word in sweep_arguments(name, []) if not word.startswith("hydra.")])
    master = compose(words[:1])
    every = of_axes(master, at_ends(words))
    seed = next((word for word in every[0] if word.startswith("seed=")), None)
    listed = [words for words in every if seed is None or seed in words]
    search = search_of(master)
    return [*listed, *(search.first(listed, "min") if search else [])]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_trial_of_a_sweep_builds_and_is_a_trial_of_its_own(name, tmp_path):
    found = set()
    for overrides in trials(name):
        config = compose(list(overrides))
        spec = trial_spec(config, tmp_path)
        found.add(spec.id)
        assert spec.id == trial_id(config)
    assert len(found) == len(trials(name)) > 1


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_says_what_it_asks_and_what_it_holds_fixed(name):
    stored = sweep_files.load(data_root() / "sweeps" / f"{name}.yaml")
    assert stored.sweep.name == name
    assert stored.sweep.question.endswith("?")
    assert stored.sweep.fixed
    assert "seed" in stored.hydra.sweeper.params
    assert "mode" not in stored.hydra


def test_alpha_follows_r_where_the_sweep_says_so():
    for overrides in trials("rank"):
        adapter = plain(compose(list(overrides)))["adapter"]
        assert adapter["lora_alpha"] == 2 * adapter["r"]


def test_an_override_replaces_the_axis_of_a_sweep():
    arguments = sweep_arguments("rank", ["adapter.r=3"])
    assert [a for a in arguments if a.startswith("adapter.r=")] == ["adapter.r=3"]
    arguments = sweep_arguments("method", ["+method=lora"])
    assert [a for a in arguments if a.startswith("+method=")] == ["+method=lora"]


def test_the_id_ignores_what_does_not_change_a_result_and_only_that():
    base = trial_id(compose([]))
    assert trial_id(compose(["logger=none", "callbacks=none"])) == base
    assert trial_id(compose(["seed=1"])) != base
    assert trial_id(compose(["adapter.r=9"])) != base


@pytest.mark.parametrize("word", ["data.prompt={mr}\\n", "data.prompt='{mr}\\n'", 'data.prompt="{mr}\\n"'])
def test_a_template_needs_no_quotes_of_hydras(word):
    config = compose(["data=files", "data.train=t.jsonl", word, "data.target=it's {ref}, yes"])
    assert config.data.prompt == "{mr}\\n"
    assert config.data.target == "it's {ref}, yes"


def test_the_axes_of_a_sweep_are_named_as_records_name_them():
    assert sweep_axes("cost") == ["method", "seed"]
    assert sweep_axes("rank") == ["adapter.r", "seed"]
    assert sweep_axes("nowhere") == []


ODD = {  # texts and values that YAML may read otherwise
    **{
        f"number {text}": text
        for text in ("1e3", "1_000", "0x1F", "+1.", ".5", "nan", "-.inf", "12", "1:30", "2020-01-01")
    },
    **{
        f"word {text}": text
        for text in ("yes", "null", "true", "~", "", " x", "a: b", "é✓", "line\nbreak", "{q}\n", "- x")
    },
    "values": [1e-5, float("inf"), None, True, [], {}, ["a", {"b": 1}]],
    "twice": [["a"], ["a"]],
}


def test_a_configuration_is_written_as_omegaconf_reads_it():
    shared = ["q_proj"]
    content = {**ODD, "shared": {"first": shared, "second": shared}}
    text = as_yaml(content)
    assert OmegaConf.to_container(OmegaConf.create(text)) == content
    assert "&" not in text
    spec = json.loads((Path(__file__).parent / "spec_defaults.json").read_text())
    assert as_yaml(spec) == OmegaConf.to_yaml(OmegaConf.create(spec))
