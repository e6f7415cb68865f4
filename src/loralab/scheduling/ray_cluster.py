"""Packs as tasks of Ray, on a cluster that runs or on a local one for this sweep. A GPU may be shared: num_gpus=0.5.

A task is not retried by Ray but by loralab, so that it goes on from its checkpoints and a trial whose process dies
twice ends as a failed one.
"""

import importlib.util
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError, OutOfMemory
from loralab.records.log_file import LogFile
from loralab.scheduling import tasks
from loralab.scheduling.executor_settings import Ray
from loralab.scheduling.executors import End, Pack, Task
from loralab.scheduling.job import Job

log = logging.getLogger(__name__)

FOLDER = "ray"  # in the sweep folder: what tasks said
STORE = 100_000_000  # bytes of a local cluster's object store; tasks pass settings only
REACHED_WITHIN = 5.0  # seconds; Ray itself tries for minutes
STOPPING = 60.0  # seconds for cancelled tasks to write where they stand


def check(settings: Ray) -> None:
    """Raises ConfigError where Ray is not installed or its cluster does not answer. Nothing is started."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("hydra.launcher.executor=ray needs Ray; valid: pip install 'loralab[ray]'")
    if settings.address in (None, "auto"):
        return
    host, _, port = str(settings.address).rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(
            f"hydra.launcher.address={settings.address} is no address of a Ray cluster; valid: HOST:PORT of its head,"
            " auto (the one of this machine), or null, which starts one for this sweep"
        )
    try:
        socket.create_connection((host, int(port)), REACHED_WITHIN).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(settings, error) from error


class RayExecutor:
    """Tasks for the packs of the sweep in ``folder``."""

    poll = 0.5

    def __init__(self, settings: Ray, folder: Path) -> None:
        """Connects to the cluster, or starts one. Raises ConfigError where that cannot be, or can never run a task."""
        self.settings, self.folder, self.count = settings, folder, 0
        self.ray = _connected(settings)
        try:
            self._check_resources()
        except ConfigError:
            self.close()
            raise

    def share(self, packs: list[Pack], weights: Sequence[int]) -> list[Task]:
        return [Task([pack]) for pack in packs]

    def retry(self, task: Task, packs: list[Pack]) -> list[Task]:
        return [Task([pack]) for pack in packs]

    def adopt(self, waiting: Sequence[Job]) -> list[Task]:
        """None: tasks of Ray end with the process that has started them."""
        return []

    def start(self, tasks: Sequence[Task]) -> None:
        (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
        # a process for each task: one that is used again would hold the base of the task before
        options = {"num_cpus": self.settings.num_cpus, "num_gpus": self.settings.num_gpus, "max_calls": 1}
        remote = self.ray.remote(max_retries=0, **options)(_perform)
        for task in tasks:
            self.count += 1
            task.name = f"Ray's task {self.count}"
            task.log = str((self.folder / FOLDER / f"{self.count}.log").absolute())
            task.handle = remote.options(name=f"loralab {self.folder.name} {self.count}").remote(
                _content(task), task.log
            )

    def over(self, tasks: Sequence[Task]) -> list[tuple[Task, End]]:
        by_reference = {task.handle: task for task in tasks}
        done, _ = self.ray.wait(list(by_reference), num_returns=len(by_reference), timeout=0)
        return [(by_reference[reference], self._end(reference)) for reference in done]

    def _end(self, reference: Any) -> End:
        errors = self.ray.exceptions
        try:
            code = self.ray.get(reference)
        except errors.TaskCancelledError:
            return End("it was cancelled", "cancelled")
        except errors.OutOfMemoryError as error:
            return End(f"Ray ended it for want of memory: {_line(error)}", error=OutOfMemory)
        except Exception as error:  # Ray raises what the task has raised too
            return End(f"{type(error).__name__}: {_line(error)}")
        return End(f"a signal stopped it, code {code}", "cancelled") if code else End("it ended with code 0")

    def stop(self, tasks: Sequence[Task], number: int) -> None:
        """Interrupts the tasks: they write checkpoints, and end."""
        references = [task.handle for task in tasks if task.handle is not None]
        for reference in references:
            self.ray.cancel(reference)
        if references:
            self.ray.wait(references, num_returns=len(references), timeout=STOPPING)

    def close(self) -> None:
        """Ends a local cluster; of another one the connection."""
        self.ray.shutdown()

    def _check_resources(self) -> None:
        """Raises ConfigError where no node of a local cluster will ever have what a task asks for; of another cluster,
        which may grow, it is said."""
        asked = {"CPU": self.settings.num_cpus, "GPU": self.settings.num_gpus}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= count for name, count in asked.items()) for node in nodes):
            return
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in asked}
        text = (
            f"hydra.launcher.num_cpus={self.settings.num_cpus:g} and num_gpus={self.settings.num_gpus:g}: no node of"
            f" Ray's cluster has that; the largest has {most['CPU']:g} CPUs and {most['GPU']:g} GPUs"
        )
        if self.settings.address is None:
            raise ConfigError(f"{text}; valid: at most that")
        log.warning("%s; the tasks wait until one has", text)


def _content(task: Task) -> dict[str, Any]:
    return tasks.content(task.packs, task.before)


def _connected(settings: Ray) -> Any:
    """The module, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    given: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if settings.address is None:
        given |= {"include_dashboard": False, "object_store_memory": STORE}
    else:
        given |= {"address": settings.address}
    try:
        ray.init(**given)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, by what is wrong
        raise _unreachable(settings, error) from error
    return ray


def _unreachable(settings: Ray, error: Exception) -> ConfigError:
    if settings.address is None:
        return ConfigError(f"a local cluster of Ray could not be started: {_line(error)}")
    if "AuthToken" in str(error.__cause__):
        return ConfigError(
            f"hydra.launcher.address={settings.address}: the cluster of Ray there asks for its token; valid:"
            " RAY_AUTH_MODE=token in the environment, and the token of its head in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    return ConfigError(
        f"hydra.launcher.address={settings.address}: no cluster of Ray answers there ({_line(error)}); valid: the one"
        " that 'ray start --head' has said, auto, or null, which starts a cluster for this sweep"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _perform(content: Mapping[str, Any], log_file: str) -> int:
    """A task, in Ray's process. Returns its exit code."""
    from loralab.signals import listen

    listen()  # Ray cancels a task by SIGINT's handler
    return tasks.perform(content, [LogFile(log_file)])
