"""The page of ``make gpu``: what was measured on one card, from gpu.json alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from loralab.analysis.values import Json
from loralab.reporting import card_figures
from loralab.reporting.charts import Figure
from loralab.reporting.html import Cell, Head, Tile, render
from loralab.reporting.table import MIB
from loralab.reporting.vega import bundle

SPEED = (
    "name trials step_s tokens_per_s over_alone over_peft over_liger peak_bytes launches waits busy_share "
    "loss_difference skipped error"
)
# Of each stage: where its rows are, and which of their keys are shown.
_PAGING = (
    "arms",
    "room optimizer status steps cap_bytes ballast_bytes measured_peak_bytes state_bytes paged_bytes evicted_bytes "
    "step_s optimizer_step_s slowest_optimizer_step_s error",
)
TABLES = {
    "plan": (
        "runs",
        "model quantization case rows length predicted_peak_bytes measured_peak_bytes predicted_over_measured status "
        "error",
    ),
    "paged": _PAGING,
    "resume": ("runs", "run status steps resumed_from paged_bytes state_bytes error"),
    "halving": ("runs", "case status statuses pack_sizes measured_peak_bytes error"),
    "workers": ("runs", "case seconds trials processes pack_sizes statuses"),
    "ballast": _PAGING,
}
# Of each stage: where the rows of its charts are, and what draws them.
FIGURES: dict[str, tuple[str, Callable[[Sequence[Json]], Iterator[Figure]]]] = {
    "speed": ("bases", card_figures.speed),
    "plan": ("runs", card_figures.ratios),
    **dict.fromkeys(("paged", "ballast"), ("arms", card_figures.memory)),
}
REHEARSAL = "rehearsal on a CPU with tiny shapes"  # on every chart, since each may be saved alone
STAGES = ("machine", "tests", "speed", *TABLES)
TITLES = {
    "length": "tokens",
    "name": "library",
    "trials": "trials a pass",
    "over_alone": "times one trial a pass",
    "over_peft": "times PEFT",
    "over_liger": "times PEFT + Liger",
    "launches": "launches a step",
    "waits": "host waits a step",
    "busy_share": "busy",
    "loss_difference": "loss, from one trial a pass",
    "predicted_over_measured": "ratio",
    "resumed_from": "from step",
    "statuses": "ends",
}


def page(result: Json) -> str:
    """A self-contained page; stages that are not there yet are left out."""
    tiles = [
        Tile(stage["status"], f"{name}, {stage['seconds']:.0f} s", stage["status"] in ("failed", "timeout"))
        for name, stage in result["stages"].items()
    ]
    mark = REHEARSAL if result["rehearsal"] else ""
    stages = [_stage(name, stage, mark) for name in STAGES if (stage := result["stages"].get(name))]
    title = f"GPU, {mark}" if mark else "GPU"
    return render("card.html", title=title, mark=mark, tiles=tiles, stages=stages, bundle=bundle())


def _stage(name: str, stage: Json, mark: str) -> Json:
    key, draw = FIGURES.get(name, ("", card_figures.ratios))
    figures = list(draw(stage.get(key, [])))
    if mark:
        figures = [replace(figure, spec={**figure.spec, "title": mark}) for figure in figures]
    return {"name": name, "facts": dict(_facts(stage)), "figures": figures, "tables": _tables(name, stage)}


def _facts(stage: Json) -> Iterator[tuple[str, str]]:
    """What a stage says besides its rows."""
    named = {"error": "not ok", "stood_in": "stood in", "nvidia_smi": "card, driver, memory, used"}
    named |= {"cuda": "CUDA of torch", "summary": "summary", "output": "output", "loss_difference": "loss difference"}
    named |= {"same_bits": "same bits", "same_paged_bytes": "same paged bytes"}
    yield from ((term, str(stage[key])) for key, term in named.items() if stage.get(key) not in (None, ""))
    environment = stage.get("environment", {})
    yield from (
        (term, environment[key]) for key, term in (("git", "commit"), ("cpu", "processor")) if environment.get(key)
    )
    versions = environment.get("versions", {})
    yield from ((name, str(value)) for name, value in versions.items() if value)
    for check in stage.get("doctor", []):
        yield f"doctor: {check['name']}", f"{check['status']}: {check['detail']}"
    measured = stage.get("constants", {})
    yield from ((f"measured {name}", str(value)) for name, value in measured.items() if name != "planned")
    yield from ((f"planned {name}", str(value)) for name, value in measured.get("planned", {}).items())


def _tables(name: str, stage: Json) -> list[tuple[str, list[Head], list[list[Cell]]]]:
    """(title, heads, rows) each."""
    if name == "speed":
        title = "{model}, {quantization}, {rows} x {length} tokens a trial"
        bases = stage.get("bases", [])
        titles = ["; ".join([title.format_map(base), *base.get("notes", [])]) for base in bases]
        return [(title, *_table(SPEED, base["sides"])) for title, base in zip(titles, bases, strict=True)]
    list_key, keys = TABLES.get(name, ("", ""))
    return [("", *_table(keys, stage.get(list_key, [])))]


def _table(keys: str, rows: Sequence[Json]) -> tuple[list[Head], list[list[Cell]]]:
    """The columns that any row can fill."""
    shown = [key for key in keys.split() if any(row.get(key) is not None for row in rows)]
    titles = [TITLES.get(key) or key.replace("_bytes", "_MiB").replace("_", " ") for key in shown]
    names = [any(isinstance(row.get(key), str) for row in rows) for key in shown]
    heads = [Head(title, key=name) for title, name in zip(titles, names, strict=True)]
    return heads, [[_cell(key, row.get(key)) for key in shown] for row in rows]


def _cell(key: str, value: Any) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        size = f"{value / MIB:,.1f}" if key.endswith("_bytes") else ""
        return Cell(size or (f"{value:.4g}" if isinstance(value, float) else str(value)), value)
    return Cell("" if value is None else str(value), kind="key")
