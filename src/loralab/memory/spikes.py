"""Steps whose memory peak is far above the usual: by how much, in which phase, and whether the batch was longer."""

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

MIB = 2**20
HISTORY = 5  # ordinary steps before the first that can be a spike
LONG = 1.2  # a batch of more than this times the median tokens is long
MAX_RECORDED = 256  # latest spikes, in the record; the rows of metrics.jsonl have all


@dataclass
class Spike:
    """One step with a spike. Tokens include padding, which needs as much memory."""

    step: int
    phase: str
    peak_bytes: int
    excess_bytes: int  # above the median of the ordinary steps before it
    rows: int
    tokens: int
    median_tokens: float
    cause: str  # "length" (the batch was long) or "other"
    allocator_retries: int  # since the step before: cudaMalloc failed, and torch freed its cached blocks
    optimizer_time_ratio: float | None = None  # to the median; above 1 where evicted paged state had to come back


class Spikes:
    """A peak above max(``factor`` x median, median + ``floor``) of the last ``window`` ordinary peaks is a spike.

    After ``window`` spikes in a row their level is the ordinary one.
    """

    def __init__(self, factor: float = 1.25, floor: int = 256 * MIB, window: int = 50) -> None:
        self.factor, self.floor = factor, floor
        self.found: list[Spike] = []
        self.count = 0
        self._peaks: deque[int] = deque(maxlen=window)
        self._tokens: deque[int] = deque(maxlen=window)
        self._times: deque[float] = deque(maxlen=window)
        self._streak = self._retries = 0

    def see(self, step: int, phase: str, peak: int, rows: int, tokens: int, retries: int = 0) -> Spike | None:
        """Takes a step's highest peak in bytes; the Spike where it is one, else None. ``retries``: the allocator's
        since the start of the process."""
        usual = median(self._peaks) if len(self._peaks) >= HISTORY else peak
        new, self._retries = retries - self._retries, retries
        if peak <= max(self.factor * usual, usual + self.floor):
            self._peaks.append(peak)
            self._tokens.append(tokens)
            self._streak = 0
            return None
        self._streak += 1
        usual_tokens = median(self._tokens)
        cause = "length" if tokens > LONG * usual_tokens else "other"
        spike = Spike(step, phase, peak, int(peak - usual), rows, tokens, usual_tokens, cause, new)
        self.count += 1
        self.found = [*self.found, spike][-MAX_RECORDED:]
        if self._streak == self._peaks.maxlen:
            self._peaks.clear()
            self._tokens.clear()
        return spike

    def time(self, spike: Spike | None, seconds: float) -> None:
        """Takes the optimizer's time in a step; ``spike``: what ``see`` returned for that step, whose ratio it sets."""
        if spike is None:
            self._times.append(seconds)
        elif self._times:
            spike.optimizer_time_ratio = seconds / max(median(self._times), 1e-9)


def row(spike: Spike) -> dict[str, Any]:
    """The fields of a spike in a row of metrics.jsonl."""
    return {
        "memory/spike_peak_gib": spike.peak_bytes / 2**30,
        "memory/spike_excess_gib": spike.excess_bytes / 2**30,
        "memory/spike_tokens": spike.tokens,
        "memory/spike_by_length": float(spike.cause == "length"),
    }
