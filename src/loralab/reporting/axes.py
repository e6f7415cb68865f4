"""What a record has on an axis, which axes there are, and one spelling for every value."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, Any]
# No part of what a trial is: trials that differ only here (and by seed) are seeds of one configuration.
_ASIDE = {"seed", "sweep", "sweeps", "hydra", "logger", "callbacks", "metric", "metric_mode", "output", "run_dir"}


def label(value: Any) -> str:
    """One spelling per value, so that ``2``, ``"2"``, ``[a, b]`` and ``'[a,b]'`` meet."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return ",".join(label(item) for item in value)
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{label(item)}" for key, item in value.items())
    text = str(value).strip().strip("'\"")
    if text.startswith("[") and text.endswith("]"):
        return ",".join(label(item) for item in text[1:-1].split(","))
    number = as_number(text)
    return text if number is None else f"{number:.12g}"


def as_number(text: str) -> float | None:
    """The finite number that ``text`` spells, if it does."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < 1e300 else None


def sort_key(text: str) -> tuple[float, str]:
    number = as_number(text)
    return (0.0, text) if number is None else (number, "")


def lookup(config: Any, dotted: str) -> Any:
    """``config["a"]["b"]`` for ``a.b``; None where there is no such key."""
    for part in dotted.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def axis_value(record: Record, axis: str) -> str:
    """What the trial has on an axis: the chosen group option, else the config's value, else its override."""
    if axis in record["choices"]:
        return label(record["choices"][axis])
    if axis == "seed" and record["seed"] is not None:
        return label(record["seed"])
    value = lookup(record["config"], axis)
    if value is not None and not isinstance(value, Mapping):
        return label(value)
    overrides = dict(item.lstrip("+~").partition("=")[::2] for item in record["overrides"])
    return label(overrides[axis]) if axis in overrides else "?"


def varying(found: Sequence[Record], axes: list[str]) -> list[str]:
    """Config keys and group choices that vary and do not follow from ``axes`` (``lora_alpha`` follows from
    ``r`` where every r has one lora_alpha); so trials that are told apart by nothing else still are."""
    choices = list(dict.fromkeys(group for record in found for group in record["choices"]))
    keys = list(dict.fromkeys(key for record in found for key in flatten(record["config"])))
    flat = [{**flatten(record["config"]), **record["choices"]} for record in found]
    chosen: list[str] = []
    for key in [*choices, *keys]:
        known = [*axes, *chosen]
        if not aside(key) and key not in known and not _follows(found, flat, known, key):
            chosen.append(key)
    return chosen


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested config -> dotted keys; lists are values, ``_target_`` is left out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif key != "_target_":
            flat[f"{prefix}{key}"] = value
    return flat


def identity(record: Record) -> str:
    """Equal for trials that differ only by seed: the whole config and the choices, without what is aside."""
    config = {key: value for key, value in record["config"].items() if not aside(key)}
    choices = {key: value for key, value in record["choices"].items() if not aside(key)}
    return json.dumps([config, choices], sort_keys=True, default=str)


def short_names(axes: Sequence[str]) -> dict[str, str]:
    """``adapter.r`` -> ``r``, where no other axis ends alike."""
    last = Counter(axis.rpartition(".")[2] for axis in axes)
    return {axis: tail if last[tail := axis.rpartition(".")[2]] == 1 else axis for axis in axes}


def _follows(found: Sequence[Record], flat: list[Record], known: list[str], key: str) -> bool:
    """Whether the labels of ``known`` decide the label of ``key`` in every trial."""
    seen: dict[tuple[str, ...], str] = {}
    for record, config in zip(found, flat, strict=True):
        place = tuple(axis_value(record, axis) for axis in known if axis != "seed")
        value = label(config.get(key))
        if seen.setdefault(place, value) != value:
            return False
    return True


def aside(key: str) -> bool:
    """Whether a key says nothing about what a trial is."""
    return re.split(r"[./]", key)[0] in _ASIDE
