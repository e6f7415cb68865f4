"""On what trials ran, as far as it moves their numbers: trials of one environment compare, of two they do not."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from loralab.analysis.values import Json, lookup

AXIS = "environment"
# Versions that compute: a loss, a quantized weight, an update or a score. Python, Hydra, W&B and git move no number.
_VERSIONS = ("loralab", "torch", "transformers", "lightning", "bitsandbytes", "torchmetrics")
COMPARED = f"compared are the versions of {', '.join(_VERSIONS)}, the device and, on a CPU, the number of threads"

Environment = dict[str, Any]


def environment(record: Json) -> Environment:
    """What moves numbers; None where the record does not say.

    An older record has no thread count: there the number of cores, by which torch chooses it, stays in the CPU's name.
    """
    found = {name: lookup(record, f"environment.versions.{name}") for name in _VERSIONS}
    gpu, cpu, threads = (lookup(record, f"environment.{key}") for key in ("gpu", "cpu", "threads"))
    device = lookup(record, "memory.device") or ("cpu" if record["choices"].get("trainer") == "cpu" else None)
    found |= {"device": device, "gpu": None if device == "cpu" else gpu, "record schema": record["schema"]}
    if device is None or device == "cpu":
        known = isinstance(cpu, str) and threads is not None
        found |= {"cpu": re.sub(r" x \d+$", "", cpu) if known else cpu, "threads": threads}
    return found


def labels(found: Sequence[tuple[Json, bool]]) -> list[str]:
    """What sets each record's environment apart from the others', such as ``torch 2.12.0``; empty where there is one.

    ``found``: records, and whether each has a result; one without joins the environment most like its own.
    """
    made = [environment(record) for record, _ in found]
    known = [one for one, (_, ok) in zip(made, found, strict=True) if ok]
    distinct = [one for index, one in enumerate(known) if one not in known[:index]]
    if len(distinct) < 2:
        return []
    usual = Counter(known.index(one) for one in known)
    distinct.sort(key=lambda one: -usual[known.index(one)])  # the likely one first, where several are alike
    return [_label(max(distinct, key=lambda other: _alike(one, other)), distinct) for one in made]


def _alike(one: Environment, other: Environment) -> int:
    return sum(key in other and other[key] == value for key, value in one.items())


def _label(one: Environment, distinct: Sequence[Environment]) -> str:
    keys = dict.fromkeys(key for other in distinct for key in other)
    apart = [key for key in keys if any(other.get(key) != one.get(key) for other in distinct)]
    return ", ".join(_said(key, one.get(key)) for key in apart)


def _said(key: str, value: Any) -> str:
    if value is None:
        return f"no {key}" if key in ("gpu", "bitsandbytes") else f"{key} not recorded"
    return str(value) if key in ("device", "gpu", "cpu") else f"{key} {value}"
