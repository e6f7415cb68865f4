"""loralab from Python and a notebook: what ``import loralab`` gives, each name imported when it is first used.

Errors are the exceptions of ``loralab.errors``, with the text that the command line prints. An interrupt ends in
KeyboardInterrupt, with the records written. A call of another thread waits, as Hydra serves one at a time.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab import errors
from loralab.records.shown import TrialRecord, TrialRecords

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd
    from torch import nn

    from loralab.planning.plan import Plan
    from loralab.running.own_trainer import AdapterModule, TrialData
    from loralab.scheduling.session import Session

Folder = str | Path

_ONE = threading.RLock()

# before torch is there: it warns on stderr of every block that is older than the profile of a step's memory
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@contextmanager
def _alone() -> Iterator[None]:
    """Within, no other thread does what needs Hydra, sys.argv or logging, of which a process has one."""
    with _ONE:
        yield


@_alone()
def train(overrides: Sequence[str] = (), fresh: bool = False) -> TrialRecord:
    """One run, as ``loralab train`` makes it; returns its record, the content of ``result.json`` in its ``folder``
    (``hydra.run.dir``).

    ``overrides``: Hydra's k=v; ``fresh``: a finished run in that folder is made again. Raises the error that the run
    ended with.
    """
    _check_words(overrides)
    session = _run([*overrides], fresh, many=False)
    (record,) = session.records
    if record["error"]:
        raise _error(record)
    assert session.folder is not None
    return TrialRecord(record, session.folder.absolute())


@_alone()
def sweep(name: str | Path, overrides: Sequence[str] = (), fresh: bool = False) -> TrialRecords:
    """The sweep ``name`` of ./sweeps or loralab's, or that of a .yaml file, as ``loralab sweep`` runs it: what is
    finished is not run again unless ``fresh``.

    Returns the records of its trials in their order, also of those that failed (``status``, ``error``). Its folder then
    has the report as well.
    """
    from loralab.cli import hydra_run
    from loralab.cli.subspace import after_sweep
    from loralab.cli.sweep import sweep_arguments
    from loralab.config import sweep_files
    from loralab.reporting import wandb_report
    from loralab.reporting.report import report

    _check_words(overrides)
    chosen = sweep_files.choice(str(name))
    hydra_run.check_axes([*overrides])
    words = sweep_arguments(chosen, [*overrides])
    hydra_run.check_own_files(words)
    session = _run(words, fresh, many=True)
    if session.folder is not None:
        after_sweep(session.folder)
        wandb_report.after_sweep(report(session.folder))
    return TrialRecords(TrialRecord(record, folder) for record, folder in _with_folders(session))


@_alone()
def plan(overrides: Sequence[str] = ()) -> "Plan":
    """The predicted memory of a run, without weights; of CUDA unless ``plan.device=cpu`` is among ``overrides``."""
    from loralab.cli.plan import planned

    _check_words(overrides)
    with _translated([*overrides]):
        return planned([*overrides])[1]


def results(folder: Folder) -> "pd.DataFrame":
    """A row a trial of the sweep or run in ``folder``: trial, folder, status, seed, error (None: none), then under
    their dotted names what its record says, its choices, its configuration and its metrics (``adapter.r``,
    ``val/loss``). What a record lacks is missing. Raises ArtifactError where there is no record."""
    from loralab.analysis.results import read_results

    return read_results(_existing(folder)).frame.copy()


def summary(folder: Folder) -> "pd.DataFrame":
    """The page's table: a row for each configuration in the order of the axes, over its seeds. Beside the axes it has
    ``mean``, ``std``, ``n``, the paired difference to the baseline with its interval, and costs (as results.json)."""
    import pandas as pd

    from loralab.analysis.arms import comparisons
    from loralab.analysis.comparable import subject
    from loralab.analysis.results import read_results
    from loralab.reporting.cost import plain
    from loralab.reporting.table import as_plain

    results_read = read_results(_existing(folder))
    rows = []
    for comparison in comparisons(results_read):
        for arm in comparison.arms:
            row = {**as_plain(arm), **plain(arm)}
            values, difference = row.pop("values"), row.pop("difference") or {}
            against = {f"difference_{key}": difference.get(key) for key in ("mean", "low", "high", "p")}
            rows.append({"set": subject(comparison.results), **values, **row, **against})
    return pd.DataFrame(rows)


def curves(folder: Folder) -> "pd.DataFrame":
    """A row for each line of the trials' metrics.jsonl: trial, folder, step and what was logged at it."""
    import pandas as pd

    from loralab.analysis.results import read_results
    from loralab.records.jsonl import rows

    logged = [
        {"trial": trial.record["trial"], "folder": trial.name, "step": step, **values}
        for trial in read_results(_existing(folder)).trials
        for step, values in rows(trial.folder / "metrics.jsonl")
    ]
    return pd.DataFrame(logged)


def charts(folder: Folder) -> "dict[str, alt.LayerChart]":
    """{name: figure} of the page of the sweep or run in ``folder``, as Altair's charts, which a notebook draws without
    a network: each output holds the library, 0.9 MB, unless another renderer than Altair's default is enabled. Raises
    ArtifactError where there is no record."""
    from loralab.analysis.arms import comparisons
    from loralab.analysis.results import read_results
    from loralab.reporting.in_notebook import shown
    from loralab.reporting.page import page

    found = read_results(_existing(folder))
    return {one.name: shown(one.spec, one.title) for one in page(found, comparisons(found)).figures}


def load(run: Folder) -> "tuple[nn.Module, Any]":
    """(model, tokenizer) of a finished run: the base in evaluation mode with the adapter acting on every pass, ready
    for ``model(**inputs)`` and ``model.generate``, and to be copied and pickled. The adapter is not in its state_dict;
    ``save_pretrained``, which would write the base alone, raises. Of a run in mixed precision
    (``base.precision`` of its record) it is the caller's ``torch.autocast`` that computes as the run did. Raises
    ArtifactError where the run has no adapter, or its base has changed since; ConfigError where the base cannot be
    loaded."""
    from loralab.artifacts.reopen import open_run, unsaved
    from loralab.training.trainer import quiet

    quiet()
    opened = open_run(Path(run).expanduser())
    opened.base.hooks.stand(opened.adapter)
    model: Any = opened.model.eval()
    if not opened.spec.adapter.changes_base:
        model.save_pretrained = partial(unsaved, str(opened.folder))
    model.config.use_cache = True  # training has no use for it
    if hasattr(model, "generation_config"):
        model.generation_config.use_cache = True
    return model, opened.base.tokenizer


@_alone()
def lightning(overrides: Sequence[str] = ()) -> "tuple[AdapterModule, TrialData]":
    """(module, data) for a ``lightning.Trainer`` of one's own: ``Trainer(max_steps=60).fit(module, data)`` makes the
    steps of ``loralab.train([*overrides, "trainer.max_steps=60"])``.

    Steps, accumulation, precision, device, validations and loggers are that Trainer's, whatever ``trainer.*``,
    ``logger.*`` and ``callbacks.*`` say among ``overrides``. Nothing is written but what that Trainer writes;
    ``module.save_adapter(folder)`` exports. Raises ConfigError, DataError.
    """
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose

    _check_words(overrides)
    with _translated([*overrides]):
        spec = trial_spec(compose([*overrides]), Path(), [*overrides])
        from loralab.running.own_trainer import module_and_data

        return module_and_data(spec)


def _run(words: list[str], fresh: bool, many: bool) -> "Session":
    from loralab.scheduling.session import Session
    from loralab.signals import listening

    session = Session(fresh=fresh, many=many)
    try:
        with listening(), _untouched(), _translated(words):
            session.run([*(["-m"] if many else []), *words])
    except errors.Interrupted as stopped:
        raise KeyboardInterrupt(str(stopped)) from stopped
    return session


def _with_folders(session: "Session") -> Iterator[tuple[dict[str, Any], Path]]:
    """The records of a sweep's trials, each with the run folder that sweep.json names."""
    if session.folder is None:
        return
    from loralab.records.record import read_sweep

    folder = session.folder.absolute()
    places = {entry["trial"]: folder / entry["folder"] for entry in read_sweep(folder)["trials"]}
    # copies, since equal parts of the session's records are one object
    yield from ((deepcopy(record), places.get(record["trial"], folder)) for record in session.records)


@contextmanager
def _untouched() -> Iterator[None]:
    """Hydra sets up logging and reads sys.argv; both are the caller's again afterwards."""
    root, arguments = logging.getLogger(), sys.argv
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        sys.argv, root.handlers[:] = arguments, handlers
        root.setLevel(level)


@contextmanager
def _translated(words: list[str]) -> Iterator[None]:
    """Hydra's errors in loralab's words, as the command line has them."""
    from loralab.cli.hydra_errors import translate

    try:
        yield
    except Exception as error:
        translated = translate(error, words)
        if type(translated) is errors.LoralabError or translated is error:  # a fault of loralab's own
            raise
        raise translated from error


def _check_words(overrides: Sequence[str]) -> None:
    if isinstance(overrides, str):
        raise errors.ConfigError(f"overrides={overrides!r} is one text; valid: a list of them, as in [{overrides!r}]")
    if isinstance(overrides, Mapping) or not all(isinstance(word, str) for word in overrides):
        raise errors.ConfigError(f"overrides={overrides!r}; valid: a list of texts, as in ['adapter.r=8']")
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise errors.ConfigError(f"{word!r} is not understood; settings are key=value")


def _existing(folder: Folder) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise errors.ArtifactError(f"{path}: no such folder; expected the folder of a sweep or of a run")
    return path


def _error(record: dict[str, Any]) -> errors.LoralabError:
    """The exception of a failed run's exit code."""
    kinds = {kind.exit_code: kind for kind in errors.LoralabError.__subclasses__()}
    return kinds.get(int(record["exit_code"] or 1), errors.LoralabError)(str(record["error"]))
