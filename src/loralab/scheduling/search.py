"""The trials of a search (``hydra/sweeper=optuna``): asked of Optuna, told their scores, kept in the sweep folder."""

import hashlib
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from loralab.config.compose import plain_sweep
from loralab.errors import ConfigError, nearest
from loralab.numerics.halving import Halving
from loralab.scheduling import asked, halving
from loralab.scheduling.feasible import Trying
from loralab.scheduling.journal import JOURNAL, copied, opened
from loralab.scheduling.rounds import Trials, axis_word
from loralab.scheduling.session import Session
from loralab.scheduling.space import Space, spoken

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

STARTUP = 10  # points drawn at random before the estimator is asked, as Optuna's default; fewer where batches fit so
ENOUGH = 5  # points at a rung before one is pruned there
MOST_REFUSED = 10  # for each point of the search, where some fit into memory
FEW = 50  # complete points, below which nothing is said of a key's importance
SAMPLERS = ("tpe", "random")
REFUSED, AGAIN = "refused", "again"  # attributes: GiB above the memory budget; number of a point that had failed
DETERMINED = {"diverged": "diverged", "out_of_memory": "memory"}  # statuses that a second run would have too


def study_of(sweeper: Any, params: Mapping[str, Any], arguments: Sequence[str]) -> "Search":
    """What ``hydra/sweeper=optuna`` asks for. Raises ConfigError, and Hydra's errors for a key that does not exist,
    before anything is written."""
    if find_spec("optuna") is None:
        raise ConfigError("hydra/sweeper=optuna needs optuna, which is not installed: pip install 'loralab[optuna]'")
    given: list[str] = [*map(axis_word, params, params.values()), *arguments]
    search = Search(Space(given), sweeper.config, sweeper.n_trials, sweeper.batch, sweeper.sampler)
    session = getattr(sweeper.task_function, "__self__", None)
    if isinstance(session, Session):
        trying = Trying(sweeper, session)
        trying.check(search.space.probes())
        search.status = session.status
        search.fresh, search.failed, search.previews = session.fresh, session.failed, session.previews
        search.excess = trying.excess
        search.check_begun()
    return search


class Search:
    """A ``rounds.Study``. A point is its trials over all seeds; its value is the mean of their metrics. What diverges,
    runs out of memory or is predicted to do so is told as infeasible; a point with a trial that failed otherwise has no
    value."""

    def __init__(self, space: Space, master: DictConfig, n_trials: int, batch: int, sampler: str = "tpe") -> None:
        """Raises ConfigError for a number of points below 1, an unknown sampler and for a rule of ``sweep.halving``
        that is none."""
        if n_trials < 1 or batch < 1:
            raise ConfigError(f"hydra.sweeper.n_trials={n_trials}, batch={batch}; valid: numbers of at least 1")
        if sampler not in SAMPLERS:
            raise ConfigError(f"hydra.sweeper.sampler={sampler!r} is unknown; {nearest(str(sampler), SAMPLERS)}")
        sweep = plain_sweep(master)
        tuning = {**sweep, "tune": {}} if sweep.get("halving") else sweep  # what is searched is tuned
        self.rule: Halving | None = halving.rule_of(tuning, master)
        self.space, self.master, self.n_trials, self.batch, self.sampler = space, master, n_trials, batch, sampler
        self.folder, self.seed = Path(str(master.hydra.sweep.dir)), int(master.seed)
        self.mode = str(master.metric_mode)
        self.fresh = self.failed = self.previews = False
        self.status: Callable[[Sequence[str]], str] = lambda words: ""  # of a trial that has been run
        self.excess: Callable[[Sequence[str]], float | None] = lambda words: None  # GiB above the memory budget
        self.passed: dict[int, int] = {}  # rungs that a point has passed
        self.waiting: list[tuple[int, list[str]]] = []  # (number of the point, overrides of a trial)
        self.ended: dict[tuple[str, ...], str] = {}
        self.tried_again = False

    @cached_property
    def study(self) -> "optuna.Study":
        """The search in the folder, which an earlier call may have begun; of a preview a copy that is not written."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = optuna.study.StudyDirection
        direction = directions.MINIMIZE if self.mode == "min" else directions.MAXIMIZE
        begun = (copied if self.previews else opened)(self.folder, direction, self.fresh)
        begun.pruner = optuna.pruners.MedianPruner(n_startup_trials=ENOUGH)
        begun.sampler = optuna.samplers.RandomSampler()  # of new points another, see _point
        return begun

    def check_begun(self) -> None:
        """Raises ConfigError where the folder holds a search that asked something else; nothing is written then."""
        if not self.fresh and (self.folder / JOURNAL).is_file():
            asked.check(copied(self.folder).user_attrs.get(asked.KEY), self._asked(), self.folder)

    def _asked(self) -> dict[str, Any]:
        rungs = None if self.rule is None else list(self.rule.rungs)
        return asked.of(self.master, self.space, {"sampler": self.sampler, "rungs": rungs})

    def ask(self) -> Trials:
        """The overrides of the trials to run next; empty: no more."""
        if asked.KEY not in self.study.user_attrs:
            self.study.set_user_attr(asked.KEY, self._asked())
        if not self.waiting:
            numbers = self._failed() if self.failed else self._next()
            self.waiting = [(number, words) for number in numbers for words in self._trials(number)]
        return [[*words, *self._pause(number)] for number, words in self.waiting]

    def tell(self, trials: Trials, values: Sequence[float | None]) -> list[dict[str, Any]]:
        """What follows from the metrics of the trials that were asked for (None: failed, nan: not known), for
        sweep.json."""
        told, self.waiting, self.ended = self.waiting, [], {}
        by_point: dict[int, list[float | None]] = {}
        for (number, _), value in zip(told, values, strict=True):
            by_point.setdefault(number, []).append(value)
        for number, scores in by_point.items():
            self._tell(number, scores)
        return self._best()

    def _tell(self, number: int, scores: Sequence[float | None]) -> None:
        import optuna

        known = [score for score in scores if score is not None and math.isfinite(score)]
        level = self.passed.get(number, 0)
        ends = self.rule is None or level >= len(self.rule.rungs)
        if self.failed:
            self._add(number, known, len(scores))
        elif None in scores:
            self._tell_failed(number)
        elif len(known) < len(scores) and ends:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
        elif ends:
            self.study.tell(number, statistics.fmean(known))
        elif len(known) == len(scores) and self._is_worse(number, level, statistics.fmean(known)):
            assert self.rule is not None
            why = f"at {self.rule.rungs[level]:g} of its steps {statistics.fmean(known):.4g}, worse than the median"
            self.ended |= {tuple(words): why for words in self._trials(number)}
            self.study.tell(number, state=optuna.trial.TrialState.PRUNED)
        else:  # also where a trial that went on before has no score at this rung
            self.passed[number] = level + 1
            self.waiting += [(number, words) for words in self._trials(number)]

    def _is_worse(self, number: int, level: int, mean: float) -> bool:
        """Whether a point is pruned by its ``mean`` at a rung."""
        trial = self._trial(number)
        if level not in self.study.get_trials(deepcopy=False)[number].intermediate_values:
            trial.report(mean, step=level)
        return trial.should_prune()

    def _tell_failed(self, number: int) -> None:
        """A point that would fail again, since it diverges or needs too much memory, is infeasible; of another failure,
        as of a full disk, nothing follows."""
        import optuna

        found = {DETERMINED[status] for words in self._trials(number) if (status := self.status(words)) in DETERMINED}
        self.ended |= {tuple(words): "another seed of its point failed" for words in self._trials(number)}
        if found:
            self._infeasible(number, min(found), 1.0)
        else:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def _infeasible(self, number: int, why: str, amount: float) -> None:
        """Tells a point as one that violates the constraint ``why``, by ``amount``."""
        import optuna

        trial = self._trial(number)
        if why not in trial.constraints:
            trial.set_constraint(why, amount)
        self.study.tell(number, state=optuna.trial.TrialState.PRUNED)

    def _next(self) -> list[int]:
        """The numbers of the points to run: those that were asked for and not told, else new ones that are predicted to
        fit into memory. Raises ConfigError where no point does."""
        import optuna

        running = [one.number for one in self._points() if one.state == optuna.trial.TrialState.RUNNING]
        numbers = [number for number in running if self._fits(self._completed(number))]
        if numbers:
            return numbers
        counts = self._counts()
        while len(numbers) < self.batch and counts["points"] < self.n_trials and not self._gives_up(counts):
            number = self._point()
            if self._fits(number):
                numbers.append(number)
            counts = self._counts()
        if not numbers and self._gives_up(counts):
            least = min(one.user_attrs[REFUSED] for one in self._points() if REFUSED in one.user_attrs)
            text = f"{counts['refused']} points were predicted to need more memory than there is, by {least:.3g} GiB or"
            text += " more, and are not trained; hydra.launcher.memory_budget and plan.budget_gib say how much there is"
            if not counts["points"]:
                raise ConfigError(f"no point of the search fits: {text}; valid: a larger budget, or a space of less")
            log.warning("the search ends: %s", text)
        return numbers

    def _gives_up(self, counts: Mapping[str, int]) -> bool:
        """Whether so many points were refused that there may be no other."""
        return counts["refused"] >= self.n_trials * (MOST_REFUSED if counts["points"] else 1)

    def _failed(self) -> list[int]:
        """The numbers of the points that failed and were not run again, once."""
        import optuna

        if self.tried_again:
            return []
        self.tried_again = True
        again = {one.user_attrs.get(AGAIN) for one in self._points()}
        states = optuna.trial.TrialState
        return [one.number for one in self._points() if one.state == states.FAIL and one.number not in again]

    def _add(self, number: int, known: Sequence[float], count: int) -> None:
        """Adds a point that had failed and has a score of each of its ``count`` trials now."""
        import optuna

        if len(known) == count:
            before = self.study.get_trials(deepcopy=False)[number]
            again = optuna.trial.create_trial(
                params=before.params,
                distributions=before.distributions,
                value=statistics.fmean(known),
                user_attrs={AGAIN: number},
            )
            self.study.add_trial(again)

    def _fits(self, number: int) -> bool:
        """Whether a point is to be trained; one that is predicted to need too much memory is told so instead."""
        words = self._trials(number)[0]
        excess = None if self.previews else self.excess(words)
        if excess is None or excess <= 0:
            return True
        self._trial(number).set_user_attr(REFUSED, excess)
        self._infeasible(number, "memory", excess)
        log.info("not trained, predicted to need %.3g GiB more than there is: %s", excess, " ".join(words))
        return False

    def _point(self) -> int:
        """The number of a new point. The sampler is seeded by how many there are, so that a search that was killed asks
        for the same points as one that was not."""
        idle, self.study.sampler = self.study.sampler, self._sampler(len(self._points()))
        number = int(self.study.ask(self.space.distributions).number)
        self.study.sampler = idle
        return number

    def _completed(self, number: int) -> int:
        """``number``; of a point whose asking was cut short the rest is asked."""
        if self.space.distributions.keys() - self.study.get_trials(deepcopy=False)[number].params.keys():
            idle, self.study.sampler = self.study.sampler, self._sampler(number)
            self.space.suggest(self._trial(number))
            self.study.sampler = idle
        return number

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        import optuna

        text = f"{self.seed} {number}"  # neighbouring seeds draw alike
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        startup = STARTUP - STARTUP % self.batch or STARTUP  # no batch of random points beside told ones
        return optuna.samplers.TPESampler(n_startup_trials=startup, multivariate=True, constant_liar=True, seed=seed)

    def _points(self) -> "list[optuna.trial.FrozenTrial]":
        return self.study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> "optuna.Trial":
        import optuna

        return optuna.Trial(self.study, self._points()[number]._trial_id)

    def _trials(self, number: int) -> Trials:
        """The overrides of the trials of a point, one for each seed."""
        params = self._points()[number].params
        return self.space.trials({key: params[key] for key in self.space.distributions if key in params})

    def _pause(self, number: int) -> list[str]:
        level = self.passed.get(number, 0)
        goes_on = self.failed or self.rule is None or level >= len(self.rule.rungs)
        return [] if goes_on or self.rule is None else [f"{halving.UNTIL}={self.rule.rungs[level]:g}"]

    def _counts(self) -> dict[str, int]:
        """How many points there are, by what became of them; ``refused`` ones are no part of ``points``."""
        found = [one for one in self._points() if AGAIN not in one.user_attrs]
        tried = [one for one in found if REFUSED not in one.user_attrs]
        states = [one.state.name.lower() for one in tried]
        infeasible = sum(any(value > 0 for value in one.constraints.values()) for one in tried)
        counts = {"complete": states.count("complete"), "pruned": states.count("pruned") - infeasible}
        counts |= {"infeasible": infeasible, "failed": states.count("fail"), "refused": len(found) - len(tried)}
        return {"points": len(tried), **counts}

    def _best(self) -> list[dict[str, Any]]:
        """For sweep.json: how many points were asked for, and the best of those that are complete."""
        import optuna

        counts = self._counts()
        complete = [one for one in self._points() if one.state == optuna.trial.TrialState.COMPLETE]
        best = min(complete, key=lambda one: (one.value or 0.0) * (1 if self.mode == "min" else -1), default=None)
        found = {} if best is None else {"chosen": " ".join(self.space.words(best.params)), "value": best.value}
        return [{"arm": [], "points": counts["points"], "complete": len(complete), **found}]

    @property
    def about(self) -> dict[str, Any]:
        """``search``, what sweep.json says of it beside its trials."""
        refused = [
            {"point": self.space.words(one.params), "excess_gib": one.user_attrs[REFUSED]}
            for one in self._points()
            if REFUSED in one.user_attrs
        ]
        given = {"sampler": self.sampler, "n_trials": self.n_trials, "batch": self.batch, "space": self.space.plain()}
        return {"search": {**given, **self._counts(), "refused": refused, "importance": self._importance()}}

    def _importance(self) -> dict[str, float]:
        """{key: share} by PED-ANOVA (Watanabe, Bansal and Hutter 2023, arXiv 2304.10255): how much the best points
        differ from all in it; empty for few points."""
        import optuna

        if self._counts()["complete"] < FEW:
            return {}
        found = optuna.importance.get_param_importances(self.study)
        return {key.lstrip("+"): float(share) for key, share in found.items()}

    @property
    def spoken(self) -> str:
        """A sentence for a preview."""
        space = "; ".join(f"{key}: {spoken(part)}" for key, part in self.space.plain().items())
        rungs = f", pruned below the median at {', '.join(map('{:g}'.format, self.rule.rungs))}" if self.rule else ""
        told = f"; {count} are told" if (count := self._counts()["points"] - len({n for n, _ in self.waiting})) else ""
        return (
            f"A search of {self.n_trials} points by {self.sampler}, {self.batch} at a time{rungs}{told}, over {space}."
            " The next points:"
        )
