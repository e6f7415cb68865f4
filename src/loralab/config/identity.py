"""Trial ids: a digest of the settings that decide a result, in one canonical form."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import PurePath
from posixpath import normpath
from typing import Any, cast

from loralab.config.classes import target
from loralab.errors import ConfigError
from loralab.records.record import SCHEMA
from loralab.records.secrets import redact

ID_LENGTH = 10
VOLATILE = ("hydra", "logger", "callbacks", "sweep", "plan")  # sections that do not change what a trial computes
LIBRARIES = ("loralab.", "lightning.pytorch.", "pytorch_lightning.")  # whose callbacks do not either, but for a few
VOLATILE_KEYS = {
    "trainer": ("test", "passed", "until", "strategy", "devices"),
    "data": ("forgetting",),
    "memory": ("snapshot",),
    "quantization": ("dequantize",),  # the same bits either way
}  # nor do these: what else is measured, where it goes, what is kept in memory
PATHS = {"data": ("train", "validation", "test"), "model": ("name_or_path", "tokenizer")}
# sets of names
UNORDERED = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "skip_modules")
FIRST_WINS = ("rank_pattern", "alpha_pattern")  # mappings whose order decides
# A section of this class with nothing but defaults is left out, so that a new section changes no trial's id.
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
STOPPING = {"mode": "min", "min_delta": 0, "patience": 3, "check_finite": True}  # EarlyStopping's defaults
SPEECH = ("_target_", "verbose", "strict", "log_rank_zero_only")  # its options that decide nothing
SCALARS = {"seed": None, "metric": "val/loss", "metric_mode": "min"}


def decides(word: str) -> bool:
    """Whether an override says which trials are run; false of one that only says how they run."""
    group, _, name = word.lstrip("+~").partition("=")[0].partition(".")
    return group.partition("/")[0] not in VOLATILE and name not in VOLATILE_KEYS.get(group, ())


def trial_id(specs: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """10 hex digits over the schema and all that differs from the specs' defaults.

    ``specs``: the built sections; ``content``: the configuration, for the seed and the metric. A path counts as it is
    spelled (``./a`` is ``a``), so a relative one means the same trial wherever the project lies, and another than the
    absolute one.
    """
    parts = {key: part for key in USUAL if (part := difference(specs[key], key)) is not None}
    scalars = {key: content[key] for key, usual in SCALARS.items() if content[key] != usual}
    own = {"metrics": plain(metrics)} if (metrics := content.get("metrics")) else {}
    return _digest({"schema": SCHEMA, **parts, **scalars, **own, **_deciding(content)})


def _deciding(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of the callbacks decides a result; empty where none does."""
    found = {"stops": stops(content), "callbacks": callbacks(content.get("callbacks"), _observes)}
    return {key: value for key, value in found.items() if value}


def callbacks(nodes: Any, observes: Callable[[Mapping[str, Any]], bool] = lambda node: False) -> list[Any]:
    """The ``callbacks`` that may change what a trial computes, without their names: those that are neither loralab's
    nor Lightning's, and Lightning's Timer where it ends the training. Its EarlyStopping is apart, in ``stops``.

    ``observes``: whether one of the former only looks on.
    """
    found = []
    for node in nodes.values() if isinstance(nodes, Mapping) else ():
        if not isinstance(node, Mapping):
            continue
        name = str(node.get("_target_"))
        ends = name.endswith(".Timer") and node.get("duration") is not None
        own = not name.startswith(LIBRARIES) and not name.endswith(".EarlyStopping")
        if ends or (own and not observes(node)):
            found.append(plain(node))
    return sorted(found, key=lambda node: json.dumps(node, sort_keys=True, default=str))


def _observes(node: Mapping[str, Any]) -> bool:
    """Whether the class of a callback says ``pack_aware = True``: it reads no single trial's state."""
    try:
        return bool(getattr(target(node, "callbacks"), "pack_aware", False))
    except ConfigError:  # reported when it is built
        return False


def stops(content: Mapping[str, Any]) -> list[Any]:
    """Lightning's EarlyStopping among the callbacks, by what of it decides a result."""
    nodes = content.get("callbacks")
    named = [node for node in (nodes.values() if isinstance(nodes, Mapping) else ()) if isinstance(node, Mapping)]
    rules = [
        {str(name): plain(value) for name, value in node.items() if STOPPING.get(str(name), name) != value}
        for node in named
        if str(node.get("_target_")).rpartition(".")[2] == "EarlyStopping"
    ]
    found = [{name: value for name, value in rule.items() if name not in SPEECH} for rule in rules]
    return sorted(found, key=lambda rule: json.dumps(rule, sort_keys=True, default=str))


def unbuilt_id(content: Mapping[str, Any]) -> str:
    """The id of settings that no spec can be built from, for the record of the failure."""
    return _digest({"schema": SCHEMA, "unbuilt": settings(content)})


def difference(spec: Any, section: str) -> list[Any] | None:
    """[class, {field: value that is not its default}]; None for the usual class with nothing but defaults."""
    cls = type(spec)
    ours = cls.__module__.partition(".")[0] == "loralab"  # whatever its module
    name = cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"
    defaults = _defaults(cast(Any, cls))
    keys = [field.name for field in fields(spec) if field.name not in VOLATILE_KEYS.get(section, ())]
    values = {key: _canonical(getattr(spec, key), key, section) for key in keys}
    usual = {key: _canonical(defaults[key], key, section) for key in keys if key in defaults}
    differing = {key: value for key, value in values.items() if key not in usual or value != usual[key]}
    return [name, differing] if differing or name != USUAL[section] else None


@cache
def _defaults(cls: Any) -> dict[str, Any]:
    """The defaults of a class as an instance has them; where none can be made, those of its fields."""
    try:
        spec = cls()
    except Exception:  # a field has no default, or the defaults contradict each other
        values = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        factories = {field.name: field.default_factory for field in fields(cls)}
        return values | {name: make() for name, make in factories.items() if make is not MISSING}
    return {field.name: getattr(spec, field.name) for field in fields(cls)}


def _canonical(value: Any, key: str, section: str) -> Any:
    """The same form for equal values: 16 and 16.0, a set of names in any order, ./a and a."""
    if key in PATHS.get(section, ()) and isinstance(value, str) and value:
        return normpath(value)
    if key in FIRST_WINS and isinstance(value, Mapping):
        return [[str(name), plain(item)] for name, item in value.items()]
    canonical = plain(value)
    if key in UNORDERED and isinstance(canonical, list):
        return sorted({json.dumps(item) for item in canonical})
    return canonical


def plain(value: Any) -> Any:
    """``value`` in JSON types; 16.0 becomes 16."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value  # False for inf and nan
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def flat(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all in ``content`` that is no mapping, and of mappings in it that are empty."""
    if isinstance(content, Mapping) and (content or not path):
        for name, value in content.items():
            yield from flat(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, content


def settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without secrets and without what does not decide a result."""
    sections = {key: value for key, value in redact(content).items() if key not in VOLATILE}
    for section, keys in VOLATILE_KEYS.items():
        if isinstance(value := sections.get(section), dict):
            sections[section] = {key: item for key, item in value.items() if key not in keys}
    return sections | _deciding(content)


def settings_key(content: Mapping[str, Any]) -> str:
    """Equal for configurations with the same settings. These have one trial id, and no spec need be built for it."""
    return json.dumps(plain(settings(content)), sort_keys=True, default=str)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:ID_LENGTH]
