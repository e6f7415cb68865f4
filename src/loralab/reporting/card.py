"""The page of ``make gpu``: what was measured on one card, from gpu.json alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralab.reporting import svg
from loralab.reporting.figures import Figure
from loralab.reporting.html import Cell, Head, Tile, render

Json = Mapping[str, Any]
Columns = Sequence[tuple[str, str, str]]  # key, title, unit
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


PAGING = (
    "roomy: the whole card; cap: torch's allocator has half of the optimizer's state beside the paged peak "
    "(simulated, managed memory lies outside); ballast: a plain allocation takes the rest, so that paged state has "
    "to leave the card."
)
HALTED = ("failed", "timeout")
STAGES = ("machine", "tests", "speed", "plan", "paged", "resume", "halving", "ballast")


@dataclass(frozen=True)
class Stage:
    """What the page shows of one stage; ``tables``: title, heads, rows."""

    facts: dict[str, str] = field(default_factory=dict)
    words: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[tuple[str, list[Head], list[list[Cell]]]] = field(default_factory=list)


def page(result: Json) -> str:
    """A self-contained page; stages that are not there yet are left out."""
    stages = result["stages"]
    tiles = [
        Tile(stage["status"], f"{name}, {stage['seconds']:.0f} s", stage["status"] in HALTED)
        for name, stage in stages.items()
    ]
    device = "the CPU: a rehearsal with tiny shapes" if result["rehearsal"] else "one CUDA card"
    shown = {name: _stage(name, stages[name]) for name in STAGES if name in stages}
    return render("card.html", title="GPU", device=device, tiles=tiles, stages=shown)


def _stage(name: str, stage: Json) -> Stage:
    facts = {"not ok": stage.get("error") or "", "stood in": stage.get("stood_in") or ""}
    runs = stage.get("runs", [])
    if name == "machine":
        return Stage(facts | _machine(stage))
    if name == "tests":
        return Stage(facts | {key: str(stage.get(key, "")) for key in ("summary", "output")})
    if name == "speed":
        return Stage(facts, tables=[_table(SPEED, base["sides"], _base(base)) for base in stage.get("bases", [])])
    if name == "plan":
        measured = [run for run in runs if run.get("predicted_over_measured")]
        return Stage(facts, figures=[_ratios(measured)] if measured else [], tables=[_table(PLAN, runs)])
    if name == "resume":
        keys = ("loss_difference", "same_bits", "same_paged_bytes")
        return Stage(facts | {key: str(stage[key]) for key in keys if key in stage}, tables=[_table(RESUME, runs)])
    if name == "halving":
        return Stage(facts, tables=[_table(HALVING, runs)])
    return Stage(facts, PAGING, tables=[_table(PAGED, stage.get("arms", []))])


def _machine(stage: Json) -> dict[str, str]:
    versions = stage.get("environment", {}).get("versions", {})
    facts = {"card, driver, memory, used": stage.get("nvidia_smi", ""), "CUDA of torch": stage.get("cuda") or ""}
    facts |= {str(name): str(value) for name, value in versions.items() if value}
    facts |= {f"doctor: {check['name']}": f"{check['status']}: {check['detail']}" for check in stage.get("doctor", [])}
    constants = {**stage.get("constants", {})}
    planned = constants.pop("planned", {})
    facts |= {f"measured {name}": str(value) for name, value in constants.items()}
    return facts | {f"planned {name}": str(value) for name, value in planned.items()}


def _base(base: Json) -> str:
    return f"{base['model']}, {base['quantization']}, {base['rows']} x {base['length']} tokens a trial"


def _ratios(runs: Sequence[Json]) -> Figure:
    ratios = [float(run["predicted_over_measured"]) for run in runs]
    names = [", ".join(filter(None, (run["model"], run["quantization"], run["case"]))) for run in runs]
    points: list[svg.Point | None] = [
        svg.Point(float(at), ratio, [ratio], text=f"{name}: {ratio:.4f}")
        for at, (name, ratio) in enumerate(zip(names, ratios, strict=True))
    ]
    drawing = svg.chart(
        [svg.Series("predicted / measured", points, 0)],
        svg.places("", names),
        svg.scale("predicted / measured peak", [1.0, *ratios]),
        joined=False,
        description="Predicted over measured peak memory of each run",
    )
    return Figure("Peak memory", "Predicted over measured peak of torch's allocator; 1 is exact.", drawing)


def _table(columns: Columns, rows: Sequence[Json], title: str = "") -> tuple[str, list[Head], list[list[Cell]]]:
    heads = [Head(f"{name} {unit}".strip()) for _, name, unit in columns]
    return title, heads, [[_cell(row.get(key), unit) for key, _, unit in columns] for row in rows]


def _cell(value: Any, unit: str) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value / MIB:,.1f}" if unit == SIZE else f"{value:.4g}" if isinstance(value, float) else str(value)
        return Cell(text, value)
    return Cell("" if value is None else str(value), kind="key")
