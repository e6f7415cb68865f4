"""What the commands print: tables, the report of a sweep, and messages on stderr."""

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loralab.reporting.report import Report


def table(rows: Iterable[Sequence[str]], right: Sequence[int] = (), styles: dict[str, str] | None = None) -> str:
    """``rows`` in columns: wrapped and coloured for a terminal, plain whole lines for a pipe or a file.

    ``right``: columns set flush right; ``styles``: {first cell of a row: its style}.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    grid = Table.grid(padding=(0, 2, 0, 0))
    rows = list(rows)
    for column in range(max(map(len, rows), default=0)):
        grid.add_column(justify="right" if column in right else "left", no_wrap=column == 0)
    for first, *others in rows:
        grid.add_row(Text(first, style=(styles or {}).get(first, "")), *map(Text, others))
    console = Console(force_terminal=terminal, width=None if terminal else 10_000)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


def show_report(folder: Path, kinds: Sequence[str] = ("svg",), tex: bool = False) -> "Report":
    """Writes the report of a sweep or a run, its figures as files of ``kinds``, its table as LaTeX where ``tex``, and
    prints the table. Returns it."""
    from loralab.reporting.report import report

    written = report(folder, kinds, tex)
    print(written.table)
    print(f"report: {written.index}")
    return written


def show_place(place: str) -> None:
    """Where W&B has the report: its address, or the line that uploads it; nothing where ``place`` is empty."""
    if place:
        print(f"report in W&B: {f'wandb sync {place}' if Path(place).is_dir() else place}")


def show_comparison(one: Path, other: Path) -> None:
    """Writes the comparison of two sweeps and prints its table."""
    from loralab.reporting.between import report

    written = report(one, other)
    print(written.table)
    print(f"report: {written.index}")


def messages_to_stderr() -> None:
    """As Hydra's logging of conf/ would have it, for a command that Hydra only composes."""
    from loralab.records.secrets import MaskedFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(MaskedFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("loralab").setLevel(logging.INFO)
