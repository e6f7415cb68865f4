"""The optimizer steps that ending trials early saves."""

from collections.abc import Sequence

from loralab.analysis.trials import PRUNED, TrialResult
from loralab.analysis.values import is_number


def steps(trials: Sequence[TrialResult]) -> tuple[int, int]:
    """(optimizer steps that were made, those of all trials run to their end), of the trials that were completed or
    ended early and whose number of steps is set."""
    made = whole = 0
    for trial in trials:
        asked, own = trial.setting("trainer.max_steps"), _made(trial)
        if own is not None and isinstance(asked, int) and asked > 0:
            made, whole = made + own, whole + asked
    return made, whole


def _made(trial: TrialResult) -> int | None:
    if trial.status == PRUNED:
        pauses = trial.get("pauses") or []
        return int(pauses[-1]["step"]) if pauses and is_number(pauses[-1].get("step")) else None
    made = trial.get("time.steps")
    return int(made) if trial.ok and is_number(made) else None


def saved(trials: Sequence[TrialResult]) -> str:
    """``1,020 of 1,440 trial-steps were made, 29% fewer``; empty where none was saved."""
    made, whole = steps(trials)
    return f"{made:,} of {whole:,} trial-steps were made, {1 - made / whole:.0%} fewer" if made < whole else ""
