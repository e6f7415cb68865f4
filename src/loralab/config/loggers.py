"""The ``logger`` group: loralab's specs, any of Lightning's loggers by ``_target_``, or several of them by name."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib.util import find_spec
from typing import Any

from loralab.config.classes import checked, no_settings, target
from loralab.errors import ConfigError


def logger(node: Any, key: str = "logger") -> Any:
    """The LoggerSpec of ``node``. One with a ``_target_`` is a logger, and further ones may be its values; one without
    is a mapping of names to loggers. Raises ConfigError."""
    from loralab.records.loggers import Loggers

    if not isinstance(node, Mapping):
        raise no_settings(node, key)
    others = {
        str(name): value
        for name, value in node.items()
        if "_target_" not in node or (isinstance(value, Mapping) and "_target_" in value)
    }
    first = {name: value for name, value in node.items() if name not in others}
    specs = {"": _one(first, key)} if "_target_" in first else {}
    specs |= {name: _one(value, f"{key}.{name}") for name, value in others.items() if value is not None}
    return specs[""] if list(specs) == [""] else Loggers(tuple(specs.values()))


def _one(node: Any, key: str) -> Any:
    from loralab.records.loggers import LightningLogger
    from loralab.spec import make

    cls = target(node, key)
    values = {str(name): value for name, value in node.items() if name != "_target_"}
    if isinstance(cls, type) and is_dataclass(cls) and hasattr(cls, "start"):
        made = make(cls, values, key)
        if (extra := getattr(cls, "extra", "")) and not find_spec(extra):
            raise ConfigError(f"{key}: {extra} is not installed: pip install -e '.[{extra}]'; or logger=csv")
        return made
    from lightning.pytorch.loggers import Logger, TensorBoardLogger

    if not (isinstance(cls, type) and issubclass(cls, Logger)):
        raise ConfigError(
            f"{key}._target_={node['_target_']!r} is no logger; valid: a class derived from "
            "lightning.pytorch.loggers.Logger, or a spec with start(folder, labels, resumed, left_out)"
        )
    if issubclass(cls, TensorBoardLogger) and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise ConfigError(f"{key}: TensorBoard is not installed: pip install -e '.[tensorboard]'; or logger=csv")
    return LightningLogger(cls, checked(cls, {**_defaults(cls), **node}, key), key)


def _defaults(cls: type[Any]) -> dict[str, Any]:
    """Arguments that a logger needs and a run knows better: set when it starts, since each trial has its own folder."""
    from inspect import signature

    named = signature(cls).parameters
    return {name: None for name in ("save_dir",) if name in named and named[name].default is named[name].empty}
