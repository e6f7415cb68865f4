"""Pages from templates: self-contained, nothing is fetched, every text is escaped where it is put in."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from loralab.analysis.values import as_number


@dataclass(frozen=True)
class Head:
    """A column's head; ``key``: a column of names."""

    text: str
    hint: str = ""
    key: bool = False


@dataclass(frozen=True)
class Cell:
    """``sort``: what sorting compares, a number with every digit; ``kind``: its CSS class, ``key`` for a name."""

    text: str
    sort: float | str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Tile:
    """A figure worth seeing first, and its words."""

    value: str
    words: str
    bad: bool = False


def render(template: str, **values: Any) -> Markup:
    """A template of ``templates/`` with its values."""
    return Markup(_environment().get_template(template).render(**values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("loralab.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        sort_key=sort_key, breakable=breakable, unbroken=unbroken, sentence=sentence, duration=duration, quoted=quote
    )
    return environment


def sort_key(value: float | str | None) -> str:
    """Of a number every digit, of a text itself; empty for what is no finite number."""
    if isinstance(value, str):
        return value
    return "" if value is None or as_number(repr(value)) is None else repr(value)


def breakable(text: str, kind: str) -> Markup:
    """Where a cell may be broken: a name after commas, a figure before an interval or ``(pack of 4)``."""
    if kind.startswith("key"):
        return escape(text).replace(",", Markup(",<wbr>"))
    return Markup(re.sub(r" (?=\[|\(pack)", " <wbr>", escape(text)))


def unbroken(title: str) -> Markup:
    """A short title stays on one line."""
    return escape(title).replace(" ", Markup("&nbsp;") if len(title) < 8 else " ")


def sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def duration(seconds: float) -> str:
    """``3 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
