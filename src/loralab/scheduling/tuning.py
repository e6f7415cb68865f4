"""The trials of a sweep that tunes (``sweep.tune``): each arm at every value, then beyond the edge of the grid."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from loralab.config import sweep_files
from loralab.errors import ConfigError, nearest
from loralab.numerics.tuning import Choice, Setting, choose, following
from loralab.scheduling import axes

log = logging.getLogger(__name__)

EXTEND = 2  # values beyond each side of the grid, where sweep.extend says nothing
TESTED = "trainer.test=true"
Arm = tuple[str, ...]  # the overrides that its trials share
Words = list[list[str]]


def check_compared(sweep: Mapping[str, Any], trials: Sequence[Sequence[str]]) -> None:
    """Raises ConfigError where ``sweep.compare`` names what is no axis of ``trials``, or what is tuned as well."""
    compared = sweep.get("compare")
    if compared is None:
        return
    if not isinstance(compared, list) or not all(isinstance(name, str) for name in compared):
        raise ConfigError(f"sweep.compare={compared!r} is no list of axes; valid: such as sweep.compare=[adapter.r]")
    known = list(dict.fromkeys(_key(word) for words in trials for word in words if axes.says_what_runs(_key(word))))
    for name in compared:
        if name in (sweep.get("tune") or ()):
            raise ConfigError(
                f"{name} stands in both sweep.compare and sweep.tune: an arm has its own best value of what is tuned;"
                " valid: one of the two"
            )
        if name not in known:
            raise ConfigError(f"sweep.compare names {name}, which is no axis of this sweep; {nearest(name, known)}")


class Tuning:
    """A ``rounds.Study``: every arm at every value of the grid, for every seed; then, for each arm whose best value is
    the least or the greatest tried, the next one, until it is inside or ``sweep.extend`` is reached."""

    def __init__(self, sweep: Mapping[str, Any], trials: Words, metric: str, mode: str, also: Sequence[str]) -> None:
        """``sweep``: what the configuration says under this name; ``trials``: of the axes; ``also``: overrides that
        every trial is given beside its own. Raises ConfigError."""
        self.mode, self.also = mode, also
        self.grid, self.names = _grid(sweep["tune"]), [str(name) for name in sweep["tune"]]
        tuned = {name.lstrip("+") for name in self.names}
        self.extend = _extend(sweep.get("extend", EXTEND))
        if not metric.startswith("val/"):
            raise ConfigError(
                f"metric={metric}: sweep.tune chooses by the validation split and reports on the test split; valid: a"
                " metric of validation, such as val/loss"
            )
        for words in trials:
            if twice := next((key for word in words if (key := _key(word)) in tuned), None):
                raise ConfigError(
                    f"{twice} is both given and tuned; valid: its values in sweep.tune alone, on the command line "
                    f"'sweep.tune={{{twice}: [A, B]}}'"
                )
        self.asked: dict[Arm, Words] = {}  # {arm: the overrides of its trials, one for each seed}
        for words in trials:
            self.asked.setdefault(tuple(word for word in words if axes.says_what_runs(_key(word))), []).append(words)
        self.scores: dict[Arm, dict[Setting, dict[str, float | None]]] = {arm: {} for arm in self.asked}
        self.waiting = [
            (arm, setting, words) for arm, own in self.asked.items() for setting in self.grid for words in own
        ]

    def ask(self) -> Words:
        """The overrides of the trials to run next; empty: no more."""
        return [[*words, *self._words(setting), *self.also] for _, setting, words in self.waiting]

    def tell(self, trials: Words, values: Sequence[float | None]) -> list[dict[str, Any]]:
        """What is decided by the metrics of the trials that were asked for (None: not completed), for sweep.json."""
        told, self.waiting = self.waiting, []
        for (arm, setting, words), value in zip(told, values, strict=True):
            self.scores[arm].setdefault(setting, {})[seed_of(words)] = value
        return [self._decide(arm) for arm in dict.fromkeys(arm for arm, _, _ in told)]

    def _decide(self, arm: Arm) -> dict[str, Any]:
        scores = self.scores[arm]
        choice = choose(scores, self.mode)
        more = following(choice, list(scores), self.grid, self.extend)
        self.waiting += [(arm, setting, words) for setting in more for words in self.asked[arm]]
        chosen = " ".join(self._words(choice.setting)) if choice.setting else "none"
        if more:
            shared = set.intersection(*map(set, self.asked))
            where = " ".join(word for word in arm if word not in shared) or "the one arm"
            names = ", ".join(" ".join(self._words(setting)) for setting in more)
            log.info("%s: %s is the best so far and the last of its values; next: %s", where, chosen, names)
        return {
            "arm": list(arm),
            "chosen": chosen,
            "means": self._means(choice),
            "next": [" ".join(self._words(setting)) for setting in more],
        }

    def _means(self, choice: Choice) -> dict[str, float]:
        return {" ".join(self._words(setting)): mean for setting, mean in choice.means.items()}

    def _words(self, setting: Setting) -> list[str]:
        return [f"{name}={value}" for name, value in zip(self.names, setting, strict=True)]


def _grid(tune: Any) -> list[Setting]:
    """Every combination of the values of ``sweep.tune``. Raises ConfigError."""
    if not isinstance(tune, Mapping) or not tune:
        raise ConfigError(
            f"sweep.tune={tune!r} is no mapping of a setting to its values; valid: such as"
            " sweep.tune={optimizer.lr:[0.001,0.002,0.004]}"
        )
    words = [f"{name}={sweep_files.axis_values(values)}" for name, values in tune.items() if values not in ([], "")]
    found = [tuple(word.partition("=")[2] for word in setting) for setting in axes.trials(words)] if words else []
    few = [name for place, name in enumerate(tune) if len({axes.canonical(_value(s[place])) for s in found}) < 2]
    if len(words) < len(tune) or few:
        raise ConfigError(f"sweep.tune.{(few or list(tune))[0]} has fewer than two values, so there is nothing to tune")
    return list(dict.fromkeys(found))


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _extend(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ConfigError(f"sweep.extend={given!r} is no number of values; valid: 0 (never), 1, {EXTEND}, ...")
    return given


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def seed_of(words: Sequence[str]) -> str:
    """The value of the override of the seed; empty where there is none."""
    return next((word.partition("=")[2] for word in words if _key(word) == "seed"), "")
