"""The sweeper's loop: it asks for trials, has them run and tells what they scored, until no more are asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf

from loralab.config import sweep_files
from loralab.config.compose import plain_sweep
from loralab.scheduling import axes, dimension, elsewhere
from loralab.scheduling.session import Session

Trials = list[list[str]]


class Study(Protocol):
    """What trials to run, round by round."""

    def ask(self) -> Trials:
        """The overrides of the trials to run next; empty: no more."""

    def tell(self, trials: Trials, values: Sequence[float | None]) -> None:
        """The metric of each trial that was asked for; None: it was not completed."""


class Grid:
    """All trials in one round."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials

    def ask(self) -> Trials:
        return self.trials

    def tell(self, trials: Trials, values: Sequence[float | None]) -> None:
        self.trials = []


def study_of(sweeper: Any, params: Mapping[str, Any], arguments: Sequence[str]) -> Study:
    """What the sweep asks: the trials of its axes, and those of its search where it has one (``sweep.d90``).

    ``params``: axes of the configuration, which ``arguments`` replace. Raises ConfigError.
    """
    master: DictConfig = sweeper.config
    trials = of_axes(
        master, [*map(axis_word, params, params.values()), *arguments], sweeper.hydra_context.config_loader
    )
    search = dimension.search_of(master)
    return Grid(trials) if search is None else dimension.Searching(search, trials, master)


def of_axes(master: DictConfig, words: Sequence[str], loader: Any = None) -> Trials:
    """The trials of ``words`` with the ``sweep.zip`` and ``sweep.when`` of the configuration."""
    sweep, chosen = plain_sweep(master), sweep_files.chosen_by(words)
    path = sweep_files.locate(chosen) if chosen and sweep.get("when") else None
    written = [f"{key}={values}" for key, values in ((path and sweep_files.axes(path)) or {}).items()]
    return axes.trials(words, sweep.get("zip"), sweep.get("when"), loader, written)


def axis_word(key: str, values: Any) -> str:
    """An axis of ``hydra.sweeper.params`` as an override."""
    given = OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values
    return f"{key}={sweep_files.axis_values(given)}"


def run(sweeper: Any, study: Study) -> list[Sequence[JobReturn]]:
    """Runs what ``study`` asks for by the launcher of ``sweeper``; the JobReturns of each round."""
    folder = Path(str(sweeper.config.hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(sweeper.config, folder / "multirun.yaml")
    returns: list[Sequence[JobReturn]] = []
    while trials := study.ask():
        first = sum(map(len, returns))
        returns.append(_launched(sweeper, trials, first))
        study.tell(trials, [done.return_value for done in returns[-1]])  # raises what a job raised
    return returns


def _launched(sweeper: Any, trials: Trials, first: int) -> Sequence[JobReturn]:
    session = getattr(sweeper.task_function, "__self__", None)
    if isinstance(session, Session) and not getattr(sweeper.launcher, "packs", False):
        return elsewhere.launch(sweeper, session, trials, first)
    sweeper.validate_batch_is_legal(trials)
    found: Sequence[JobReturn] = sweeper.launcher.launch(trials, initial_job_idx=first)
    return found
