"""Imports the classes that ``_target_`` names; finds the yaml keys that a class of the user's does not have."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import import_module
from inspect import signature
from typing import Any

from loralab.config.words import own_classes
from loralab.errors import ConfigError, nearest
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


def checked(cls: type[Any], node: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The keys of ``node`` as arguments of a class that is no spec. Raises ConfigError for one that it does not have,
    with the nearest that it has, and for one that is missing."""
    given = {str(name): value for name, value in node.items() if name != "_target_"}
    parameters = list(signature(cls).parameters.values())
    named = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        for name in given:
            if name not in named:
                valid = nearest(name, named) if named else "it has none"
                raise ConfigError(f"{key}.{name} is not an option of {cls.__name__}; {valid}")
    missing = [one.name for one in parameters if one.name in named and one.default is one.empty]
    if missing := [name for name in missing if name not in given]:
        raise ConfigError(f"{key}.{missing[0]} is missing: {cls.__name__} needs it")
    return given


def foreign_keys(config: Mapping[Any, Any], words: Iterable[str]) -> list[tuple[str, str]]:
    """(group, key) of the keys of a yaml that the class which ``words`` name for its group does not have."""
    keys: list[tuple[str, str]] = []
    for group, set_keys in own_classes(words).items():
        node = config.get(group)
        try:
            known = {"_target_", *(field.name for field in fields(target(node, group))), *set_keys}
        except (ConfigError, TypeError):  # reported when it is built
            continue
        keys += [(group, str(key)) for key in node or () if key not in known]
    return keys
