"""``loralab report A B``: two sweeps held against each other, as a terminal's table, Markdown, JSON and a page."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.analysis.arms import Arm
from loralab.analysis.between import SIDES, Between, Pair, between
from loralab.analysis.paired import LEVEL
from loralab.analysis.results import SweepResults, read_results
from loralab.analysis.values import short_names
from loralab.errors import ArtifactError
from loralab.reporting import differences
from loralab.reporting.charts import Figure
from loralab.reporting.html import Cell, Head, Tile, render
from loralab.reporting.labels import in_lines
from loralab.reporting.layout import aligned, markdown_table, natural_width, terminal_width, wrapped
from loralab.reporting.provenance import facts
from loralab.reporting.report import write_text
from loralab.reporting.table import SIGNIFICANT, level_text, score_text
from loralab.reporting.vega import bundle

DIFFERENCE = "B - A"
MOST_SETTINGS = 8  # that are told; all are in compare.json


@dataclass(frozen=True)
class Compared:
    """``table``: for the terminal; ``index``: the page; ``files``: what was written, by name."""

    table: str
    index: Path
    files: dict[str, Path]


def report(one: Path, other: Path) -> Compared:
    """Write index.html, compare.md and compare.json into ``one/report/compare_OTHER``. Raises ArtifactError where a
    folder has nothing to report, or the two do not compare; then nothing is written."""
    for folder in (one, other):
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: no such folder; expected the folder of a sweep or of a run")
    if one.resolve() == other.resolve():
        raise ArtifactError(f"{one} and {other} are one folder; expected two sweeps to hold against each other")
    found = between(read_results(one), read_results(other))
    notes = list(_notes(found))
    texts = {
        "index.html": _page(found, notes),
        "compare.md": _markdown(found, notes),
        "compare.json": json.dumps(_json(found, notes), indent=1, allow_nan=False) + "\n",
    }
    folder = one / "report" / f"compare_{other.resolve().name}"
    written = {name: write_text(folder / name, text) for name, text in texts.items()}
    return Compared(_terminal(found, notes, terminal_width()), written["index.html"], written)


def _title(found: Between) -> str:
    return " and ".join(f"{side} = {one.results.folder}" for side, one in zip(SIDES, found.sides, strict=True))


def _titles(found: Between) -> list[str]:
    """Of the columns behind the row's name."""
    tuned = [
        f"{name} {side}" for side, one in zip(SIDES, found.sides, strict=True) if one.tuned for name in one.tuned.names
    ]
    return [*tuned, *(f"{found.results.metric} {side}" for side in SIDES), DIFFERENCE, "seeds"]


def _cells(found: Between, pair: Pair) -> list[str]:
    tuned = [
        one.tuned.text(arm.values, place, arm.trials[0].values[axis])
        for one, arm in zip(found.sides, (pair.one, pair.other), strict=True)
        if one.tuned
        for place, axis in enumerate(one.tuned.axes)
    ]
    shared = len(pair.difference.seeds) if pair.difference else 0
    return [*tuned, score_text(pair.one), score_text(pair.other), _difference(pair), f"{shared} shared"]


def _difference(pair: Pair) -> str:
    if pair.difference is None:
        return "-"
    return pair.difference.text + (f" {SIGNIFICANT}" if pair.verdict else "")


def _notes(found: Between) -> Iterator[str]:
    """What the differences are of, the loudest first."""
    if not found.one_environment:
        yield (
            "MADE WITH DIFFERENT VERSIONS OR HARDWARE: the differences are of the settings and of these together, and "
            "nothing here tells which of the two they come from"
        )
    for side, versions in zip(SIDES, found.versions, strict=True):
        yield f"{side}: " + "; ".join(f"{count} completed trials with {text}" for text, count in versions.items())
    yield from _settings(found)
    for key, what in (("data.fingerprint", "data"), ("base.fingerprint", "base")):
        one, other = found.shared(key)
        yield f"The same {what} ({one})" if one == other else f"DIFFERENT {what.upper()}: A has {one}, B has {other}"
    yield from _matching(found)
    for side, arms in zip(SIDES, found.alone, strict=True):
        if arms:
            names = "; ".join([*(arm.name for arm in arms[:3]), *(["..."] if len(arms) > 3 else [])])
            yield f"{len(arms)} rows of {side} have no partner: {names}"
    yield (
        f"{DIFFERENCE}: mean paired difference over the seeds that both rows have [its {LEVEL:.0%} interval: Student's "
        f"t, n - 1 degrees of freedom, of that row alone]; {SIGNIFICANT} marks a difference whose interval excludes 0 "
        f"{level_text(found.level)}; {found.results.better} is better"
    )
    if any(pair.difference and pair.difference.interval is None for pair in found.pairs):
        yield "A difference without an interval, of one seed or of one value, is no finding"


def _settings(found: Between) -> Iterator[str]:
    told = [f"{key} = {one} in A, {other} in B" for key, (one, other) in found.settings.items()]
    more = len(told) - MOST_SETTINGS
    if told:
        yield "Settings that differ: " + "; ".join(
            [*told[:MOST_SETTINGS], *([f"and {more} more, in compare.json"] if more > 0 else [])]
        )
    else:
        yield "No setting is one value in all of A and another in all of B"


def _matching(found: Between) -> Iterator[str]:
    names = ", ".join(short_names(found.axes).values())
    rows = f"{len(found.pairs)} pairs of rows" if len(found.pairs) > 1 else "One pair of rows"
    tuned = found.sides[0].tuned
    best = f"; each row is at its own best {' and '.join(tuned.names)}, chosen on the validation split" if tuned else ""
    yield f"{rows}, matched by {names or 'nothing, since neither varies what the other has'}{best}"


def _counts(found: Between) -> str:
    """``B is better in 1 of 4 rows, worse in none``."""
    signs = [pair.verdict for pair in found.pairs]
    better, worse = (str(signs.count(sign) or "none") for sign in ("better", "worse"))
    return f"B is better in {better} of {len(signs)} rows, worse in {worse}, {level_text(found.level)}"


def _terminal(found: Between, notes: list[str], width: int) -> str:
    titles, names = _titles(found), [pair.name for pair in found.pairs]
    cells = [_cells(found, pair) for pair in found.pairs]
    legend: list[str] = []
    rows = [[name, *texts] for name, texts in zip(names, cells, strict=True)]
    if natural_width(["row", *titles], rows) > width:
        legend = ["", *(line for at, name in enumerate(names, 1) for line in wrapped(f"{at}: {name}", width, "   "))]
        rows = [[str(at), *texts] for at, texts in enumerate(cells, 1)]
    table = [line[:width] for line in aligned(["row", *titles], rows, range(1, len(titles)))]
    lines = [*wrapped(f"{_title(found)}: {_counts(found)}", width), "", *table, *legend, ""]
    lines += [line for note in notes for line in wrapped(note, width, "  ")]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _markdown(found: Between, notes: list[str]) -> str:
    rows = [[pair.name, *_cells(found, pair)] for pair in found.pairs]
    lines = [
        f"# {_title(found)}",
        "",
        f"{_counts(found)}.".capitalize(),
        "",
        markdown_table(["row", *_titles(found)], rows),
    ]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def _json(found: Between, notes: list[str]) -> dict[str, Any]:
    """``difference``: B less A, with its 95% interval ``low`` to ``high``, None where there is none."""
    return {
        "metric": found.results.metric,
        "metric_mode": found.results.mode,
        "matched_by": found.axes,
        **{
            side: {
                "folder": str(one.results.folder),
                "versions": versions,
                "without_partner": [arm.name for arm in alone],
            }
            for side, one, versions, alone in zip(SIDES, found.sides, found.versions, found.alone, strict=True)
        },
        "settings": {key: dict(zip(SIDES, values, strict=True)) for key, values in found.settings.items()},
        "data": dict(zip(SIDES, found.shared("data.fingerprint"), strict=True)),
        "base": dict(zip(SIDES, found.shared("base.fingerprint"), strict=True)),
        "rows": [_plain(pair) for pair in found.pairs],
        "notes": notes,
    }


def _plain(pair: Pair) -> dict[str, Any]:
    difference = pair.difference
    low, high = (difference.interval if difference else None) or (None, None)
    told = difference and {"mean": difference.mean, "low": low, "high": high, "p": difference.p, "n": difference.n}
    return {
        "name": pair.name,
        **{side: _scores(arm) for side, arm in zip(SIDES, (pair.one, pair.other), strict=True)},
        "difference": told and {**told, "seeds": difference.seeds if difference else []},
        "verdict": pair.verdict or None,
    }


def _scores(arm: Arm) -> dict[str, Any]:
    return {"values": arm.values, "mean": arm.mean, "std": arm.std, "scores": arm.by_seed}


def _page(found: Between, notes: list[str]) -> str:
    heads = [Head("row", key=True), *(Head(title) for title in _titles(found))]
    rows = [
        [Cell(pair.name, pair.name, "key"), *(Cell(text, text) for text in texts[:-4]), *_numbers(pair, texts[-4:])]
        for pair in found.pairs
        for texts in [_cells(found, pair)]
    ]
    signs = [pair.verdict for pair in found.pairs]
    tiles = [
        Tile(str(len(signs)), "pairs of rows"),
        *(
            Tile(str(signs.count(sign)), f"where B is {sign}, {level_text(found.level)}")
            for sign in ("better", "worse")
        ),
    ]
    if not found.one_environment:
        tiles.append(Tile("different versions", "or hardware, so differences are not of the settings alone", bad=True))
    drawn = list(_figures(found))
    return render(
        "between.html",
        title=_title(found),
        tiles=tiles,
        sides=list(zip(SIDES, map(_about, (side.results for side in found.sides)), strict=True)),
        table=(heads, rows),
        notes=notes,
        figures=drawn,
        bundle=bundle() if drawn else "",
    )


def _numbers(pair: Pair, texts: list[str]) -> list[Cell]:
    gap = pair.difference
    numbers = (pair.one.mean, pair.other.mean, gap.mean if gap else None, len(gap.seeds) if gap else 0)
    return [Cell(text, number, "breaks") for text, number in zip(texts, numbers, strict=True)]


def _about(results: SweepResults) -> dict[str, str]:
    found = facts(results)
    terms = ("data", "data fingerprint", "base", "base fingerprint")
    return {"question": results.question, **found.header, **{term: found.provenance[term] for term in terms}}


def _figures(found: Between) -> Iterator[Figure]:
    results = found.results
    rows = [
        {**differences.row(pair.difference, pair.name, "the same row of A", results.mode), "label": in_lines(pair.name)}
        for pair in found.pairs
        if pair.difference and pair.difference.interval
    ]
    if rows:
        caption = (
            f"Mean paired difference, B less A, over shared seeds with its {LEVEL:.0%} interval; better is B's, where "
            f"0 is excluded {level_text(found.level)}; any other is no finding.{differences.left_out(len(rows))}"
        )
        title = f"{results.metric}, {DIFFERENCE}; {results.better} is better"
        spec = differences.drawn(rows[: differences.MOST_ROWS], title)
        yield Figure("differences", "Paired differences", caption, spec, [differences.LEGEND])
