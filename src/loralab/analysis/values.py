"""What a record holds on an axis, which axes there are, when two values are equal, and how each is written."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeGuard

from loralab.config import identity as settings
from loralab.records.shared import once

Json = dict[str, Any]
UNKNOWN = "-"  # the label of a value that nothing tells, and of a setting that a trial does not have
# No part of what a trial is: trials that differ only here (and by seed) are seeds of one configuration.
_ASIDE = {
    *("seed", "sweep", "sweeps", "hydra", "logger", "callbacks"),
    *("metric", "metric_mode", "metrics", "output", "run_dir", "plan"),
}
_ASIDE_KEYS = {"trainer.test", "trainer.until", "data.forgetting"}

_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9_]*)")
_REAL = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")
_ITEM = re.compile(r"""(?:[^,'"\[\]]|'[^']*'|"[^"]*"|\[[^\]]*\])+""")
_MAPPINGS = (dict, Mapping)  # what nearly all are is looked for first
_WORDS = {"null": None, "true": True, "false": False}


class _Unsaid:
    """The value of an axis of which a record says nothing; null is a value."""


UNSAID = _Unsaid()


def canonical(value: Any) -> str:
    """Equal for equal settings, and only for them: 16, 16.0 and "16" are one, two texts that differ by a blank two.

    A text that spells a number is that number, since a setting's type decides which of the two it becomes.
    """
    if value is UNSAID:
        return UNKNOWN
    if value is None or isinstance(value, str | int | float):
        return _canonical_of(value)
    return once(_canonical_text, value)


def _canonical_text(value: Any) -> str:
    return json.dumps(_settled(value), sort_keys=True)


@lru_cache(maxsize=2**16, typed=True)  # True is not 1
def _canonical_of(value: str | float | None) -> str:
    """Of what every trial is asked for."""
    return json.dumps(_settled(value))


def spelled(text: str) -> Any:
    """The value that the text of an override stands for: quotes taken off, lists split."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    if text.startswith("[") and text.endswith("]"):
        return [spelled(item) for item in _ITEM.findall(text[1:-1])]
    return text


def label(value: Any) -> str:
    """A value as a reader sees it; two values may look alike, see ``names``."""
    value = _settled(value)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return ",".join(label(item) for item in value)
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{label(item)}" for key, item in value.items())
    if isinstance(value, str) and value != " ".join(value.split()):
        return json.dumps(value, ensure_ascii=False)  # blanks that would not be seen
    return str(value)


def names(values: Iterable[Any]) -> dict[str, str]:
    """canonical -> label for the values of one axis, each with a label of its own."""
    values_by_key = {canonical(value): value for value in values}
    labels = {key: UNKNOWN if value is UNSAID else label(value) for key, value in values_by_key.items()}
    distinct = len({UNKNOWN, *labels.values()}) == len({UNKNOWN, *labels})
    return labels if distinct else {key: key for key in labels}


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether JSON has it as a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_number(text: str) -> float | None:
    """The finite number that ``text`` spells, if it does."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < 1e300 else None


def sort_key(canonical: str) -> tuple[bool, float, str]:
    """Numbers by size, then texts."""
    number = as_number(canonical)
    return (number is None, number or 0.0, canonical)


def lookup(config: Any, dotted: str) -> Any:
    """``config["a"]["b"]`` for ``a.b``; None where there is no such key."""
    for part in dotted.split("."):
        config = config.get(part) if isinstance(config, _MAPPINGS) else None
    return config


def axis_value(record: Json, axis: str) -> Any:
    """What the trial has on an axis: the chosen group option, else the config's value, else its override."""
    if axis in record["choices"]:
        return record["choices"][axis]
    if axis == "seed" and record["seed"] is not None:
        return record["seed"]
    value = lookup(record["config"], axis)
    if value is not None and not isinstance(value, Mapping):
        return value
    overrides = dict(item.lstrip("+~").partition("=")[::2] for item in record["overrides"])
    if axis in overrides:
        return spelled(overrides[axis])
    group, _, key = axis.rpartition(".")
    holder = lookup(record["config"], group) if group else record["config"]
    return None if isinstance(holder, Mapping) and key in holder else UNSAID


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested config -> dotted keys; lists are values, ``_target_`` is left out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif key != "_target_":
            flat[f"{prefix}{key}"] = value
    return flat


def flat(name: str, value: Any) -> dict[str, Any]:
    """``flatten({name: value})``; of a shared section computed once. Do not change it."""
    return once(_flat, value, name)


def _flat(value: Any, name: str) -> dict[str, Any]:
    return flatten({name: value})


def identity(record: Json) -> str:
    """Equal for trials that differ only by seed: the whole config and the choices, without what is aside, and
    of the callbacks what decides a result."""
    config = record["config"]
    texts = {key: once(_deciding, value, key) for key, value in config.items() if not aside(key)}
    texts["callbacks"] = once(_callbacks, config.get("callbacks"))
    content = ", ".join(f"{json.dumps(key)}: {text}" for key, text in sorted(texts.items()))
    choices = once(_choices, record["choices"])
    return sys.intern(f"[{{{content}}}, {choices}]")  # of trials that differ in numbers alone, kept once


def _deciding(value: Any, name: str) -> str:
    """The canonical text of a section of a config, without what is aside."""
    left_out = [dotted.rpartition(".")[2] for dotted in _ASIDE_KEYS if dotted.startswith(f"{name}.")]
    if not left_out or not isinstance(value, Mapping):
        return canonical(value)
    return canonical({key: item for key, item in value.items() if key not in left_out})


def _callbacks(nodes: Any) -> str:
    return canonical([*settings.stops({"callbacks": nodes}), *settings.callbacks(nodes)])


def _choices(choices: Json) -> str:
    return canonical({key: value for key, value in choices.items() if not aside(key)})


def short_names(axes: Sequence[str]) -> dict[str, str]:
    """``adapter.r`` -> ``r``, where no other axis ends alike."""
    last = Counter(axis.rpartition(".")[2] for axis in axes)
    return {axis: tail if last[tail := axis.rpartition(".")[2]] == 1 else axis for axis in axes}


@cache
def aside(key: str) -> bool:
    """Whether a key says nothing about what a trial is."""
    named = key.rpartition("@")[2]  # of a choice such as data@data.forgetting, where it is put
    below = any(f"{named}.".startswith(f"{one}.") for one in _ASIDE_KEYS)
    return below or re.split(r"[./]", key)[0] in _ASIDE


def _settled(value: Any) -> Any:
    """As JSON has it, numbers and words without regard to how they were written."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        is_integer = value.is_integer() and abs(value) < 1e15
        return int(value) if is_integer else value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): _settled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_settled(item) for item in value]
    text = str(value)
    if len(text) < 300 and _WHOLE.fullmatch(text):
        return int(text)
    if len(text) < 300 and _REAL.fullmatch(text):
        return _settled(float(text))
    return _WORDS.get(text.lower(), text)
