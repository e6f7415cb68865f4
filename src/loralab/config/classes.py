"""Imports the classes that ``_target_`` names; finds the yaml keys that a class of the user's does not have."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from loralab.config.places import shown
from loralab.config.sweep_files import named_classes
from loralab.errors import ConfigError, nearest
from loralab.optim.targets import check_names
from loralab.quick_imports import quick_imports
from loralab.records import sources


def target(node: Any, key: str) -> Any:
    """The class that ``node`` names in ``_target_``; the current folder is searched too. Raises ConfigError."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise no_settings(node, key)
    module, _, name = str(node["_target_"]).rpartition(".")
    if module.partition(".")[0] != "loralab":
        sources.importable()
    try:
        with quick_imports():
            return getattr(import_module(module), name)
    except Exception as error:  # a module of the user's own may raise anything
        said = f"{key}._target_={node['_target_']!r} cannot be found: {_why(error, module, name)}"
        raise ConfigError(said) from error


def no_settings(node: Any, key: str) -> ConfigError:
    """What is wrong with ``node`` in the place of a class and its settings."""
    if "." in key:
        return ConfigError(f"{key} must be a mapping with a _target_, got {node!r}")
    if isinstance(node, str):
        return ConfigError(
            f"{key}: {node!r} is a text, where an option's settings belong; valid: {key}=OPTION on the command line,"
            f" and in the defaults of a yaml file '- override /{key}: OPTION' with an option of conf/{key}/"
        )
    return ConfigError(f"{key} must be one of the options of conf/{key}/, got {node!r}")


def _why(error: Exception, module: str, name: str) -> str:
    """Which part of ``module.name`` is missing and where it was searched, or what its import raised and where."""
    if not module:
        return "a class is named with its module; valid: MODULE.CLASS, as in lab.Scaled"
    if isinstance(error, AttributeError) and (found := sys.modules.get(module)) is not None and _is_loaded(found):
        file, named = getattr(found, "__file__", None), vars(found).items()
        own = [key for key, value in named if f"{getattr(value, '__module__', '')}.".startswith(f"{module}.")]
        classes = [key for key in own if callable(vars(found)[key]) and not key.startswith("_")]
        return f"{module} ({shown(Path(file)) if file else 'built in'}) has no {name}; {nearest(name, classes)}"
    missing = str(error.name) if isinstance(error, ModuleNotFoundError) else ""
    if missing and f"{module}.".startswith(f"{missing}."):
        parent = missing.rpartition(".")[0]
        if parent:
            return f"{parent} has no module {missing.rpartition('.')[2]}"
        here = sorted(path.stem for path in Path.cwd().glob("*.py"))
        hint = nearest(missing, here).partition("valid: ")[0] if here else ""
        return f"there is no module {missing}; {hint}searched: {Path.cwd()} and what is installed in {sys.prefix}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shown(Path(error.filename))}:{error.lineno}: {error.msg}"
    return f"{_raised_at(error)}{type(error).__name__}: {error}"


def _is_loaded(module: ModuleType) -> bool:
    """False while, or after, its import raised."""
    return not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _raised_at(error: Exception) -> str:
    """``lab.py:12: `` of the last line below the current folder that ``error`` went through; empty without one."""
    frames = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(Path.cwd())]
    return f"{shown(Path(frames[-1].filename))}:{frames[-1].lineno}: " if frames else ""


BARE: dict[str, tuple[str, ...]] = {"optimizer": ("lr", "lr_ratio"), "schedule": ()}
"""{group that takes a class or function which is no spec: the keys of its yaml that this one is given too}."""


def _known(cls: Any, group: str) -> tuple[str, ...]:
    """The keys of a yaml that ``cls`` is given. Raises TypeError for a class that is of no use there."""
    if group in BARE and not is_dataclass(cls):
        given: Iterable[str] = signature(cls).parameters
        return tuple(key for key in BARE[group] if key in given or key == "lr_ratio")
    return tuple(field.name for field in fields(cls))


def checked(cls: type[Any], node: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The keys of ``node`` as arguments of a class that is no spec. Raises ConfigError for one that it does not have,
    with the nearest that it has, and for one that is missing."""
    given = {str(name): value for name, value in node.items() if name != "_target_"}
    check_names(cls, given, key)
    return given


def foreign_keys(config: Mapping[Any, Any], words: Iterable[str]) -> list[tuple[str, str]]:
    """(group, key) of the keys of a yaml that the class which ``words``, or the sweep file that they choose, name for
    its group does not have."""
    keys: list[tuple[str, str]] = []
    for group, set_keys in named_classes(words).items():
        node = config.get(group)
        try:
            known = {"_target_", *_known(target(node, group), group), *set_keys}
        except (ConfigError, TypeError):  # reported when it is built
            continue
        keys += [(group, str(key)) for key in node or () if key not in known]
    return keys
