"""Imports the classes that ``_target_`` names; finds the yaml keys that a class of the user's does not have."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import signature
from typing import Any

from loralab.config.words import own_classes
from loralab.errors import ConfigError
from loralab.records import sources


def target(node: Any, key: str) -> Any:
    """The class that ``node`` names in ``_target_``; the current folder is searched too. Raises ConfigError."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{key} must be one of the options of conf/{key}/, got {node!r}")
    module, _, name = str(node["_target_"]).rpartition(".")
    if module.partition(".")[0] != "loralab":
        sources.importable()
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_={node['_target_']!r} cannot be found: {error}") from error


BARE: dict[str, tuple[str, ...]] = {"optimizer": ("lr", "lr_ratio"), "schedule": ()}
"""{group that takes a class or function which is no spec: the keys of its yaml that this one is given too}."""


def _known(cls: Any, group: str) -> tuple[str, ...]:
    """The keys of a yaml that ``cls`` is given. Raises TypeError for a class that is of no use there."""
    if group in BARE and not is_dataclass(cls):
        given: Iterable[str] = signature(cls).parameters
        return tuple(key for key in BARE[group] if key in given or key == "lr_ratio")
    return tuple(field.name for field in fields(cls))


def foreign_keys(config: Mapping[Any, Any], words: Iterable[str]) -> list[tuple[str, str]]:
    """(group, key) of the keys of a yaml that the class which ``words`` name for its group does not have."""
    keys: list[tuple[str, str]] = []
    for group, set_keys in own_classes(words).items():
        node = config.get(group)
        try:
            known = {"_target_", *_known(target(node, group), group), *set_keys}
        except (ConfigError, TypeError):  # reported when it is built
            continue
        keys += [(group, str(key)) for key in node or () if key not in known]
    return keys
