"""What a figure calls an arm: short, whole, and in lines that fit beside a chart."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loralab.analysis.arms import Arm
from loralab.analysis.results import SweepResults
from loralab.analysis.values import UNKNOWN, as_number

if TYPE_CHECKING:
    import altair as alt

LONGEST_LINE = 30  # characters; the labels of a figure take at most two fifths of its width
LINE, ROW = 14, 24  # pixels of a line and of a row


def spoken(results: SweepResults, axis: str, text: str) -> str:
    """``r = 8``, and ``nf4`` alone: a text says by itself what it is."""
    bare = as_number(text) is not None or text in ("true", "false", "null")
    return f"{results.short[axis]} = {text}" if bare else text


def row_labels(arms: Sequence[Arm]) -> dict[str, str]:
    """{an arm's name: its label}, in lines; the whole name where shorter ones would be the same."""
    short = {arm.name: _short(arm) or arm.name for arm in arms}
    distinct = len(set(short.values())) == len(short)
    return {name: in_lines(label if distinct else name) for name, label in short.items()}


def _short(arm: Arm) -> str:
    return ", ".join(spoken(arm.results, axis, text) for axis, text in arm.values.items() if text != UNKNOWN)


def in_lines(text: str) -> str:
    """Broken after commas, between settings where that is enough, so that nothing has to be cut; one word that is
    longer than a line loses its middle."""
    lines = [""]
    settings = [part if len(part) <= LONGEST_LINE else part.replace(",", ",\0") for part in text.split(", ")]
    for part in re.findall(r"[^\0]+", "\0".join(f"{part}, " for part in settings)[:-2]):
        if lines[-1] and len(lines[-1] + part.rstrip()) > LONGEST_LINE:
            lines.append("")
        lines[-1] += part
    half = (LONGEST_LINE - 1) // 2
    stripped = (line.strip() for line in lines)
    return "\n".join(line if len(line) <= LONGEST_LINE + 4 else f"{line[:half]}…{line[-half:]}" for line in stripped)


def row_axis(field: str = "label") -> "alt.Y":
    """An axis with a row for each label, in the order of the data."""
    import altair as alt

    axis = alt.Axis(labelExpr="split(datum.label, '\\n')", labelLineHeight=LINE - 1, labelLimit=260)
    return alt.Y(f"{field}:N", title=None, sort=None, axis=axis)


def height(labels: Sequence[str]) -> int:
    """Pixels of a chart with a row for each of these labels."""
    most = max((label.count("\n") + 1 for label in labels), default=1)
    return max(ROW, LINE * most + 6) * len(labels) + 10
