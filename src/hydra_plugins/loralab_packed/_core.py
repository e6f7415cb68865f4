"""One sweep: every trial composed first, sweep.json written before any runs, then trial after trial."""

import logging
import math
import os
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
from loralab.scheduling.jobs import Job

log = logging.getLogger("loralab.scheduling.sweep")

Budgets = tuple[int | None, float | None]  # tokens of a pass, GiB; null: as the device has it
BY_TRIAL = "${loralab.trial_id:}"  # hydra.sweep.subdir as conf/train.yaml has it


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
        every = _jobs(folder, configs)
        jobs = {job.trial: job for job in reversed(every)}  # the first of each
        once = [job for job in every if jobs[job.trial] is job]
        _say_repeated(every, jobs)
        owner.begin(folder, once)
        ledger = Ledger(folder, master, once)
        if pack or budgets[1] is not None:
            try:
                owner.prepare(budgets[0] if pack else 1, budgets[1], ledger.update)
            finally:
                ledger.update()
        returns: dict[str, JobReturn] = {}
        for job, config in zip(every, configs, strict=True):
            if job.trial not in returns:
                skipped = owner.skip(job)
                returns[job.trial] = _skipped(job, skipped) if skipped else _run(context, task_function, config, ledger)
        return [returns[job.trial] for job in every]


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


def _skipped(job: Job, stored: dict[str, Any]) -> JobReturn:
    """What running a trial that is finished would have come to."""
    name = str(JobRuntime.instance().get("name"))
    return JobReturn(
        overrides=job.overrides,
        working_dir=str(Path.cwd()),
        task_name=name,
        status=JobStatus.COMPLETED,
        _return_value=job.value(stored),
    )


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
    found = {}
    for place in record.find(folder):
        try:
            stored = record.read(place)
        except ArtifactError:
            continue
        known = (record.SCHEMA, "completed", place.name, folder)
        if (stored["schema"], stored["status"], stored["trial"], place.parent) == known:
            found[identity.settings_key(stored["config"])] = stored["trial"]
    return found


def _say_repeated(every: Sequence[Job], first: Mapping[str, Job]) -> None:
    """Values that spell one trial twice: 16 and 16.0, or a value given twice."""
    again = [job for job in every if first[job.trial] is not job]
    if again:
        same = [f"{' '.join(job.differing(first[job.trial])) or 'a repeated value'} ({job.trial})" for job in again]
        more = f" and {len(same) - 3} more" if len(same) > 3 else ""
        log.info(
            "%d of %d settings mean a trial named before, which runs once: %s%s",
            len(again),
            len(every),
            ", ".join(same[:3]),
            more,
        )


class Ledger:
    """sweep.json: what the sweep asks, its axes, and how each trial stands.

    Trials of earlier calls that have a record stay listed: a call with fewer seeds or other settings hides nothing.
    """

    def __init__(self, folder: Path, config: DictConfig, jobs: Sequence[Job]) -> None:
        self.folder = folder
        self._seen: dict[str, int] = {}  # {folder: time of its record}
        sweep = OmegaConf.to_container(config.sweep, resolve=True) if config.get("sweep") else {}
        if not isinstance(sweep, dict):
            raise ConfigError(f"sweep={sweep!r} is no group of settings; valid: a sweep file, or null")
        trials = {job.trial: _entry(folder, job) for job in jobs}
        before = [trials.pop(one["trial"], {**one, "earlier": True}) for one in _earlier(folder, trials)]
        listed = [*before, *trials.values()]
        self.content: dict[str, Any] = {
            **{str(key): value for key, value in sweep.items()},
            "name": sweep.get("name") or folder.name,
            "question": sweep.get("question"),
            "axes": axes([list(one.get("overrides") or []) for one in listed]),
            "overrides": list(config.hydra.overrides.task),
            "cwd": str(Path.cwd()),  # what relative paths among them are relative to
            "trials": listed,
        }
        for job in jobs:
            job.sweep = self.content
        self.update()

    def update(self) -> None:
        """Reads the status of every trial whose record has changed, and writes what is new."""
        known = dict(self._seen)
        for entry in self.content["trials"]:
            place = self.folder / entry["folder"]
            if (written := _written(place)) != self._seen.get(entry["folder"]):
                self._seen[entry["folder"]] = written
                entry["status"] = status_of(place)
        if known != self._seen:
            record.write_sweep(self.folder, self.content)


def _written(folder: Path) -> int:
    try:
        return (folder / record.RESULT).stat().st_mtime_ns
    except OSError:
        return 0


def _earlier(folder: Path, trials: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Trials that sweep.json already lists and that have a record; not those that ``trials`` runs anew under another
    id, because an earlier version gave them theirs."""
    try:
        listed: list[dict[str, Any]] = record.read_sweep(folder)["trials"]
    except ArtifactError:
        return []
    now = [sorted(one["overrides"]) for one in trials.values()]
    return [one for one in listed if "trial" in one and not _left_out(folder / str(one["folder"]), one, now)]


def _left_out(folder: Path, entry: Mapping[str, Any], now: Sequence[Sequence[str]]) -> bool:
    if _written(folder) == 0:
        return True
    try:
        schema = record.read(folder)["schema"]
    except ArtifactError:
        return status_of(folder) == "pending"
    return bool(schema < record.SCHEMA and sorted(entry.get("overrides") or []) in now)


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


def _raw_subdir(config: DictConfig) -> str:
    """As it is written, not resolved."""
    return str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"])  # type: ignore[call-overload,index]


def _entry(folder: Path, job: Job) -> dict[str, Any]:
    return {
        "trial": job.trial,
        "folder": os.path.relpath(job.folder, folder),
        "status": "pending",
        "overrides": job.overrides,
        "choices": job.choices,
    }
