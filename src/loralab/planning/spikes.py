"""Memory over the steps of a run whose batches are sometimes long, as CUDA would need it: no card is asked.

Three steps are traced: the shortest and the longest of the ordinary ones, and a lengthened one. Memory is piecewise
linear in the length that a batch is padded to, so that the others lie between them.
"""

from typing import Any

import numpy as np

from loralab.data.encoding import Encoded
from loralab.data.passes import BatchShape, Feed, Pass
from loralab.planning.foresee import Foresight
from loralab.planning.geometry import Geometry

MOST_STEPS = 2000


def by_step(spec: Any, data: Encoded, foresight: Foresight) -> dict[str, Any] | None:
    """Of a trial alone with ``memory.spiky_every``: {step, length: tokens that the longest pass of each step is padded
    to, peak_bytes: of torch's allocator in each, paged_bytes: of optimizer state, in none of them, state_bytes: of
    state that is in them}. None where no step is made, or it could not be traced."""
    steps = _longest_passes(spec, data)
    if not steps:
        return None
    lengthened = [one for one in steps if one.length is not None]
    ordinary = [one for one in steps if one.length is None]
    traced: dict[int, Any] = {}
    for some, choose in ((ordinary, min), (ordinary, max), (lengthened, max)):
        if some:
            shape = choose(some, key=_width)
            micros = min(2, spec.trainer.accumulate_grad_batches)
            plan = foresight.of([spec], Geometry((shape,) * micros, cuda=True, scored=False))
            if plan is None:
                return None
            traced[_width(shape)] = plan
    widths = [_width(one) for one in steps]
    known = sorted(traced)
    peaks = np.interp(widths, known, [traced[width].predicted_peak_bytes for width in known])
    last = traced[known[-1]]
    return {
        **{"step": [one.step for one in steps], "length": widths, "peak_bytes": [round(peak) for peak in peaks]},
        **{"paged_bytes": last.paged_bytes, "state_bytes": last.by_kind.get("optimizer", 0)},
    }


def _longest_passes(spec: Any, data: Encoded) -> list[Pass]:
    """Of each step the pass with the longest row, lengthened where the step is."""
    feed = Feed.of(spec, data.train, stop=min(spec.trainer.max_steps, MOST_STEPS))
    chosen, every = feed.chosen(), spec.memory.spiky_every
    length = spec.memory.spike(spec.model.length, spec.room)
    found: list[Pass] = []
    for number in range(len(chosen) // feed.micros):
        shapes = [chosen.shape(number * feed.micros + micro) for micro in range(feed.micros)]
        batch: BatchShape = max((one for one in shapes if one is not None), key=lambda one: max(one.inputs))
        found.append(Pass(number + 1, (batch,), length if (number + 1) % every == 0 else None))
    return found


def _width(shape: Pass) -> int:
    return shape.length or max(shape.present[0].inputs)
