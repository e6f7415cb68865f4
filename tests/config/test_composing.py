"""Trials composed from copies are what Hydra composes, word for word."""

import pytest
from hydra import initialize_config_dir
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from loralab.cli.sweep import sweep_arguments
from loralab.config import sweep_files
from loralab.config.compose import register_resolvers
from loralab.config.places import data_root
from loralab.config.scales import parted
from loralab.config.words import quoted
from loralab.scheduling import axes
from loralab.scheduling.composing import Composed

SWEEPS = [
    *sorted(path.stem for path in (data_root() / "sweeps").glob("*.yaml")),
    *("paper/qlora_table2", "paper/lora_table6@paper", "paper/lora_table16@paper"),
]


@pytest.fixture(scope="module")
def loaders():
    """Hydra's loader, the quick one over it, and the configuration of a sweep."""
    register_resolvers()
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        plain = GlobalHydra.instance().config_loader()
        words = ["hydra/launcher=packed", "hydra.launcher.pack=off"]
        yield plain, Composed(plain), plain.load_configuration("train", words, run_mode=RunMode.MULTIRUN)


def assert_same(loaders, words):
    hydras, quick, master = loaders
    expected = hydras.load_sweep_config(master, words)
    found = quick._copy_with_values(master, [*map(str, master.hydra.overrides.hydra), *words])
    assert OmegaConf.to_container(found, resolve=False) == OmegaConf.to_container(expected, resolve=False)
    for node, other in ((found, expected), (found.hydra, expected.hydra), (found.model, expected.model)):
        assert OmegaConf.is_struct(node) == OmegaConf.is_struct(other)
        assert OmegaConf.is_readonly(node) == OmegaConf.is_readonly(other)
        assert OmegaConf.get_type(node) == OmegaConf.get_type(other)
    return found


@pytest.mark.parametrize("name", SWEEPS)
def test_the_last_trial_of_every_sweep(loaders, name):
    given = [word for word in sweep_arguments(name, []) if not word.startswith("hydra.")]
    sweep = sweep_files.load(data_root() / "sweeps" / f"{parted(name)[0]}.yaml", parted(name)[1]).sweep
    trials = axes.trials(
        axes.at_ends(quoted(given)), *(OmegaConf.to_container(sweep).get(key) for key in ("zip", "when"))
    )
    loaders[1]._copy_with_values(loaders[2], trials[0])  # a copy, not the one that was composed
    assert_same(loaders, list(trials[-1]))


@pytest.mark.parametrize(
    "words",
    [
        ["adapter.r=3", "adapter.r=4"],
        ["~callbacks.progress", "seed=1"],
        ["model=random", "+model.config.hidden_size=32", "model.config.hidden_size=64", "++model.config.a=1"],
        ["model=random", "+model.config={a: 1}", "+model.config.b=2"],
        ["data=files", "data.prompt='{mr}\\n'", "data.labels=[a,b]", "adapter.target_modules='a.*'"],
        ["optimizer.lr=1e-3", "optimizer=adamw_8bit"],
        ["logger=none", "callbacks=none", "adapter.lora_alpha=${adapter.r}"],
    ],
    ids=" ".join,
)
def test_words_of_every_kind(loaders, words):
    config = assert_same(loaders, words)
    again = assert_same(loaders, words)
    config.seed = 99
    assert again.seed != 99  # no two trials are given the same object


@pytest.mark.parametrize("words", [["adapter.q=3"], ["nothing=3"], ["model=nothing"], ["+seed=3"], ["adapter.r=(("]])
def test_what_hydra_refuses_is_refused_in_its_words(loaders, words):
    hydras, quick, master = loaders
    with pytest.raises(Exception) as expected:  # noqa: PT011 - of several kinds
        hydras.load_sweep_config(master, words)
    with pytest.raises(type(expected.value)) as found:
        quick.load_sweep_config(master, words)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_what_these_tests_keep_of_a_composition_is_what_hydra_makes_anew(loaders, monkeypatch, mode):
    words = [
        "model=random",
        "+model.config.a=1",
        "~callbacks.progress",
        "hydra/launcher=packed",
        "adapter.r=3",
        "seed=2",
    ]
    kept = [loaders[0].load_configuration("train", words, run_mode=mode) for _ in range(2)]
    monkeypatch.setattr(config_loader_impl, "create_defaults_list", config_loader_impl.create_defaults_list.__wrapped__)
    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge.__wrapped__)
    monkeypatch.setattr(OverridesParser, "parse_rule", OverridesParser.parse_rule.__wrapped__)
    anew = loaders[0].load_configuration("train", words, run_mode=mode)
    for config in kept:
        assert OmegaConf.to_container(config, resolve=False) == OmegaConf.to_container(anew, resolve=False)
        assert OmegaConf.is_struct(config) == OmegaConf.is_struct(anew)
        assert OmegaConf.get_type(config.hydra) == OmegaConf.get_type(anew.hydra)
