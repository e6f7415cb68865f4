"""How far a row gets of what full fine-tuning gets, where a sweep has full fine-tuning beside other methods."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loralab.analysis.arms import Arm, Comparison
from loralab.analysis.paired import LEVEL, Difference, paired

METHOD = "full"
SHARE, GAP = "of full", "vs full"  # the columns


@dataclass(frozen=True)
class ToFull:
    """A row beside the row ``full``. ``difference``: the row less full, over shared seeds; ``share``: (untrained - row)
    / (untrained - full), None unless there is an ``untrained`` row that full is better than by its 95% interval. The
    difference counts at the level at which all of the column hold together with 95% (Bonferroni)."""

    full: Arm
    difference: Difference | None
    untrained: Arm | None = None
    share: float | None = None


Gaps = Mapping[int, ToFull]  # by the id of the arm


def to_full(comparison: Comparison) -> Gaps:
    """Of each row with a score that has a full fine-tuning row of its environment most like it; empty where there is no
    such row, or nothing else."""
    scored = comparison.contenders
    trained = [arm for arm in scored if _is_full(arm) and any(arm.steps)]
    untrained = [arm for arm in scored if arm.steps and not any(arm.steps)]
    if not trained or len(scored) == len(trained):
        return {}
    found = {}
    for arm in scored:
        full = _most_like(arm, trained)
        if full is not None:
            found[id(arm)] = _beside(arm, full, _most_like(full, untrained), comparison.results.mode)
    count = sum(gap.difference is not None and gap.full is not arm for arm in scored if (gap := found.get(id(arm))))
    level = 1 - (1 - LEVEL) / max(1, count)
    return {
        key: replace(gap, difference=gap.difference and replace(gap.difference, level=level))
        for key, gap in found.items()
    }


def gap_is_new(comparison: Comparison, gaps: Gaps) -> bool:
    """Whether a difference to full is there that is not the one to the row that the arm is held against anyway."""
    return any(
        one.difference is not None and arm is not one.full and arm.against is not one.full
        for arm in comparison.arms
        if (one := gaps.get(id(arm)))
    )


def sentences(comparison: Comparison) -> Iterator[str]:
    """How the column is read, and of which rows it is; none where there is no column."""
    gaps = to_full(comparison)
    shares = [gap for gap in gaps.values() if gap.share is not None]
    fulls = "; ".join(dict.fromkeys(gap.full.name for gap in gaps.values()))
    if shares:
        bases = "; ".join(dict.fromkeys(gap.untrained.name for gap in shares if gap.untrained))
        yield (
            f"{SHARE}: how much of full fine-tuning's improvement over the untrained base a row reaches, (untrained - "
            f"row) / (untrained - full) of the means over shared seeds, without an interval; full: {fulls}; untrained: "
            f"{bases}"
        )
    elif gap_is_new(comparison, gaps):
        why = "is not told from 0 by its interval" if any(gap.untrained for gap in gaps.values()) else "is not known"
        yield (
            f"{GAP}: mean paired difference to full fine-tuning ({fulls}) over shared seeds [its {LEVEL:.0%} "
            "interval], ! where 0 is excluded for all rows together; full's own improvement over the untrained base "
            f"{why}, so there is no share of it"
            + ("" if "told" in why else " (a row with trainer.max_steps=0 would give it)")
        )


def _is_full(arm: Arm) -> bool:
    return all(trial.get("adapter.method") == METHOD for trial in arm.ok)


def _most_like(arm: Arm, others: Sequence[Arm]) -> Arm | None:
    """Of the same environment, the one that has the most of its values; None where several have as many, unless these
    have the same scores, as untrained rows do."""
    alike: dict[int, list[Arm]] = {}
    for other in others:
        if other.environment == arm.environment:
            count = sum(text == arm.values[axis] for axis, text in other.values.items())
            alike.setdefault(count, []).append(other)
    best = alike[max(alike)] if alike else []
    return best[0] if len({tuple(sorted(other.by_seed.items())) for other in best}) == 1 else None


def _beside(arm: Arm, full: Arm, untrained: Arm | None, mode: str) -> ToFull:
    difference = paired(arm.by_seed, full.by_seed)
    gained = paired(full.by_seed, untrained.by_seed) if untrained else None
    if untrained is None or gained is None or gained.verdict(mode) != "better":
        return ToFull(full, difference, untrained)
    seeds = [seed for seed in gained.seeds if seed in arm.by_seed]
    if not seeds:
        return ToFull(full, difference, untrained)
    base, top, own = (statistics.fmean(one.by_seed[seed] for seed in seeds) for one in (untrained, full, arm))
    return ToFull(full, difference, untrained, (base - own) / (base - top) + 0.0)
