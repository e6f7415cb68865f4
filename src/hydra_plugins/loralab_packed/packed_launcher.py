"""The launcher as a Hydra plugin. Hydra imports it at every start, so nothing heavy is imported here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class PackedLauncherConf:
    """``hydra/launcher=packed``. Keys of executors: null is the default in scheduling/executor_settings.py."""

    _target_: str = "hydra_plugins.loralab_packed.packed_launcher.PackedLauncher"
    pack: str = "auto"  # off: one trial after the other
    token_budget: int | None = None  # tokens of one pass; null: 2048 on a CPU, 16384 on a GPU
    memory_budget: float | None = None  # GiB of one pass; null: 80% of the free memory of a CPU, 90% of a GPU's
    executor: str = "local"  # a process a GPU of this machine; slurm: a pack an array task; ray: a pack a task
    # slurm: what is null is the cluster's default
    partition: Any = None
    account: Any = None
    qos: Any = None
    timeout_min: Any = None  # null: 240; a task is requeued at its limit and goes on from its checkpoints
    max_num_timeout: Any = None  # how often; null: 5
    signal_delay_s: Any = None  # before its limit a task writes checkpoints; null: 90 s, of short tasks a quarter
    gpus_per_node: Any = None  # null: 0
    cpus_per_task: Any = None
    mem_gb: Any = None
    array_parallelism: Any = None  # tasks that run at a time; null: 32
    setup: Any = None  # lines of the batch script: ["module load cuda"]
    additional_parameters: Any = None  # others of sbatch: {constraint: a100}
    # ray
    address: Any = None  # host:port of a cluster, or auto; null: a local one for this sweep
    num_cpus: Any = None  # of a task; null: 1
    num_gpus: Any = None  # 0.5: two tasks share a GPU; null: 0


ConfigStore.instance().store(group="hydra/launcher", name="packed", node=PackedLauncherConf, provider="loralab")


class PackedLauncher(Launcher):  # type: ignore[misc]
    """Runs a sweep's trials over a base that stays loaded, several to a pass where that pays: in this process, or by an
    executor in others."""

    packs = True  # it reads and writes a sweep's records itself

    def __init__(
        self,
        pack: str = "auto",
        token_budget: int | None = None,
        memory_budget: float | None = None,
        executor: str = "local",
        **keys: Any,
    ) -> None:
        self.settings, self.keys = (pack, token_budget, memory_budget, executor), keys

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from loralab.scheduling.composing import Composed

        hydra_context.config_loader = Composed(hydra_context.config_loader)
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from loralab.scheduling import launch

        options = launch.checked_options(*self.settings, self.keys)
        context, task, config = self.hydra_context, self.task_function, self.config
        return launch.launch(context, task, config, job_overrides, initial_job_idx, options)
