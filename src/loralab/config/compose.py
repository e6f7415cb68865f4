"""From a composed Hydra configuration to checked specs: unknown keys and wrong types fail before anything loads."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, make_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from loralab.config import identity
from loralab.config.words import forced, own_classes, quoted
from loralab.errors import ConfigError, DataError, nearest
from loralab.records import sources

if TYPE_CHECKING:
    from loralab.training.specs import TrialSpec

SPECS = (
    "adapter",
    "quantization",
    "optimizer",
    "schedule",
    "trainer",
    "data",
    "logger",
    "model",
    "memory",
    "plan",
)  # cheapest import first
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes of a file's name, characters of a path
OTHERS = ("callbacks", "seed", "metric", "metric_mode", "sweep")


def data_root() -> Path:
    """The folder that holds conf/ and sweeps/: the package in a wheel, the repository in a checkout."""
    package = Path(__file__).parents[1]
    return package if (package / "conf").is_dir() else package.parents[1]


def register_resolvers() -> None:
    """``loralab.root``, ``loralab.mul`` (alpha tied to r), ``loralab.trial_id`` (a trial's folder in a sweep)."""
    OmegaConf.register_new_resolver("loralab.root", lambda: str(data_root()), replace=True)
    OmegaConf.register_new_resolver("loralab.mul", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("loralab.trial_id", lambda *, _root_: trial_id(_root_), replace=True)


def plain(config: DictConfig, words: Iterable[str] | None = None) -> dict[str, Any]:
    """The resolved configuration without Hydra's own part.

    ``words``: of the command line; null: as Hydra's part has them. Where they name a group's class, the yaml's keys
    that are neither theirs nor that class's are left out.
    """
    if words is None:
        words = OmegaConf.select(config, "hydra.overrides.task") or []
    copied = OmegaConf.create({str(key): config._get_node(key) for key in config if key != "hydra"})
    try:
        resolved = OmegaConf.to_container(copied, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise ConfigError(f"{key} cannot be resolved: {_first_line(error)}") from error
    assert isinstance(resolved, dict)
    for group, key in _others(resolved, words):
        del resolved[group][key]
    return {str(key): value for key, value in resolved.items()}


def _others(config: Mapping[Any, Any], words: Iterable[str]) -> list[tuple[str, str]]:
    """(group, key) of what a yaml holds and the class that ``words`` name in its place does not have."""
    found = []
    for group, given in own_classes(words).items():
        node = config.get(group)
        try:
            names = {one.name for one in fields(_target(node, group))}
        except (ConfigError, TypeError):  # told when it is built
            continue
        found += [(group, str(key)) for key in node or () if key not in {"_target_", *names, *given}]
    return found


def _content(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    return plain(config) if isinstance(config, DictConfig) else cast(dict[str, Any], config)


def trial_id(config: DictConfig | Mapping[str, Any]) -> str:
    """10 hex digits over all that decides a trial's result: the same packed, alone, in any folder.

    ``config``: composed, or plain and resolved.
    """
    content = _content(config)
    try:
        _check_keys(content)
        return identity.trial_id({key: build(content[key], key) for key in identity.USUAL}, content)
    except Exception:  # settings of no trial; whoever builds its specs is told what is wrong
        return identity.unbuilt_id(content)


def trial_spec(
    config: DictConfig | Mapping[str, Any],
    folder: Path,
    overrides: list[str] | None = None,
    choices: Mapping[str, str] | None = None,
) -> "TrialSpec":
    """Every part of ``config`` built and checked. Raises ConfigError with the dotted key that is wrong."""
    content = _content(config)
    _check_keys(content)
    sweep = content.get("sweep") or {}
    if content["metric_mode"] not in ("min", "max"):
        raise ConfigError(f"metric_mode must be min or max, got {content['metric_mode']!r}")
    if type(content["seed"]) is not int or content["seed"] < 0:
        raise ConfigError(f"seed must be a whole number of at least 0, got {content['seed']!r}")
    specs = {key: build(content[key], key) for key in SPECS}
    callbacks = dict(_callbacks(content.get("callbacks") or {}))
    from loralab.training.specs import (
        TrialSpec,  # torch, Lightning and the rest, once the settings are known to be sound
    )

    _check_metric(content["metric"], content["metric_mode"], specs, specs["trainer"].patience is not None)
    return TrialSpec(
        id=identity.trial_id(specs, content),
        folder=folder,
        seed=content["seed"],
        metric=content["metric"],
        metric_mode=content["metric_mode"],
        **specs,
        callbacks=callbacks,
        config=content,
        overrides=list(overrides or []),
        choices=dict(choices or {}),
        sweep=sweep.get("name"),
    )


def _check_keys(content: Mapping[str, Any]) -> None:
    valid = (*SPECS, *OTHERS)
    for key in valid:
        if key not in content:
            raise ConfigError(f"{key} is missing: ~{key} took it away; valid: all of {', '.join(valid)}")
    for key in content:
        if key not in valid:
            raise ConfigError(f"{key} is not an option; {nearest(key, valid)}")
    for key in ("sweep", "callbacks"):
        if not isinstance(content[key], Mapping | None):
            raise ConfigError(f"{key}={content[key]!r} is no group of settings; valid: a mapping, or null")


def _check_metric(metric: str, mode: str, specs: Mapping[str, Any], watched: bool) -> None:
    from loralab.forward.metrics import HIGHER, names

    model = specs["model"]
    if specs["data"].generate_rows and model.task == "sequence_classification":
        rows = specs["data"].generate_rows
        raise ConfigError(f"data.generate_rows={rows}: a classifier generates no text; valid: 0")
    scores = model.task == "sequence_classification" and model.num_labels == 1
    task = "regression" if scores else model.task
    watchable = names(task, False, False)
    if watched and metric not in watchable:
        raise ConfigError(
            f"trainer.patience watches metric={metric!r}, which no validation on the way measures;"
            f" valid: {', '.join(watchable)}"
        )
    valid = names(task, specs["data"].generate_rows > 0, specs["trainer"].test)
    if metric not in valid:
        raise ConfigError(f"metric={metric!r} is not measured by this run; {nearest(str(metric), valid)}")
    best = "max" if metric.rpartition("/")[2] in HIGHER else "min"
    if mode != best:
        which = "higher" if best == "max" else "lower"
        raise ConfigError(f"metric_mode={mode} would rank a worse {metric} first: {which} is better; valid: {best}")


def build(node: Mapping[str, Any], key: str) -> Any:
    """The spec that ``node`` names in ``_target_``, its fields checked by name and type."""
    _check_paths(node, key)
    cls = _target(node, key)
    text = json.dumps(node, default=repr)
    if (cls, key, text) not in _built:
        if len(_built) > 4096:
            _built.clear()
        _built[cls, key, text] = _build(cls, node, key)
    return _built[cls, key, text]


def _check_paths(node: Any, key: str) -> None:
    """A name that no file system takes is none of a file, and of a hub neither."""
    for name in identity.PATHS.get(key, ()) if isinstance(node, Mapping) else ():
        value = node.get(name)
        longest = max((len(part.encode(errors="replace")) for part in str(value or "").split("/")), default=0)
        if longest > LONGEST_NAME or len(str(value)) > LONGEST_PATH:
            text = f"{key}.{name}={str(value)[:40]}... has {len(str(value))} characters, and no file has such a name"
            raise (DataError if key == "data" else ConfigError)(f"{text}; valid: an existing path")


_built: dict[tuple[Any, str, str], Any] = {}  # specs are frozen: the trials of a sweep share those that are equal


def _build(cls: Any, node: Mapping[str, Any], key: str) -> Any:
    values = {str(name): value for name, value in node.items() if name != "_target_"}
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ConfigError(
            f"{key}._target_={node['_target_']!r} is not a loralab spec; valid: a dataclass derived from one"
        )
    names = [one.name for one in fields(cls)]
    _check_switches(cls, values, key)
    try:
        merged = OmegaConf.merge(_schema(cls, key), values)
        return OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        unknown = next((name for name in values if name not in names), None)
        if unknown is None:  # a key inside one of them
            raise ConfigError(f"{key}.{error.full_key or '?'}: {_first_line(error)}") from error
        valid = nearest(unknown, names) if names else "it has none"
        raise ConfigError(f"{key}.{unknown} is not an option of {cls.__name__}; {valid}") from error
    except OmegaConfBaseException as error:
        where = f"{key}.{error.full_key}" if getattr(error, "full_key", None) else key
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    except (TypeError, ValueError) as error:  # of a class of the user's own
        raise ConfigError(f"{key}: {cls.__name__} refuses its options: {error}") from error


def _schema(cls: Any, key: str) -> Any:
    """How OmegaConf checks the fields' types. Raises ConfigError where one has a type that it does not know."""
    try:
        return OmegaConf.structured(cls)
    except OmegaConfBaseException as error:
        for one in fields(cls):
            try:
                OmegaConf.structured(make_dataclass("One", [(one.name, get_type_hints(cls)[one.name])]))
            except OmegaConfBaseException:
                kind = getattr(one.type, "__name__", one.type)
                raise ConfigError(
                    f"{key}.{one.name}: {cls.__name__} says it is of type {kind}, which no setting is checked by;"
                    " valid: Any, or a type such as int, float, str, bool, list[str], dict[str, int]"
                ) from error
        raise


def _check_switches(cls: Any, values: Mapping[str, Any], key: str) -> None:
    """OmegaConf takes every whole number for true."""
    for one in fields(cls):
        value = values.get(one.name)
        if one.type in (bool, "bool") and type(value) is int and value not in (0, 1):
            raise ConfigError(f"{key}.{one.name}={value} is no switch; valid: true, false")


def _callbacks(nodes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Callbacks are made anew for each fit, so what is kept is how; their keys are checked now."""
    for name, node in nodes.items():
        if node is None:
            continue
        cls = _target(node, f"callbacks.{name}")
        from lightning.pytorch import Callback

        if not (isinstance(cls, type) and issubclass(cls, Callback)):
            raise ConfigError(f"callbacks.{name}._target_={node['_target_']!r} is not a Lightning callback")
        values = {str(key): value for key, value in node.items() if key != "_target_"}
        try:
            cls(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"callbacks.{name}: {error}") from error
        yield name, partial(cls, **values)


def _target(node: Any, key: str) -> Any:
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{key} must be one of the options of conf/{key}/, got {node!r}")
    module, _, name = str(node["_target_"]).rpartition(".")
    if module.partition(".")[0] != "loralab":
        sources.importable()
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_={node['_target_']!r} cannot be found: {error}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def quantizers(config: DictConfig) -> dict[str, Any]:
    """The schemes of a quantization study by name: ``study.schemes``, or the one that ``quantization=`` chooses.

    A scheme is {option: a file of conf/quantization, any of its keys}; an option of the scheme's own name may be left
    out. Each spec is built, so that a wrong key is told before a weight is read.
    """
    content = plain(config)
    schemes = {str(name): dict(node or {}) for name, node in content["study"]["schemes"].items()}
    chosen = build(content["quantization"], "quantization")
    if chosen.name != "none":
        return {chosen.name: chosen}
    folder = data_root() / "conf" / "quantization"
    known = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    made = {}
    for name, keys in schemes.items():
        option = str(keys.pop("option", name))
        if option not in known:
            raise ConfigError(f"study.schemes.{name}.option={option!r} is unknown; {nearest(option, known)}")
        node = OmegaConf.merge(OmegaConf.load(folder / f"{option}.yaml"), keys)
        made[name] = build(cast(Any, OmegaConf.to_container(node)), f"study.schemes.{name}")
    return made


def compose(overrides: list[str], name: str = "train") -> DictConfig:
    """The configuration of conf/NAME.yaml with ``overrides``, without running anything."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_resolvers()
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        words = quoted(forced(overrides))
        config = cast(DictConfig, hydra_compose(name, overrides=words, return_hydra_config=name != "train"))
    with open_dict(config):
        for group, key in _others(config, words):
            del config[group][key]
    return config


def shown(overrides: list[str]) -> list[str]:
    """``overrides`` as Hydra is to show them: without the keys that a class named among them does not have."""
    if not own_classes(overrides):
        return overrides
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_resolvers()
    words = quoted(forced(overrides))
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        left = _others(hydra_compose("train", overrides=words), words)
    # set first, because Hydra takes a key that is null for none
    return [*overrides, *(word for group, key in left for word in (f"++{group}.{key}=0", f"~{group}.{key}"))]


def sweep_axes(name: str) -> list[str]:
    """The keys that ``sweeps/NAME.yaml`` varies by itself; empty where there is no such file."""
    path = data_root() / "sweeps" / f"{name}.yaml"
    if not path.is_file():
        return []
    return [str(key) for key in OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params") or {}]
