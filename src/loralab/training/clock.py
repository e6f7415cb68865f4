"""The seconds that a trial has taken, summed over all processes that have worked on it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NAMES = ("startup_s", "train_s", "wall_s")


@dataclass
class Clock:
    """Seconds of this process, beside those that a checkpoint has brought of earlier ones. What a process did after its
    last checkpoint is made again, and its seconds are lost with it."""

    started: float = field(default_factory=time.monotonic)  # when this process began with the trial
    startup_s: float | None = None  # of this process, until its first fit
    train_s: float = 0.0  # of its finished fits
    untimed_tokens: int = 0  # of steps that no timing counts, in all processes
    fitting_since: float | None = None  # the beginning of the fit under way
    earlier: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    _state: dict[str, Any] = field(default_factory=dict)

    def begin(self, now: float) -> None:
        """A fit begins."""
        self.fitting_since = now
        if self.startup_s is None:
            self.startup_s = now - self.started

    def end(self, seconds: float, untimed_tokens: int) -> None:
        """The fit under way has ended; it has trained for ``seconds``."""
        self.fitting_since = None
        self.train_s += seconds
        self.untimed_tokens += untimed_tokens

    def total(self, now: float, excluded: float = 0.0) -> dict[str, float]:
        """{name in the record's ``time``: seconds until ``now``}. ``excluded``: those of the fit under way that are no
        training."""
        fitted = 0.0 if self.fitting_since is None else max(0.0, now - self.fitting_since - excluded)
        own = {"startup_s": self.startup_s or 0.0, "train_s": self.train_s + fitted, "wall_s": now - self.started}
        return {name: self.earlier[name] + own[name] for name in NAMES}

    def rate(self, tokens: int) -> float | None:
        """Tokens a second of the finished fits; None where no second was timed. ``tokens``: seen in training."""
        seconds, timed = self.earlier["train_s"] + self.train_s, tokens - self.untimed_tokens
        return timed / seconds if seconds > 0 and timed > 0 else None

    def mark(self, now: float, excluded: float = 0.0, untimed_tokens: int = 0) -> None:
        """Sets what ``state_dict`` returns to the state at ``now``, which is one for all trials of a pack."""
        self._state = {**self.total(now, excluded), "untimed_tokens": self.untimed_tokens + untimed_tokens}

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: Mapping[str, Any], tokens: int) -> None:
        """Goes on from ``state_dict``; without one (of an earlier version) the seconds of ``tokens`` are not known."""
        self.earlier = {name: float(state.get(name, 0.0)) for name in NAMES}
        self.untimed_tokens = int(state.get("untimed_tokens", tokens))
