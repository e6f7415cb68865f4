"""Fewer layers than ``target_modules`` names, by PEFT's rules: some excluded, some blocks alone."""

import re
from collections.abc import Iterable
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import Strict

from loralab.errors import ConfigError, nearest
from loralab.quantization.base import matching
from loralab.spec import Natural

Names = Annotated[list[str], MinLen(1)]
NamePattern = Annotated[str, Strict(), MinLen(1)]
Targets = Annotated[Names | NamePattern, "all-linear, a list of names or a regular expression"]
TargetsOrNull = Annotated[Names | NamePattern | None, "null, a list of names or a regular expression"]
Indexes = Annotated[
    Annotated[list[Natural], MinLen(1)] | Natural | None, "null, the number of a block or a list of them"
]


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether the layer ``name`` is one of ``modules``, or lies in one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def without_excluded(names: list[str], exclude_modules: Any) -> list[str]:
    """Those of ``names`` that are, or end in, no entry of ``exclude_modules``; a text is a regular expression on the
    whole name. Raises ConfigError where an entry excludes nothing, or all are excluded."""
    if exclude_modules is None:
        return names
    entries = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules
    excluded: set[str] = set()
    for entry in entries:
        found = _matched(names, entry, isinstance(exclude_modules, str))
        if not found:
            leaves = {name.rpartition(".")[2] for name in names}
            raise ConfigError(f"adapter.exclude_modules: {entry!r} is no adapted layer; {nearest(entry, leaves)}")
        excluded |= found
    if excluded >= set(names):
        raise ConfigError(
            f"adapter.exclude_modules={exclude_modules!r} leaves none of the {len(names)} layers of "
            "adapter.target_modules; valid: some of them"
        )
    return [name for name in names if name not in excluded]


def of_blocks(names: list[str], layers_to_transform: int | list[int] | None) -> list[str]:
    """Those of ``names`` in the blocks that ``layers_to_transform`` numbers, from 0. Raises ConfigError where a block
    has none."""
    if layers_to_transform is None:
        return names
    wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    numbers = {name: block_number(name) for name in names}
    present = sorted({number for number in numbers.values() if number is not None})
    missing = [number for number in wanted if number not in present]
    if missing:
        valid = f"0 to {present[-1]}" if present == list(range(len(present))) and present else f"{present}"
        raise ConfigError(
            f"adapter.layers_to_transform: no adapted layer is in a block {missing[0]}; valid: "
            f"{valid if present else 'null, since none of them is in a numbered block'}"
        )
    return [name for name in names if numbers[name] in wanted]


def block_number(name: str) -> int | None:
    """The first number in a layer's name that has two words before it (PEFT's rule); None where there is none."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(found[1]) if found else None


def _matched(names: list[str], entry: str, pattern: bool) -> set[str]:
    if pattern:
        return set(matching(entry, names, "adapter.exclude_modules"))
    return {name for name in names if name == entry or name.endswith(f".{entry}")}
