"""What the launcher does with a sweep: composes every trial, runs them, returns one JobReturn for each."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from loralab.config import identity
from loralab.config.build import check_tags
from loralab.config.compose import as_called, plain, plain_sweep
from loralab.errors import ArtifactError, ConfigError, nearest
from loralab.records import record
from loralab.records.lock import hold
from loralab.records.shared import part, share
from loralab.scheduling import executor_settings, opening
from loralab.scheduling.claims import named_by
from loralab.scheduling.job import Job, Record
from loralab.scheduling.session import Session
from loralab.scheduling.sweep import PackOptions
from loralab.scheduling.train_log import TerminalFilter

log = logging.getLogger(__name__)

OF_SWEEPER = ("zip", "when", "d90", "tune", "halving")  # what only loralab's sweeper does of what a sweep file says
BY_TRIAL = "${loralab.trial_id:}"  # hydra.sweep.subdir as conf/train.yaml has it


def launch(
    context: HydraContext,
    task_function: TaskFunction,
    master: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    options: PackOptions,
) -> list[JobReturn]:
    """A JobReturn for each of ``job_overrides``, in their order. A task that is not loralab's runs job by job."""
    setup_globals()
    configure_log(master.hydra.hydra_logging, master.hydra.verbose)
    if not job_overrides:
        raise ConfigError("the sweep has no trial: an axis has no value; valid: at least one, as in seed=0,1")
    folder = Path(str(master.hydra.sweep.dir))
    session: Any = getattr(task_function, "__self__", None)
    if not isinstance(session, Session):
        folder.mkdir(parents=True, exist_ok=True)
        configs = list(compose_all(context.config_loader, master, job_overrides, first))
        return [_run_job(context, task_function, master, config) for config in configs]
    show_own_lines()
    with hold(folder):
        jobs = jobs_of(folder, compose_all(context.config_loader, master, job_overrides, first), session)
        records = session.sweep(folder, distinct(jobs), header(master, master.hydra, folder), options)
    return [job_return(job, records[job.trial]) for job in jobs]


def header(config: DictConfig, hydra: Any, folder: Path) -> dict[str, Any]:
    """What sweep.json says beside its axes and trials: the sweep file's words and how it was called.

    ``hydra``: Hydra's own part of the configuration.
    """
    sweep = plain_sweep(config)
    sweeper = str(hydra.runtime.choices.get("hydra/sweeper"))
    known = {"loralab": OF_SWEEPER, "optuna": ("halving",)}.get(sweeper, ())
    if own := [key for key in OF_SWEEPER if sweep.get(key) is not None and key not in known]:
        raise ConfigError(
            f"hydra/sweeper={sweeper} does not know sweep.{own[0]}; valid: hydra/sweeper=loralab, the default"
        )
    if not isinstance(wanted := sweep.get("subspace"), bool | None):
        raise ConfigError(f"sweep.subspace={wanted!r} is no answer; valid: true, false")
    check_tags(sweep.get("tags"))
    return {
        **sweep,
        **named_by(config, hydra),
        "name": sweep.get("name") or folder.name,
        "question": sweep.get("question"),
        "overrides": as_called(hydra),
        "hydra_overrides": [word for word in hydra.overrides.hydra if _belongs_to_sweep(word)],
        "cwd": str(Path.cwd()),  # what relative paths among them are relative to
    }


def _belongs_to_sweep(word: str) -> bool:
    """True for an override of Hydra's own part that a resumed sweep needs: launcher, sweeper, search path."""
    key = word.lstrip("+~").partition("=")[0]
    return key.startswith(("hydra/launcher", "hydra.launcher", "hydra.searchpath", "hydra/sweeper", "hydra.sweeper"))


def show_own_lines() -> None:
    """Makes loralab's INFO lines visible on the terminal, except those marked ``terminal=False``."""
    logging.getLogger("loralab").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(TerminalFilter())


def compose_all(
    loader: Any, master: DictConfig, job_overrides: Sequence[Sequence[str]], first: int
) -> Iterator[DictConfig]:
    """The configuration of each trial, one at a time: thousands together would fill the memory. ``loader``: Hydra's;
    ``first``: the number of the first of them."""
    for number, overrides in enumerate(job_overrides, first):
        config = loader.load_sweep_config(master, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        yield config


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


def job_return(job: Job, stored: Record) -> JobReturn:
    """What a sweeper is told of a trial that has been run: its metric, None where it failed."""
    return JobReturn(
        overrides=job.overrides,
        working_dir=str(Path.cwd()),
        task_name=str(JobRuntime.instance().get("name")),
        status=JobStatus.COMPLETED,
        _return_value=job.value(stored),
    )


def checked_options(
    pack: str,
    token_budget: int | None,
    memory_budget: float | None,
    executor: str = "local",
    keys: Mapping[str, Any] | None = None,
) -> PackOptions:
    """``keys``: those of the executors. Raises ConfigError for an unknown policy, a budget that holds nothing, or an
    executor that this machine cannot use. Nothing is started or submitted."""
    if pack not in ("auto", "off"):
        raise ConfigError(f"hydra.launcher.pack={pack!r} is unknown; {nearest(str(pack), ('auto', 'off'))}")
    if token_budget is not None and token_budget < 1:
        raise ConfigError(f"hydra.launcher.token_budget must be at least 1 token, got {token_budget}")
    if memory_budget is not None and not 0 < memory_budget < math.inf:
        raise ConfigError(f"hydra.launcher.memory_budget must be a positive number of GiB or null, got {memory_budget}")
    given = {
        key: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value for key, value in (keys or {}).items()
    }
    settings = executor_settings.checked(executor, given)
    opening.check(settings)
    return PackOptions(pack == "auto", token_budget, memory_budget, settings)


def jobs_of(folder: Path, configs: Iterable[DictConfig], session: Session | None = None) -> list[Job]:
    """A job for each. A trial id is taken from a finished record of the same settings; else its specs are built.

    ``session``: keeps what was found of finished records for its later rounds."""
    finished = session.finished if session is not None else None
    if finished is None:
        finished = _finished(folder)
        if session is not None:
            session.finished = finished
    jobs = [job_of(config, folder, finished) for config in configs]
    if len({job.folder for job in jobs}) < len({job.trial for job in jobs}):
        raise ConfigError("hydra.sweep.subdir gives several trials one folder; valid: ${loralab.trial_id:} in it")
    return jobs


def job_of(config: DictConfig, folder: Path, finished: Mapping[str, str]) -> Job:
    """The job of a composed configuration. ``finished``: {settings: trial id}, see ``jobs_of``."""
    content, subdir = share(plain(config)), _raw_subdir(config)
    job = Job.of(content, config.hydra, folder)
    job.choices = part(job.choices)
    trial = finished.get(identity.settings_key(content)) if finished and subdir == BY_TRIAL else None
    if trial is not None:
        job.trial = trial
    job.folder = folder / (job.trial if subdir == BY_TRIAL else _subdir(config))
    return job


def _finished(folder: Path) -> dict[str, str]:
    """{settings: trial id} of the completed records below ``folder`` whose folder is named by their trial id."""
    trials = {}
    for place in record.find(folder):
        try:
            stored = record.read(place)
        except ArtifactError:
            continue
        identity_and_place = (stored["schema"], stored["status"], stored["trial"], place.parent)
        if identity_and_place == (record.SCHEMA, "completed", place.name, folder):
            trials[identity.settings_key(stored["config"])] = stored["trial"]
    return trials


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """The first job of each trial; logs the others."""
    by_trial = {job.trial: job for job in reversed(jobs)}
    _mention_repeated(jobs, by_trial)
    return [job for job in jobs if by_trial[job.trial] is job]


def _mention_repeated(jobs: Sequence[Job], first: Mapping[str, Job]) -> None:
    """Logs the settings that mean the same trial as earlier ones: 16 and 16.0, or a value given twice."""
    repeated = [job for job in jobs if first[job.trial] is not job]
    if repeated:
        names = [f"{_new_words(job, first[job.trial]) or 'a repeated value'} ({job.trial})" for job in repeated]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        text = "%d of %d settings mean a trial named before, which runs once: %s%s"
        log.info(text, len(repeated), len(jobs), ", ".join(names[:3]), more)


def _new_words(job: Job, other: Job) -> str:
    return " ".join(word for word in job.overrides if word not in other.overrides)


def _subdir(config: DictConfig) -> str:
    """hydra.sweep.subdir as Hydra will resolve it for this trial."""
    original = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        return str(OmegaConf.select(config, "hydra.sweep.subdir"))
    finally:
        HydraConfig.instance().cfg = original


def _raw_subdir(config: DictConfig) -> str:
    """hydra.sweep.subdir as it is written, not resolved."""
    return str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"])  # type: ignore[call-overload,index]
