"""What ``hydra.launcher.executor`` and its keys may be, checked before a trial is composed or a job submitted."""

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, ClassVar

from loralab.errors import ConfigError, nearest
from loralab.spec import Count, Gib, Natural, NotNegative, Positive, Text, make, spec

SECTION = "hydra.launcher"
OWNED = {  # of sbatch, each set by a key of its own or by loralab
    "partition": "hydra.launcher.partition",
    "account": "hydra.launcher.account",
    "qos": "hydra.launcher.qos",
    "time": "hydra.launcher.timeout_min",
    "signal": "hydra.launcher.signal_delay_s",
    "array": "hydra.launcher.array_parallelism",
    "cpus-per-task": "hydra.launcher.cpus_per_task",
    "gpus-per-node": "hydra.launcher.gpus_per_node",
    "mem": "hydra.launcher.mem_gb",
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "requeue", "no-requeue", "chdir"), "loralab itself"),
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), "loralab itself: a pack trains in one process"),
}


@spec(SECTION)
class Local:
    """Processes of this machine, one a GPU where it has several; else this process."""

    device: ClassVar[str | None] = None  # the machine says
    memory_gib: ClassVar[float | None] = None


@spec(SECTION)
class Slurm:
    """Array tasks of Slurm, one a pack. What is null is the cluster's own default."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    timeout_min: Count = 240  # of a task; it is requeued at the limit and goes on from its checkpoints
    max_num_timeout: Natural = 5  # times that a task is requeued at its time limit
    signal_delay_s: Count | None = None  # before the limit a task writes its checkpoints; null: 90, for short ones less
    gpus_per_node: Natural = 0
    cpus_per_task: Count | None = None
    mem_gb: Gib | None = None
    array_parallelism: Count = 32  # tasks that run at a time
    setup: list[Text] = field(default_factory=list)  # lines of the batch script before the task: module load, ...
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # of sbatch: {constraint: a100, mail-type: END}

    def __post_init__(self) -> None:
        if self.signal_delay_s is not None and self.signal_delay_s > 30 * self.timeout_min:
            raise ConfigError(
                f"{SECTION}.signal_delay_s={self.signal_delay_s} is more than half of the {60 * self.timeout_min} s of"
                f" {SECTION}.timeout_min={self.timeout_min}: a task would be stopped as soon as it has begun; valid: at"
                f" most {30 * self.timeout_min}, or null"
            )
        for name, value in self.additional_parameters.items():
            owner = OWNED.get(name.replace("_", "-"))
            if owner is not None:
                raise ConfigError(f"{SECTION}.additional_parameters.{name}={value} is set by {owner}")

    @property
    def delay(self) -> int:
        """Seconds before the time limit at which a task is told."""
        return self.signal_delay_s or min(90, 15 * self.timeout_min)

    @property
    def device(self) -> str:
        """What a task computes on."""
        other = any(name.startswith(("gres", "gpus")) for name in self.additional_parameters)
        return "cuda" if self.gpus_per_node or other else "cpu"

    @property
    def memory_gib(self) -> float | None:
        """What of a task's memory its packs are made for; None where that is not known."""
        return 0.8 * self.mem_gb if self.mem_gb and self.device == "cpu" else None

    def sbatch(self) -> dict[str, Any]:
        """The words of sbatch that say what a task needs, without those that are not set."""
        words = {
            **{"partition": self.partition, "account": self.account, "qos": self.qos, "time": self.timeout_min},
            **{"cpus-per-task": self.cpus_per_task, "gpus-per-node": self.gpus_per_node or None},
            "mem": f"{round(1024 * self.mem_gb)}M" if self.mem_gb else None,
            **{name.replace("_", "-"): value for name, value in self.additional_parameters.items()},
        }
        return {name: value for name, value in words.items() if value is not None}


@spec(SECTION)
class Ray:
    """Tasks of Ray, one a pack."""

    address: Text | None = None  # of a cluster that runs, host:port or auto; null: a local one for this sweep
    num_cpus: Positive = 1.0  # of a task; may be a fraction
    num_gpus: NotNegative = 0.0  # 0.5: two tasks share a GPU
    memory_gib: ClassVar[float | None] = None

    @property
    def device(self) -> str:
        """What a task computes on."""
        return "cuda" if self.num_gpus else "cpu"


Settings = Local | Slurm | Ray
EXECUTORS: dict[str, type[Any]] = {"local": Local, "slurm": Slurm, "ray": Ray}


def checked(executor: str, keys: Mapping[str, Any]) -> Settings:
    """The settings of ``executor``; of ``keys`` those that are null are not set. Raises ConfigError for an unknown
    executor, a key of another one, or a wrong value. Nothing of the machine is asked."""
    if executor not in EXECUTORS:
        raise ConfigError(f"{SECTION}.executor={executor!r} is unknown; {nearest(str(executor), EXECUTORS)}")
    given = {key: value for key, value in keys.items() if value is not None}
    known = [one.name for one in fields(EXECUTORS[executor])]
    for key in given:
        owners = [name for name, cls in EXECUTORS.items() if key in [one.name for one in fields(cls)]]
        if key not in known and owners:
            valid = f"valid: {', '.join(sorted(known))}" if known else "it has none"
            raise ConfigError(
                f"{SECTION}.{key}={given[key]} is a key of executor={owners[0]}, and {SECTION}.executor={executor};"
                f" {valid}, or {SECTION}.executor={owners[0]}"
            )
    settings: Settings = make(EXECUTORS[executor], given, SECTION)
    return settings
