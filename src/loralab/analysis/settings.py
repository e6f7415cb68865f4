"""The settings of many trials, key by key: of a section that trials share, each key is read once."""

from collections.abc import Sequence
from functools import cached_property

from loralab.analysis.values import Json, aside, axis_value, canonical, flat
from loralab.records.shared import distinct


class Settings:
    """Of ``records``, one or more: what their configurations and choices have under each key."""

    def __init__(self, records: Sequence[Json]) -> None:
        self.records = records
        self._choices = distinct(record["choices"] for record in records)
        names = dict.fromkeys(name for record in records for name in record["config"])
        self._sections = {name: distinct(record["config"].get(name) for record in records) for name in names}

    @cached_property
    def groups(self) -> list[str]:
        """Those of the choices, in the order in which they are first there."""
        return list(dict.fromkeys(group for choices in self._choices for group in choices))

    @cached_property
    def names(self) -> dict[str, str]:
        """{dotted key: section of the configuration that has it}, in the order in which they are first there."""
        found: dict[str, str] = {}
        seen = set()
        for record in self.records:
            for name, section in record["config"].items():
                if (name, id(section)) not in seen:
                    seen.add((name, id(section)))
                    found |= {key: name for key in flat(name, section) if key not in found}
        return found

    def values(self, key: str) -> set[str]:
        """The canonical values of a key of the configurations; null where one lacks it."""
        name = self.names[key]
        return {canonical(flat(name, section).get(key)) for section in self._sections[name]}

    def texts(self, key: str) -> list[str]:
        """Of each record the canonical value of the group or key: its choice, else its configuration's, else null."""
        name = self.names.get(key, key)
        known = {id(one): canonical(flat(name, one).get(key)) for one in self._sections.get(name, [None])}
        return [
            canonical(record["choices"][key]) if key in record["choices"] else known[id(record["config"].get(name))]
            for record in self.records
        ]

    def varies(self, key: str) -> bool:
        """Whether records may differ under the group or key; where it is false, they do not."""
        own = self.values(key) if key in self.names else {canonical(None)}
        chosen = {canonical(choices[key]) for choices in self._choices if key in choices}
        return len(own | chosen) > 1


def varying(records: Sequence[Json], axes: Sequence[str]) -> list[str]:
    """Config keys and group choices that vary and do not follow from ``axes`` (``lora_alpha`` follows from
    ``r`` where every r has one lora_alpha); so trials that are told apart by nothing else still are."""
    settings = Settings(records)
    positions = [tuple(canonical(axis_value(record, axis)) for axis in axes if axis != "seed") for record in records]
    chosen: list[str] = []
    for key in dict.fromkeys([*settings.groups, *settings.names]):
        if aside(key) or key in axes or not settings.varies(key):
            continue
        further = [(*position, text) for position, text in zip(positions, settings.texts(key), strict=True)]
        if len(set(further)) > len(set(positions)):
            chosen.append(key)
            positions = further
    return chosen
