"""Plain text for a terminal or a pipe: columns, and lines that are not too long."""

import re
import shutil
from collections.abc import Iterable, Sequence
from textwrap import wrap

WIDTH = 100
UNBOUNDED = 10_000


def terminal_width(most: int = WIDTH) -> int:
    """The terminal's columns, at most ``most``; that where there is no terminal."""
    return min(most, shutil.get_terminal_size((most, 24)).columns)


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Printable lines no longer than ``width``, all but the first after ``indent``."""
    return wrap(_printable(text), width, subsequent_indent=indent)


def natural_width(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Of the lines that ``aligned`` gives."""
    from rich.cells import cell_len

    return sum(max(map(cell_len, cells)) + 2 for cells in zip(titles, *rows, strict=True)) - 2


def aligned(titles: Sequence[str], rows: Iterable[Sequence[str]], right: range = range(0)) -> list[str]:
    """Lines of equal columns below a ruled head, without escape codes; the columns ``right`` are set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rule = box.Box("    \n    \n -- \n" + "    \n" * 5, ascii=True)
    table = Table(box=rule, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(_printable, row))
    console = Console(
        width=UNBOUNDED, color_system=None, force_jupyter=False, markup=False, emoji=False, highlight=False
    )
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """For a README or an issue."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def markdown_text(text: str) -> str:
    """``text`` as Markdown shows it letter by letter, on one line."""
    return re.sub(r"([\\`*{}\[\]<>#|~&$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(_printable(text).split()))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
