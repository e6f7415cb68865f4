"""A spec's fields are checked by their types, and what is wrong is one paragraph with the dotted key."""

import copy
import dataclasses
import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Le, Len
from torch import nn

from loralab.errors import ConfigError
from loralab.spec import Count, Natural, Positive, Share, Text, Whole, arguments, make, spec


@spec("part")
class Part:
    size: Annotated[Count, Le(100)] = 1
    least: Natural = 0
    rate: Positive = 1.0
    kind: Literal["flat", "tall"] = "flat"
    limit: Count | None = None
    name: str | None = None
    on: bool = False
    names: list[Text] = field(default_factory=list)
    ranks: dict[str, Count] = field(default_factory=dict)
    pair: Annotated[list[Share], Len(2, 2), "two numbers in [0, 1)"] = field(default_factory=lambda: [0.0, 0.5])
    width: Literal["auto"] | Whole | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < self.size:
            raise ConfigError("part.limit is below part.size")


@dataclass(frozen=True)
class Derived(Part):
    depth: int = 3
    odd: Any = None


@dataclass(frozen=True)
class Inner:
    rows: int = 1


@dataclass
class Foreign:
    needed: float
    path: Path = Path()
    inner: Inner = field(default_factory=Inner)
    ranks: dict[str, int] | None = None


WRONG = [
    ({"size": 0}, "part.size must be at least 1, got 0"),
    ({"size": 101}, "part.size must be a whole number from 1 to 100, got 101"),
    ({"size": 1.5}, "part.size must be a whole number, got 1.5"),
    ({"size": True}, "part.size must be a whole number, got True"),
    ({"size": "8"}, "part.size must be a whole number, got '8'"),
    ({"least": -1}, "part.least must be at least 0, got -1"),
    ({"rate": math.nan}, "part.rate must be a positive number, got nan"),
    ({"rate": "1"}, "part.rate must be a positive number, got '1'"),
    ({"rate": False}, "part.rate must be a positive number, got False"),
    ({"kind": "flta"}, "part.kind='flta' is unknown; did you mean flat? valid: flat, tall"),
    ({"limit": 0}, "part.limit must be at least 1, or null, got 0"),
    ({"limit": "x"}, "part.limit must be a whole number or null, got 'x'"),
    ({"name": ["a"]}, "part.name must be a text or null, got ['a']"),
    ({"on": 2}, "part.on must be true or false, got 2"),
    ({"names": "ab"}, "part.names must be a list of texts, got 'ab'"),
    ({"ranks": {"q": 0}}, "part.ranks.q must be at least 1, got 0"),
    ({"ranks": 3}, "part.ranks must be a mapping, got 3"),
    ({"pair": [0.5]}, "part.pair must be two numbers in [0, 1), got [0.5]"),
    ({"pair": [0.5, 1]}, "part.pair.1 must be a number in [0, 1), got 1"),
    ({"width": "wide"}, "part.width must be auto, a whole number or null, got 'wide'"),
    ({"sise": 3}, "part.sise is not an option of Part; did you mean size? valid: kind, least,"),
    ({"size": 0, "sise": 3}, "part.sise is not an option"),
    ({"size": 3, "limit": 2}, "part.limit is below part.size"),
    ({"name": ["a" * 999]}, "part.name must be a text or null, got ['aaaa"),
]


@pytest.mark.parametrize(("values", "said"), WRONG, ids=str)
def test_a_wrong_value_is_told_with_its_key_and_what_is_valid(values, said):
    with pytest.raises(ConfigError) as direct:
        Part(**values)
    assert str(direct.value).startswith(said)
    assert len(str(direct.value)) < 300
    with pytest.raises(ConfigError) as built:
        make(Part, values, "part")
    assert str(built.value) == str(direct.value)


def test_the_key_is_where_the_settings_stand():
    with pytest.raises(ConfigError, match=r"^study\.schemes\.a\.size must be"):
        make(Part, {"size": 0}, "study.schemes.a")


def test_whole_floats_numbers_as_names_and_a_yamls_truth_values_settle():
    part = Part(size=16.0, rate=2, name=7, names=[1, True, "a"], on="yes", pair=(0, 0.25))
    assert (part.size, type(part.size), part.rate, type(part.rate)) == (16, int, 2.0, float)
    assert (part.name, part.names, part.on, part.pair) == ("7", ["1", "True", "a"], True, [0.0, 0.25])


def test_a_spec_is_frozen_compares_copies_and_pickles():
    part = Part(size=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.size = 3
    assert part == copy.copy(part) == pickle.loads(pickle.dumps(part)) == dataclasses.replace(Part(), size=2)
    with pytest.raises(ConfigError, match=r"part\.size must be at least 1"):
        dataclasses.replace(part, size=0)


@pytest.mark.parametrize(("values", "said"), WRONG, ids=str)
def test_what_a_plain_dataclass_inherits_is_checked_too(values, said):
    ways = [lambda: make(Derived, values, "part")]
    if "sise" not in values:  # which Python itself refuses
        ways.append(lambda: Derived(**values))
    for way in ways:
        with pytest.raises(ConfigError) as refused:
            way()
        assert str(refused.value).startswith(said.replace("Part", "Derived").partition(" valid:")[0])


def test_a_plain_dataclass_says_more_by_plain_types():
    assert make(Derived, {"size": 2.0, "depth": 4.0, "odd": [1]}, "part") == Derived(size=2, depth=4, odd=[1])
    for value in ("4", True, 4.5):
        with pytest.raises(ConfigError, match=rf"part\.depth must be a whole number, got {value!r}"):
            make(Derived, {"depth": value}, "part")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"needed": "x"}, "mine.needed must be a number, got 'x'"),
        ({"needed": 1, "inner": {"rows": "x"}}, "mine.inner.rows must be a whole number"),
        ({"needed": 1, "inner": {"rosw": 2}}, "mine.inner.rosw is not an option of Inner; did you mean rows?"),
        ({"needed": 1, "ranks": {"a": True}}, "mine.ranks.a must be a whole number, got True"),
        ({"needed": 1, "path": 3}, "mine.path=3: "),
    ],
)
def test_a_class_from_elsewhere_is_checked_by_its_types(values, said):
    with pytest.raises(ConfigError) as refused:
        make(Foreign, values, "mine")
    assert str(refused.value).startswith(said)


def test_a_class_from_elsewhere_gets_objects_of_its_types():
    made = make(Foreign, {"needed": 1, "path": "a/b", "inner": {"rows": 3}}, "mine")
    assert made == Foreign(1.0, Path("a/b"), Inner(3))
    with pytest.raises(TypeError, match="needed"):
        make(Foreign, {}, "mine")


def test_a_type_that_no_setting_has_is_named():
    strange = dataclasses.make_dataclass("Strange", [("layer", nn.Module, None)])
    with pytest.raises(ConfigError, match=r"mine\.layer: Strange declares the type Module, by which no setting"):
        make(strange, {"layer": 3}, "mine")


class Watch:
    @arguments("callbacks.watch")
    def __init__(self, every: Count = 1, seconds: Positive | None = None) -> None:
        self.every, self.seconds = every, seconds


@pytest.mark.parametrize(
    ("given", "values", "said"),
    [
        ((), {"every": 0}, "callbacks.watch.every must be at least 1, got 0"),
        ((0,), {}, "callbacks.watch.every must be at least 1, got 0"),
        ((1, "x"), {}, "callbacks.watch.seconds must be a positive number or null, got 'x'"),
        ((), {"evry": 2}, "callbacks.watch.evry is not an option of Watch; did you mean every?"),
    ],
)
def test_arguments_are_checked_as_fields_are(given, values, said):
    with pytest.raises(ConfigError) as refused:
        Watch(*given, **values)
    assert str(refused.value).startswith(said)


def test_arguments_that_are_right_arrive():
    watch = Watch(2.0, seconds=3)
    assert (watch.every, watch.seconds) == (2, 3.0)
    with pytest.raises(ConfigError, match="callbacks.watch"):
        Watch(1, 2.0, 3)
