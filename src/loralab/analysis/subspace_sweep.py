"""``sweep.subspace``: ``loralab subspace`` for a sweep's trials, and for pairs that differ in rank or seed alone."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from loralab.analysis import subspace_files as files
from loralab.analysis import subspace_runs as runs
from loralab.analysis.results import SweepResults
from loralab.analysis.trials import TrialResult
from loralab.errors import LoralabError
from loralab.running.inputs import Inputs

log = logging.getLogger(__name__)


def run(results: SweepResults) -> None:
    """Writes the files of all completed trials and pairs that are not there yet. What fails is a warning."""
    inputs = Inputs()
    trials = [trial for trial in results.trials if trial.ok and files.single(trial) is None]
    lacking = [pair for pair in files.pairs(results) if files.both(pair) is None]
    if trials or lacking:
        log.info("subspaces of %d trials and %d pairs", len(trials), len(lacking))
    for trial in trials:
        _try(trial, files.path_of(trial.folder), partial(runs.measure, trial.folder, inputs))
    for pair in lacking:
        one, two = pair.first, pair.second
        _try(one, files.path_of(one.folder, two.record), partial(runs.compare, one.folder, two.folder, inputs))


def _try(trial: TrialResult, path: Path, make: Callable[[], dict[str, Any]]) -> None:
    try:
        files.write(path, make())
    except LoralabError as error:
        log.warning("sweep.subspace: %s: %s", trial.name, error)
    except Exception as error:  # a trial whose figures cannot be had takes nothing from the sweep
        log.warning("sweep.subspace: %s: %s: %s", trial.name, type(error).__name__, error)
