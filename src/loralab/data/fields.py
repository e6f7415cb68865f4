"""A record's fields as text, and the templates that they are put into."""

import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loralab.errors import ConfigError, nearest

Spans = tuple[tuple[int, int], ...]
MOST, LONGEST = 30, 60  # names in a message, characters of one of them


class BadRow(Exception):  # noqa: N818 - never leaves this package
    """Why one record cannot be a row."""


class Number(str):
    """A number as the file writes it: 1.10 stays 1.10."""

    __slots__ = ()


class TemplateText(str):
    """A text and the (start, stop) of each part that its template wrote; the rest are a row's fields."""

    __slots__ = ("template_spans",)
    template_spans: Spans

    def __new__(cls, text: str, template_spans: Spans) -> "TemplateText":
        instance = super().__new__(cls, text)
        instance.template_spans = template_spans
        return instance

    def __reduce__(self) -> tuple[Any, ...]:
        return TemplateText, (str(self), self.template_spans)


def template_spans(text: str) -> Spans:
    """The parts of ``text`` that a template wrote; of a plain str none."""
    return text.template_spans if isinstance(text, TemplateText) else ()


class Template:
    r"""``'{mr}\n'``: fields in braces; ``{{`` is a brace; backslash n a newline, backslash t a tab."""

    def __init__(self, text: str, key: str) -> None:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"data.{key}={text!r} is no template ({error}); a literal brace is written twice"
            ) from None
        self.parts: list[tuple[str, str | None]] = []
        for literal, name, spec, conversion in parts:
            if name is not None and (not name or spec or conversion or set(".[]") & set(name)):
                raise ConfigError(
                    f"data.{key}={text!r}: a field is a plain name in braces such as {{text}}; "
                    "no nested access, no format; a literal brace is written twice"
                )
            self.parts.append((literal.replace("\\n", "\n").replace("\\t", "\t"), name))

    @property
    def fields(self) -> list[str]:
        """Names of the columns it reads, in order."""
        return [name for _, name in self.parts if name is not None]

    def use_column(self, text: str, key: str, columns: Sequence[str]) -> None:
        """Changes a template without a field into the column named ``text``. Raises ConfigError where there is none."""
        if self.fields or not self.parts:
            return
        if text not in columns:
            raise ConfigError(
                f"data.{key}={text!r} has no {{field}}, so every row would be the same, and there is no column of "
                f"that name; {nearest(text, columns)}"
            )
        self.parts = [("", text)]

    def render(self, fields: Mapping[str, Any]) -> str:
        """The text of a record; a TemplateText where the template wrote some of it. Raises BadRow."""
        text = ""
        spans: list[tuple[int, int]] = []
        for literal, name in self.parts:
            if literal.strip():
                start = spans.pop()[0] if spans and spans[-1][1] == len(text) else len(text)
                spans.append((start, len(text) + len(literal)))
            text += literal + (text_of(fields, name) if name is not None else "")
        return TemplateText(text, tuple(spans)) if spans else text


def text_of(fields: Mapping[str, Any], name: str) -> str:
    """A field as text; a number as it is written. Raises BadRow for other values, NUL characters and invalid UTF-8."""
    value = field_of(fields, name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"field {name!r} is {typename(value)}, text is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field {name!r} is {value}, text or a finite number is wanted")
    text = str(value)
    if "\0" in text:
        raise BadRow(f"field {name!r} holds a NUL character")
    if re.search("[\ud800-\udfff]", text):
        raise BadRow(f"field {name!r} is not valid UTF-8")
    return text


def missing(kind: str, name: str, names: Iterable[str]) -> str:
    """The words for a field, or another ``kind``, that is not among ``names``: which there are, and the nearest."""
    listed = list(names)
    shown = [each if len(each) <= LONGEST else f"{each[:LONGEST]}..." for each in listed[:MOST]]
    more = f" and {len(listed) - MOST} more" if len(listed) > MOST else ""
    close = nearest(name, listed).partition("valid:")[0].strip()
    return f"{kind} {name!r} is missing (has: {', '.join(shown) or 'nothing'}{more}){close and f'; {close}'}"


def field_of(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a field. Raises BadRow, with the nearest name, where it is missing."""
    if name not in fields:
        raise BadRow(missing("field", name, map(str, fields)))
    return fields[name]


def typename(value: Any) -> str:
    """The kind of a value in JSON's words."""
    names = {type(None): "null", bool: "true/false", list: "a list", dict: "an object", float: "a fraction"}
    return names.get(type(value), type(value).__name__)
