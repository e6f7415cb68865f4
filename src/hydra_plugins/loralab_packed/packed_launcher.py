"""The launcher as a Hydra plugin. Hydra imports it at every start, so nothing heavy is imported here."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class PackedLauncherConf:
    """``hydra/launcher=packed``."""

    _target_: str = "hydra_plugins.loralab_packed.packed_launcher.PackedLauncher"
    pack: str = "auto"  # off: one trial after the other
    token_budget: int | None = None  # tokens of one pass; null: 2048 on a CPU, 16384 on a GPU
    memory_budget: float | None = None  # GiB of one pass; null: 80% of the free memory of a CPU, 90% of a GPU's


ConfigStore.instance().store(group="hydra/launcher", name="packed", node=PackedLauncherConf, provider="loralab")


class PackedLauncher(Launcher):  # type: ignore[misc]
    """Runs a sweep's trials in one process over a base that stays loaded, several to a pass where that pays."""

    packs = True  # it reads and writes a sweep's records itself

    def __init__(self, pack: str = "auto", token_budget: int | None = None, memory_budget: float | None = None) -> None:
        self.settings = (pack, token_budget, memory_budget)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from loralab.scheduling.composing import Composed

        hydra_context.config_loader = Composed(hydra_context.config_loader)
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from loralab.scheduling import launch

        options = launch.checked_options(*self.settings)
        context, task, config = self.hydra_context, self.task_function, self.config
        return launch.launch(context, task, config, job_overrides, initial_job_idx, options)
