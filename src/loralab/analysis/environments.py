"""The environments of trials: what of hardware and versions changes a number. Only within one do trials compare."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from loralab.analysis.values import Json, lookup
from loralab.records.shared import Section, distinct, once

AXIS = "environment"
BEFORE = "32-true"  # what trainer.precision=auto was before records said it
# Versions that compute: a loss, a quantized weight, an update or a score. Python, Hydra, W&B and git move no number.
_VERSIONS = ("loralab", "torch", "transformers", "lightning", "bitsandbytes", "torchmetrics")
COMPARED = (
    f"compared are the versions of {', '.join(_VERSIONS)}, the device, what trainer.precision=auto came to "
    "and, on a CPU, the number of threads"
)

Environment = Mapping[str, Any]


def environment(record: Json) -> Environment:
    """The versions and the hardware that change numbers; None where the record does not say.

    An older record has no thread count: there the number of cores, by which torch chooses it, stays in the CPU's name.
    """
    device = lookup(record, "memory.device") or ("cpu" if record["choices"].get("trainer") == "cpu" else None)
    asked = lookup(record["config"], "trainer.precision")
    precision = (lookup(record, "base.precision") or BEFORE) if asked == "auto" else None
    return once(_environment, record["environment"], device, precision, record["schema"])


def _environment(section: Json, device: str | None, precision: str | None, schema: int) -> Environment:
    values = {name: lookup(section, f"versions.{name}") for name in _VERSIONS}
    gpu, cpu, threads = (lookup(section, key) for key in ("gpu", "cpu", "threads"))
    values |= {"device": device, "gpu": None if device == "cpu" else gpu, "record schema": schema}
    values |= {"precision": precision} if precision else {}  # else it is a setting
    if device is None or device == "cpu":
        name = re.sub(r" x \d+$", "", cpu) if isinstance(cpu, str) and threads is not None else cpu
        values |= {"cpu": name, "threads": threads}
    return Section(values)


def labels(records: Sequence[tuple[Json, bool]]) -> list[str]:
    """How each record's environment differs from the others', such as ``torch 2.12.0``; empty where there is only one.

    ``records``: each with whether it has a result; one without joins the environment most like its own.
    """
    environments = [environment(record) for record, _ in records]
    with_result = [this for this, (_, ok) in zip(environments, records, strict=True) if ok]
    different: list[Environment] = []
    for this in distinct(with_result):
        different += [this] if this not in different else []
    if len(different) < 2:
        return []
    usual = Counter(map(different.index, with_result))
    likely = [different[place] for place, _ in usual.most_common()]  # the usual one first, where several are alike
    told_of = {id(this): _label(max(likely, key=partial(_in_common, this)), likely) for this in distinct(environments)}
    return [told_of[id(this)] for this in environments]


def told(this: Environment, keys: Sequence[str]) -> str:
    """What the environment has under ``keys``: ``loralab 0.1.0, torch 2.13.0``."""
    return ", ".join(_text(key, this.get(key)) for key in keys)


def _in_common(this: Environment, other: Environment) -> int:
    return sum(key in other and other[key] == value for key, value in this.items())


def _label(this: Environment, distinct: Sequence[Environment]) -> str:
    keys = dict.fromkeys(key for other in distinct for key in other)
    differing = [key for key in keys if any(other.get(key) != this.get(key) for other in distinct)]
    return told(this, differing)


def _text(key: str, value: Any) -> str:
    if value is None:
        return f"no {key}" if key in ("gpu", "bitsandbytes") else f"{key} not recorded"
    return str(value) if key in ("device", "gpu", "cpu") else f"{key} {value}"
