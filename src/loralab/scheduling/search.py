"""The trials of a search (``hydra/sweeper=optuna``): asked of Optuna, told their scores, kept in the sweep folder."""

import hashlib
import logging
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig

from loralab.config.compose import plain_sweep
from loralab.errors import ConfigError
from loralab.numerics.halving import Halving
from loralab.scheduling import halving
from loralab.scheduling.rounds import Trials, axis_word

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

JOURNAL = "optuna.journal"
STARTUP = 10  # points drawn at random before the estimator is asked, as Optuna's default
ENOUGH = 5  # points at a rung before one is pruned there
Key = tuple[int, str]  # number of a point, override of the seed


def study_of(sweeper: Any, params: Mapping[str, Any], arguments: Sequence[str]) -> "Search":
    """What ``hydra/sweeper=optuna`` asks for. Raises ConfigError."""
    if find_spec("optuna") is None:
        raise ConfigError("hydra/sweeper=optuna needs optuna, which is not installed: pip install 'loralab[optuna]'")
    given: list[str] = [*map(axis_word, params, params.values()), *arguments]
    return Search(Space(given), sweeper.config, sweeper.n_trials, sweeper.batch)


class Space:
    """What overrides leave open: ``fixed`` words, those of the ``seeds`` and the ``distributions`` of the others."""

    def __init__(self, words: Sequence[str]) -> None:
        """``words``: overrides, the later of two for one key counts. Raises ConfigError."""
        self.fixed: list[str] = []
        self.seeds: list[str] = []
        self.distributions: dict[str, Any] = {}
        parsed = {str(one.get_key_element()): one for one in OverridesParser.create().parse_overrides(list(words))}
        for key, override in parsed.items():
            if not override.is_sweep_override():
                self.fixed.append(str(override.input_line))
            elif key == "seed":
                self.seeds = [f"seed={text}" for text in _texts(override)]
            else:
                self.distributions[key] = _distribution(override)
        if not self.distributions:
            raise ConfigError(
                "hydra/sweeper=optuna has no space to search; valid: at least one interval, range or choice, as in"
                " optimizer.lr=tag(log,interval(1e-4,1e-2))"
            )

    def words(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides of a point."""
        return [f"{key}={_text(value)}" for key, value in params.items()]


class Search:
    """A ``rounds.Study``. A point is its trials over all seeds; its value is the mean of their metrics. A point with a
    trial that failed has none."""

    def __init__(self, space: Space, master: DictConfig, n_trials: int, batch: int) -> None:
        """Raises ConfigError for a number of points below 1 and for a rule of ``sweep.halving`` that is none."""
        if n_trials < 1 or batch < 1:
            raise ConfigError(f"hydra.sweeper.n_trials={n_trials}, batch={batch}; valid: numbers of at least 1")
        sweep = plain_sweep(master)
        asked = {**sweep, "tune": {}} if sweep.get("halving") else sweep  # what is searched is tuned
        self.rule: Halving | None = halving.rule_of(asked, master)
        self.space, self.n_trials, self.batch = space, n_trials, batch
        self.folder, self.seed = Path(str(master.hydra.sweep.dir)), int(master.seed)
        self.mode = str(master.metric_mode)
        self.passed: dict[int, int] = {}  # rungs that a point has passed
        self.waiting: list[tuple[int, list[str]]] = []  # (number of the point, overrides of a trial)
        self.ended: dict[tuple[str, ...], str] = {}

    @cached_property
    def study(self) -> "optuna.Study":
        """The search in the folder, which an earlier call may have begun."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(self.folder / JOURNAL)))
        directions = optuna.study.StudyDirection
        direction = directions.MINIMIZE if self.mode == "min" else directions.MAXIMIZE
        pruner = optuna.pruners.MedianPruner(n_startup_trials=ENOUGH)
        return optuna.create_study(
            storage=storage, study_name="loralab", direction=direction, pruner=pruner, load_if_exists=True
        )

    def ask(self) -> Trials:
        """The overrides of the trials to run next; empty: no more."""
        import optuna

        if not self.waiting:
            begun = [one.number for one in self.study.trials if one.state == optuna.trial.TrialState.RUNNING]
            left = self.n_trials - len(self.study.trials)
            numbers = begun or [self._point() for _ in range(min(self.batch, left))]
            self.waiting = [(number, words) for number in numbers for words in self._trials(number)]
        return [[*words, *self._pause(number)] for number, words in self.waiting]

    def tell(self, trials: Trials, values: Sequence[float | None]) -> list[dict[str, Any]]:
        """What follows from the metrics of the trials that were asked for (None: failed), for sweep.json."""
        told, self.waiting, self.ended = self.waiting, [], {}
        by_point: dict[int, list[float | None]] = {}
        for (number, _), value in zip(told, values, strict=True):
            by_point.setdefault(number, []).append(value)
        for number, scores in by_point.items():
            self._tell(number, scores)
        return self._best()

    def _tell(self, number: int, scores: Sequence[float | None]) -> None:
        import optuna

        states, level = optuna.trial.TrialState, self.passed.get(number, 0)
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            self.study.tell(number, state=states.FAIL)
        elif self.rule is None or level >= len(self.rule.rungs):
            self.study.tell(number, statistics.fmean(known))
        else:
            trial = self._trial(number)
            trial.report(statistics.fmean(known), step=level)
            if trial.should_prune():
                why = f"at {self.rule.rungs[level]:g} of its steps {statistics.fmean(known):.4g}, worse than the median"
                self.ended |= {tuple(words): why for words in self._trials(number)}
                self.study.tell(number, state=states.PRUNED)
            else:
                self.passed[number] = level + 1
                self.waiting += [(number, words) for words in self._trials(number)]

    def _point(self) -> int:
        """The number of a new point. The sampler is seeded by how many there are, so that a search that was killed asks
        for the same points as one that was not."""
        import optuna

        text = f"{self.seed} {len(self.study.trials)}"  # neighbouring seeds draw alike
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        self.study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=STARTUP, multivariate=True, constant_liar=True, seed=seed
        )
        return int(self.study.ask(self.space.distributions).number)

    def _trial(self, number: int) -> "optuna.Trial":
        import optuna

        return optuna.Trial(self.study, self.study.trials[number]._trial_id)

    def _trials(self, number: int) -> Trials:
        """The overrides of the trials of a point, one for each seed."""
        words = [*self.space.fixed, *self.space.words(self.study.trials[number].params)]
        return [[*words, seed] for seed in self.space.seeds] or [words]

    def _pause(self, number: int) -> list[str]:
        level = self.passed.get(number, 0)
        return [f"{halving.UNTIL}={self.rule.rungs[level]:g}"] if self.rule and level < len(self.rule.rungs) else []

    def _best(self) -> list[dict[str, Any]]:
        """For sweep.json: how many points were asked for, and the best of those that are complete."""
        import optuna

        trials = self.study.trials
        complete = [one for one in trials if one.state == optuna.trial.TrialState.COMPLETE]
        best = min(complete, key=lambda one: (one.value or 0.0) * (1 if self.mode == "min" else -1), default=None)
        found = {} if best is None else {"chosen": " ".join(self.space.words(best.params)), "value": best.value}
        return [{"arm": [], "points": len(trials), "complete": len(complete), **found}]


def _distribution(override: Override) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if not isinstance(value, IntervalSweep):
        if not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: valid in a space: interval, range or choice")
        return CategoricalDistribution(_texts(override))
    log_scale, low, high = "log" in value.tags, value.start, value.end
    if low is None or high is None or not low < high or (log_scale and low <= 0):
        raise ConfigError(f"{override.input_line}: an interval rises, and one on a log scale is above 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log_scale)
    return FloatDistribution(float(low), float(high), log=log_scale)


def _texts(override: Override) -> list[str]:
    return [str(text) for text in override.sweep_string_iterator()]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
