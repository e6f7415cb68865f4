"""The search as a Hydra plugin. Hydra imports it at every start, so nothing heavy is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class OptunaSweeperConf:
    """``hydra/sweeper=optuna``."""

    _target_: str = "hydra_plugins.loralab_optuna.optuna_sweeper.OptunaSweeper"
    params: dict[str, Any] | None = None  # the space: {key: interval, range or choice of Hydra's grammar}
    n_trials: int = 30  # points of the space, each over every seed
    batch: int = 8  # points asked for at a time, which share passes
    sampler: str = "tpe"  # or random


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="loralab")


class OptunaSweeper(Sweeper):  # type: ignore[misc]
    """Tree-structured Parzen estimation (multivariate, constant liar) or random points over a space; ``sweep.halving``
    prunes at its rungs. What was asked and told is in the sweep folder, from which a later call goes on."""

    def __init__(
        self, params: Mapping[str, Any] | None = None, n_trials: int = 30, batch: int = 8, sampler: str = "tpe"
    ) -> None:
        self.params, self.n_trials, self.batch, self.sampler = params, n_trials, batch, sampler

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """The JobReturns of each round of trials."""
        from loralab.scheduling import rounds, search

        return rounds.run(self, search.study_of(self, self.params or {}, arguments))
