"""A quantization study as JSON, a terminal table, a page and a W&B table."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loralab.numerics import codebooks
from loralab.reporting import svg
from loralab.reporting.html import cell, definitions, document, figure, head, pairs, sort_key, table, tile
from loralab.reporting.provenance import brief
from loralab.reporting.report import write_text
from loralab.reporting.table import DECOMPOSED, align, memory

FAMILIES = ("int8 weight-only", "int8 weights and activations", "int4", "fp4", "nf4")
Rows = dict[str, dict[str, Any]]
Column = tuple[str, str, str, Callable[[float], str]]  # key, title, hint, text

HELD = "packed weights and statistics; decomposed products hold the weights in 16 bits too, for columns of outliers"
COLUMNS: list[Column] = [
    ("bits_per_parameter", "bits/param", HELD, "{:.4f}".format),
    ("bytes", "bytes", HELD, memory),
    ("relative_rmse", "rel. RMSE", "||W' - W|| / ||W||, W' in float32", "{:.2%}".format),
    (
        "bulk_relative_rmse",
        "RMSE, small weights",
        "relative RMSE over the weights within 3 standard deviations, outliers left out",
        "{:.2%}".format,
    ),
    ("snr_db", "SNR dB", "-20 log10 of the relative RMSE", "{:.1f}".format),
    ("matmul_relative_error", "matmul", "of x W^T, x as said above; activations quantized where so", "{:.2%}".format),
    ("zeroed_share", "become 0", "share of the weights other than 0 that quantize to 0", "{:.1%}".format),
    ("loss", "loss", "mean negative log-likelihood of the targets", "{:.4f}".format),
    ("loss_change", "loss change", "against the dense model", "{:+.4f}".format),
    ("kl", "KL", "KL(dense || quantized) per target, nats", "{:.4f}".format),
    ("same_prediction", "same choice", "targets with the dense model's most likely token", "{:.1%}".format),
]


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """quantize.json and report/index.html in ``folder``; the page's path."""
    write_text(folder / "quantize.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return write_text(folder / "report" / "index.html", page(result))


def fitting(result: Mapping[str, Any]) -> Rows:
    """The schemes that were measured."""
    return {name: row for name, row in result["schemes"].items() if "error" not in row}


def terminal(result: Mapping[str, Any]) -> str:
    """The table as plain text; schemes that do not fit say why below it."""
    rows = fitting(result)
    evaluated = any("kl" in row for row in rows.values())
    hidden = ("bulk_relative_rmse", *(("bytes", "snr_db", "zeroed_share", "same_prediction") if evaluated else ()))
    shown = [column for column in _shown(rows) if column[0] not in hidden]
    titles = ["scheme", *(title for _, title, _, _ in shown), ""]
    body = [[name, *(_text(column, row) for column in shown), ""] for name, row in rows.items()]
    lines = [f"{subject(result)}", "", *align(titles, body, numeric_from=0)]
    notes = [f"{name}: {row['error']}" for name, row in result["schemes"].items() if "error" in row]
    notes += [f"- {words}" for words in undefined({**rows, **_dense(result)})]
    notes += [DECOMPOSED] if any(name.endswith("_decomposed") for name in rows) else []
    if "inputs" in result:
        notes.insert(0, f"matmul: error of x W^T, x: {result['inputs']['of']}")
    return "\n".join(line.rstrip() for line in [*lines, *([""] if notes else []), *notes])


def undefined(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which figures are missing, why and whose: a text for each; what is exact (no error, no SNR) has none."""
    titles = {column[0]: column[1] for column in COLUMNS} | {"layers": "some layers"}
    whose: dict[str, list[str]] = {}
    for name, row in rows.items():
        for key, words in row.get("undefined", {}).items():
            if not (key == "snr_db" and row["relative_rmse"] == 0):
                whose.setdefault(f"{titles.get(key, key.replace('_', ' '))}: {words}", []).append(name)
    return [
        f"{words} ({'all of them' if len(names) == len(rows) > 1 else ', '.join(names)})"
        for words, names in whose.items()
    ]


def subject(result: Mapping[str, Any]) -> str:
    """What was quantized, in one line."""
    weights, data = result["weights"], result.get("data")
    shape = f", {' x '.join(map(str, result['shape']))}" if "shape" in result else f", {len(result['layers'])} layers"
    scored = f"; scored on {data['targets']:,} targets of {data['name']}" if data else ""
    return f"{weights}{shape}{scored}"


def wandb_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows), every measure of every scheme."""
    rows = fitting(result)
    keys = [column[0] for column in _shown(rows)]
    return ["scheme", *keys], [[name, *(row.get(key) for key in keys)] for name, row in rows.items()]


def page(result: Mapping[str, Any]) -> str:
    """The whole document."""
    figures = "\n".join(figure(*one) for one in _figures(result))
    sections = [
        _header(result),
        f"<section>\n<h2>Schemes</h2>\n{_schemes(result)}\n</section>",
        f'<section>\n<h2>Figures</h2>\n<div class="figures">\n{figures}\n</div>\n</section>',
        f"<section>\n<h2>Layers</h2>\n{_layers(result)}\n</section>",
    ]
    return document("quantize", sections)


def _header(result: Mapping[str, Any]) -> str:
    rows, data = fitting(result), result.get("data") or {}
    parameters = next(iter(rows.values()))["weights"]
    tiles = [tile(str(len(rows)), "schemes on the same weights"), tile(f"{parameters:,}", "weights quantized")]
    if "dense" in result:
        tiles.append(tile(_number(result["dense"]["loss"], ".4f"), "loss of the dense model"))
    found = result.get("outlier_features")
    facts = {
        "base fingerprint": result.get("fingerprint", ""),
        "data": f"{data['name']} {data['fingerprint']}, {data['rows']} rows" if data else "",
        "outlier features": "" if found is None else f"{len(found)} of the hidden size {found[:12] or ''}",
        "x of the matmul error": result.get("inputs", {}).get("of", ""),
        "machine": result.get("machine", ""),
        "versions": brief(result.get("versions")),
    }
    return (
        '<header>\n<div class="kicker">loralab quantize</div>\n'
        f"<h1>{escape(str(result['weights']))}</h1>\n"
        f'<p class="question">What does each scheme cost, in bits and in error? {escape(subject(result))}</p>\n'
        f'<div class="tiles">{"".join(tiles)}</div>\n{definitions(pairs(facts))}\n</header>'
    )


def _schemes(result: Mapping[str, Any]) -> str:
    rows = fitting(result)
    shown = _shown(rows)
    heads = [head("scheme", key=True), *(head(title, hint) for _, title, hint, _ in shown)]
    heads.append(head("worst layer", "the largest relative RMSE", key=True))
    body = []
    for name, row in rows.items():
        cells = [cell(name, name, "key"), *(cell(_text(one, row), sort_key(row.get(one[0]))) for one in shown)]
        worst: dict[str, Any] = next(iter(row["worst_layers"]), {"layer": "", "relative_rmse": None})
        text = f"{worst['layer']} {_number(worst['relative_rmse'], '.2%')}".strip()
        cells.append(cell(text, sort_key(worst["relative_rmse"]), "key"))
        body.append(f"<tr>{''.join(cells)}</tr>")
    refused = [(name, row["error"]) for name, row in result["schemes"].items() if "error" in row]
    left_out = "".join(f'<p class="note">{escape(name)} is left out: {escape(why)}</p>' for name, why in refused)
    if any(name.endswith("_decomposed") for name in rows):
        left_out = f'<p class="note">{DECOMPOSED}.</p>{left_out}'
    return table(heads, body, "sortable") + left_out + _undefined({**rows, **_dense(result)})


def _dense(result: Mapping[str, Any]) -> Rows:
    return {"dense model": result["dense"]} if "dense" in result else {}


def _undefined(rows: Rows) -> str:
    why = "; ".join(undefined(rows))
    return f'<p class="note">- is undefined. {escape(why)}.</p>' if why else ""


def _layers(result: Mapping[str, Any]) -> str:
    layers: Rows = result["layers"]
    keys = list(dict.fromkeys(key for found in layers.values() for key in found if key not in ("shape", "undefined")))
    heads = [head("layer", key=True), head("shape"), *(head(key.replace("_", " ")) for key in keys)]
    body = []
    for name, found in layers.items():
        shape = " x ".join(map(str, found["shape"]))
        cells = [cell(name, name, "key"), cell(shape, shape)]
        cells += [cell(_number(found.get(key), ".4g"), sort_key(found.get(key))) for key in keys]
        body.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "sigma: standard deviation without outliers (median |w| / 0.6745 over weights other than 0); kurtosis: about 0,"
        " of a normal distribution 3; loudest column: its RMS over the median column's. Activations count where"
        " |x| >= 6 (LLM.int8(), section 4), padding left out."
    )
    return table(heads, body, "sortable") + f'<p class="note">{note}</p>' + _undefined(layers)


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    rows = {name: row for name, row in fitting(result).items() if row["relative_rmse"]}
    if rows:
        caption = "One mark per scheme; up and left is better. 6 dB is half the error."
        yield ("Precision against bits", *_scatter(rows, "snr_db", "SNR of the weights, dB", caption))
    evaluated = {name: row for name, row in rows.items() if row.get("loss_change") is not None}
    if evaluated:
        caption = "One mark per scheme; down and left is better; bars: one standard error over targets, paired."
        yield ("Loss change against bits", *_scatter(evaluated, "loss_change", "change in loss, nats", caption))
    yield "Code books", _code_books(), "The values that codes stand for, in units of a block's absmax."
    usual = ("int8_absmax", "int4_absmax", "fp4", "fp4_e2m1", "nf4", "nf4_double")
    chosen: list[str] = [name for name in usual if name in rows]
    chosen = chosen or list(rows)[:6]
    if len(result["layers"]) > 1 and chosen:
        yield ("Error by layer", *_by_layer(rows, chosen, list(result["layers"])))


def _scatter(rows: Rows, key: str, title: str, caption: str) -> tuple[str, str]:
    bits = [row["bits_per_parameter"] for row in rows.values()]
    spread = [row[key] + side * (row.get("loss_change_se") or 0.0) for row in rows.values() for side in (-1, 1)]
    ticks = [(at, f"{at:g}") for at in (4, 4.25, 4.5, 5, 6, 8, 16, 24)]
    low, high = min([4.0, *bits]) / 1.04, max([8.0, *bits]) * 1.04
    series = []
    for hue, family in enumerate(FAMILIES):
        inside = [(name, row) for name, row in rows.items() if _family(name) == family]
        points: list[svg.Point | None] = [
            svg.Point(
                row["bits_per_parameter"],
                row[key],
                [row[key]],
                row["loss_change_se"] if key == "loss_change" else None,
                f"{name}: {row['bits_per_parameter']:.4f} bits, {row[key]:.4g}",
            )
            for name, row in inside
        ]
        series += [svg.Series(family, points, hue)] if points else []
    x = svg.Axis("bits per parameter", low, high, [tick for tick in ticks if low <= tick[0] <= high], log2=True)
    legend = svg.legend([(one.name, one.colour) for one in series])
    return legend + svg.scatter(series, x, svg.scale(title, spread), title), caption


def _family(name: str) -> str:
    if name.startswith(("int8_product", "llm_int8")):
        return FAMILIES[1]
    return next((one for one in ("int4", "fp4", "nf4") if name.startswith(one)), FAMILIES[0])


def _code_books() -> str:
    names = [*codebooks.FOUR_BIT, "dynamic"]
    axis = svg.scale("value / absmax", [-1.0, 1.0], pad=0.03)
    canvas = svg.Canvas(axis, svg.places("", list(reversed(names))))
    canvas.frame()
    for row, name in enumerate(reversed(names)):
        hue = f"c{names.index(name) % svg.COLOURS}"
        for value in sorted(set(codebooks.table(name).tolist())):
            x, y = canvas.px(value), canvas.py(row)
            canvas.line(x, y - 12, x, y + 12, f"bar {hue}")
    return canvas.done("The values of each code book")


def _by_layer(rows: Rows, chosen: Sequence[str], order: Sequence[str]) -> tuple[str, str]:
    curves = []
    for hue, name in enumerate(chosen):
        known = rows[name]["layers"]
        points = [(float(at), known[layer]) for at, layer in enumerate(order) if known.get(layer) is not None]
        curves.append(svg.Curve(name, points, hue))
    y = svg.scale("relative RMSE", [value for curve in curves for _, value in curve.rows])
    x = svg.steps("layer, in the model's order", [at for curve in curves for at, _ in curve.rows])
    drawn = svg.legend([(curve.name, curve.colour) for curve in curves]) + svg.line_plot(curves, x, y)
    return drawn, "Layers in the order of the table below."


def _shown(rows: Rows) -> list[Column]:
    return [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows.values())]


def _text(column: Column, row: Mapping[str, Any]) -> str:
    value = row.get(column[0])
    if value is None:
        return "-"
    error = f" +- {row['loss_change_se']:.4f}" if column[0] == "loss_change" and row.get("loss_change_se") else ""
    return column[3](value) + error


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
