"""Which arms of a table are held against which, and how many paired differences that makes together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loralab.analysis import environments
from loralab.analysis.results import SweepResults

if TYPE_CHECKING:
    from loralab.analysis.arms import Arm

Pairs = dict[str, list[tuple["Arm", "Arm"]]]  # label: arms that have it, each with its partner


def by_axis(results: SweepResults, contenders: Sequence["Arm"]) -> dict[str, Pairs]:
    """Of each axis that moves by itself the arms with a score, by their label, with their partners: those that have the
    first label and are else equal, but for axes that move with it."""
    moving = [axis for axis in results.moving() if axis in results.compared]
    axes = [axis for axis in moving if axis != environments.AXIS and axis not in results.led]
    return {axis: _of_axis(results, contenders, axis) for axis in axes}


def together(results: SweepResults, arms: Sequence["Arm"]) -> int:
    """How many paired differences a page takes of these arms, each once: those along the axes, and that of each row to
    the one that it is held against (``against``)."""
    contenders = [arm for arm in arms if arm.scores]
    along = (pair for pairs in by_axis(results, contenders).values() for found in pairs.values() for pair in found)
    rows = ((arm, arm.against) for arm in arms if arm.against is not None)
    return len({(*one.values.values(), None, *other.values.values()) for one, other in (*along, *rows)})


def _of_axis(results: SweepResults, contenders: Sequence["Arm"], axis: str) -> Pairs:
    labels, led = results.axes[axis], results.led

    def key(arm: "Arm", label: str) -> tuple[str, ...]:
        return (label, *(text for name, text in arm.values.items() if axis not in (name, led.get(name))))

    scored = {key(arm, arm.values[axis]): arm for arm in reversed(contenders)}
    found: Pairs = {}
    for arm in contenders:
        other = scored.get(key(arm, labels[0]))
        if arm.values[axis] != labels[0] and other is not None and set(arm.by_seed) & set(other.by_seed):
            found.setdefault(arm.values[axis], []).append((arm, other))
    return found
