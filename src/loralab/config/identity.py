"""What makes two trials one: the settings that decide a result, after their types have settled."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import PurePath
from posixpath import normpath
from typing import Any, cast

from loralab.records.record import SCHEMA, redact

ID_LENGTH = 10
VOLATILE = ("hydra", "logger", "callbacks", "sweep", "plan")  # they do not change what a trial computes
ASIDE = {"trainer": ("test",), "memory": ("snapshot",)}  # nor do these keys: what else is measured, and where it goes
PATHS = {"data": ("train", "validation", "test"), "model": ("name_or_path", "tokenizer")}
UNORDERED = ("target_modules", "exclude_modules", "layers_to_transform", "skip_modules")  # sets of names
FIRST_WINS = ("rank_pattern", "alpha_pattern")  # mappings whose order decides
# A section that is this and differs in nothing is left out, so that a later section renames no trial.
USUAL = {
    "adapter": "LoRA",
    "quantization": "NoQuantization",
    "optimizer": "AdamW",
    "schedule": "Schedule",
    "trainer": "TrainerSpec",
    "data": "Docstrings",
    "model": "Pretrained",
    "memory": "MemorySpec",
}
SCALARS = {"seed": None, "metric": "val/loss", "metric_mode": "min"}


def trial_id(specs: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """10 hex digits over the schema and all that differs from the specs' defaults.

    ``specs``: the built sections; ``content``: the configuration, for the seed and the metric. A path counts as it is
    spelled (``./a`` is ``a``), so a relative one means the same trial wherever the project lies, and another than the
    absolute one.
    """
    parts = {key: part for key in USUAL if (part := difference(specs[key], key)) is not None}
    scalars = {key: content[key] for key, usual in SCALARS.items() if content[key] != usual}
    return _digest({"schema": SCHEMA, **parts, **scalars})


def unbuilt_id(content: Mapping[str, Any]) -> str:
    """Of settings that no spec can be built from: they fail, under a name of their own."""
    return _digest({"schema": SCHEMA, "unbuilt": settings(content)})


def difference(spec: Any, section: str) -> list[Any] | None:
    """[class, {field: value that is not its default}]; None for the usual class with nothing but defaults."""
    cls = type(spec)
    ours = cls.__module__.partition(".")[0] == "loralab"  # wherever in the package it comes to lie
    name = cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"
    defaults = _defaults(cast(Any, cls))
    keys = [field.name for field in fields(spec) if field.name not in ASIDE.get(section, ())]
    values = {key: _settled(getattr(spec, key), key, section) for key in keys}
    usual = {key: _settled(defaults[key], key, section) for key in keys if key in defaults}
    differing = {key: value for key, value in values.items() if key not in usual or value != usual[key]}
    return [name, differing] if differing or name != USUAL[section] else None


@cache
def _defaults(cls: Any) -> dict[str, Any]:
    """A class's defaults as an instance has them; without one, as the fields say."""
    try:
        spec = cls()
    except Exception:  # a field without a default, or defaults that do not go together
        values = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        factories = {field.name: field.default_factory for field in fields(cls)}
        return values | {name: make() for name, make in factories.items() if make is not MISSING}
    return {field.name: getattr(spec, field.name) for field in fields(cls)}


def _settled(value: Any, key: str, section: str) -> Any:
    """One form for what means one thing: 16 and 16.0, a set of names in any order, ./a and a."""
    if key in PATHS.get(section, ()) and isinstance(value, str) and value:
        return normpath(value)
    if key in FIRST_WINS and isinstance(value, Mapping):
        return [[str(name), plain(item)] for name, item in value.items()]
    settled = plain(value)
    if key in UNORDERED and isinstance(settled, list):
        return sorted({json.dumps(item) for item in settled})
    return settled


def plain(value: Any) -> Any:
    """As JSON types, whole numbers as such: 16.0 is 16."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value  # inf and nan are none
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, as a record may hold it, without what does not decide a result."""
    kept: dict[str, Any] = {}
    for key, value in redact(content).items():
        if key in VOLATILE:
            continue
        aside = ASIDE.get(key, ())
        kept[key] = {k: v for k, v in value.items() if k not in aside} if aside and isinstance(value, dict) else value
    return kept


def settings_key(content: Mapping[str, Any]) -> str:
    """Equal for configurations that spell the same settings: then the trial is the same, and no spec need be built."""
    return json.dumps(plain(settings(content)), sort_keys=True, default=str)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:ID_LENGTH]
