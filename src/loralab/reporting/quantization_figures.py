"""The figures of a quantization study: error and loss against bits, code books, use of the codes, error by layer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loralab.analysis.values import Json
from loralab.numerics import codebooks
from loralab.reporting import charts
from loralab.reporting.charts import Figure, Legend

if TYPE_CHECKING:
    import altair as alt

FAMILIES = ("int8 weight-only", "int8 weights and activations", "int4", "fp4", "nf4")
USUAL = ("int8_absmax", "int4_absmax", "fp4", "fp4_e2m1", "nf4", "nf4_double")
CODED = ("int8_absmax_tensor", "int8_absmax", "int4_absmax", "fp4", "nf4")
BITS = (4, 4.25, 4.5, 5, 6, 8, 16, 24)
Measures = Mapping[str, Mapping[str, Any]]  # of each scheme


def figures(schemes: Measures, layers: Sequence[str]) -> Iterator[Figure]:
    """Of the schemes that were measured; ``layers``: in the model's order."""
    rows = {name: row for name, row in schemes.items() if row["relative_rmse"]}
    if rows:
        caption = "One mark per scheme; up and left is better. 6 dB is half the error."
        yield _scatter("Precision against bits", rows, "snr_db", "SNR of the weights (dB)", caption)
    evaluated = {name: row for name, row in rows.items() if row.get("loss_change") is not None}
    if evaluated:
        caption = "One mark per scheme; down and left is better; bars: one standard error over targets, paired."
        yield _scatter("Loss change against bits", evaluated, "loss_change", "change in loss (nats)", caption)
    yield _code_books()
    if coded := {name: row["code_histogram"] for name, row in rows.items() if "code_histogram" in row}:
        yield _code_use(coded)
    chosen = [name for name in USUAL if name in rows] or list(rows)[:6]
    if len(layers) > 1 and chosen:
        yield _by_layer(rows, chosen, layers)


def family(name: str) -> str:
    """The kind of a scheme, which gives its colour."""
    if name.startswith(("int8_product", "llm_int8")):
        return FAMILIES[1]
    return next((one for one in ("int4", "fp4", "nf4") if one in name), FAMILIES[0])


def _scatter(title: str, schemes: Measures, key: str, name: str, caption: str) -> Figure:
    import altair as alt

    rows: list[Json] = []
    for scheme, row in schemes.items():
        error, value = row.get("loss_change_se") if key == "loss_change" else None, row[key]
        ends = {"low": value - error, "high": value + error} if error else {}
        rows.append({"name": scheme, "group": family(scheme), "x": row["bits_per_parameter"], "value": value, **ends})
    bits, groups = [row["x"] for row in rows], [one for one in FAMILIES if any(one == row["group"] for row in rows)]
    low, high = min([4.0, *bits]) / 1.04, max([8.0, *bits]) * 1.04
    ticks = [tick for tick in BITS if low <= tick <= high]
    scale = alt.Scale(type="log", base=2, domain=[low, high], nice=False)
    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X("x:Q", title="bits per parameter", scale=scale, axis=alt.Axis(values=ticks, format="~g", grid=False)),
        color=charts.colour(groups),
        tooltip=[alt.Tooltip("name:N", title="scheme"), _number("x", "bits per parameter"), _number("value", name)],
    )
    marks = base.mark_point(filled=True, size=85, opacity=0.9, stroke="white", strokeWidth=1)
    marks = marks.encode(y=charts.y_number("value", name), shape=charts.shape(groups, "group"))
    bars = base.mark_rule(strokeWidth=1.6).encode(y=charts.y_number("low", name), y2="high:Q")
    spec = charts.specification(charts.layers(bars, marks.add_params(charts.zoom())), {"rows": rows})
    return Figure(_stem(title), title, caption, spec, [Legend("group", "both", groups)])


def _code_books() -> Figure:
    import altair as alt

    names = [*codebooks.FOUR_BIT, "dynamic"]
    rows = [{"name": name, "value": value} for name in names for value in sorted(set(codebooks.table(name).tolist()))]
    ticks = alt.Chart(alt.NamedData("rows")).mark_tick(thickness=1.6, size=18)
    ticks = ticks.encode(
        x=alt.X("value:Q", title="value / absmax"),
        y=alt.Y("name:N", title=None, sort=None),
        color=charts.colour(names, "name"),
        tooltip=[alt.Tooltip("name:N", title="code book"), _number("value", "value / absmax")],
    )
    chart = charts.layers(ticks.add_params(charts.zoom(("x",))))
    spec = charts.specification(chart, {"rows": rows}, charts.ROW * len(names) + 10)
    caption = "The values that codes stand for, in units of a block's absmax."
    return Figure("code_books", "Code books", caption, spec, [Legend("name", "colour", names)])


def _code_use(histograms: Mapping[str, Sequence[int]]) -> Figure:
    """How often each code is used, of one scheme of each kind."""
    chosen = [name for name in CODED if name in histograms] or list(histograms)[:5]
    rows = []
    for name in chosen:
        counts = histograms[name]
        last, mean = max(1, len(counts) - 1), sum(counts) / len(counts)
        rows += [{"group": name, "x": at / last, "value": count / mean} for at, count in enumerate(counts)]
    caption = "1 everywhere: every code is used equally often. The codes of a scheme are spread over the whole width."
    titles = ("code, from the lowest value to the highest", "uses of a code / their mean")
    return _lines("Use of the codes", caption, chosen, rows, titles)


def _by_layer(schemes: Measures, chosen: Sequence[str], order: Sequence[str]) -> Figure:
    rows = [
        {"group": name, "x": index, "value": error, "layer": layer}
        for name in chosen
        for index, layer in enumerate(order)
        if (error := schemes[name]["layers"].get(layer)) is not None
    ]
    caption = "Layers in the order of the table below."
    return _lines("Error by layer", caption, chosen, rows, ("layer, in the model's order", "relative RMSE"), "layer")


def _lines(
    title: str, caption: str, names: Sequence[str], rows: list[Json], titles: tuple[str, str], hint: str = ""
) -> Figure:
    import altair as alt

    x_title, y_title = titles
    tips = [
        alt.Tooltip("group:N", title="scheme"),
        _number("value", y_title),
        *([alt.Tooltip(f"{hint}:N")] * bool(hint)),
    ]
    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X(
            "x:Q", title=x_title, scale=alt.Scale(nice=False), axis=alt.Axis(grid=False, tickMinStep=1 if hint else 0)
        ),
        y=charts.y_number("value", y_title),
        color=charts.colour(names),
        tooltip=tips,
    )
    width = alt.StrokeWidth("group:O", scale=charts.nested(names, 3.2, 1.4), legend=None)
    lines = base.mark_line(clip=True).encode(strokeWidth=width)
    points = base.mark_point(filled=True, size=16, clip=True)
    spec = charts.specification(charts.layers(lines.add_params(charts.zoom()), points), {"rows": rows})
    return Figure(_stem(title), title, caption, spec, [Legend("group", "colour", list(names))], "y")


def _number(name: str, title: str) -> "alt.Tooltip":
    import altair as alt

    return alt.Tooltip(f"{name}:Q", title=title, format=".5~g")


def _stem(title: str) -> str:
    return title.lower().replace(" ", "_")
