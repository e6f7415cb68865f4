"""What a reader must know of a table before reading it, in words: the same on the page, in Markdown, on a terminal."""

from collections.abc import Iterator, Sequence

from loralab.analysis.paired import LEVEL
from loralab.reporting import environments, published
from loralab.reporting.axes import lookup
from loralab.reporting.gather import Study, Trial
from loralab.reporting.rows import Row, Table, contenders, level
from loralab.reporting.sets import apart
from loralab.reporting.table import STEPS, TOLD, VERSUS, differs_in_seeds, ended, trial_text, where

NONE_BEST = "no single best row: the leading rows are not told apart by their intervals"
ONE_SEED = "no intervals: with one seed a row, no difference can be told from chance"


def notes(study: Study, found: Sequence[Row], packs_shown: bool = True) -> Iterator[str]:
    """Of one table; ``packs_shown``: whether any of its cells says that it is a pack's."""
    yield from _environments(study)
    yield from separation(study, found)
    yield from _versus(study, found)
    if differs_in_seeds(found):
        yield (
            "The rows are over different seeds, so their means do not compare; the paired differences, over shared "
            "seeds, do"
        )
    yield from _constant(study, found)
    yield from _lengths(study, found)
    yield from _packs(found, packs_shown)
    if source := published.source(study.about):
        yield source.rstrip(".")


def general(study: Study, tables: Sequence[Table]) -> Iterator[str]:
    """Of all tables together."""
    if study.about.get("damaged"):
        yield f"sweep.json cannot be read, so this is what the records say: {study.about['damaged']}"
    if why := apart([part for part, _ in tables]):
        yield why.rstrip(".")
    if study.repeats:
        yield f"{study.repeats} repeated: the same trial counts once"
    yield from study.conflicts


def separation(study: Study, found: Sequence[Row]) -> Iterator[str]:
    """Which row is the best by its intervals, or that none is; and how many differ from the baseline."""
    among = contenders(found)
    if len(among) < 2:
        return
    best = next((row for row in among if row.best), None)
    if best is None:
        yield "; ".join(filter(None, [_capital(undecided(found)), differing(study, found)]))
        return
    others = len(among) - 1
    each = f"at {level(found):.1%} each, {LEVEL:.0%} for all {others} together (Bonferroni)" if others > 1 else ""
    yield (
        f"Best: {where(study, best)}: its paired interval against every other row excludes 0"
        f"{', ' if each else ''}{each or f' at {LEVEL:.0%}'}"
    )
    if words := differing(study, found):
        yield _capital(words)


def undecided(found: Sequence[Row]) -> str:
    """Why no row is marked as the best."""
    return ONE_SEED if all(row.n < 2 for row in contenders(found)) else NONE_BEST


def differing(study: Study, found: Sequence[Row]) -> str:
    """``against the baseline, 2 of 5 rows' 95% intervals exclude 0: 1 better, 1 worse``; empty without intervals."""
    told = [row.difference.verdict(study.mode) for row in found if row.difference and row.difference.interval]
    ways = [f"{told.count(way)} {way}" for way in ("better", "worse") if way in told]
    if not told:
        return ""
    if not ways:
        return f"no row differs from the baseline by its {LEVEL:.0%} interval"
    count = f"{len(told) - told.count('')} of {len(told)}"
    return f"against the baseline, {count} rows' {LEVEL:.0%} intervals exclude 0: {', '.join(ways)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _environments(study: Study) -> Iterator[str]:
    labels = study.axes.get(environments.AXIS, [])
    if len(labels) > 1:
        yield (
            f"Trials were made in {len(labels)} environments ({' | '.join(labels)}): each has rows and a baseline of "
            f"its own, no difference is taken from one to another, and no row is marked; {environments.COMPARED}"
        )


def _versus(study: Study, found: Sequence[Row]) -> Iterator[str]:
    """How to read the differences, where there are any."""
    differences = [row.difference for row in found if row.difference]
    if not differences:
        return
    baselines = "; ".join(where(study, row) for row in found if row.baseline)
    if any(one.reach is not None for one in differences):
        yield (
            f"{VERSUS} ({baselines}): mean paired difference over shared seeds [its 95% interval: Student's t, n - 1 "
            f"degrees of freedom, not corrected for the number of rows]; {TOLD} marks an interval that excludes 0; one "
            "that holds 0 is no finding"
        )
    if any(one.reach is None for one in differences):
        yield f"{VERSUS}: a difference without an interval, of one seed or of one value, is no finding"


def _constant(study: Study, found: Sequence[Row]) -> Iterator[str]:
    same = [row for row in found if row.n < len(row.scores)]
    if same:
        untrained = " (nothing was trained)" if all(not any(row.steps) for row in same) else ""
        yield (
            f"In {len(same)} of {len(found)} rows every seed gives the very same {study.metric}{untrained}: that is "
            "one measurement, n = 1, without deviation or interval; loralab quantize --evaluate has intervals over rows"
        )


def _lengths(study: Study, found: Sequence[Row]) -> Iterator[str]:
    stopped = [trial for row in found for trial in row.ok if trial.record.get("stopped_early")]
    total = sum(len(row.ok) for row in found)
    if stopped:
        patience = " | ".join(dict.fromkeys(str(lookup(t.record["config"], "trainer.patience")) for t in stopped))
        ends = _ends(study, stopped)
        yield f"{len(stopped)} of {total} trials stopped early by trainer.patience = {patience}; {ends}"
    uneven = sum(len(set(row.steps)) > 1 for row in found)
    if uneven:
        yield f"{uneven} rows average trials of different numbers of steps; see {STEPS}"


def _ends(study: Study, stopped: Sequence[Trial]) -> str:
    told = [f"{trial_text(study, trial)} {ended(trial)}" for trial in stopped[:3]]
    return "; ".join(told) + (f"; and {len(stopped) - 3} more, each in results.csv" if len(stopped) > 3 else "")


def _packs(found: Sequence[Row], shown: bool) -> Iterator[str]:
    packs = {pack for row in found for pack in row.packs}
    if packs <= {None}:
        return
    if shown:
        yield (
            "(pack of N): N trials ran at once, and the measured memory, time and speed are those of all N together, "
            "so they compare with no other row's; a row whose seeds ran in different packs has none; peak alone is the "
            "predicted peak of a trial by itself"
        )
    threads = {lookup(trial.record, "environment.threads") for row in found for trial in row.ok}
    cpu = any(lookup(trial.record, "memory.device") == "cpu" for row in found for trial in row.ok)
    if cpu and threads != {1}:
        yield "Run again alone, a packed trial may differ by float rounding: the same bits with one thread only"
