"""Scores of trials that were finished without them, from their adapters: nothing is trained anew."""

import logging
import time
from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loralab.data.base import FORGETTING
from loralab.errors import DataError
from loralab.records import record
from loralab.records.lock import hold
from loralab.scheduling.job import Job, Record

if TYPE_CHECKING:
    from loralab.running.inputs import TrialData
    from loralab.running.runner import Runner
    from loralab.training.trial import Trial

log = logging.getLogger(__name__)


def add_scores(job: Job, runner: "Runner", lacking: Collection[str]) -> Record:
    """The record of a finished trial with the scores of its adapter on what it is ``lacking``, the ``test`` split or
    ``forgetting``, written in place of the old one.

    Raises ArtifactError where the adapter is gone or no longer fits, DataError for other rows than the trial's.
    """
    from loralab.artifacts.reopen import open_run
    from loralab.running.attach import pad_token_id
    from loralab.running.finish import add_predictions
    from loralab.running.fit import Fit
    from loralab.training.trainer import quiet
    from loralab.training.trial import Trial

    quiet()
    with hold(job.folder):
        run = open_run(job.folder, runner.inputs)
        try:
            other = job.spec().data.forgetting if FORGETTING in lacking else None
            spec = replace(run.spec, data=replace(run.spec.data, forgetting=other))
            data, stored = runner.inputs.data(spec), deepcopy(run.record)
            if data.encoded.splits.fingerprint != stored["data"]["fingerprint"]:
                raise DataError(f"{job.folder} was made on other rows than {data.encoded.splits.name} has now")
            trial = Trial(spec, run.adapter, data.encoded, pad_token_id(run.base), deepcopy(run.record))
            trial.step = trial.last_validated_step = int(stored["time"]["steps"] or 0)
            fit = Fit(run.base, [trial], time.monotonic(), False, runner.foresight)
            if "test" in lacking:
                fit.evaluate("test", "test")
            if FORGETTING in lacking:
                trial.bare_scores = runner.inputs.bare_scores(run.untrained().base, spec, data.encoded)
                fit.measure_forgetting()
            if trial.failure is not None:
                raise trial.failure
        finally:
            run.close()
            if run.spec.adapter.changes_base:
                runner.inputs.forget_base()
        _take(stored, trial, data, job.content["data"].get(FORGETTING))
        add_predictions(trial)
        record.write(job.folder, stored)
    log.info("%s was finished without %s scores: they are of its adapter", job.trial, " and ".join(lacking))
    return record.read(job.folder)


def _take(stored: Record, trial: "Trial", data: "TrialData", node: Any) -> None:
    """Adds the scores of ``trial`` to a record; those on data.forgetting, now ``node``, in place of earlier ones."""
    from loralab.running.forgetting import described

    if data.encoded.forgetting is not None:
        kept = {name: value for name, value in stored["metrics"].items() if not name.startswith(f"{FORGETTING}/")}
        stored["metrics"] = kept
        stored["data"][FORGETTING] = described(data.encoded, data.forgetting_source)
        stored["config"]["data"][FORGETTING] = node
    stored["metrics"].update(trial.metrics)
