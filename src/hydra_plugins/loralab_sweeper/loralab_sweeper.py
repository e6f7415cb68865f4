"""The sweeper as a Hydra plugin. Hydra imports it at every start, so nothing heavy is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class LoralabSweeperConf:
    """``hydra/sweeper=loralab``."""

    _target_: str = "hydra_plugins.loralab_sweeper.loralab_sweeper.LoralabSweeper"
    params: dict[str, Any] | None = None  # axes of a sweep file: {key: values in Hydra's grammar, or a list of them}


ConfigStore.instance().store(group="hydra/sweeper", name="loralab", node=LoralabSweeperConf, provider="loralab")


class LoralabSweeper(Sweeper):  # type: ignore[misc]
    """The product of the axes; ``sweep.zip`` moves some together, ``sweep.when`` keeps one to some of the trials."""

    def __init__(self, params: Mapping[str, Any] | None = None) -> None:
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """The JobReturns of each round of trials."""
        from loralab.scheduling import rounds

        return rounds.run(self, rounds.study_of(self, self.params or {}, arguments))
