"""Pages from templates: self-contained, nothing is fetched, every text is escaped where it is put in."""

import base64
import gzip
import json
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from loralab.analysis.values import as_number
from loralab.reporting.charts import Figure

PLAIN = 150_000  # characters of JSON, above which a page carries them packed


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


@dataclass(frozen=True)
class Section:
    """A further section of a page: its HTML above its figures, and these."""

    body: Markup
    figures: list[Figure] = field(default_factory=list)


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
        embedded=embedded,
        sort_key=sort_key,
        breakable=breakable,
        unbroken=unbroken,
        sentence=sentence,
        duration=duration,
        quoted=quote,
    )
    return environment


def embedded(value: Any, kind: str = "", name: str = "") -> Markup:
    """A script element of this class and id that holds the value as JSON, packed with gzip where it is large; no text
    can end it."""
    content = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    given = (("class", kind), ("id", name))
    attributes = Markup().join(Markup(' {}="{}"').format(key, text) for key, text in given if text)
    if len(content) <= PLAIN:
        safe = content.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        return Markup('<script type="application/json"{}>{}</script>').format(attributes, Markup(safe))
    packed = base64.b64encode(gzip.compress(content.encode(), 9, mtime=0)).decode()
    return Markup('<script type="text/plain" data-gzip{}>{}</script>').format(attributes, packed)


def sort_key(value: float | str | None) -> str:
    """Of a number every digit, of a text itself; empty for what is no finite number."""
    if isinstance(value, str):
        return value
    return "" if value is None or as_number(repr(value)) is None else repr(value)


def breakable(text: str, kind: str) -> Markup:
    """Where a cell may be broken: a name after commas, underscores and the dots that are no decimal points, a figure
    before ``[`` or ``(pack``."""
    if kind.startswith("key"):
        return Markup(re.sub(r"([,_]|\.(?!\d))(?=\S)", r"\1<wbr>", str(escape(text))))
    return Markup(re.sub(r" (?=\[|\(pack)", " <wbr>", str(escape(text))))


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
