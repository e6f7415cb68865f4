"""A long sentence arrives: memory by step with and without paging, as it was predicted where no card has run it."""

from collections.abc import Iterable

from loralab.analysis.arms import Comparison
from loralab.analysis.trials import TrialResult
from loralab.analysis.values import Json
from loralab.reporting import charts, curves
from loralab.reporting.charts import Figure, Legend
from loralab.reporting.table import MIB

GIB = 1024 * MIB
NAME = "memory in use on the device, predicted (GiB)"
CARD, PAGED, UNPAGED = "all that the card has", "paged", "not paged"
SHORT_OF = 0.5  # share of the largest paged state that the card has no room for when the longest batch arrives


def predicted(comparison: Comparison) -> list[Figure]:
    """One picture of the runs with long batches, of each optimizer its first; empty where a run really paged its state
    (then it was measured), or where no prediction of a paged run is there."""
    trials = [trial for arm in comparison.arms for trial in arm.trials]
    if any(trial.get("optimizer.paging") == "on" for trial in trials):
        return []
    found = _first_of_each(trial for trial in trials if trial.get("memory.predicted_on_card"))
    card = capacity(series["peak_bytes"], series["paged_bytes"]) if (series := _largest_paged(found.values())) else 0
    if not card:
        return []
    lines = [_line(name, on_card(one, card), bool(one["paged_bytes"])) for name, one in found.items()]
    steps = [step for one in found.values() for step in one["step"]]
    ends = [(float(step), card / GIB) for step in (min(steps), max(steps))]
    lines.append(curves.line(CARD, (CARD, PAGED), ends, broken=False))
    stored = {"seeds": lines, "means": []}
    made = curves.rows(stored, None)
    names, values = [*found, CARD], [point["value"] for point in made["lines"]]
    margin = (max(values) - min(values)) * 0.06
    domain = [min(values) - margin, max(values) + margin]
    spec = charts.specification(curves.chart(NAME, names, [PAGED, UNPAGED], domain), made)
    dead = ", ".join(line["group"] for line in lines if line["broken"]) or "none"
    caption = (
        "Predicted from a trace of the training step, not measured: no card has run it. The card is one of "
        f"{card / GIB:.3g} GiB, which has no room for {SHORT_OF:.0%} of the largest paged state when the longest batch "
        f"arrives: that share is on the host for this step and comes back. Cross: out of memory ({dead})."
    )
    legends = [Legend("group", "colour", names), Legend("by", "dash", [PAGED, UNPAGED])]
    store = {"metrics": {NAME: stored}, "metric": NAME, "smooth": None}
    title = "A long sentence arrives: memory by step, predicted"
    return [Figure("memory", title, caption, spec, legends, "y", "curves", store)]


def capacity(peaks: Iterable[int], paged: int) -> int:
    """Bytes of the card that is short of room for SHORT_OF of ``paged`` bytes at the highest of ``peaks``, in which
    they are not counted."""
    return max(peaks) + round((1 - SHORT_OF) * paged)


def on_card(series: Json, card: int) -> list[tuple[int, float, bool]]:
    """(step, bytes in use, whether that is too much) of a run on a card of ``card`` bytes, to the step that it ends in:
    paged state takes what the step leaves of the card, and is on the host beyond that."""
    made: list[tuple[int, float, bool]] = []
    for step, peak in zip(series["step"], series["peak_bytes"], strict=True):
        used = peak + min(series["paged_bytes"], max(0, card - peak))
        made.append((step, used, used > card))
        if used > card:
            break
    return made


def _line(name: str, points: list[tuple[int, float, bool]], paged: bool) -> Json:
    series = [(float(step), used / GIB) for step, used, _ in points]
    return curves.line(name, (name, PAGED if paged else UNPAGED), series, broken=points[-1][2])


def _first_of_each(trials: Iterable[TrialResult]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for trial in trials:
        found.setdefault(str(trial.get("optimizer.name")), trial.get("memory.predicted_on_card"))
    return found


def _largest_paged(found: Iterable[Json]) -> Json | None:
    paged = [one for one in found if one["paged_bytes"]]
    return max(paged, key=lambda one: one["paged_bytes"], default=None)
