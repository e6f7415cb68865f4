"""What a task does in the process that an executor has started: its packs, one after the other, in one Runner.

It may be started several times, as by Slurm after a preemption: trials that are over are not run again, and the others
go on from their checkpoints.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import Interrupted
from loralab.records.secrets import MaskedFormatter
from loralab.scheduling.job import Job, Record
from loralab.scheduling.watching import news

log = logging.getLogger(__name__)


def content(packs: Sequence[Sequence[Job]], before: Mapping[str, int]) -> dict[str, Any]:
    """A task for another process, as plain values. ``before``: {trial: when its record was written}."""
    return {
        "packs": [[job.as_json() for job in pack] for pack in packs],
        "before": dict(before),
        "cwd": str(Path.cwd()),
    }


def perform(task: Mapping[str, Any], handlers: Sequence[logging.Handler]) -> int:
    """Runs a task of ``content`` and returns the exit code: 0, whatever its trials came to, or that of a signal, whose
    handlers the caller has set. What it says goes to ``handlers``."""
    from loralab.scheduling.session import Session
    from loralab.scheduling.sweep import Sweep

    logging.basicConfig(level=logging.INFO, handlers=list(handlers), force=True)
    for handler in handlers:
        handler.setFormatter(MaskedFormatter("%(asctime)s %(message)s"))
    log.info("CUDA_VISIBLE_DEVICES=%s", os.environ.get("CUDA_VISIBLE_DEVICES"))
    os.chdir(task["cwd"])
    try:
        packs = left([[Job.from_json(stored) for stored in pack] for pack in task["packs"]], task["before"])
        if packs:
            Sweep(packs[0][0].folder.parent, [], Session(fresh=False, many=True).runner).run_packs(packs)
    except Interrupted as stopped:
        return stopped.exit_code
    return 0


def left(packs: Sequence[Sequence[Job]], before: Mapping[str, int]) -> list[list[Job]]:
    """What an earlier start of the same task has not brought to its end."""
    over = set()
    for job, stored, _ in news([job for pack in packs for job in pack], before):
        job.fresh = False  # it was begun by that start
        if is_over(job, stored):
            over.add(job.trial)
    remaining = [[job for job in pack if job.trial not in over] for pack in packs]
    return [pack for pack in remaining if pack]


def is_over(job: Job, stored: Record) -> bool:
    """Whether ``stored``, written since the task began, is of a trial that has got as far as it was to go."""
    return stored["status"] not in ("running", "interrupted") or job.has_paused(stored)
