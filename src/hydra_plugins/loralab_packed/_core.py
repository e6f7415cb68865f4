"""One sweep: every trial composed first, sweep.json written before any runs, then trial after trial."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from loralab import record
from loralab.config import trial_id


def launch(
    context: HydraContext,
    task_function: TaskFunction,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first: int,
) -> list[JobReturn]:
    """A JobReturn for each of ``job_overrides``, in their order."""
    setup_globals()
    hydra = master.hydra
    configure_log(hydra.hydra_logging, hydra.verbose)
    folder = Path(str(hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    configs = [_compose(context, master, list(overrides), first + i) for i, overrides in enumerate(job_overrides)]
    ledger = Ledger(folder, master, configs)
    returns = []
    for index, config in enumerate(configs):
        done = run_job(
            hydra_context=context,
            task_function=task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        returns.append(done)
        ledger.update(index)
        configure_log(hydra.hydra_logging, hydra.verbose)
    return returns


def _compose(context: HydraContext, master: DictConfig, overrides: list[str], number: int) -> DictConfig:
    config: DictConfig = context.config_loader.load_sweep_config(master, overrides)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    return config


class Ledger:
    """sweep.json: what the sweep asks, its axes, and how each trial stands."""

    def __init__(self, folder: Path, config: DictConfig, configs: list[DictConfig]) -> None:
        self.folder = folder
        sweep = OmegaConf.to_container(config.sweep, resolve=True) if config.get("sweep") else {}
        assert isinstance(sweep, dict)
        self.content: dict[str, Any] = {
            **{str(key): value for key, value in sweep.items()},
            "name": sweep.get("name") or folder.name,
            "question": sweep.get("question"),
            "axes": axes(configs),
            "overrides": list(config.hydra.overrides.task),
            "trials": [_entry(folder, one) for one in configs],
        }
        record.write_sweep(folder, self.content)

    def update(self, index: int) -> None:
        entry = self.content["trials"][index]
        entry["status"] = status_of(self.folder / entry["folder"])
        record.write_sweep(self.folder, self.content)


def axes(configs: list[DictConfig]) -> dict[str, list[str]]:
    """{swept key: its values in order} over the trials' own overrides."""
    found: dict[str, list[str]] = {}
    every = [dict(o.split("=", 1) for o in config.hydra.overrides.task if "=" in o) for config in configs]
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


def _entry(folder: Path, config: DictConfig) -> dict[str, Any]:
    original = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        subdir = str(OmegaConf.select(config, "hydra.sweep.subdir"))
    finally:
        HydraConfig.instance().cfg = original
    return {
        "trial": trial_id(config),
        "folder": subdir,
        "status": status_of(folder / subdir),
        "overrides": list(config.hydra.overrides.task),
        "choices": {k: v for k, v in config.hydra.runtime.choices.items() if not str(k).startswith("hydra/")},
    }
