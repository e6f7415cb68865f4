"""The executor of a sweep: none for this process, else processes of its GPUs, Slurm or Ray."""

from collections.abc import Sequence
from pathlib import Path

from loralab.scheduling import slurm, workers
from loralab.scheduling.executor_settings import Local, Settings, Slurm
from loralab.scheduling.executors import Executor


def check(settings: Settings) -> None:
    """Raises ConfigError where this machine cannot use the executor of ``settings``. Nothing is submitted."""
    if isinstance(settings, Slurm):
        slurm.check(settings)
    elif not isinstance(settings, Local):
        from loralab.scheduling import ray_cluster

        ray_cluster.check(settings)


def executor(settings: Settings, folder: Path, device: str, packs: int) -> Executor | None:
    """What runs the packs of the sweep in ``folder``; None: this process. ``packs``: how many there are.

    Raises ArtifactError where Slurm still has trials of this sweep and another executor is to run them, ConfigError
    where LORALAB_DEVICES names a card that is not there."""
    if isinstance(settings, Slurm):
        return slurm.SlurmExecutor(settings, folder)
    slurm.check_not_queued(folder, "local" if isinstance(settings, Local) else "ray")
    if isinstance(settings, Local):
        names: Sequence[str] = workers.devices(device)
        return workers.LocalExecutor(names) if names and packs > 1 else None
    from loralab.scheduling import ray_cluster

    return ray_cluster.RayExecutor(settings, folder)
