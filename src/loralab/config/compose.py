"""Composes the command line, conf/ and sweeps/ into one configuration, by Hydra."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from loralab.config import sweep_files
from loralab.config.classes import foreign_keys
from loralab.config.places import data_root, searched
from loralab.config.words import LITERAL, forced, in_quotes, quoted
from loralab.errors import ConfigError

ONE_CLASS = (  # groups of which a trial has one option
    *("model", "quantization", "adapter", "data", "optimizer", "schedule", "trainer", "logger", "memory", "plan"),
)
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # one that is not escaped
_ABSENT = object()
DEFAULTS = {"launcher": "packed", "sweeper": "loralab"}  # of Hydra's own groups


def register_resolvers() -> None:
    """``loralab.mul`` (alpha tied to r), ``loralab.trial_id`` (a trial's folder in a sweep) and ``loralab.rank_for``
    (the rank, or what else sets an adapter's size, with that many parameters), ``loralab.steps`` (a number of steps,
    unless epochs say it); and loralab's own launcher and sweeper, unless a file or a word names another."""
    _set_hydra_defaults()
    OmegaConf.register_new_resolver("loralab.mul", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("loralab.trial_id", _trial_id, replace=True)
    OmegaConf.register_new_resolver("loralab.rank_for", _rank_for, replace=True)
    OmegaConf.register_new_resolver("loralab.steps", _steps, replace=True)


def _set_hydra_defaults() -> None:
    from hydra.conf import HydraConf
    from hydra.core.config_store import ConfigStore

    chosen = [{key: DEFAULTS.get(key, value) for key, value in entry.items()} for entry in HydraConf().defaults]
    ConfigStore.instance().store(group="hydra", name="config", node=HydraConf(defaults=chosen), provider="loralab")


def _trial_id(*, _root_: DictConfig) -> str:
    from loralab.config.build import trial_id  # imports this module

    return trial_id(_root_)


def _steps(usual: int, *, _parent_: DictConfig) -> int:
    """Of ``trainer.max_steps`` where nothing else sets it: with ``trainer.max_epochs`` none, as in Lightning."""
    return usual if _parent_.get("max_epochs") is None else -1


def _rank_for(budget: int, *, _root_: DictConfig) -> int:
    from loralab.config.budget import rank_for

    return rank_for(budget, _root_)


def plain(config: DictConfig, words: Iterable[str] | None = None) -> dict[str, Any]:
    """The resolved configuration without Hydra's own part. Raises ConfigError where it cannot be resolved.

    ``words``: the command line's; None: taken from Hydra's part. Where they name a class for a group, the yaml's keys
    that neither they nor the class have are left out.
    """
    if words is None:
        words = OmegaConf.select(config, "hydra.overrides.task") or []
    try:
        resolved = {str(key): _resolved(config, str(key)) for key in config if key != "hydra"}
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        if (cause := _refusal(error)) is not None:
            raise ConfigError(f"{key}: {cause}") from error
        raise ConfigError(f"{key} cannot be resolved: {str(error).strip().splitlines()[0]}") from error
    for group, key in foreign_keys(resolved, words):
        del resolved[group][key]
    return resolved


def _resolved(config: DictConfig, key: str) -> Any:
    value = config[key]
    if not OmegaConf.is_config(value):
        return value
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)


def as_called(hydra: Any) -> list[str]:
    """The settings of the command line as they were written, interpolations and escapes too."""
    return [str(word) for word in cast(list[Any], OmegaConf.to_container(hydra.overrides.task, resolve=False))]


def settled_words(hydra: Any, content: Mapping[str, Any]) -> list[str]:
    """The settings of the command line, each with the value that it has in ``content`` where it was written as an
    interpolation: ``adapter.lora_alpha=16``, which says the same in another call."""
    words = enumerate(as_called(hydra))
    return [_settled(word, hydra, at, content) if _INTERPOLATION.search(word) else word for at, word in words]


def _settled(word: str, hydra: Any, at: int, content: Mapping[str, Any]) -> str:
    setting = word.partition("=")[0]
    found: Any = content
    for part in setting.lstrip("+").split("."):
        found = found.get(part, _ABSENT) if isinstance(found, Mapping) else _ABSENT
    if found is _ABSENT or setting.lstrip("+") in hydra.runtime.choices:
        return str(hydra.overrides.task[at])
    if isinstance(found, str) and "${" in found:  # a text that means itself
        return f"{setting}='{in_quotes(found).replace('${', chr(92) + '${')}'"
    return f"{setting}={sweep_files.grammar(found)}"


def as_yaml(content: Mapping[str, Any]) -> str:
    """A resolved configuration as OmegaConf writes it, in a tenth of its time: a launcher does it for every trial."""
    text: str = yaml.dump(content, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return text


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Repeats what occurs twice; texts that OmegaConf would read as numbers are quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if LITERAL.fullmatch(text) else None)


_Dumper.add_representer(str, _text)


def plain_sweep(config: DictConfig) -> dict[str, Any]:
    """What the configuration says under ``sweep``, resolved; empty where it says nothing. Raises ConfigError."""
    asked = config.get("sweep") or OmegaConf.create()
    if not isinstance(asked, DictConfig):
        raise ConfigError(f"sweep={asked!r} is no group of settings; valid: a sweep file, or null")
    sweep = cast(dict[Any, Any], OmegaConf.to_container(asked, resolve=True))
    return {str(key): value for key, value in sweep.items()}


def _refusal(error: BaseException | None) -> ConfigError | None:
    """What a resolver of ours raised, which OmegaConf wraps; None: the error is OmegaConf's own."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def compose(overrides: list[str], name: str = "train", config_dir: str | None = None) -> DictConfig:
    """The configuration of conf/NAME.yaml with ``overrides``, without running anything.

    ``config_dir``: a folder that is searched before ./conf and loralab's, as by the flag of this name. Raises
    ConfigError where there is no such folder.
    """
    words = quoted(forced(overrides))
    with searched(config_dir):
        config = _composed(words, name)
    with open_dict(config):
        for group, key in foreign_keys(config, words):
            del config[group][key]
    return config


def _composed(words: list[str], name: str = "train") -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_resolvers()
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        config = cast(DictConfig, hydra_compose(name, overrides=words, return_hydra_config=True))
    if name == "train":
        check_one_each(config, config.hydra)
        with open_dict(config):
            del config["hydra"]
    return config


def check_one_each(content: Mapping[str, Any], hydra: Any) -> None:
    """Raises ConfigError for a group that is one class and was given several options, of which Hydra merges the
    settings into those of the last. ``hydra``: its own part, which lists no such group among its choices."""
    if hydra.job.config_name != "train":  # one of the user's own may set a group without an option
        return
    for group in ONE_CLASS:
        if group in content and group not in hydra.runtime.choices:
            more = ", or logger=several, from which ~logger.NAME takes one away" if group == "logger" else ""
            raise ConfigError(
                f"{group}=[...]: a list of options merges their settings into one class, the last; valid: one option"
                f" in one run, or -m {group}=A,B for one trial of each{more}"
            )


def shown(overrides: list[str]) -> list[str]:
    """``overrides`` for ``--cfg``: with words that remove the keys which a class named among them does not have."""
    if not sweep_files.named_classes(overrides):
        return overrides
    words = quoted(forced(overrides))
    foreign = foreign_keys(_composed(words), words)
    # set first, because Hydra does not remove a key whose value is null
    return [*overrides, *(word for group, key in foreign for word in (f"++{group}.{key}=0", f"~{group}.{key}"))]


def sweep_axes(chosen: str, folder: Path | None = None) -> list[str]:
    """The keys that the sweep file of ``+sweeps=`` varies; empty where there is no such file, or none that can be read.

    ``folder``: the one that the sweep was begun in; None: the current one.
    """
    path = sweep_files.locate(chosen, folder)
    try:
        scale = sweep_files.scale_of(chosen, folder)
        return [key.lstrip("+") for key in (sweep_files.axes(path, scale) if path else None) or ()]
    except ConfigError:  # it has changed since the sweep
        return []
