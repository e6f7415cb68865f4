"""One sweep: every trial composed first, sweep.json written before any runs, then trial after trial."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from loralab import record
from loralab.config import trial_id
from loralab.errors import ArtifactError, ConfigError, nearest
from loralab.jobs import Job
from loralab.locks import hold

Budgets = tuple[int | None, float | None]  # tokens of a pass, GiB; null: as the device has it


def launch(
    context: HydraContext,
    task_function: TaskFunction,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    budgets: Budgets = (None, None),
    pack: bool = False,
) -> list[JobReturn]:
    """A JobReturn for each of ``job_overrides``, in their order. Another's task runs job by job."""
    setup_globals()
    configure_log(master.hydra.hydra_logging, master.hydra.verbose)
    folder = Path(str(master.hydra.sweep.dir))
    if not job_overrides:
        raise ConfigError("the sweep has no trial: an axis has no value; valid: at least one, as in seed=0,1")
    owner: Any = getattr(task_function, "__self__", None)
    if not hasattr(owner, "prepare"):
        folder.mkdir(parents=True, exist_ok=True)
        configs = [_compose(context, master, list(overrides), first + i) for i, overrides in enumerate(job_overrides)]
        return [_run(context, task_function, config) for config in configs]
    logging.getLogger("loralab").setLevel(logging.INFO)  # Hydra's own lines stay away, the packer's do not
    with hold(folder):
        configs = [_compose(context, master, list(overrides), first + i) for i, overrides in enumerate(job_overrides)]
        ledger = Ledger(folder, master, configs)
        if pack or budgets[1] is not None:
            jobs = [_job(folder, config) for config in configs]
            try:
                owner.prepare(jobs, budgets[0] if pack else 1, budgets[1], ledger.update)
            finally:
                ledger.update()
        return [_run(context, task_function, config, ledger) for config in configs]


def _run(
    context: HydraContext, task_function: TaskFunction, config: DictConfig, ledger: "Ledger | None" = None
) -> JobReturn:
    try:
        return run_job(
            hydra_context=context,
            task_function=task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    finally:  # a sweep that is stopped leaves no trial in doubt
        if ledger is not None:
            ledger.update()
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)


def checked(pack: str, token_budget: int | None, memory_budget: float | None) -> Budgets:
    """The budgets. Raises ConfigError for an unknown policy or a budget that holds nothing."""
    if pack not in ("auto", "off"):
        raise ConfigError(f"hydra.launcher.pack={pack!r} is unknown; {nearest(str(pack), ('auto', 'off'))}")
    if token_budget is not None and token_budget < 1:
        raise ConfigError(f"hydra.launcher.token_budget must be at least 1 token, got {token_budget}")
    if memory_budget is not None and not 0 < memory_budget < math.inf:
        raise ConfigError(f"hydra.launcher.memory_budget must be a positive number of GiB or null, got {memory_budget}")
    return token_budget, memory_budget


def _compose(context: HydraContext, master: DictConfig, overrides: list[str], number: int) -> DictConfig:
    loader = context.config_loader
    config: DictConfig = getattr(loader, "take", loader.load_sweep_config)(master, overrides)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    return config


def _job(folder: Path, config: DictConfig) -> Job:
    hidden = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return Job.composed(hidden, config.hydra, folder / _subdir(config))


class Ledger:
    """sweep.json: what the sweep asks, its axes, and how each trial stands.

    Trials of earlier calls that have a record stay listed: a call with fewer seeds or other settings hides nothing.
    """

    def __init__(self, folder: Path, config: DictConfig, configs: list[DictConfig]) -> None:
        self.folder = folder
        sweep = OmegaConf.to_container(config.sweep, resolve=True) if config.get("sweep") else {}
        if not isinstance(sweep, dict):
            raise ConfigError(f"sweep={sweep!r} is no group of settings; valid: a sweep file, or null")
        trials = {one["trial"]: one for one in (_entry(folder, config) for config in configs)}
        if len({one["folder"] for one in trials.values()}) < len(trials):
            raise ConfigError("hydra.sweep.subdir gives several trials one folder; valid: ${loralab.trial_id:} in it")
        before = [trials.pop(one["trial"], {**one, "earlier": True}) for one in _earlier(folder)]
        listed = [*before, *trials.values()]
        self.content: dict[str, Any] = {
            **{str(key): value for key, value in sweep.items()},
            "name": sweep.get("name") or folder.name,
            "question": sweep.get("question"),
            "axes": axes([list(one.get("overrides") or []) for one in listed]),
            "overrides": list(config.hydra.overrides.task),
            "trials": listed,
        }
        record.write_sweep(folder, self.content)

    def update(self) -> None:
        """Read the status of every trial that was not complete from its record."""
        for entry in self.content["trials"]:
            if entry["status"] != "completed" or not entry.get("earlier"):
                entry["status"] = status_of(self.folder / entry["folder"])
        record.write_sweep(self.folder, self.content)


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """Trials that sweep.json already lists and that have a record."""
    try:
        listed: list[dict[str, Any]] = record.read_sweep(folder)["trials"]
    except ArtifactError:
        return []
    return [one for one in listed if "trial" in one and status_of(folder / str(one["folder"])) != "pending"]


def axes(trials: list[list[str]]) -> dict[str, list[str]]:
    """{swept key: its values in order} over the trials' own overrides."""
    found: dict[str, list[str]] = {}
    every = [dict(o.split("=", 1) for o in overrides if "=" in o) for overrides in trials]
    for overrides in every:
        for key, value in overrides.items():
            values = found.setdefault(key.lstrip("+"), [])
            if value not in values:
                values.append(value)
    return {key: values for key, values in found.items() if len(values) > 1 or len(every) == 1}


def status_of(folder: Path) -> str:
    """The status in the folder's record, or pending where it has none yet."""
    try:
        return str(record.read(folder)["status"])
    except Exception:
        return "pending"


def _subdir(config: DictConfig) -> str:
    """As Hydra will resolve it for this trial."""
    original = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        return str(OmegaConf.select(config, "hydra.sweep.subdir"))
    finally:
        HydraConfig.instance().cfg = original


def _entry(folder: Path, config: DictConfig) -> dict[str, Any]:
    subdir = _subdir(config)
    return {
        "trial": trial_id(config),
        "folder": subdir,
        "status": status_of(folder / subdir),
        "overrides": list(config.hydra.overrides.task),
        "choices": {k: v for k, v in config.hydra.runtime.choices.items() if not str(k).startswith("hydra/")},
    }
