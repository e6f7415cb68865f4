"""A quantization study as JSON, a terminal table, a page and a W&B table."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loralab.reporting.charts import Figure
from loralab.reporting.html import Cell, Head, Tile, render
from loralab.reporting.layout import aligned, natural_width, terminal_width, wrapped
from loralab.reporting.provenance import brief
from loralab.reporting.quantization_figures import figures
from loralab.reporting.report import write_figures, write_text
from loralab.reporting.table import DECOMPOSED, memory
from loralab.reporting.vega import bundle

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
    """quantize.json, report/index.html and report/figures/*.svg in ``folder``; the page's path."""
    write_text(folder / "quantize.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    drawn = list(figures(fitting(result), list(result["layers"])))
    write_figures(folder / "report" / "figures", drawn, ("svg",))
    return write_text(folder / "report" / "index.html", page(result, drawn))


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


def page(result: Mapping[str, Any], drawn: list[Figure]) -> str:
    """The whole document with the figures ``drawn``."""
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
        figures=drawn,
        bundle=bundle(),
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
