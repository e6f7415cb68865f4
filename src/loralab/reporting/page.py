"""The page of a sweep or a run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loralab.analysis.answer import answer
from loralab.analysis.arms import Comparison
from loralab.analysis.comparable import subject
from loralab.analysis.results import SweepResults
from loralab.analysis.trials import MISSING, PRUNED, STALE
from loralab.analysis.values import canonical, flat, label
from loralab.records.record import shell_line
from loralab.records.shared import distinct
from loralab.reporting import cost, memory, samples
from loralab.reporting.charts import Figure
from loralab.reporting.figures import figures
from loralab.reporting.html import Section, Tile, duration, render
from loralab.reporting.notes import differing, messages, notes, undecided
from loralab.reporting.provenance import Facts, facts, held_fixed, question
from loralab.reporting.strips import strips
from loralab.reporting.table import DECOMPOSED, Column, columns, seeds_text
from loralab.reporting.trials import MANY, stored
from loralab.reporting.vega import bundle

MOST_ROWS = 200  # of a table as HTML; further ones are packed, and unfolded by the page's script

EXPLAINED = {
    "bits/param": "Bits per parameter: packed weights and their statistics over the quantized layers' parameters.",
    "bits overall": "Bits overall: the same over all of the base's weights, quantized or not.",
    "peak alone": (
        "Peak alone: predicted for a trial by itself, for the largest batch that the data can give, without the dense "
        "weights that quantization.dequantize=auto keeps where there is room."
    ),
    "peak memory": (
        "Peak memory: measured, the largest over the seeds. On a CPU it is measured of one step only, whatever batch "
        "that step had, so it can be smaller than peak alone, which is for the largest batch."
    ),
    "train s": (
        "Train s: the time of the training steps, without steps whose memory was profiled. Times and speeds are means, "
        "and not a benchmark: other processes on the machine count."
    ),
}


@dataclass(frozen=True)
class Page:
    """``text``: the whole document; ``figures``: those on it, in order."""

    text: str
    figures: list[Figure]


def page(results: SweepResults, comparisons: Sequence[Comparison]) -> Page:
    """The document; where trials cannot be compared, results and figures by set."""
    provenance, command = facts(results), results.about.get("command")
    sections = [_section(comparison, number, len(comparisons) > 1) for number, comparison in enumerate(comparisons)]
    drawn = [figure for section in sections for figure in _drawn(section)]
    troubled = [trial for trial in results.trials if not trial.ok and trial.status != PRUNED]
    text = render(
        "sweep.html",
        title=results.name,
        results=results,
        question=question(results),
        answer="" if results.single else answer(comparisons),
        tiles=list(_tiles(results, comparisons, provenance)),
        held_fixed=held_fixed(results),
        facts=provenance,
        command=shell_line(map(str, command)) if isinstance(command, list) else command,
        notes=messages(results, comparisons),
        sections=sections,
        explained=EXPLAINED,
        seeds_text=seeds_text,
        trials=stored(results, comparisons),
        settings=_shared_settings(results),
        troubled=troubled[:MOST_ROWS],
        more_troubled=len(troubled) - len(troubled[:MOST_ROWS]),
        stale=results.count(STALE) > 0,
        most_rows=MOST_ROWS,
        bundle=bundle() if drawn else "",
        packed=len(results.trials) > MANY,
    )
    return Page(text, drawn)


def _section(comparison: Comparison, number: int, one_of_several: bool) -> dict[str, Any]:
    """What the template shows of one table."""
    shown = columns(comparison)
    fixed = [f"Held fixed: {text}" for text in (held_fixed(comparison.results) if one_of_several else [])]
    prefix = f"set{number + 1}_" if one_of_several else ""
    return {
        "comparison": comparison,
        "subject": subject(comparison.results) if one_of_several else "",
        "columns": shown,
        "strips": strips(comparison.arms),
        "notes": [*fixed, *_reading(comparison, shown), *notes(comparison)],
        "cost": _named(prefix, cost.section(comparison)),
        "memory": _named(prefix, memory.section(comparison)),
        "samples": samples.section(comparison),
        "figures": [replace(figure, name=f"{prefix}{figure.name}") for figure in figures(comparison, number)],
    }


def _named(prefix: str, section: Section | None) -> Section | None:
    """The section with its figures named after their set."""
    if section is None:
        return None
    return replace(section, figures=[replace(figure, name=f"{prefix}{figure.name}") for figure in section.figures])


def _drawn(section: Mapping[str, Any]) -> list[Figure]:
    others = [one for key in ("cost", "memory") if (one := section[key]) is not None]
    return [*section["figures"], *(figure for one in others for figure in one.figures)]


def _tiles(results: SweepResults, comparisons: Sequence[Comparison], provenance: Facts) -> Iterator[Tile]:
    completed, total, stale = results.count("completed"), len(results.trials), results.count(STALE)
    waiting = results.count("running", MISSING)
    early = results.count(PRUNED)
    failed = total - completed - waiting - stale - early
    texts = [f"{failed} failed, listed below"] if failed else []
    texts += [f"{early} ended early by the sweep"] if early else []
    texts += [f"{waiting} running or not started"] if waiting else []
    texts += [f"{stale} stale: base or data have changed since, listed below"] if stale else []
    yield Tile(f"{completed} of {total}", ", ".join(["trials completed", *texts]), bad=bool(failed or stale))
    if len(comparisons) > 1:
        yield Tile(f"{len(comparisons)} sets", "whose numbers do not compare with each other, for the reason below")
    else:
        yield from _headline(comparisons[0])
    if provenance.seconds:
        yield Tile(duration(provenance.seconds), "of running time, all trials together")


def _headline(comparison: Comparison) -> Iterator[Tile]:
    results, best, first = comparison.results, comparison.best, comparison.arms[0]
    if results.single and first.mean is not None:
        yield Tile(f"{first.mean:.4f}", results.metric)
    if results.searched and comparison.contenders:
        yield Tile(f"{first.mean:.4f}", f"{results.metric} of the best point: {first.name}")
    elif best is not None:
        yield Tile(f"{best.mean:.4f}", f"{results.metric} of the best row, by its intervals: {best.name}")
    elif len(comparison.contenders) > 1:
        title, _, reason = undecided(comparison).partition(": ")
        yield Tile(title, "; ".join(filter(None, [reason, differing(comparison)])))


def _reading(comparison: Comparison, shown: Sequence[Column]) -> Iterator[str]:
    """How to read the columns."""
    results, counts = comparison.results, sorted({arm.n for arm in comparison.arms})
    n = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    if comparison.deviates:
        yield (
            f"{results.metric}: mean and sample standard deviation over n = {n} seeds; {results.better} is better. "
            "The strip shows each seed, the mean and, about it, the interval of the paired difference, on one scale."
        )
    else:
        yield f"{results.metric}: {results.better} is better" + ("." if results.single else f"; n = {n}.")
    titles = {column.title for column in shown}
    yield " ".join(text for title, text in EXPLAINED.items() if title in titles)
    if any("decomposed" in str(t.record["choices"].get("quantization")) for arm in comparison.arms for t in arm.ok):
        yield DECOMPOSED
    yield from _cut(results)


def _cut(results: SweepResults) -> Iterator[str]:
    """``50 of 384 rows were cut to model.max_length = 192``, once for each combination of numbers."""
    counts = []
    for trial in results.trials:
        data = trial.record["data"]
        rows = data["rows"] if isinstance(data["rows"], Mapping) else {}
        total = sum(count for count in rows.values() if isinstance(count, int))
        longest = data.get("max_length") or trial.setting("model.max_length")
        counts += [(data["truncated"], total, longest)] if data["truncated"] else []
    for cut, total, longest in dict.fromkeys(counts):
        limit = "model.max_length" if longest is None else f"model.max_length = {longest}"
        yield f"{cut:,} of {total:,} rows were cut to {limit}."


def _shared_settings(results: SweepResults) -> list[str]:
    """What all trials share; of a single run, everything."""
    configs = [trial.record["config"] for trial in results.trials if trial.record["config"]]
    texts = []
    for name, first in (configs or [{}])[0].items():
        sections = [flat(name, section) for section in distinct(config.get(name) for config in configs)]
        shared = [key for key in flat(name, first) if len({canonical(own.get(key)) for own in sections}) == 1]
        texts += [f"{key}={label(sections[0][key])}" for key in shared]
    return texts
