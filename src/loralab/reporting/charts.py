"""What every chart shares: colours, dashes and shapes, axes with units, zoom, hover, and how it becomes a file.

A chart is an Altair chart over named data sets; the page puts its own rows into them when its reader filters. Series
differ by colour (Okabe and Ito, safe for colour-blind readers), by width or size, and by dash or shape.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from loralab.analysis.values import Json

if TYPE_CHECKING:
    import altair as alt

COLOURS = ("#0072b2", "#d55e00", "#00846a", "#b14f89", "#a87400", "#3c8fc4", "#5f6670")
DASHES = ([1, 0], [7, 3], [2, 3], [10, 3, 2, 3])
SHAPES = ("circle", "square", "diamond", "triangle-up")
WIDTH, HEIGHT = 560, 300  # pixels, of a file; a page's charts are as wide as their column
ROW = 24  # pixels, of a chart with a row for each name
LONGEST_LABEL = 260  # pixels
ZOOM = "wheel![event.ctrlKey || event.shiftKey || event.metaKey]"  # so that the bare wheel scrolls the page


@dataclass(frozen=True)
class Legend:
    """What the colours, dashes or shapes of the rows' ``field`` stand for; the page filters by it."""

    field: str
    kind: str
    names: list[str]


@dataclass(frozen=True)
class Figure:
    """A chart with its title and caption; ``name``: of its files. ``axes``: which of x and y may be made logarithmic;
    ``store``: what the page chooses its rows from, by ``kind`` of figure."""

    name: str
    title: str
    caption: str
    spec: Json
    legends: list[Legend] = field(default_factory=list)
    axes: str = ""
    kind: str = "rows"
    store: Json = field(default_factory=dict)

    def plain(self) -> Json:
        """For the page's script."""
        legends = [{"field": one.field, "kind": one.kind, "names": one.names} for one in self.legends]
        about = {"name": self.name, "title": self.title, "kind": self.kind, "axes": self.axes}
        spec = {**self.spec, "datasets": {}} if self.store else self.spec
        return {**about, "legends": legends, "spec": spec, "store": self.store}


def specification(chart: "alt.LayerChart", rows: Mapping[str, Sequence[Json]], height: float = HEIGHT) -> Json:
    """The chart as Vega-Lite with the rows of its data sets, legible alone; without the address of its schema."""
    spec: Json = chart.properties(width=WIDTH, height=height).to_dict(validate=False)
    spec.pop("$schema", None)
    spec["datasets"] = {name: list(given) for name, given in rows.items()}
    return {**spec, "config": config()}


def layers(*parts: "alt.Chart") -> "alt.LayerChart":
    import altair as alt

    return cast("alt.LayerChart", alt.layer(*parts))


def config() -> Json:
    """Sizes of texts, colours of series: of a file, on white."""
    text = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 600, "labelLimit": LONGEST_LABEL}
    return {
        "font": "Helvetica Neue, Arial, sans-serif",
        "background": "#ffffff",
        "view": {"stroke": None},
        "axis": {**text, "gridColor": "#e6e9ed", "domainColor": "#5c6570", "tickColor": "#5c6570", "titlePadding": 8},
        "legend": {
            **text,
            "orient": "top",
            "columns": 3,
            "symbolOpacity": 1,
            "symbolStrokeWidth": 2,
            "labelLimit": 320,
        },
        "range": {"category": list(COLOURS)},
    }


def colour(names: Sequence[str], name: str = "group") -> "alt.Color":
    """The names keep their colours whichever rows are left."""
    import altair as alt

    range_ = [COLOURS[index % len(COLOURS)] for index in range(len(names))]
    legend = alt.Legend(title=None) if len(names) > 1 else None
    return alt.Color(f"{name}:N", scale=alt.Scale(domain=list(names), range=range_), legend=legend, sort=None)


def dash(names: Sequence[str]) -> "alt.StrokeDash":
    import altair as alt

    scale = alt.Scale(domain=list(names), range=[list(DASHES[index % len(DASHES)]) for index in range(len(names))])
    return alt.StrokeDash("by:N", scale=scale, legend=alt.Legend(title=None) if len(names) > 1 else None, sort=None)


def shape(names: Sequence[str], name: str = "by") -> "alt.Shape":
    import altair as alt

    scale = alt.Scale(domain=list(names), range=[SHAPES[index % len(SHAPES)] for index in range(len(names))])
    legend = alt.Legend(title=None) if len(names) > 1 and name == "by" else None
    return alt.Shape(f"{name}:N", scale=scale, legend=legend, sort=None)


def nested(names: Sequence[str], widest: float, least: float) -> "alt.Scale":
    """Sizes that shrink from the first name to the last, so that equal lines and marks are seen inside each other."""
    import altair as alt

    step = (widest - least) / max(1, len(names) - 1)
    return alt.Scale(
        type="ordinal", domain=list(names), range=[round(widest - step * index, 2) for index in range(len(names))]
    )


def zoom(axes: Sequence[Literal["x", "y"]] = ("x", "y")) -> "alt.Parameter":
    """Drag to move, wheel with Ctrl to zoom, double click to reset; ``axes``: those of numbers."""
    import altair as alt

    return alt.selection_interval(name="zoom", bind="scales", zoom=ZOOM, encodings=list(axes))


def x_number(name: str, title: str, values: Sequence[float]) -> "alt.X":
    """A tick at each value that was run; over powers of two the axis is logarithmic."""
    import altair as alt

    ticks, wide = sorted(set(values)), min(values) > 0 and max(values) / min(values) >= 4
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    domain = [low / 2**0.4, high * 2**0.4] if wide else [low - margin, high + margin]
    scale = alt.Scale(type="log", base=2, domain=domain, nice=False) if wide else alt.Scale(domain=domain, nice=False)
    axis = alt.Axis(values=ticks, format="~g", grid=False)
    return alt.X(f"{name}:Q", title=title, scale=scale, axis=axis)


def y_number(name: str, title: str, domain: Sequence[float] | None = None) -> "alt.Y":
    import altair as alt

    scale = alt.Scale(zero=False, nice=False, domain=list(domain)) if domain else alt.Scale(zero=False)
    return alt.Y(f"{name}:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6))


def without_spikes(values: Sequence[float]) -> list[float]:
    """[low, high] of the middle 98% with a margin, so that one spike does not flatten every curve."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[-1 - cut]
    margin = (high - low) * 0.06 or abs(high) * 0.02 or 1e-6
    return [low - margin, high + margin]


def rounded(value: float | None) -> float | None:
    """Six digits: what a screen shows of a curve, in a tenth of the bytes."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def by_name(title: str, mark: float) -> "alt.LayerChart":
    """A mark for each row of ``rows`` at its value, a row of the chart for each name, and a line at ``mark``, which is
    the one row of ``at``."""
    import altair as alt

    base = alt.Chart(alt.NamedData("rows")).encode(
        y=alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=LONGEST_LABEL)),
        x=alt.X("value:Q", title=title, scale=alt.Scale(zero=False)),
        tooltip=[alt.Tooltip("name:N"), alt.Tooltip("value:Q", title=title, format=".6~g")],
    )
    line = alt.Chart(alt.NamedData("at")).mark_rule(strokeDash=[4, 3], color="#5c6570").encode(x="at:Q")
    return layers(line, base.mark_point(filled=True, size=80, opacity=1, color=COLOURS[0]).add_params(zoom(("x",))))
