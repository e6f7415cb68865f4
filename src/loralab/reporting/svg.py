"""Small SVG charts: no script, colours from the page's style sheet, ``<title>`` gives the tooltips.

Series differ by colour (Okabe and Ito, safe for colour-blind readers) and by the shape of their marks.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 72.0, 16.0, 14.0, 46.0
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
class Key:
    """An entry of a legend: a small drawing, ``width`` pixels wide and 14 high, and what it stands for."""

    name: str
    drawing: Markup
    width: int = 14


@dataclass
class Canvas:
    """An SVG being drawn: a plot area inside margins."""

    x: Axis
    y: Axis
    width: float = 540
    height: float = 310
    parts: list[str] = field(default_factory=list)
    labelled: float = -math.inf  # where the last label of the x axis ends

    @property
    def bottom(self) -> float:
        """Where the plot area ends; the names below it may need several lines."""
        named = self.x.named and not self.slanted
        most = max((len(_wrapped(name, self.room)) for _, name in self.x.ticks), default=1) if named else 1
        return self.height - BOTTOM - 15 * (most - 1)

    @property
    def tall(self) -> float:
        """The height of the whole drawing: names that are set aslant hang below it."""
        longest = max((min(len(name), LONGEST) for _, name in self.x.ticks), default=0)
        return self.height + (LETTER * longest * math.sin(math.radians(SLANT)) if self.slanted else 0)

    @cached_property
    def slanted(self) -> bool:
        """Whether a name is too long to stand upright under its tick, even in several lines."""
        pieces = [piece for _, name in self.x.ticks for piece in _pieces(name)]
        lines = [len(_wrapped(name, self.room)) for _, name in self.x.ticks]
        return self.x.named and (max(map(len, pieces), default=0) > self.room or max(lines, default=0) > 3)

    @property
    def room(self) -> int:
        """Letters that fit under one tick of the x axis."""
        return max(5, int((self.width - LEFT - RIGHT) / max(1, len(self.x.ticks)) / 7.4))

    def px(self, value: float) -> float:
        return LEFT + self.x.share(value) * (self.width - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return self.bottom - self.y.share(value) * (self.bottom - TOP)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(self, x: float, y: float, content: str, kind: str = "tick", extra: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{extra}>{escape(content)}</text>')

    def path(self, places: Iterable[tuple[float, float]], kind: str, title: str = "", style: str = "") -> None:
        """A polyline in pixels."""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        css = f' style="{style}"' if style else ""
        self.parts.append(f'<polyline class="{kind}"{css} points="{points}">{_title(title)}</polyline>')

    def mark(self, x: float, y: float, colour: int, title: str, size: float = 5, shape: int | None = None) -> None:
        """The series' own shape unless another is given: circle, square, diamond, triangle."""
        drawn = _shape(x, y, size, (colour if shape is None else shape) % SHAPES)
        self.parts.append(f'<g class="c{colour % COLOURS} mean">{_title(title)}{drawn}</g>')

    def cross(self, x: float, y: float, colour: int) -> None:
        """Where a run ended too early."""
        for up in (-4, 4):
            self.line(x - 4, y - up, x + 4, y + up, f"bar c{colour % COLOURS}")

    def frame(self) -> None:
        """Grid, ticks and titles of both axes."""
        bottom = self.bottom
        for at, name in self.y.ticks:
            self.line(LEFT, self.py(at), self.width - RIGHT, self.py(at), "grid")
            self.text(LEFT - 8, self.py(at) + 4, name, "tick end")
        for at, name in self.x.ticks:
            self.line(self.px(at), bottom, self.px(at), bottom + 4, "axis")
            self._label(self.px(at), name)
        self.line(LEFT, bottom, self.width - RIGHT, bottom, "axis")
        self.text((LEFT + self.width - RIGHT) / 2, self.tall - 8, self.x.title, "name middle")
        middle = (TOP + bottom) / 2
        self.text(14, middle, self.y.title, "name middle", f' transform="rotate(-90 14 {middle:.1f})"')

    def _label(self, x: float, name: str) -> None:
        """Under its tick; a number for which there is no room beside the last one is left out."""
        if self.slanted:
            y, short = self.bottom + 16, name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
            self.text(x + 4, y, short, "tick end", f' transform="rotate(-{SLANT} {x + 4:.1f} {y:.1f})"')
        elif self.x.named:
            for row, words in enumerate(_wrapped(name, self.room)):
                self.text(x, self.bottom + 18 + 15 * row, words, "tick middle")
        elif x - LETTER * len(name) / 2 > self.labelled + 4:
            self.text(x, self.bottom + 18, name, "tick middle")
            self.labelled = x + LETTER * len(name) / 2

    def done(self, description: str) -> Markup:
        label = f'role="img" aria-label="{escape(description)}"'
        head = f'<svg viewBox="0 0 {self.width:g} {self.tall:g}" {label}>'
        return Markup("\n".join([head, *self.parts, "</svg>"]))


def scale(title: str, values: Sequence[float], pad: float = 0.08) -> Axis:
    """A linear axis over ``values`` with about five round ticks."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    margin = (high - low) * pad if high - low > 1e-6 * size + 1e-9 else 0.02 * size + 1e-6
    low, high = low - margin, high + margin
    step = _round_step((high - low) / 6)
    first = math.ceil(low / step)
    places = [index * step for index in range(first, math.floor(high / step) + 1)]
    return Axis(title, low, high, [(at, _tick(at, step)) for at in places])


def steps(title: str, values: Sequence[float]) -> Axis:
    """A linear axis that starts and ends with the data, for training steps."""
    low, high = min(values), max(max(values), min(values) + 1)
    stride = max(1, round(_round_step((high - low) / 6)))
    ticks = [(float(at), str(at)) for at in range(math.ceil(low / stride) * stride, math.floor(high) + 1, stride)]
    return Axis(title, low, high, ticks)


def powers(title: str, values: Sequence[float]) -> Axis:
    """A log2 axis with a tick at each value that was run; all must be positive."""
    low, high = min(values), max(values)
    ticks = [(value, f"{value:g}") for value in sorted(set(values))]
    return Axis(title, low / 2**0.5, high * 2**0.5, ticks, log2=True)


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
    for each in series:
        for run in _unbroken(each.points) if joined else ():
            middle = [(canvas.px(point.x), canvas.py(point.mean)) for point in run]
            canvas.path(middle, f"line c{each.colour % COLOURS}", each.name)
        for point in filter(None, each.points):
            there = [other for other in series if any(p and p.x == point.x for p in other.points)]
            shift = 0.0 if joined else _shift(there.index(each), len(there), canvas)
            _draw_point(canvas, point, each.colour, shift)
    return canvas.done(description)


def scatter(series: Sequence[Series], x: Axis, y: Axis, description: str = "") -> Markup:
    """The same points on two continuous axes, each mark at its values."""
    canvas = Canvas(x, y)
    canvas.frame()
    for each in series:
        for point in filter(None, each.points):
            _draw_point(canvas, point, each.colour)
    return canvas.done(description)


def line_plot(curves: Sequence[Curve], x: Axis, y: Axis, smooth: float = 0.0, description: str = "") -> Markup:
    """Training curves; with ``smooth`` the raw values stay as a faint line behind an exponential mean."""
    canvas = Canvas(x, y)
    canvas.frame()
    budget = max(60, min(MAX_POINTS, 16 * MAX_POINTS // max(1, len(curves))))
    passes: list[tuple[str, Callable[[Curve], list[tuple[float, float]]]]] = [("line", lambda curve: curve.rows)]
    if smooth:
        passes = [("raw", lambda curve: curve.rows), ("line", lambda curve: _smoothed(curve.rows, smooth))]
    for kind, rows in passes:
        for curve in curves:
            kept = downsample(rows(curve), budget)
            pixels = [(canvas.px(step), canvas.py(min(max(value, y.low), y.high))) for step, value in kept]
            style = curve.style if kind == "line" else ""
            canvas.path(pixels, f"{kind} thin c{curve.colour % COLOURS}", curve.name, style)
            if len(kept) == 1:
                canvas.mark(*pixels[0], curve.colour, curve.name, size=3)
            if curve.broken and kind == "line":
                canvas.cross(*pixels[-1], curve.colour)
    return canvas.done(description)


def strip(values: Sequence[float], mean: float, std: float | None, low: float, high: float) -> Markup:
    """A table cell's picture: the seeds, their mean and standard deviation on a scale shared by all rows, which holds
    them all."""
    width, middle = 120.0, 9.0
    spread = (high - low) or 1.0

    def at(value: float) -> float:
        return 6 + (value - low) / spread * (width - 12)

    parts = [f'<line class="grid" x1="2" x2="{width - 2:g}" y1="{middle}" y2="{middle}"/>']
    if std is not None:
        ends = f'x1="{at(mean - std):.1f}" x2="{at(mean + std):.1f}"'
        parts.append(f'<line class="bar" {ends} y1="{middle}" y2="{middle}"/>')
    parts += [f'<circle class="seed" cx="{at(value):.1f}" cy="{middle}" r="2.4"/>' for value in values]
    parts.append(f'<circle class="mean" cx="{at(mean):.1f}" cy="{middle}" r="4"/>')
    return Markup(f'<svg class="strip" viewBox="0 0 {width:g} 18" aria-hidden="true">{"".join(parts)}</svg>')


def legend(names: Sequence[tuple[str, int]], round_marks: bool = False) -> list[Key]:
    """The mark of each (name, colour); ``round_marks``: shapes stand for something else."""
    marks = [(name, colour % COLOURS, _shape(7, 7, 5, 0 if round_marks else colour % SHAPES)) for name, colour in names]
    return [Key(name, Markup(f'<g class="c{colour} mean">{shape}</g>')) for name, colour, shape in marks]


def shape_legend(names: Sequence[str]) -> list[Key]:
    """What the marks' shapes stand for."""
    shapes = [_shape(7, 7, 5, at % SHAPES) for at in range(len(names))]
    return [Key(name, Markup(f'<g class="plain">{shape}</g>')) for name, shape in zip(names, shapes, strict=True)]


def line_legend(names: Sequence[tuple[str, str]]) -> list[Key]:
    """(name, style): what the dashes and shades of lines stand for."""
    line = '<line class="axis" stroke-width="2" x1="0" x2="28" y1="7" y2="7" style="{}"/>'
    return [Key(name, Markup(line.format(style)), width=28) for name, style in names]


def downsample(rows: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most ``limit`` rows: the least and the greatest of each bucket, in order, so that spikes survive."""
    if len(rows) <= limit:
        return list(rows)
    buckets = max(1, limit // 2)
    kept = []
    for index in range(buckets):
        start, stop = len(rows) * index // buckets, len(rows) * (index + 1) // buckets
        bucket = range(start, stop)
        ends = {min(bucket, key=lambda at: rows[at][1]), max(bucket, key=lambda at: rows[at][1])}
        kept += [rows[at] for at in sorted(ends)]
    return kept


def _draw_point(canvas: Canvas, point: Point, colour: int, shift: float = 0.0) -> None:
    tone, x = f"c{colour % COLOURS}", canvas.px(point.x) + shift
    if point.std is not None:
        low, high = canvas.py(point.mean - point.std), canvas.py(point.mean + point.std)
        canvas.line(x, low, x, high, f"bar {tone}")
        for end in (low, high):
            canvas.line(x - 4, end, x + 4, end, f"bar {tone}")
    for value in point.values if len(point.values) > 1 else ():
        where = f'cx="{x:.1f}" cy="{canvas.py(value):.1f}"'
        canvas.parts.append(f'<circle class="seed {tone}" {where} r="2.6"/>')
    canvas.mark(x, canvas.py(point.mean), colour, point.text, shape=point.shape)


def _shift(index: int, total: int, canvas: Canvas) -> float:
    """Pixels to the side of a name, so that error bars of several series do not cover each other."""
    room = (canvas.width - LEFT - RIGHT) / max(1, len(canvas.x.ticks))
    spread = min(26.0, room * 0.8 / max(1, total))
    return (index - (total - 1) / 2) * spread


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
        side = size * 1.7
        return f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}"/>'
    reach = size * 1.3
    corners = {
        2: [(0, -reach), (reach, 0), (0, reach), (-reach, 0)],
        3: [(0, -reach), (reach, reach * 0.8), (-reach, reach * 0.8)],
    }[kind]
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


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


def _tick(value: float, step: float) -> str:
    """As many decimals as the step has."""
    decimals = next((n for n in range(15) if math.isclose(step, round(step, n), rel_tol=1e-6)), 15)
    return f"{value:.{decimals}f}"
