"""The trials of a sweep: the product of its axes, some of which move together (zip) or are in some trials only (when).

``sweep.zip: [[adapter.r, optimizer.lr]]``: the n-th value of each of these goes with the n-th of the others.
``sweep.when: {quantization.double_quant: {quantization: [nf4, fp4]}}``: an axis for the trials alone in which each key
behind it has the value, or one of the values; elsewhere it is left out, and the setting is what it is without it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer

from loralab.config import identity
from loralab.errors import ConfigError, nearest

Conditions = Mapping[str, Mapping[str, set[str]]]  # {axis: {other: its values in which the axis is there}}
EXAMPLES = {
    "zip": "[[adapter.r,optimizer.lr]]",
    "when": "{quantization.double_quant:{quantization:[nf4,fp4]}}",
}


@dataclass(frozen=True)
class Value:
    """One value of an axis: the override that sets it, and its canonical form, by which conditions compare."""

    word: str
    canonical: str


@dataclass(frozen=True)
class Axis:
    """A key of the command line with its values; one that is given a single value is an axis of one."""

    key: str  # with plus signs
    values: list[Value]
    swept: bool

    @property
    def name(self) -> str:
        return self.key.lstrip("+")


def trials(
    words: Sequence[str], zipped: Any = None, when: Any = None, loader: Any = None, written: Sequence[str] = ()
) -> list[list[str]]:
    """The overrides of each trial, the first axis moving slowest.

    ``words``: overrides, the later of two for one key counts; ``zipped``, ``when``: what the sweep says under these
    names; ``loader``: Hydra's config loader, which glob() asks; ``written``: the sweep file's axes, which ``words`` may
    have narrowed until ``when`` holds in no trial: its axis is left out then. Raises ConfigError where an axis has no
    value or no finite number of them, or where ``zipped`` or ``when`` name no axis, differ in length or never hold.
    """
    axes = _axes(words, loader)
    conditions = _conditions(when, axes)
    present = _present(axes, zipped, conditions)
    if never := _never_there(conditions, present):
        as_written = _axes([*words, *written], loader)
        _check_each_holds(conditions, never & _never_there(conditions, _present(as_written, zipped, conditions)))
    return [[axes[name].values[place].word for name, place in row] for row in dict.fromkeys(present)]


def _present(axes: Mapping[str, Axis], zipped: Any, conditions: Conditions) -> list[tuple[tuple[str, int], ...]]:
    """The axes of each trial, with the place of its value in each."""
    rows = [dict(_flat(row)) for row in product(*map(_places, _groups(zipped, axes)))]
    return [tuple((name, row[name]) for name in axes if _holds(name, row, axes, conditions)) for row in rows]


def _never_there(conditions: Conditions, present: Sequence[tuple[tuple[str, int], ...]]) -> set[str]:
    return set(conditions) - {name for row in present for name, _ in row}


def values_of(word: str) -> list[str]:
    """The values of the axis ``word``, as they are written; of a word with one value that one."""
    (axis,) = _axes([word], None).values()
    return [value.word.partition("=")[2] for value in axis.values]


def at_ends(words: Sequence[str]) -> list[str]:
    """``words`` with the two ends of each interval in place of it: values of a search's space to try it with."""
    found = []
    for override in OverridesParser.create().parse_overrides(list(words)):
        value: Any = override.value()
        is_interval = override.is_sweep_override() and not override.is_discrete_sweep()
        ends = f"{override.get_key_element()}={value.start},{value.end}" if is_interval else override.input_line
        found.append(str(ends))
    return found


def _axes(words: Sequence[str], loader: Any) -> dict[str, Axis]:
    """The axes by their keys as they are written, with plus signs."""
    parser = OverridesParser.create(config_loader=loader)
    found = {}
    for override in parser.parse_overrides(list(words)):
        axis = _axis(override)
        if not axis.values:
            raise ConfigError(f"the sweep has no trial: {override.input_line} has no value; valid: at least one")
        found[str(override.get_key_element())] = axis
    return found


def _axis(override: Override) -> Axis:
    key = override.get_key_element()
    name = key.lstrip("+")
    if not override.is_sweep_override():
        value = Value(f"{key}={override.get_value_element_as_str()}", canonical(override.value()))
        return Axis(key, [value], swept=False)
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line}: an interval has no values to go through; valid: {name}=A,B,C, choice(A,B) or"
            " range(FROM,TO,STEP)"
        )
    texts = override.sweep_string_iterator()
    values = override.sweep_iterator(transformer=Transformer.identity)
    found = [
        Value(f"{key}={text}", canonical(Override._convert_value(v))) for text, v in zip(texts, values, strict=True)
    ]
    return Axis(key, found, swept=True)


def says_what_runs(key: str) -> bool:
    """Whether a setting (a key without plus signs) is one of the trials': not their seed, not how their sweep goes."""
    return key not in ("seed", "sweeps") and not key.startswith("sweep.")


def canonical(value: Any) -> str:
    """The same text for equal values: 16 and 16.0, a text with quotes and without."""
    return json.dumps(identity.plain(value), sort_keys=True, default=str)


def _groups(zipped: Any, axes: Mapping[str, Axis]) -> list[list[Axis]]:
    """The axes, those that move together in one group, at the place of the group's first."""
    group_of: dict[str, list[Axis]] = {}
    for names in _zipped_names(zipped):
        group = [axes[_known(name, axes, "sweep.zip")] for name in names]
        lengths = {axis.name: len(axis.values) for axis in group}
        keys = [axis.key for axis in group]
        if repeated := [axis.name for axis in group if axis.key in group_of or keys.count(axis.key) > 1]:
            raise ConfigError(f"sweep.zip names {repeated[0]} twice; valid: each axis once")
        if len(set(lengths.values())) > 1:
            counted = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ConfigError(f"sweep.zip: {counted} values, and they move together; valid: as many of each")
        group_of |= dict.fromkeys(keys, sorted(group, key=list(axes.values()).index))
    groups = [group_of.get(key, [axis]) for key, axis in axes.items()]
    return [group for place, group in enumerate(groups) if group not in groups[:place]]


def _zipped_names(zipped: Any) -> list[list[str]]:
    """The groups of ``sweep.zip``; a single group may be written as one list."""
    groups = [zipped] if isinstance(zipped, list) and zipped and all(isinstance(x, str) for x in zipped) else zipped
    if groups is None:
        return []
    lists = isinstance(groups, list) and all(isinstance(group, list) and len(group) > 1 for group in groups)
    if not lists or not all(isinstance(name, str) for group in groups for name in group):
        raise _malformed("zip", zipped, "lists of axes, at least two in each")
    return [list(group) for group in groups]


def _conditions(when: Any, axes: Mapping[str, Axis]) -> Conditions:
    if when is None:
        return {}
    if not isinstance(when, Mapping) or not all(isinstance(other, Mapping) and other for other in when.values()):
        raise _malformed("when", when, "{axis: {other axis: value or list of values}}")
    conditions = {
        _known(str(name), axes, "sweep.when"): {
            _known(str(other), axes, f"sweep.when.{name}"): {
                canonical(value) for value in (values if isinstance(values, list) else [values])
            }
            for other, values in others.items()
        }
        for name, others in when.items()
    }
    for name in conditions:
        _check_not_circular(name, conditions, ())
    return conditions


def _malformed(key: str, value: Any, form: str) -> ConfigError:
    return ConfigError(f"sweep.{key}={value} is not understood: {form}; valid: such as sweep.{key}={EXAMPLES[key]}")


def _known(name: str, axes: Mapping[str, Axis], where: str) -> str:
    """The key of the axis ``name``, which may have plus signs. Raises ConfigError where there is none."""
    key = next((key for key, axis in axes.items() if axis.name == name.lstrip("+")), None)
    if key is None:
        swept = [axis.name for axis in axes.values() if axis.swept]
        raise ConfigError(f"{where} names {name}, which is no axis of this sweep; {nearest(name, swept)}")
    return key


def _check_not_circular(name: str, conditions: Conditions, above: tuple[str, ...]) -> None:
    if name in above:
        circle = " -> ".join([*above[above.index(name) :], name])
        raise ConfigError(f"sweep.when is circular: {circle}; valid: an axis that depends on others, not on itself")
    for other in conditions.get(name, ()):
        _check_not_circular(other, conditions, (*above, name))


def _places(group: Sequence[Axis]) -> list[list[tuple[str, int]]]:
    return [[(axis.key, place) for axis in group] for place in range(len(group[0].values))]


def _flat(row: Iterable[list[tuple[str, int]]]) -> list[tuple[str, int]]:
    return [pair for group in row for pair in group]


def _holds(name: str, row: Mapping[str, int], axes: Mapping[str, Axis], conditions: Conditions) -> bool:
    """Whether the axis is there in the trial of ``row`` {axis: place of its value}."""
    return all(
        axes[other].values[row[other]].canonical in allowed and _holds(other, row, axes, conditions)
        for other, allowed in conditions.get(name, {}).items()
    )


def _check_each_holds(conditions: Conditions, never: set[str]) -> None:
    for name, others in conditions.items():
        if name in never:
            wanted = " and ".join(f"{other} is {' or '.join(sorted(values))}" for other, values in others.items())
            raise ConfigError(
                f"sweep.when: {name} varies only where {wanted}, which is so in no trial; valid: values that the axes"
                f" have, or no {name} in sweep.when"
            )
