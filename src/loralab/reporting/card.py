"""The page of ``make gpu``: what was measured on one card, from gpu.json alone."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from loralab.reporting import html, svg

Row = Mapping[str, Any]
MIB = 2**20
SIZE, SECONDS, TEXT = "MiB", "s", ""
PLAN = (
    *(("model", "model", TEXT), ("quantization", "quantization", TEXT), ("case", "case", TEXT), ("rows", "rows", TEXT)),
    *(("length", "tokens", TEXT), ("predicted_peak_bytes", "predicted", SIZE)),
    *(("measured_peak_bytes", "measured", SIZE), ("predicted_over_measured", "ratio", TEXT)),
    *(("status", "status", TEXT), ("error", "error", TEXT)),
)
PAGED = (
    *(("room", "room", TEXT), ("optimizer", "optimizer", TEXT), ("status", "status", TEXT), ("steps", "steps", TEXT)),
    *(("cap_bytes", "cap", SIZE), ("ballast_bytes", "ballast", SIZE), ("measured_peak_bytes", "peak", SIZE)),
    *(("state_bytes", "state", SIZE), ("paged_bytes", "paged", SIZE), ("step_s", "step", SECONDS)),
    *(("optimizer_step_s", "update", SECONDS), ("slowest_optimizer_step_s", "slowest update", SECONDS)),
    ("error", "error", TEXT),
)
SPEED = (
    *(("name", "library", TEXT), ("trials", "trials a pass", TEXT), ("step_s", "step", SECONDS)),
    *(("tokens_per_s", "tokens/s", TEXT), ("over_alone", "times one trial a pass", TEXT)),
    *(("over_peft", "times PEFT", TEXT), ("peak_bytes", "peak", SIZE)),
    *(("loss_difference", "loss, from one trial a pass", TEXT), ("error", "error", TEXT)),
)
RESUME = (
    *(("run", "run", TEXT), ("status", "status", TEXT), ("steps", "steps", TEXT), ("resumed_from", "from step", TEXT)),
    *(("paged_bytes", "paged", SIZE), ("state_bytes", "state", SIZE), ("error", "error", TEXT)),
)
HALVING = (
    *(("case", "case", TEXT), ("status", "status", TEXT), ("statuses", "ends", TEXT), ("pack_sizes", "packs", TEXT)),
    *(("measured_peak_bytes", "peak", SIZE), ("error", "error", TEXT)),
)


def page(found: Row) -> str:
    """A self-contained page; stages that are not there yet are left out."""
    stages = found["stages"]
    device = "the CPU: a rehearsal with tiny shapes" if found["rehearsal"] else "one CUDA card"
    tiles = [
        html.tile(one["status"], f"{name}, {one['seconds']:.0f} s", one["status"] in ("failed", "timeout"))
        for name, one in stages.items()
    ]
    sections = [f"<header><h1>Measured on {device}</h1></header>", f'<div class="tiles">{"".join(tiles)}</div>']
    makers = {"machine": _machine, "tests": _tests, "speed": _speed, "plan": _plan, "paged": _paged}
    makers.update(resume=_resume, halving=_halving, ballast=_paged)
    for name, make in makers.items():
        if name in stages:
            notes = {"not ok": stages[name].get("error") or "", "stood in": stages[name].get("stood_in") or ""}
            told = html.definitions(html.pairs(notes))
            sections.append(f"<section><h2>{name}</h2>{told}{make(stages[name])}</section>")
    return html.document("GPU", sections)


def _machine(part: Row) -> str:
    versions = part.get("environment", {}).get("versions", {})
    told = {"card, driver, memory, used": part.get("nvidia_smi", ""), "CUDA of torch": part.get("cuda") or ""}
    told |= {str(name): str(value) for name, value in versions.items() if value}
    told |= {f"doctor: {one['name']}": f"{one['status']}: {one['detail']}" for one in part.get("doctor", [])}
    constants = {**part.get("constants", {})}
    planned = constants.pop("planned", {})
    told |= {f"measured {name}": str(value) for name, value in constants.items()}
    told |= {f"planned {name}": str(value) for name, value in planned.items()}
    return html.definitions(html.pairs(told))


def _tests(part: Row) -> str:
    return html.definitions(html.pairs({key: str(part.get(key, "")) for key in ("summary", "output")}))


def _speed(part: Row) -> str:
    return "".join(
        f"<h3>{escape(base['model'])}, {base['quantization']}, {base['rows']} x {base['length']} tokens a trial</h3>"
        f"{_table(SPEED, base['sides'])}"
        for base in part.get("bases", [])
    )


def _plan(part: Row) -> str:
    runs = part.get("runs", [])
    return _ratios([one for one in runs if one.get("predicted_over_measured")]) + _table(PLAN, runs)


def _resume(part: Row) -> str:
    told = {key: str(part[key]) for key in ("loss_difference", "same_bits", "same_paged_bytes") if key in part}
    return html.definitions(html.pairs(told)) + _table(RESUME, part.get("runs", []))


def _halving(part: Row) -> str:
    return _table(HALVING, part.get("runs", []))


def _ratios(runs: Sequence[Row]) -> str:
    if not runs:
        return ""
    ratios = [float(one["predicted_over_measured"]) for one in runs]
    names = [", ".join(filter(None, (one["model"], one["quantization"], one["case"]))) for one in runs]
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
