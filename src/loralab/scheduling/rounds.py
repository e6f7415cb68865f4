"""The sweeper's loop: it asks for trials, has them run and tells what they scored, until no more are asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf

from loralab.config import sweep_files
from loralab.config.compose import plain_sweep
from loralab.errors import ConfigError
from loralab.records.secrets import masked, redact
from loralab.scheduling import axes, claims, dimension, elsewhere, halving, previewing, tuning
from loralab.scheduling.session import Session
from loralab.scheduling.sweep_file import decide

Trials = list[list[str]]


class Study(Protocol):
    """What trials to run, round by round."""

    def ask(self) -> Trials:
        """The overrides of the trials to run next; empty: no more."""

    def tell(self, trials: Trials, values: Sequence[float | None]) -> Sequence[Mapping[str, Any]]:
        """What follows from the metrics of the trials that were asked for (None: not completed), for sweep.json."""


class Grid:
    """All trials in one round."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials

    def ask(self) -> Trials:
        return self.trials

    def tell(self, trials: Trials, values: Sequence[float | None]) -> Sequence[Mapping[str, Any]]:
        self.trials = []
        return ()


def study_of(sweeper: Any, params: Mapping[str, Any], arguments: Sequence[str]) -> Study:
    """What the sweep asks: the trials of its axes, each at every value of what is tuned (``sweep.tune``), and those of
    its search where it has one (``sweep.d90``).

    ``params``: axes of the configuration, which ``arguments`` replace. Raises ConfigError.
    """
    master: DictConfig = sweeper.config
    words, loader = [*map(axis_word, params, params.values()), *arguments], sweeper.hydra_context.config_loader
    trials = of_axes(master, words, loader)
    claims.check(master, words, loader)
    sweep, search = plain_sweep(master), dimension.search_of(master)
    tuning.check_compared(sweep, trials)
    rule = halving.rule_of(sweep, master)
    if sweep.get("tune") is not None:
        if search is not None:
            raise ConfigError("sweep.tune and sweep.d90 both say which trials come next; valid: one of them")
        given = (sweep, trials, str(master.metric), str(master.metric_mode), tested(master, arguments))
        if rule is None:
            return tuning.Tuning(*given)
        session = getattr(sweeper.task_function, "__self__", None)
        is_complete = session.is_complete if isinstance(session, Session) else lambda words: False
        return halving.Halved(rule, is_complete, *given)
    return Grid(trials) if search is None else dimension.Searching(search, trials, master)


def tested(master: DictConfig, words: Sequence[str]) -> list[str]:
    """The override that has every trial scored on the test split, where ``master`` has them not. Raises ConfigError
    where ``words`` forbid it."""
    if any(word.lstrip("+").partition("=")[::2] == ("trainer.test", "false") for word in words):
        raise ConfigError(
            "trainer.test=false: sweep.tune chooses each arm's best value by the validation split, whose least mean is"
            " no score of the arm; valid: trainer.test=true, which sweep.tune sets"
        )
    if OmegaConf.select(master, "trainer.test") is True:
        return []
    return [tuning.TESTED if "test" in master.trainer else f"+{tuning.TESTED}"]  # a trainer of the user's own


def of_axes(master: DictConfig, words: Sequence[str], loader: Any = None) -> Trials:
    """The trials of ``words`` with the ``sweep.zip`` and ``sweep.when`` of the configuration."""
    sweep, chosen = plain_sweep(master), sweep_files.chosen_by(words)
    path = sweep_files.locate(chosen) if chosen and sweep.get("when") else None
    own = sweep_files.axes(path, sweep_files.scale_of(str(chosen))) if path else None
    written = [f"{key}={values}" for key, values in (own or {}).items()]
    return axes.trials(words, sweep.get("zip"), sweep.get("when"), loader, written)


def axis_word(key: str, values: Any) -> str:
    """An axis of ``hydra.sweeper.params`` as an override."""
    given = OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values
    return f"{key}={sweep_files.axis_values(given)}"


def run(sweeper: Any, study: Study) -> list[Sequence[JobReturn]]:
    """Runs what ``study`` asks for by the launcher of ``sweeper``; the JobReturns of each round."""
    session = getattr(sweeper.task_function, "__self__", None)
    if isinstance(session, Session) and session.previews:
        tune = plain_sweep(sweeper.config).get("tune") or ()
        names = [str(name).lstrip("+") for name in tune]
        trials = study.ask()
        session.previewed = previewing.preview(sweeper, trials, names, getattr(study, "spoken", ""))
        return []
    folder = Path(str(sweeper.config.hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    asked = redact(OmegaConf.to_container(sweeper.config, resolve=False))
    (folder / "multirun.yaml").write_text(masked(OmegaConf.to_yaml(OmegaConf.create(asked))), "utf-8")
    returns: list[Sequence[JobReturn]] = []
    decisions: list[Mapping[str, Any]] = []
    while trials := study.ask():
        if isinstance(session, Session):
            session.about = getattr(study, "about", {})
        first = sum(map(len, returns))
        returns.append(_launched(sweeper, trials, first))
        decisions += study.tell(trials, [done.return_value for done in returns[-1]])  # raises what a job raised
        decide(folder, decisions, getattr(study, "about", {}))  # before anything is done about them
        if isinstance(session, Session):
            session.end_early(getattr(study, "ended", {}))
    return returns


def _launched(sweeper: Any, trials: Trials, first: int) -> Sequence[JobReturn]:
    session = getattr(sweeper.task_function, "__self__", None)
    if isinstance(session, Session) and not getattr(sweeper.launcher, "packs", False):
        return elsewhere.launch(sweeper, session, trials, first)
    # each is composed before any runs; here the first, before anything is written
    sweeper.validate_batch_is_legal(trials[:1] if isinstance(session, Session) else trials)
    found: Sequence[JobReturn] = sweeper.launcher.launch(trials, initial_job_idx=first)
    return found
