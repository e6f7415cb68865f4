"""Trials run by another launcher than loralab's own (basic, joblib, submitit): each alone, often in another process.

This process alone writes sweep.json; what the others have done it reads from their records, as they are written.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, setup_globals

from loralab.records.lock import hold
from loralab.scheduling import launch as launching
from loralab.scheduling.composing import Composed
from loralab.scheduling.job import Job
from loralab.scheduling.session import Session
from loralab.scheduling.sweep import PackOptions

log = logging.getLogger(__name__)


def launch(sweeper: Any, session: Session, trials: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """A JobReturn for each of ``trials``; those that are finished are not launched again."""
    master, context, launcher = sweeper.config, sweeper.hydra_context, sweeper.launcher
    setup_globals()
    configure_log(master.hydra.hydra_logging, master.hydra.verbose)
    launching.show_own_lines()
    folder = Path(str(master.hydra.sweep.dir))
    name = master.hydra.runtime.choices.get("hydra/launcher")
    log.info("hydra/launcher=%s: packing is off, each trial runs alone; hydra/launcher=packed trains several", name)

    def run(jobs: list[Job]) -> None:
        try:
            launcher.launch([job.asked for job in jobs], initial_job_idx=first)
        except Exception as error:  # a process died: the records say which trials have a result
            text = "hydra/launcher=%s ended with %s: %s"
            log.error(text, name, type(error).__name__, " ".join(str(error).split())[:300])

    with hold(folder):
        composed = Composed(context.config_loader)
        jobs = launching.jobs_of(folder, launching.compose_all(composed, master, trials, first), session)
        header = launching.header(master, master.hydra, folder)
        records = session.sweep(folder, launching.distinct(jobs), header, PackOptions(pack=False), run)
    return [launching.job_return(job, records[job.trial]) for job in jobs]
