"""A quantization study as JSON, a terminal table, a page and a W&B table."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from loralab.numerics import codebooks
from loralab.reporting import svg
from loralab.reporting.figures import Figure
from loralab.reporting.html import Cell, Head, Tile, render
from loralab.reporting.layout import aligned, natural_width, terminal_width, wrapped
from loralab.reporting.provenance import brief
from loralab.reporting.report import write_text
from loralab.reporting.table import DECOMPOSED, memory

FAMILIES = ("int8 weight-only", "int8 weights and activations", "int4", "fp4", "nf4")
Measures = dict[str, dict[str, Any]]  # of each scheme, or of each layer
Quantity = tuple[str, str, str, Callable[[float], str]]  # key, title, hint, format

HELD = "packed weights and statistics; decomposed products hold the weights in 16 bits too, for columns of outliers"
QUANTITIES: list[Quantity] = [
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
    ("codes_used", "codes used", "codes that some weight has, of all layers", "{:d}".format),
    (
        "code_entropy_bits",
        "entropy",
        "Shannon entropy of the codes, bits: the more evenly used, the higher",
        "{:.2f}".format,
    ),
    (
        "merged_share",
        "merged",
        "share of a layer's distinct weights that fall on a code with another one of their scale",
        "{:.1%}".format,
    ),
    ("loss", "loss", "mean negative log-likelihood of the targets", "{:.4f}".format),
    ("loss_change", "loss change", "against the dense model", "{:+.4f}".format),
    ("kl", "KL", "KL(dense || quantized) per target, nats", "{:.4f}".format),
    ("same_prediction", "same choice", "targets with the dense model's most likely token", "{:.1%}".format),
]

WIDTH = 120
EXPENDABLE = (
    "codes_used",
    "merged_share",
    "code_entropy_bits",
    "bytes",
    "snr_db",
    "zeroed_share",
    "loss",
    "kl",
    "matmul_relative_error",
)  # when the terminal is narrow


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """quantize.json and report/index.html in ``folder``; the page's path."""
    write_text(folder / "quantize.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return write_text(folder / "report" / "index.html", page(result))


def fitting(result: Mapping[str, Any]) -> Measures:
    """The schemes that were measured."""
    return {name: row for name, row in result["schemes"].items() if "error" not in row}


def terminal(result: Mapping[str, Any], width: int | None = None) -> str:
    """The table as plain text, ``width`` columns wide (None: the terminal's); schemes that do not fit say why below."""
    schemes, width = fitting(result), width or terminal_width(WIDTH)
    evaluated = any("kl" in row for row in schemes.values())
    hidden = ("bulk_relative_rmse", *(("bytes", "snr_db", "zeroed_share", "same_prediction") if evaluated else ()))
    shown = [quantity for quantity in _shown(schemes) if quantity[0] not in hidden]
    for key in ("", *EXPENDABLE):
        shown = [quantity for quantity in shown if quantity[0] != key]
        titles = ["scheme", *(quantity[1] for quantity in shown)]
        rows = [[name, *(_text(quantity, row) for quantity in shown)] for name, row in schemes.items()]
        if natural_width(titles, rows) <= width:
            break
    lines = aligned(titles, rows, range(1, len(titles)))
    notes = [f"matmul: error of x W^T, x: {result['inputs']['of']}"] if "inputs" in result else []
    notes += [f"{name}: {row['error']}" for name, row in result["schemes"].items() if "error" in row]
    notes += [f"- {message}" for message in undefined({**schemes, **_dense(result)})]
    notes += [DECOMPOSED] if any(name.endswith("_decomposed") for name in schemes) else []
    footer = [line for note in notes for line in wrapped(note, width, "  ")]
    lines = [subject(result), "", *lines, *([""] if footer else []), *footer]
    return "\n".join(line.rstrip() for line in lines)


def undefined(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which figures are missing, why and whose: a text for each; what is exact (no error, no SNR) has none."""
    titles = {quantity[0]: quantity[1] for quantity in QUANTITIES} | {"layers": "some layers"}
    names_by_reason: dict[str, list[str]] = {}
    for name, row in rows.items():
        for key, reason in row.get("undefined", {}).items():
            if not (key == "snr_db" and row["relative_rmse"] == 0):
                names_by_reason.setdefault(f"{titles.get(key, key.replace('_', ' '))}: {reason}", []).append(name)
    return [
        f"{reason} ({'all of them' if len(names) == len(rows) > 1 else ', '.join(names)})"
        for reason, names in names_by_reason.items()
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
    keys = [quantity[0] for quantity in _shown(rows)]
    return ["scheme", *keys], [[name, *(row.get(key) for key in keys)] for name, row in rows.items()]


def page(result: Mapping[str, Any]) -> str:
    """The whole document."""
    schemes, data, dense = fitting(result), result.get("data") or {}, result.get("dense")
    parameters = next(iter(schemes.values()))["weights"]
    tiles = [Tile(str(len(schemes)), "schemes on the same weights"), Tile(f"{parameters:,}", "weights quantized")]
    tiles += [Tile(_number(dense["loss"], ".4f"), "loss of the dense model")] if dense else []
    outliers = result.get("outlier_features")
    facts = {
        "base fingerprint": result.get("fingerprint", ""),
        "data": f"{data['name']} {data['fingerprint']}, {data['rows']} rows" if data else "",
        "outlier features": "" if outliers is None else f"{len(outliers)} of the hidden size {outliers[:12] or ''}",
        "x of the matmul error": result.get("inputs", {}).get("of", ""),
        "machine": result.get("machine", ""),
        "versions": brief(result.get("versions")),
    }
    return render(
        "quantization.html",
        title="quantize",
        weights=str(result["weights"]),
        subject=subject(result),
        tiles=tiles,
        facts=facts,
        schemes=_scheme_table(schemes),
        notes=list(_notes(result, schemes)),
        figures=list(_figures(result)),
        layers=_layer_table(result["layers"]),
        undefined_layers="; ".join(undefined(result["layers"])),
    )


def _scheme_table(schemes: Measures) -> tuple[list[Head], list[list[Cell]]]:
    shown = _shown(schemes)
    heads = [Head("scheme", key=True), *(Head(title, hint) for _, title, hint, _ in shown)]
    heads.append(Head("worst layer", "the largest relative RMSE", key=True))
    rows = []
    for name, row in schemes.items():
        worst: dict[str, Any] = next(iter(row["worst_layers"]), {"layer": "", "relative_rmse": None})
        text = f"{worst['layer']} {_number(worst['relative_rmse'], '.2%')}".strip()
        cells = [Cell(name, name, "key"), *(Cell(_text(quantity, row), row.get(quantity[0])) for quantity in shown)]
        rows.append([*cells, Cell(text, worst["relative_rmse"], "key")])
    return heads, rows


def _notes(result: Mapping[str, Any], schemes: Measures) -> Iterator[str]:
    if any(name.endswith("_decomposed") for name in schemes):
        yield DECOMPOSED
    for name, row in result["schemes"].items():
        if "error" in row:
            yield f"{name} is left out: {row['error']}"
    if reasons := "; ".join(undefined({**schemes, **_dense(result)})):
        yield f"- is undefined. {reasons}"


def _dense(result: Mapping[str, Any]) -> Measures:
    return {"dense model": result["dense"]} if "dense" in result else {}


def _layer_table(layers: Measures) -> tuple[list[Head], list[list[Cell]]]:
    keys = list(dict.fromkeys(key for row in layers.values() for key in row if key not in ("shape", "undefined")))
    heads = [Head("layer", key=True), Head("shape"), *(Head(key.replace("_", " ")) for key in keys)]
    rows = []
    for name, row in layers.items():
        shape = " x ".join(map(str, row["shape"]))
        numbers = [Cell(_number(row.get(key), ".4g"), row.get(key)) for key in keys]
        rows.append([Cell(name, name, "key"), Cell(shape, shape), *numbers])
    return heads, rows


def _figures(result: Mapping[str, Any]) -> Iterator[Figure]:
    rows = {name: row for name, row in fitting(result).items() if row["relative_rmse"]}
    if rows:
        caption = "One mark per scheme; up and left is better. 6 dB is half the error."
        yield _scatter("Precision against bits", rows, "snr_db", "SNR of the weights, dB", caption)
    evaluated = {name: row for name, row in rows.items() if row.get("loss_change") is not None}
    if evaluated:
        caption = "One mark per scheme; down and left is better; bars: one standard error over targets, paired."
        yield _scatter("Loss change against bits", evaluated, "loss_change", "change in loss, nats", caption)
    yield Figure("Code books", "The values that codes stand for, in units of a block's absmax.", _code_books())
    if coded := {name: row["code_histogram"] for name, row in rows.items() if "code_histogram" in row}:
        yield _code_use(coded)
    usual = ("int8_absmax", "int4_absmax", "fp4", "fp4_e2m1", "nf4", "nf4_double")
    chosen: list[str] = [name for name in usual if name in rows]
    chosen = chosen or list(rows)[:6]
    if len(result["layers"]) > 1 and chosen:
        yield _by_layer(rows, chosen, list(result["layers"]))


def _scatter(title: str, rows: Measures, key: str, name: str, caption: str) -> Figure:
    bits = [row["bits_per_parameter"] for row in rows.values()]
    spread = [row[key] + sign * (row.get("loss_change_se") or 0.0) for row in rows.values() for sign in (-1, 1)]
    ticks = [(value, f"{value:g}") for value in (4, 4.25, 4.5, 5, 6, 8, 16, 24)]
    low, high = min([4.0, *bits]) / 1.04, max([8.0, *bits]) * 1.04
    families: dict[str, list[svg.Point | None]] = {family: [] for family in FAMILIES}
    for scheme, row in rows.items():
        bits, value = row["bits_per_parameter"], row[key]
        error = row["loss_change_se"] if key == "loss_change" else None
        tip = f"{scheme}: {bits:.4f} bits, {value:.4g}"
        families[_family(scheme)].append(svg.Point(bits, value, [value], error, tip))
    series = [svg.Series(family, points, colour) for colour, (family, points) in enumerate(families.items()) if points]
    x = svg.Axis("bits per parameter", low, high, [tick for tick in ticks if low <= tick[0] <= high], log2=True)
    legend = svg.legend([(one.name, one.colour) for one in series])
    return Figure(title, caption, svg.scatter(series, x, svg.scale(name, spread), name), [legend])


def _family(name: str) -> str:
    if name.startswith(("int8_product", "llm_int8")):
        return FAMILIES[1]
    return next((family for family in ("int4", "fp4", "nf4") if family in name), FAMILIES[0])


def _code_books() -> Markup:
    names = [*codebooks.FOUR_BIT, "dynamic"]
    axis = svg.scale("value / absmax", [-1.0, 1.0], pad=0.03)
    canvas = svg.Canvas(axis, svg.places("", list(reversed(names))))
    canvas.frame()
    for row, name in enumerate(reversed(names)):
        colour = f"c{names.index(name) % svg.COLOURS}"
        for value in sorted(set(codebooks.table(name).tolist())):
            x, y = canvas.px(value), canvas.py(row)
            canvas.line(x, y - 12, x, y + 12, f"bar {colour}")
    return canvas.done("The values of each code book")


def _code_use(histograms: Mapping[str, Sequence[int]]) -> Figure:
    """How often each code is used, of one scheme of each kind."""
    usual = ("int8_absmax_tensor", "int8_absmax", "int4_absmax", "fp4", "nf4")
    chosen = [name for name in usual if name in histograms] or list(histograms)[:5]
    curves = []
    for colour, name in enumerate(chosen):
        counts = histograms[name]
        last, mean = max(1, len(counts) - 1), sum(counts) / len(counts)
        curves.append(svg.Curve(name, [(place / last, count / mean) for place, count in enumerate(counts)], colour))
    y = svg.scale("uses of a code / their mean", [0.0, *(value for curve in curves for _, value in curve.rows)])
    x = svg.scale("code, from the lowest value to the highest", [0.0, 1.0], pad=0.03)
    caption = "1 everywhere: every code is used equally often. The codes of a scheme are spread over the whole width."
    legend = svg.legend([(curve.name, curve.colour) for curve in curves])
    return Figure("Use of the codes", caption, svg.line_plot(curves, x, y), [legend])


def _by_layer(rows: Measures, chosen: Sequence[str], order: Sequence[str]) -> Figure:
    curves = []
    for colour, name in enumerate(chosen):
        errors = rows[name]["layers"]
        points = [(float(index), errors[layer]) for index, layer in enumerate(order) if errors.get(layer) is not None]
        curves.append(svg.Curve(name, points, colour))
    y = svg.scale("relative RMSE", [value for curve in curves for _, value in curve.rows])
    x = svg.steps("layer, in the model's order", [index for curve in curves for index, _ in curve.rows])
    legend = svg.legend([(curve.name, curve.colour) for curve in curves])
    return Figure("Error by layer", "Layers in the order of the table below.", svg.line_plot(curves, x, y), [legend])


def _shown(rows: Measures) -> list[Quantity]:
    return [quantity for quantity in QUANTITIES if any(row.get(quantity[0]) is not None for row in rows.values())]


def _text(quantity: Quantity, row: Mapping[str, Any]) -> str:
    value = row.get(quantity[0])
    if value is None:
        return "-"
    error = f" +- {row['loss_change_se']:.4f}" if quantity[0] == "loss_change" and row.get("loss_change_se") else ""
    return quantity[3](value) + error


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
