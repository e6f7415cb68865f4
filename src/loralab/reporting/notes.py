"""Notes that explain a table: the same on the page, in Markdown and on a terminal."""

from collections.abc import Iterator, Sequence

from loralab.analysis import disagreements, environments, full, search
from loralab.analysis.arms import Comparison
from loralab.analysis.claims import verdicts
from loralab.analysis.comparable import apart
from loralab.analysis.dimension import sentences
from loralab.analysis.effects import effects
from loralab.analysis.paired import LEVEL
from loralab.analysis.published import source
from loralab.analysis.results import SweepResults
from loralab.reporting.table import SIGNIFICANT, STEPS, VERSUS, level_text

NONE_BEST = "no single best row: the leading rows are not told apart by their intervals"
ONE_SEED = "no intervals: with one seed a row, no difference can be told from chance"


def notes(comparison: Comparison, packs_shown: bool = True) -> Iterator[str]:
    """The notes of one table; ``packs_shown``: True if any of its cells is marked as a pack's."""
    yield from _environments(comparison)
    if comparison.tuned is not None:
        yield from comparison.tuned.sentences()
    yield from _noise(comparison)
    yield from sentences(comparison.results)
    yield from search.sentences(comparison) if comparison.results.searched else _separation(comparison)
    yield from _versus(comparison)
    yield from full.sentences(comparison)
    yield from _effects(comparison)
    if comparison.differs_in_seeds:
        yield (
            "The rows are over different seeds, so their means do not compare; the paired differences, over shared "
            "seeds, do"
        )
    yield from _constant(comparison)
    yield from _lengths(comparison)
    yield from _parts(comparison)
    yield from _best_states(comparison)
    yield from _kept_weights(comparison)
    yield from _packs(comparison, packs_shown)
    if published_source := source(comparison.results):
        yield published_source


def general(results: SweepResults, comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The notes of all tables together."""
    if results.about.get("damaged"):
        yield f"sweep.json cannot be read, so this is what the records say: {results.about['damaged']}"
    if reason := apart([comparison.results for comparison in comparisons]):
        yield reason.rstrip(".")
    yield from disagreements.sentences(results.about)
    if results.repeats:
        yield f"{results.repeats} repeated: the same trial counts once"
    yield from results.conflicts


def messages(results: SweepResults, comparisons: Sequence[Comparison]) -> list[str]:
    """The notes of all tables together, then the verdicts on the paper's claims."""
    return [*general(results, comparisons), *(verdict.text for verdict in verdicts(results, comparisons))]


def undecided(comparison: Comparison) -> str:
    """Why no row is marked as the best."""
    return ONE_SEED if all(arm.n < 2 for arm in comparison.contenders) else NONE_BEST


def differing(comparison: Comparison) -> str:
    """``against the baseline, 2 of 5 rows differ at 99.29%, 95% for all 7 paired differences together: 1 better, 1
    worse``; empty without intervals."""
    differences = [arm.difference for arm in comparison.arms if arm.difference and arm.difference.interval]
    signs = [difference.verdict(comparison.results.mode) for difference in differences]
    counts = [f"{signs.count(sign)} {sign}" for sign in ("better", "worse") if sign in signs]
    if not signs:
        return ""
    level = level_text(differences[0].level)
    if not counts:
        return f"no row differs from the baseline {level}"
    told = len(signs) - signs.count("")
    differ = "differs" if told == 1 else "differ"
    return f"against the baseline, {told} of {len(signs)} rows {differ} {level}: {', '.join(counts)}"


def _noise(comparison: Comparison) -> Iterator[str]:
    """The noise floor, before any claim."""
    if comparison.noise is not None:
        deviation, count = comparison.noise
        yield (
            f"Noise floor: over its seeds a row's {comparison.results.metric} has a standard deviation of "
            f"{deviation:.2g} ({f'pooled over {count} rows' if count > 1 else 'of the one row'} with several seeds); a "
            "difference of that size between two single runs is within the noise"
        )


def _parts(comparison: Comparison) -> Iterator[str]:
    """Which scores are over a part of a split."""
    found = [trial.get("data.limited") for arm in comparison.arms for trial in arm.ok]
    limits = [limited for limited in found if isinstance(limited, dict)]
    texts = {
        f"the first {rows[0]} of {rows[1]} {split} rows"
        for limited in limits
        for split, rows in limited.items()
        if split != "train"
    }
    if texts:
        yield (
            f"Scores of {len(limits)} of {len(found)} trials are over a part of a split, by a limit of the trainer: "
            f"{', '.join(sorted(texts))}"
        )


def _best_states(comparison: Comparison) -> Iterator[str]:
    """What adapter/ holds where the best state was kept."""
    trials = [trial for arm in comparison.arms for trial in arm.ok]
    kept = [best for trial in trials if isinstance(best := trial.get("best"), dict)]
    if kept:
        steps = ", ".join(f"step {best['step']} ({best['value']:.4f})" for best in kept[:3])
        yield (
            f"adapter/ of {len(kept)} of {len(trials)} trials holds the state with the best {kept[0]['metric']} of all "
            f"validations, and test scores are of it: {steps}{', ...' if len(kept) > 3 else ''}; val/ is of the last"
        )


def _separation(comparison: Comparison) -> Iterator[str]:
    """Which row is the best by its intervals, or that none is; and how many differ from the baseline."""
    others = len(comparison.contenders) - 1
    if others < 1:
        return
    if comparison.best is None:
        yield "; ".join(filter(None, [_capital(undecided(comparison)), differing(comparison)]))
        return
    together = f", at {comparison.level:.1%} each, {LEVEL:.0%} for all {others} together (Bonferroni)"
    level = together if others > 1 else f" at {LEVEL:.0%}"
    yield f"Best: {comparison.best.name}: its paired interval against every other row excludes 0{level}"
    if differences := differing(comparison):
        yield _capital(differences)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _environments(comparison: Comparison) -> Iterator[str]:
    labels = comparison.results.axes.get(environments.AXIS, [])
    if len(labels) > 1:
        yield (
            f"Trials were made in {len(labels)} environments ({' | '.join(labels)}): each has rows and a baseline of "
            f"its own, no difference is taken from one to another, and no row is marked; {environments.COMPARED}"
        )


def _versus(comparison: Comparison) -> Iterator[str]:
    """How to read the differences, where there are any."""
    differences = [arm.difference for arm in comparison.arms if arm.difference]
    baselines = dict.fromkeys(arm.name for arm in comparison.arms if arm.baseline)
    like_with_like = any(arm.against and arm.against.name not in baselines for arm in comparison.arms)
    held_against = "" if like_with_like else f" ({'; '.join(baselines)})"
    if like_with_like:
        yield (
            f"{VERSUS}: like with like, each row against the row that has the first value of one axis and is equal to "
            "it in all others, where there is one"
        )
    if any(difference.reach is not None for difference in differences):
        yield (
            f"{VERSUS}{held_against}: mean paired difference over shared seeds [its 95% interval: Student's t, n - 1 "
            f"degrees of freedom, of that row alone]; {SIGNIFICANT} marks a difference whose interval excludes 0 "
            f"{level_text(differences[0].level)}; any other is no finding"
        )
    if any(difference.reach is None for difference in differences):
        yield f"{VERSUS}: a difference without an interval, of one seed or of one value, is no finding"


def _effects(comparison: Comparison) -> Iterator[str]:
    """What each of several axes does to the scores, where every combination of their values has been scored."""
    found = effects(comparison)
    if len(found.importance) > 1 and found.n > 1:
        shares = found.text.replace("of the variance", f"of the variance of {comparison.results.metric}")
        yield (
            f"{shares} (ANOVA over {len(comparison.contenders)} rows with {found.n} seeds each, without what chance "
            "adds: epsilon squared, 0% where it is negative)"
        )


def _constant(comparison: Comparison) -> Iterator[str]:
    same = [arm for arm in comparison.arms if arm.n < len(arm.scores)]
    if same:
        untrained = " (nothing was trained)" if all(not any(arm.steps) for arm in same) else ""
        yield (
            f"In {len(same)} of {len(comparison.arms)} rows every seed gives the very same {comparison.results.metric}"
            f"{untrained}: that is one measurement, n = 1, without deviation or interval; loralab quantize --evaluate "
            "has intervals over rows"
        )


def _lengths(comparison: Comparison) -> Iterator[str]:
    stopped = [trial for arm in comparison.arms for trial in arm.ok if trial.get("stopped_early")]
    total = sum(len(arm.ok) for arm in comparison.arms)
    if stopped:
        given = [patience for trial in stopped if (patience := trial.setting("trainer.patience"))]
        rule = f" by trainer.patience = {' | '.join(dict.fromkeys(map(str, given)))}" if given else ""
        ends = "; ".join(f"{comparison.results.describe(trial)} {trial.ended}" for trial in stopped[:3])
        ends += f"; and {len(stopped) - 3} more, each in results.csv" if len(stopped) > 3 else ""
        yield f"{len(stopped)} of {total} trials stopped early{rule}; {ends}"
    uneven = sum(len(set(arm.steps)) > 1 for arm in comparison.arms)
    if uneven:
        averages = "1 row averages" if uneven == 1 else f"{uneven} rows average"
        yield f"{averages} trials of different numbers of steps; see {STEPS}"


def _kept_weights(comparison: Comparison) -> Iterator[str]:
    """Which rows have dense weights in their measured memory."""
    measured = [arm for arm in comparison.arms if arm.measured("memory.measured_peak_bytes", largest=True)]
    kept = [arm for arm in measured if any(trial.get("base.dequantize") == "resident" for trial in arm.ok)]
    if kept:
        yield (
            f"Measured memory of {len(kept)} of {len(measured)} rows holds the quantized base's dense weights beside "
            "its codes, since there was room; quantization.dequantize=per_use keeps none"
        )


def _packs(comparison: Comparison, shown: bool) -> Iterator[str]:
    packs = {pack for arm in comparison.arms for pack in arm.packs}
    if packs <= {None}:
        return
    if shown:
        yield (
            "(pack of N): N trials ran at once, and the measured memory, time and speed are those of all N together, "
            "so they compare with no other row's; a row whose seeds ran in different packs has none; peak alone is the "
            "predicted peak of a trial by itself, on the largest batch that its rows can make"
        )
    completed = [trial for arm in comparison.arms for trial in arm.ok]
    cpu = any(trial.get("memory.device") == "cpu" for trial in completed)
    if cpu and {trial.get("environment.threads") for trial in completed} != {1}:
        yield "Run again alone, a packed trial may differ by float rounding: the same bits with one thread only"
