"""Small SVG charts: no script, colours from the page's style sheet, ``<title>`` gives the tooltips.

Series differ by colour (Okabe and Ito, safe for colour-blind readers) and by the shape of their marks.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 72.0, 16.0, 14.0, 46.0
WIDTH, HEIGHT = 540.0, 310.0
COLOURS, SHAPES = 7, 4
DASHES = ("", "stroke-dasharray:7 3", "stroke-dasharray:2 3", "stroke-dasharray:10 3 2 3")
MAX_POINTS = 2000
LETTER = 6.9  # pixels, of a tick's label
SLANT, LONGEST = 50, 30  # degrees, letters


@dataclass(frozen=True)
class Point:
    """One place on the x axis: the seeds' values, their mean and standard deviation (None for one seed).

    ``shape``: of the mark, where it is not the series' own.
    """

    x: float
    mean: float
    values: list[float]
    std: float | None = None
    text: str = ""
    shape: int | None = None


@dataclass(frozen=True)
class Series:
    """``points`` in order of x; None is a missing run: no line is drawn across it."""

    name: str
    points: list[Point | None]
    colour: int


@dataclass(frozen=True)
class Curve:
    """One run over its steps: (step, value) pairs; ``broken``: it did not complete; ``style``: CSS of its line."""

    name: str
    rows: list[tuple[float, float]]
    colour: int
    broken: bool = False
    style: str = ""


@dataclass(frozen=True)
class Axis:
    """Where data lie on one axis; ``ticks`` are (place, label); ``log2`` spreads powers of two evenly."""

    title: str
    low: float
    high: float
    ticks: list[tuple[float, str]]
    log2: bool = False
    named: bool = False  # ticks are names, each of which must be read

    def share(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``."""
        low, high, at = (math.log2(v) if self.log2 else v for v in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True)
class LegendEntry:
    """An entry of a legend: a small drawing, ``width`` pixels wide and 14 high, and what it stands for."""

    name: str
    drawing: Markup
    width: int = 14


@dataclass
class Canvas:
    """An SVG being drawn: a plot area inside margins.

    Names below the x axis stand upright in up to three lines, and the plot ends above them at ``bottom``; where one
    is longer, all are set aslant and hang below the drawing, which is ``tall`` pixels high.
    """

    x: Axis
    y: Axis
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [name for _, name in self.x.ticks] if self.x.named else []
        self.room = max(5, int((WIDTH - LEFT - RIGHT) / max(1, len(names)) / 7.4))  # letters under one name's tick
        lines = max((len(_wrapped(name, self.room)) for name in names), default=1)
        word = max((len(piece) for name in names for piece in _pieces(name)), default=0)
        self.slanted = word > self.room or lines > 3
        longest = max(min(len(name), LONGEST) for name in names) if self.slanted else 0
        self.tall = HEIGHT + LETTER * longest * math.sin(math.radians(SLANT))
        self.bottom = HEIGHT - BOTTOM - (0 if self.slanted else 15 * (lines - 1))

    def px(self, value: float) -> float:
        return LEFT + self.x.share(value) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return self.bottom - self.y.share(value) * (self.bottom - TOP)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(self, x: float, y: float, content: str, kind: str = "tick middle", turned: int = 0) -> None:
        turn = f' transform="rotate({turned} {x:.1f} {y:.1f})"' if turned else ""
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{turn}>{escape(content)}</text>')

    def path(self, places: Iterable[tuple[float, float]], kind: str, title: str = "", style: str = "") -> None:
        """A polyline in pixels."""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        css = f' style="{style}"' if style else ""
        self.parts.append(f'<polyline class="{kind}"{css} points="{points}">{_title(title)}</polyline>')

    def mark(self, x: float, y: float, colour: int, title: str, size: float = 5, shape: int | None = None) -> None:
        """The series' own shape unless another is given: circle, square, diamond, triangle."""
        drawn = _shape(x, y, size, (colour if shape is None else shape) % SHAPES)
        self.parts.append(f'<g class="c{colour % COLOURS} mean">{_title(title)}{drawn}</g>')

    def point(self, point: Point, colour: int, shift: float = 0.0) -> None:
        """A mark at the mean, its error bar, and a small circle for each of several seeds; ``shift``: pixels aside."""
        colour_class, x = f"c{colour % COLOURS}", self.px(point.x) + shift
        if point.std is not None:
            low, high = self.py(point.mean - point.std), self.py(point.mean + point.std)
            self.line(x, low, x, high, f"bar {colour_class}")
            for end in (low, high):
                self.line(x - 4, end, x + 4, end, f"bar {colour_class}")
        for value in point.values if len(point.values) > 1 else ():
            self.parts.append(f'<circle class="seed {colour_class}" cx="{x:.1f}" cy="{self.py(value):.1f}" r="2.6"/>')
        self.mark(x, self.py(point.mean), colour, point.text, shape=point.shape)

    def cross(self, x: float, y: float, colour: int) -> None:
        """Where a run ended too early."""
        for up in (-4, 4):
            self.line(x - 4, y - up, x + 4, y + up, f"bar c{colour % COLOURS}")

    def frame(self) -> None:
        """Grid, ticks and titles of both axes; a number without room beside the last one's label gets none."""
        for at, name in self.y.ticks:
            self.line(LEFT, self.py(at), WIDTH - RIGHT, self.py(at), "grid")
            self.text(LEFT - 8, self.py(at) + 4, name, "tick end")
        free = -math.inf
        for at, name in self.x.ticks:
            x, half = self.px(at), LETTER * len(name) / 2
            self.line(x, self.bottom, x, self.bottom + 4, "axis")
            if self.slanted:
                short = name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
                self.text(x + 4, self.bottom + 16, short, "tick end", -SLANT)
            elif self.x.named or x - half > free:
                for row, words in enumerate(_wrapped(name, self.room) if self.x.named else [name]):
                    self.text(x, self.bottom + 18 + 15 * row, words)
                free = x + half + 4
        self.line(LEFT, self.bottom, WIDTH - RIGHT, self.bottom, "axis")
        self.text((LEFT + WIDTH - RIGHT) / 2, self.tall - 8, self.x.title, "name middle")
        self.text(14, (TOP + self.bottom) / 2, self.y.title, "name middle", -90)

    def done(self, description: str) -> Markup:
        label = f'role="img" aria-label="{escape(description)}"'
        head = f'<svg viewBox="0 0 {WIDTH:g} {self.tall:g}" {label}>'
        return Markup("\n".join([head, *self.parts, "</svg>"]))


def scale(title: str, values: Sequence[float], pad: float = 0.08) -> Axis:
    """A linear axis over ``values`` with about five round ticks."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    margin = (high - low) * pad if high - low > 1e-6 * size + 1e-9 else 0.02 * size + 1e-6
    low, high = low - margin, high + margin
    step = _round_step((high - low) / 6)
    values_of_ticks = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decimals = next((n for n in range(15) if math.isclose(step, round(step, n), rel_tol=1e-6)), 15)
    return Axis(title, low, high, [(value, f"{value:.{decimals}f}") for value in values_of_ticks])


def steps(title: str, values: Sequence[float]) -> Axis:
    """A linear axis that starts and ends with the data, for training steps."""
    low, high = min(values), max(max(values), min(values) + 1)
    stride = max(1, round(_round_step((high - low) / 6)))
    ticks = [(float(at), str(at)) for at in range(math.ceil(low / stride) * stride, math.floor(high) + 1, stride)]
    return Axis(title, low, high, ticks)


def powers(title: str, values: Sequence[float]) -> Axis:
    """A log2 axis with a tick at each value that was run; all must be positive."""
    ticks = [(value, f"{value:g}") for value in sorted(set(values))]
    return Axis(title, min(values) / 2**0.5, max(values) * 2**0.5, ticks, log2=True)


def places(title: str, names: Sequence[str]) -> Axis:
    """A categorical axis: name i is at i."""
    return Axis(title, -0.6, len(names) - 0.4, [(float(index), name) for index, name in enumerate(names)], named=True)


def chart(series: Sequence[Series], x: Axis, y: Axis, *, joined: bool = True, description: str = "") -> Markup:
    """Means with error bars (one standard deviation) over small points for the seeds.

    ``joined``: x is a number, so lines join the means and each mark is at its value; else the series stand side by
    side over the name of their place.
    """
    canvas = Canvas(x, y)
    canvas.frame()
    for one in series:
        for run in _unbroken(one.points) if joined else ():
            middle = [(canvas.px(point.x), canvas.py(point.mean)) for point in run]
            canvas.path(middle, f"line c{one.colour % COLOURS}", one.name)
        for point in filter(None, one.points):
            present = [other for other in series if any(p and p.x == point.x for p in other.points)]
            spread = min(26.0, (WIDTH - LEFT - RIGHT) / max(1, len(x.ticks)) * 0.8 / len(present))
            canvas.point(point, one.colour, 0.0 if joined else (present.index(one) - (len(present) - 1) / 2) * spread)
    return canvas.done(description)


def scatter(series: Sequence[Series], x: Axis, y: Axis, description: str = "") -> Markup:
    """The same points on two continuous axes, each mark at its values."""
    canvas = Canvas(x, y)
    canvas.frame()
    for one in series:
        for point in filter(None, one.points):
            canvas.point(point, one.colour)
    return canvas.done(description)


def line_plot(curves: Sequence[Curve], x: Axis, y: Axis, smooth: float = 0.0, description: str = "") -> Markup:
    """Training curves; with ``smooth`` the raw values stay as a faint line behind an exponential mean."""
    canvas = Canvas(x, y)
    canvas.frame()
    budget = max(60, min(MAX_POINTS, 16 * MAX_POINTS // max(1, len(curves))))
    passes = [("raw", 0.0), ("line", smooth)] if smooth else [("line", 0.0)]
    for kind, keep in passes:
        for curve in curves:
            rows = downsample(_smoothed(curve.rows, keep) if keep else curve.rows, budget)
            pixels = [(canvas.px(step), canvas.py(min(max(value, y.low), y.high))) for step, value in rows]
            css_class = f"{kind} thin c{curve.colour % COLOURS}"
            canvas.path(pixels, css_class, curve.name, curve.style if kind == "line" else "")
            if len(rows) == 1:
                canvas.mark(*pixels[0], curve.colour, curve.name, size=3)
            if curve.broken and kind == "line":
                canvas.cross(*pixels[-1], curve.colour)
    return canvas.done(description)


def strip(values: Sequence[float], mean: float, std: float | None, low: float, high: float) -> Markup:
    """A table cell's picture: the seeds, their mean and standard deviation on a scale shared by all rows, which holds
    them all."""

    def at(value: float) -> str:
        return f"{6 + (value - low) / ((high - low) or 1.0) * 108:.1f}"

    parts = ['<line class="grid" x1="2" x2="118" y1="9.0" y2="9.0"/>']
    if std is not None:
        parts.append(f'<line class="bar" x1="{at(mean - std)}" x2="{at(mean + std)}" y1="9.0" y2="9.0"/>')
    parts += [f'<circle class="seed" cx="{at(value)}" cy="9.0" r="2.4"/>' for value in values]
    parts.append(f'<circle class="mean" cx="{at(mean)}" cy="9.0" r="4"/>')
    return Markup(f'<svg class="strip" viewBox="0 0 120 18" aria-hidden="true">{"".join(parts)}</svg>')


def legend(names: Sequence[tuple[str, int]], round_marks: bool = False) -> list[LegendEntry]:
    """The mark of each (name, colour); ``round_marks``: shapes stand for something else."""
    marks = [(name, colour % COLOURS, _shape(7, 7, 5, 0 if round_marks else colour % SHAPES)) for name, colour in names]
    return [LegendEntry(name, Markup(f'<g class="c{colour} mean">{shape}</g>')) for name, colour, shape in marks]


def shape_legend(names: Sequence[str]) -> list[LegendEntry]:
    """What the marks' shapes stand for."""
    return [
        LegendEntry(name, Markup(f'<g class="plain">{_shape(7, 7, 5, at % SHAPES)}</g>'))
        for at, name in enumerate(names)
    ]


def line_legend(names: Sequence[tuple[str, str]]) -> list[LegendEntry]:
    """(name, style): what the dashes and shades of lines stand for."""
    line = '<line class="axis" stroke-width="2" x1="0" x2="28" y1="7" y2="7" style="{}"/>'
    return [LegendEntry(name, Markup(line.format(style)), width=28) for name, style in names]


def downsample(rows: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most ``limit`` rows: the least and the greatest of each bucket, in order, so that spikes survive."""
    if len(rows) <= limit:
        return list(rows)
    buckets, sampled = max(1, limit // 2), []
    for index in range(buckets):
        bucket = range(len(rows) * index // buckets, len(rows) * (index + 1) // buckets)
        ends = {pick(bucket, key=lambda at: rows[at][1]) for pick in (min, max)}
        sampled += [rows[at] for at in sorted(ends)]
    return sampled


def _unbroken(points: Sequence[Point | None]) -> list[list[Point]]:
    runs = [list(run) for there, run in groupby(points, key=lambda point: point is not None) if there]
    return [[point for point in run if point] for run in runs if len(run) > 1]


def _smoothed(rows: Sequence[tuple[float, float]], keep: float) -> list[tuple[float, float]]:
    """Exponential mean, corrected for its start as Adam's moments are (Kingma and Ba 2015, section 3)."""
    smooth, total, weight = [], 0.0, 0.0
    for step, value in rows:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((step, total / weight))
    return smooth


def _shape(x: float, y: float, size: float, kind: int) -> str:
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"/>'
    if kind == 1:
        width = size * 1.7
        return f'<rect x="{x - width / 2:.1f}" y="{y - width / 2:.1f}" width="{width:.1f}" height="{width:.1f}"/>'
    radius = size * 1.3
    diamond, triangle = [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)], [(1.0, 0.8), (-1.0, 0.8)]
    corners = [(0.0, -1.0), *(diamond if kind == 2 else triangle)]
    return f'<polygon points="{" ".join(f"{x + radius * dx:.1f},{y + radius * dy:.1f}" for dx, dy in corners)}"/>'


def _wrapped(text: str, room: int) -> list[str]:
    """At most four lines, broken after commas, underscores and spaces; clipped where that is not enough."""
    lines = [""]
    for piece in _pieces(text):
        if lines[-1] and len(lines[-1] + piece) > room:
            lines.append("")
        lines[-1] += piece
    lines = [*lines[:3], "..."] if len(lines) > 4 else lines
    return [line if len(line) <= room + 1 else line[: room - 1] + "..." for line in lines]


def _pieces(text: str) -> list[str]:
    return re.findall(r"[^,_ ]*[,_ ]?", text)


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _round_step(rough: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least ``rough``."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next((nice * power for nice in (1, 2, 2.5, 5) if nice * power >= rough), 10 * power)
