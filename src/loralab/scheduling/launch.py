"""Hydra's side of a sweep: every trial composed first, one record and one JobReturn for each."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from loralab.config import identity
from loralab.config.compose import plain
from loralab.errors import ArtifactError, ConfigError, nearest
from loralab.records import record
from loralab.records.lock import hold
from loralab.scheduling.job import Job, Record
from loralab.scheduling.session import Session
from loralab.scheduling.sweep import PackOptions
from loralab.scheduling.train_log import TerminalFilter

log = logging.getLogger(__name__)

BY_TRIAL = "${loralab.trial_id:}"  # hydra.sweep.subdir as conf/train.yaml has it


def launch(
    context: HydraContext,
    task_function: TaskFunction,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    options: PackOptions,
) -> list[JobReturn]:
    """A JobReturn for each of ``job_overrides``, in their order. Another's task runs job by job."""
    setup_globals()
    configure_log(master.hydra.hydra_logging, master.hydra.verbose)
    if not job_overrides:
        raise ConfigError("the sweep has no trial: an axis has no value; valid: at least one, as in seed=0,1")
    folder = Path(str(master.hydra.sweep.dir))
    session: Any = getattr(task_function, "__self__", None)
    if not isinstance(session, Session):
        folder.mkdir(parents=True, exist_ok=True)
        configs = _compose_all(context, master, job_overrides, first)
        return [_run_job(context, task_function, master, config) for config in configs]
    _show_own_lines()
    with hold(folder):
        every = _jobs(folder, _compose_all(context, master, job_overrides, first))
        jobs = {job.trial: job for job in reversed(every)}  # the first of each
        _mention_repeated(every, jobs)
        once = [job for job in every if jobs[job.trial] is job]
        records = session.sweep(folder, once, header(master, master.hydra, folder), options)
    return [_job_return(job, records[job.trial]) for job in every]


def header(config: DictConfig, hydra: Any, folder: Path) -> dict[str, Any]:
    """What sweep.json says beside its axes and trials: the sweep file's words and how it was called.

    ``hydra``: Hydra's own part of the configuration.
    """
    sweep = OmegaConf.to_container(config.sweep, resolve=True) if config.get("sweep") else {}
    if not isinstance(sweep, dict):
        raise ConfigError(f"sweep={sweep!r} is no group of settings; valid: a sweep file, or null")
    return {
        **{str(key): value for key, value in sweep.items()},
        "name": sweep.get("name") or folder.name,
        "question": sweep.get("question"),
        "overrides": list(hydra.overrides.task),
        "hydra_overrides": [word for word in hydra.overrides.hydra if _is_of_how_it_runs(word)],
        "cwd": str(Path.cwd()),  # what relative paths among them are relative to
    }


def _is_of_how_it_runs(word: str) -> bool:
    """Whether a word for Hydra itself belongs to the sweep when it is resumed: its launcher and where it looks."""
    key = word.lstrip("+~").partition("=")[0]
    return key.startswith(("hydra/launcher", "hydra.launcher", "hydra.searchpath", "hydra/sweeper", "hydra.sweeper"))


def _show_own_lines() -> None:
    """Hydra's own lines stay away from the terminal, loralab's do not."""
    logging.getLogger("loralab").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(TerminalFilter())


def _compose_all(
    context: HydraContext, master: DictConfig, job_overrides: Sequence[Sequence[str]], first: int
) -> list[DictConfig]:
    loader = context.config_loader
    compose = getattr(loader, "take", loader.load_sweep_config)
    configs: list[DictConfig] = [compose(master, list(overrides)) for overrides in job_overrides]
    for number, config in enumerate(configs, first):
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
    return configs


def _run_job(context: HydraContext, task_function: TaskFunction, master: DictConfig, config: DictConfig) -> JobReturn:
    try:
        return run_job(
            hydra_context=context,
            task_function=task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    finally:
        configure_log(master.hydra.hydra_logging, master.hydra.verbose)


def _job_return(job: Job, stored: Record) -> JobReturn:
    return JobReturn(
        overrides=job.overrides,
        working_dir=str(Path.cwd()),
        task_name=str(JobRuntime.instance().get("name")),
        status=JobStatus.COMPLETED,
        _return_value=job.value(stored),
    )


def checked_options(pack: str, token_budget: int | None, memory_budget: float | None) -> PackOptions:
    """Raises ConfigError for an unknown policy or a budget that holds nothing."""
    if pack not in ("auto", "off"):
        raise ConfigError(f"hydra.launcher.pack={pack!r} is unknown; {nearest(str(pack), ('auto', 'off'))}")
    if token_budget is not None and token_budget < 1:
        raise ConfigError(f"hydra.launcher.token_budget must be at least 1 token, got {token_budget}")
    if memory_budget is not None and not 0 < memory_budget < math.inf:
        raise ConfigError(f"hydra.launcher.memory_budget must be a positive number of GiB or null, got {memory_budget}")
    return PackOptions(pack == "auto", token_budget, memory_budget)


def _jobs(folder: Path, configs: Sequence[DictConfig]) -> list[Job]:
    """A job for each. Settings that a finished record spells are its trial; only others need their specs built."""
    finished = _finished(folder)
    jobs = []
    for config in configs:
        content, subdir = plain(config), _raw_subdir(config)
        known = finished.get(identity.settings_key(content)) if subdir == BY_TRIAL else None
        job = Job.of(content, config.hydra, folder)
        if known is not None:
            job.trial = known
        job.folder = folder / (job.trial if subdir == BY_TRIAL else _subdir(config))
        jobs.append(job)
    if len({job.folder for job in jobs}) < len({job.trial for job in jobs}):
        raise ConfigError("hydra.sweep.subdir gives several trials one folder; valid: ${loralab.trial_id:} in it")
    return jobs


def _finished(folder: Path) -> dict[str, str]:
    """{settings: trial} of the completed records that lie where their trials belong."""
    trials = {}
    for place in record.find(folder):
        try:
            stored = record.read(place)
        except ArtifactError:
            continue
        where = (stored["schema"], stored["status"], stored["trial"], place.parent)
        if where == (record.SCHEMA, "completed", place.name, folder):
            trials[identity.settings_key(stored["config"])] = stored["trial"]
    return trials


def _mention_repeated(every: Sequence[Job], first: Mapping[str, Job]) -> None:
    """Values that spell one trial twice: 16 and 16.0, or a value given twice."""
    again = [job for job in every if first[job.trial] is not job]
    if again:
        same = [f"{' '.join(job.differing(first[job.trial])) or 'a repeated value'} ({job.trial})" for job in again]
        more = f" and {len(same) - 3} more" if len(same) > 3 else ""
        log.info(
            "%d of %d settings mean a trial named before, which runs once: %s%s",
            *(len(again), len(every), ", ".join(same[:3]), more),
        )


def _subdir(config: DictConfig) -> str:
    """As Hydra will resolve it for this trial."""
    original = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        return str(OmegaConf.select(config, "hydra.sweep.subdir"))
    finally:
        HydraConfig.instance().cfg = original


def _raw_subdir(config: DictConfig) -> str:
    """As it is written, not resolved."""
    return str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"])  # type: ignore[call-overload,index]
