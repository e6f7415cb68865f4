"""Test scores of trials that were finished without them, from their adapters: nothing is trained anew."""

import logging
import time
from copy import deepcopy
from typing import TYPE_CHECKING

from loralab.errors import DataError
from loralab.records import record
from loralab.records.lock import hold
from loralab.scheduling.job import Job, Record

if TYPE_CHECKING:
    from loralab.running.runner import Runner

log = logging.getLogger(__name__)


def add_test_scores(job: Job, runner: "Runner") -> Record:
    """The record of a finished trial with the scores of its adapter on the test split, written in place of the old one.

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
            data, stored = runner.inputs.data(run.spec).encoded, deepcopy(run.record)
            if data.splits.fingerprint != stored["data"]["fingerprint"]:
                raise DataError(f"{job.folder} was made on other rows than {data.splits.name} has now")
            trial = Trial(run.spec, run.adapter, data, pad_token_id(run.base), deepcopy(run.record))
            trial.step = trial.last_validated_step = int(stored["time"]["steps"] or 0)
            Fit(run.base, [trial], time.monotonic(), False, runner.foresight).evaluate("test", "test")
            if trial.failure is not None:
                raise trial.failure
        finally:
            run.close()
            if run.spec.adapter.changes_base:
                runner.inputs.forget_base()
        stored["metrics"].update(trial.metrics)
        add_predictions(trial)
        record.write(job.folder, stored)
    log.info("%s was finished without test scores: they are of its adapter", job.trial)
    return record.read(job.folder)
