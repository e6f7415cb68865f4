"""The trials of a sweep that tunes and ends early what cannot win (``sweep.halving``)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from loralab.errors import ConfigError
from loralab.numerics.halving import Halving, Rung
from loralab.numerics.tuning import Setting
from loralab.scheduling.tuning import Arm, Tuning, Words, seed_of
from loralab.spec import make

UNTIL = "++trainer.until"  # a trainer of the user's own may be without it
KNOWN_ENDS = ("trainer.patience", "trainer.max_time")


def rule_of(sweep: Mapping[str, Any], master: DictConfig) -> Halving | None:
    """What the sweep file asks under ``sweep.halving``: true takes the defaults. None for false, null or nothing.

    Raises ConfigError, also where trials end early by another rule, so that a rung would not be of equal steps."""
    asked = sweep.get("halving")
    if asked in (None, False):
        return None
    if sweep.get("tune") is None:
        raise ConfigError("sweep.halving ends values of what is tuned, and there is no sweep.tune; valid: both")
    stops = [
        str(node.get("_target_")) for node in (master.get("callbacks") or {}).values() if isinstance(node, DictConfig)
    ]
    ends = [key for key in KNOWN_ENDS if master.trainer.get(key.partition(".")[2]) is not None]
    ends += [name for name in stops if name.endswith((".EarlyStopping", ".Timer"))]
    if ends:
        raise ConfigError(f"sweep.halving and {ends[0]} both end trials early; valid: one of them")
    if not isinstance(asked, Mapping | bool):
        raise ConfigError(
            f"sweep.halving={asked!r} is no group of settings; valid: true, false, {{rungs: [0.25, 0.5]}}"
        )
    return make(Halving, dict(asked) if isinstance(asked, Mapping) else {}, "sweep.halving")


class Halved(Tuning):
    """A ``rounds.Study``: as Tuning, but trials go from rung to rung, and at each the values of an arm that cannot win
    end. Arms are never compared with each other. Rungs are synchronous: every value of an arm that was asked for has
    reached a rung before one of them is ended."""

    def __init__(self, rule: Halving, is_complete: Callable[[Sequence[str]], bool], *given: Any) -> None:
        """``is_complete``: whether the trial of these overrides has been trained to its end, by an earlier call."""
        super().__init__(*given)
        self.rule, self.is_complete = rule, is_complete
        self.passed: dict[tuple[Arm, Setting], int] = {}  # rungs that a setting of an arm has passed
        self.rungs: dict[Arm, list[dict[Setting, dict[str, float | None]]]] = {
            arm: [{} for _ in rule.rungs] for arm in self.asked
        }
        self.ended: dict[tuple[str, ...], str] = {}  # {overrides of a trial: why it has ended}

    def ask(self) -> Words:
        """The overrides of the trials to run next, each with the share of its steps at which it pauses."""
        trials = super().ask()
        pauses = [self._pause(arm, setting) for arm, setting, _ in self.waiting]
        return [[*words, *pause] for words, pause in zip(trials, pauses, strict=True)]

    def tell(self, trials: Words, values: Sequence[float | None]) -> list[dict[str, Any]]:
        """What is decided by the metrics at the rungs that were reached and of the trials that are complete (None:
        failed, nan: not known)."""
        told, self.waiting = list(zip(self.waiting, trials, values, strict=True)), []
        at_rung: dict[tuple[Arm, int], list[Setting]] = {}
        complete: list[Arm] = []
        for (arm, setting, words), _, value in told:
            level = self.passed.get((arm, setting), 0)
            if level < len(self.rule.rungs):
                self.rungs[arm][level].setdefault(setting, {})[seed_of(words)] = value
                at_rung.setdefault((arm, level), []).append(setting)
            else:
                self.scores[arm].setdefault(setting, {})[seed_of(words)] = value
                complete.append(arm)
        self.ended = {}
        decisions = [self._at(arm, level, list(dict.fromkeys(own))) for (arm, level), own in at_rung.items()]
        return [*decisions, *(self._decide(arm) for arm in dict.fromkeys(complete))]

    def _at(self, arm: Arm, level: int, asked: Sequence[Setting]) -> dict[str, Any]:
        """The decision at a rung of one arm: its settings go on, or end."""
        rung: Rung = self.rungs[arm][level]
        ended = self.rule.ended(rung, asked, self.mode)
        for setting in asked:
            own = [(*words, *self._words(setting), *self.also) for words in self.asked[arm]]
            if setting in ended and all(map(self.is_complete, own)):  # nothing is left to be saved
                del ended[setting]
            if setting in ended:
                self.scores[arm][setting] = dict.fromkeys(rung[setting])
                self.ended |= dict.fromkeys(own, f"at {self.rule.rungs[level]:g} of its steps {ended[setting]}")
            else:
                self.passed[arm, setting] = level + 1
                self.waiting += [
                    (arm, setting, words) for words in self.asked[arm] if self._lives(rung, setting, words)
                ]
        means = {" ".join(self._words(s)): _mean(own) for s, own in rung.items()}
        names = [" ".join(self._words(setting)) for setting in ended]
        return {"arm": list(arm), "rung": self.rule.rungs[level], "means": means, "ended": names}

    def _lives(self, rung: Rung, setting: Setting, words: Sequence[str]) -> bool:
        return rung[setting].get(seed_of(words)) is not None

    def _pause(self, arm: Arm, setting: Setting) -> list[str]:
        level = self.passed.get((arm, setting), 0)
        return [f"{UNTIL}={self.rule.rungs[level]:g}"] if level < len(self.rule.rungs) else []


def _mean(scores: Mapping[str, float | None]) -> float | None:
    """The mean over seeds; None where one failed or is not known."""
    values = [value for value in scores.values() if value is not None and math.isfinite(value)]
    return sum(values) / len(values) if values and len(values) == len(scores) else None
