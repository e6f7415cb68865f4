"""One sentence that answers a sweep's question, as far as the intervals allow."""

from collections.abc import Iterator, Sequence

from loralab.analysis import search
from loralab.analysis.arms import Comparison
from loralab.analysis.paired import LEVEL, Difference, paired
from loralab.analysis.pairs import Pairs, by_axis, together
from loralab.records.shared import kept

MOST_NAMED = 4  # values of an axis


def answer(comparisons: Sequence[Comparison]) -> str:
    """Of each axis, which of its values differ from its first and by how much, all else equal: intervals of paired
    differences that hold together with 95% (Bonferroni). Empty for a single row."""
    if len(comparisons) != 1:
        return "The trials are of several sets whose numbers do not compare with each other, so there is no one answer."
    return _of(comparisons[0])


@kept
def _of(comparison: Comparison) -> str:
    if comparison.results.searched:
        return search.answer(comparison)
    if len(comparison.arms) < 2:
        return ""
    if len(comparison.contenders) < 2:
        found = "no row has" if not comparison.contenders else "only one row has"
        return f"There is no answer yet: {found} a completed trial."
    metric = comparison.results.metric
    if all(arm.n < 2 for arm in comparison.contenders):
        best = (min if comparison.results.mode == "min" else max)(
            comparison.contenders, key=lambda arm: arm.mean or 0.0
        )
        least = "lowest" if comparison.results.mode == "min" else "highest"
        return (
            f"With one score a row nothing can be told from chance; the {least} {metric} is that of {best.name} "
            f"({best.mean:.4f})."
        )
    pairs = by_axis(comparison.results, comparison.contenders)
    if not any(pairs.values()):
        return "No two rows differ in one axis alone and share seeds, so none can be held against another."
    count = together(comparison.results, comparison.arms)
    level = 1 - (1 - LEVEL) / count
    clauses = [clause for axis, by_label in pairs.items() for clause in _clauses(comparison, axis, by_label, level)]
    seeds = sorted({arm.n for arm in comparison.contenders})
    over = " to ".join(str(number) for number in dict.fromkeys((seeds[0], seeds[-1])))
    held = f"{LEVEL:.0%} for all {count} paired differences together" if count > 1 else f"{LEVEL:.0%}"
    return f"By {metric}, {'; '.join(clauses)} ({held}, {over} seed{'s' * (seeds[-1] > 1)})."


def _clauses(comparison: Comparison, axis: str, by_label: Pairs, level: float) -> Iterator[str]:
    """``r = 8 is better than 2 by 0.03 to 0.05``; labels of which nothing can be told share one clause."""
    results, unclear = comparison.results, []
    first, name = results.axes[axis][0], results.together(axis)
    found: dict[str, list[str]] = {}
    for label, arms in by_label.items():
        gaps = [gap for arm, other in arms if (gap := paired(arm.by_seed, other.by_seed, level)) is not None]
        verdicts = [gap.verdict(results.mode) for gap in gaps]
        told = [gap for gap, verdict in zip(gaps, verdicts, strict=True) if verdict]
        kinds = {verdict for verdict in verdicts if verdict}
        if len(kinds) != 1:
            unclear.append(label if not kinds else f"{label} (better in some settings, worse in others)")
            continue
        where = "" if len(told) == len(gaps) else f" in {len(told)} of {len(gaps)} settings"
        found.setdefault(kinds.pop(), []).append(f"{label}{where} ({_spread(told)})")
    for kind, labels in found.items():
        named = _listed(labels)
        yield f"{name} = {named} {'is' if len(labels) == 1 else 'are'} {kind} than {first}"
    if unclear:
        yield f"{name} = {_listed(unclear)} cannot be told apart from {first}"


def _spread(gaps: Sequence[Difference]) -> str:
    """``+0.0100``, ``-0.05 to -0.03``: the mean differences."""
    ends = sorted({min(gap.mean for gap in gaps), max(gap.mean for gap in gaps)})
    return " to ".join(dict.fromkeys(f"{end:+.4f}" for end in ends))


def _listed(texts: Sequence[str]) -> str:
    shown = [*texts[:MOST_NAMED], *([f"{len(texts) - MOST_NAMED} more"] if len(texts) > MOST_NAMED else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
