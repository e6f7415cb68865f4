"""The page of ``make gpu``: what was measured on one card, from gpu.json alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reporting import html, svg

Row = Mapping[str, Any]
MIB = 2**20
SIZE, SECONDS, TEXT = "MiB", "s", ""
PLANNER = (
    *(("model", "model", TEXT), ("quantization", "quantization", TEXT), ("rows", "rows", TEXT)),
    *(("length", "tokens", TEXT), ("predicted_peak_bytes", "predicted", SIZE)),
    *(("measured_peak_bytes", "measured", SIZE), ("predicted_over_measured", "ratio", TEXT)),
    *(("status", "status", TEXT), ("error", "error", TEXT)),
)
PAGED = (
    *(("room", "room", TEXT), ("optimizer", "optimizer", TEXT), ("batches", "batches", TEXT)),
    *(("status", "status", TEXT), ("steps", "steps", TEXT), ("cap_bytes", "cap", SIZE)),
    *(("ballast_bytes", "ballast", SIZE), ("measured_peak_bytes", "peak", SIZE), ("state_bytes", "state", SIZE)),
    *(("paged_bytes", "paged", SIZE), ("step_s", "step", SECONDS), ("optimizer_step_s", "update", SECONDS)),
    *(("slowest_optimizer_step_s", "slowest update", SECONDS), ("error", "error", TEXT)),
)
SPEED = (
    *(("name", "trials", TEXT), ("tokens_per_s", "tokens/s", TEXT), ("train_s", "training", SECONDS)),
    *(("pack_sizes", "pack sizes", TEXT), ("note", "note", TEXT)),
)


def page(found: Row) -> str:
    """A self-contained page; parts that are not there yet are left out."""
    parts = found["parts"]
    device = "one CUDA card" if found["device"] == "cuda" else "the CPU: a rehearsal with tiny shapes"
    tiles = [
        html.tile(
            part["status"], f"{name}, {part.get('seconds', 0):.0f} s", part["status"] in ("failed", "out of time")
        )
        for name, part in parts.items()
    ]
    sections = [f"<header><h1>Measured on {device}</h1></header>", f'<div class="tiles">{"".join(tiles)}</div>']
    makers = {"machine": _machine, "tests": _tests, "planner": _planner, "paged": _paged, "packed": _packed}
    for name, make in makers.items():
        if name in parts:
            error = {"not completed": parts[name]["error"] or ""}
            sections.append(
                f"<section><h2>{name}</h2>{html.definitions(html.pairs(error))}{make(parts[name])}</section>"
            )
    return html.document("GPU", sections)


def _machine(part: Row) -> str:
    versions = part.get("environment", {}).get("versions", {})
    told = {"card, driver, memory, used": part.get("nvidia_smi", ""), "CUDA of torch": part.get("cuda") or ""}
    told |= {str(name): str(value) for name, value in versions.items() if value}
    told |= {f"doctor: {one['name']}": f"{one['status']}: {one['detail']}" for one in part.get("doctor", [])}
    return html.definitions(html.pairs(told))


def _tests(part: Row) -> str:
    return html.definitions(html.pairs({key: str(part.get(key, "")) for key in ("summary", "note", "output")}))


def _planner(part: Row) -> str:
    runs = part.get("runs", [])
    return _ratios([one for one in runs if one.get("predicted_over_measured")]) + _table(PLANNER, runs)


def _ratios(runs: Sequence[Row]) -> str:
    if not runs:
        return ""
    ratios = [float(one["predicted_over_measured"]) for one in runs]
    names = [f"{one['model']}, {one['quantization']}" for one in runs]
    points: list[svg.Point | None] = [
        svg.Point(float(at), ratio, [ratio], text=f"{name}: {ratio:.4f}")
        for at, (name, ratio) in enumerate(zip(names, ratios, strict=True))
    ]
    drawn = svg.chart(
        [svg.Series("predicted / measured", points, 0)],
        svg.places("", names),
        svg.scale("predicted / measured peak", [1.0, *ratios]),
        joined=False,
        description="Predicted over measured peak memory of each run",
    )
    return html.figure("Peak memory", drawn, "Predicted over measured peak of torch's allocator; 1 is exact.")


def _paged(part: Row) -> str:
    words = (
        "roomy: the whole card; cap: torch's allocator has half of the optimizer's state beside the paged peak "
        "(simulated, managed memory lies outside); ballast: a plain allocation takes the rest, so that paged state has "
        "to leave the card"
    )
    return f"<p>{words}.</p>{_table(PAGED, part.get('arms', []))}"


def _packed(part: Row) -> str:
    rows = [{"name": name, **part[name]} for name in ("packed", "solo", "peft") if name in part]
    return _table(SPEED, rows)


def _table(columns: Sequence[tuple[str, str, str]], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    heads = [html.head(f"{name} {unit}".strip()) for _, name, unit in columns]
    body = ["<tr>" + "".join(_cell(row.get(key), unit) for key, _, unit in columns) + "</tr>" for row in rows]
    return html.table(heads, body, "sortable")


def _cell(value: Any, unit: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value / MIB:,.1f}" if unit == SIZE else f"{value:.4g}" if isinstance(value, float) else str(value)
        return html.cell(text, repr(value))
    return html.cell("" if value is None else str(value), "", "key")
