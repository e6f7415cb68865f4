"""Classes and functions that ``_target_`` names, with their arguments checked against their signatures."""

import inspect
import sys
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from loralab.errors import ConfigError, nearest


def refused(cls: Any, key: str, error: Exception) -> ConfigError:
    """The ConfigError, beginning with ``key``, for what ``cls`` raised at its arguments."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return ConfigError(f"{key}: {cls.__name__} refuses its options: {text}")


def path_of(cls: Any) -> str:
    """``module.name`` of a class or function, whatever name it was found by."""
    module, name = getattr(cls, "__module__", ""), getattr(cls, "__qualname__", "")
    return f"{module}.{name}" if name else repr(cls)


def imported(path: str) -> Any:
    """What ``path_of`` names, in a module that has been imported."""
    module = next(name for name in _beginnings(path) if name in sys.modules)
    return attrgetter(path.removeprefix(f"{module}."))(sys.modules[module])


def _beginnings(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _parameters(cls: Any, skip: int) -> dict[str, inspect.Parameter]:
    """The arguments of a class or function behind the first ``skip``; of a class's ``__init__`` self is none."""
    return dict([*inspect.signature(cls).parameters.items()][skip:])


def defaults(cls: Any, skip: int) -> dict[str, Any]:
    """{argument: default} behind the first ``skip`` arguments."""
    return {name: one.default for name, one in _parameters(cls, skip).items() if one.default is not one.empty}


def check_names(
    cls: Any,
    values: Mapping[str, Any],
    key: str,
    skip: int = 0,
    others: tuple[str, ...] = (),
    of_run: tuple[str, ...] = (),
) -> None:
    """Raises ConfigError where ``values`` has a name that is no argument of ``cls`` behind the first ``skip`` and none
    of ``others``, with the nearest that it has, or lacks one that ``cls`` needs. ``of_run``: what the run gives."""
    parameters = _parameters(cls, skip)
    named = [name for name, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        for name in values:
            if name not in named:
                valid = nearest(name, {*named, *others}) if named or others else "it has none"
                raise ConfigError(f"{key}.{name} is not an option of {cls.__name__}; {valid}")
    for name in named:
        if parameters[name].default is inspect.Parameter.empty and name not in values and name not in of_run:
            raise ConfigError(f"{key}.{name} is missing, which {cls.__name__} needs; +{key}.{name}=VALUE sets it")


def checked(cls: Any, values: Mapping[str, Any], key: str, skip: int, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """``values`` but for those that are defaults. Raises ConfigError for an unknown name, or where one is missing."""
    check_names(cls, values, key, skip, others, of_run=("max_steps",))
    usual = defaults(cls, skip)
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if name not in usual or not _equal(value, usual[name])}


def _equal(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default if isinstance(value, bool) else bool(value == default)
