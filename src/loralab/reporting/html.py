"""Pieces of a self-contained HTML page: no link leaves it, nothing is fetched, every text is escaped."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from urllib.parse import quote

from loralab.reporting.axes import as_number


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page."""
    style, script = (files(__package__).joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} - loralab</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        "<footer>Written by loralab from the runs' records; nothing on this page is fetched.</footer>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def figure(title: str, body: str, caption: str) -> str:
    """A drawing with its words."""
    return f"<figure>\n<h3>{escape(title)}</h3>\n{body}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def tile(value: str, words: str, bad: bool = False) -> str:
    """A figure worth seeing first, and its words."""
    return f'<div class="tile{" bad" if bad else ""}"><b>{escape(value)}</b><span>{escape(words)}</span></div>'


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """(term, HTML) pairs as a list."""
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{text}</dd>' for term, text in rows)}</dl>"


def merged(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Several texts under one term become one cell."""
    texts: dict[str, list[str]] = {}
    for term, text in rows:
        texts.setdefault(term, []).append(escape(text))
    return [(term, "<br>".join(found)) for term, found in texts.items()]


def pairs(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Terms and texts, escaped; empty ones left out."""
    return [(term, escape(text)) for term, text in values.items() if text]


def table(heads: Sequence[str], body: Sequence[str], kind: str) -> str:
    """Heads and rows made by ``head`` and ``cell``; ``kind`` sortable: a click on a head sorts."""
    top = f"<thead><tr>{''.join(heads)}</tr></thead>"
    rows = "\n".join(body)
    return f'<div class="scroll"><table class="{kind}">{top}\n<tbody>\n{rows}\n</tbody></table></div>'


def head(text: str, hint: str = "", key: bool = False) -> str:
    """A column's head; ``key``: a column of names."""
    title = f' title="{escape(hint)}"' if hint and hint != text else ""
    shown = escape(text).replace(" ", "&nbsp;" if len(text) < 8 else " ")
    return f'<th{" class=key" if key else ""}{title}><button type="button">{shown}</button></th>'


def cell(text: str, sort: str, kind: str = "") -> str:
    """``sort``: what sorting compares; the texts of ``kind`` key may be broken after commas."""
    css = f' class="{kind}"' if kind else ""
    shown = escape(text).replace(",", ",<wbr>") if kind == "key" else escape(text)
    if kind == "breaks":  # before a bracket only: an interval, or "(pack of 4)"
        shown = re.sub(r" (?=\[|\(pack)", " <wbr>", shown)
    return f'<td{css} data-sort="{escape(sort)}">{shown}</td>'


def link(path: str, text: str) -> str:
    """To a file beside the page; quoted, so that no path can name another scheme."""
    return f'<a href="{escape(quote(path))}">{escape(text)}</a>'


def sort_key(value: float | None) -> str:
    """Of a number, every digit."""
    return "" if value is None or as_number(repr(value)) is None else repr(value)


def duration(seconds: float) -> str:
    """``3 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
