"""One pack from its check to its records; a single run is a pack of one."""

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from loralab.data.base import FORGETTING
from loralab.errors import ConfigError, Interrupted, LoralabError, explain
from loralab.forward import compiled
from loralab.forward.head import frozen_head
from loralab.models.batching import check_rows
from loralab.models.loading import Base
from loralab.models.sharded import shard
from loralab.planning import resident
from loralab.planning.foresee import Foresight, check_packing, predicted
from loralab.quantization.linear import keep_dense
from loralab.records import record
from loralab.records.metric_logger import prepare
from loralab.running.attach import attach_trial, open_record
from loralab.running.finish import close_record
from loralab.running.fit import Fit
from loralab.running.forgetting import described
from loralab.running.inputs import Inputs, TrialData, check_labels, check_metrics
from loralab.training import checkpoint
from loralab.training.epochs import settled
from loralab.training.observer import can_go_on
from loralab.training.specs import TrialSpec
from loralab.training.trainer import quiet
from loralab.training.trial import Trial

log = logging.getLogger(__name__)


class Runner:
    """Runs packs one after the other and keeps what the next one can use (``inputs``, ``foresight``)."""

    def __init__(self, progress: bool = False) -> None:
        """``progress``: Lightning's bar on the terminal."""
        self.progress = progress
        self.inputs = Inputs()
        self.foresight = Foresight()

    def run(self, specs: list[TrialSpec]) -> list[dict[str, Any]]:
        """Fits ``specs`` together and returns their records, which are also on disk. A trial's failure is in its
        record; only an interruption leaves as an exception, after every record has been written."""
        started = time.monotonic()
        records = [open_record(spec, index, len(specs)) for index, spec in enumerate(specs)]
        data: list[TrialData] = []
        try:
            self._run_pack(specs, records, data, started)
        except (Exception, KeyboardInterrupt, SystemExit, Interrupted) as error:  # Lightning exits at Ctrl-C
            self._close(specs, records, data, error)
        finally:
            if any(spec.adapter.changes_base for spec in specs):
                self.inputs.forget_base()
        return records

    def _run_pack(
        self, specs: list[TrialSpec], records: list[dict[str, Any]], data: list[TrialData], started: float
    ) -> None:
        """Check, read, load, attach, resume, then fit, score, export and record. Fills ``data``."""
        quiet()
        prepare(specs[0].logger)
        check_pack(specs)
        for spec in specs:
            spec.check_positions()
            check_packing(spec)
        specs[0].trainer.check_precision()
        specs[0].memory.check(specs[0].trainer.device)
        compiled.check(specs[0].model.compile, specs[0].trainer.device)
        data += [self.inputs.data(spec) for spec in specs]
        rows = [trial_data.encoded for trial_data in data]
        specs = [settled(spec, encoded) for spec, encoded in zip(specs, rows, strict=True)]
        check_pack(specs)  # by their steps too
        _name_limits(data[0].limited)
        shares = [spec.own_share for spec in specs]
        device, held = specs[0].trainer.device, self.inputs.base_bytes
        dequantize = self.foresight.dequantize(shares, rows, device, held)
        plan = self.foresight.check(resident.settled(shares, dequantize), rows, device, held)
        for stored, trial_data in zip(records, data, strict=True):
            stored["data"].update(source=trial_data.source, tokenizer=trial_data.tokenizer)
            stored["data"]["limited"] = trial_data.limited
            stored["data"][FORGETTING] = described(trial_data.encoded, trial_data.forgetting_source)
            stored["memory"].update(predicted(plan))
        base = self.inputs.base(specs[0], len(rows[0].splits.labels) or None)
        keep_dense(base.model, dequantize)
        check_labels(base, rows)
        check_metrics(base, specs)
        bare = [self.inputs.bare_scores(base, *parts) for parts in zip(specs, rows, strict=True)]
        trials: list[Trial] = []
        try:
            with base.hooks.given(decomposed={}):  # for these trials alone
                # one by one, so that the adapters before a refused one are detached too
                trials.extend(attach_trial(base, *parts) for parts in zip(specs, rows, records, strict=True))
            check_batches(base, trials)
            for trial, scores in zip(trials, bare, strict=True):
                trial.bare_scores = scores
                _resume(trial)
                if not trial.step:
                    trial.record.pop("pauses", None)
            if specs[0].trainer.spreads:
                shard(base.model, specs[0].trainer.device, specs[0].trainer.processes)
            self._fit(base, trials, started)
        finally:
            with ExitStack() as closing:  # of every trial, whatever another's raises
                for trial in reversed(trials):
                    closing.callback(trial.close_loggers)
                    closing.callback(trial.adapter.detach)

    def _fit(self, base: Base, trials: list[Trial], started: float) -> None:
        """Fits until every record is closed: packs that do not run together are divided and go on in parts."""
        waiting = parts_at_one_step(base, trials)
        if len(waiting) > 1:
            self._plan_again(base, waiting)
        while waiting:
            parts = Fit(base, waiting.pop(0), started, self.progress, self.foresight).run()
            if parts:
                self._plan_again(base, parts)
            waiting[:0] = parts

    def _plan_again(self, base: Base, parts: list[list[Trial]]) -> None:
        """Frees the memory of the divided pack, and predicts that of its parts."""
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        for trials in parts:
            specs = resident.settled([trial.spec for trial in trials], base.dequantize)
            rows, device, step = [trial.data for trial in trials], specs[0].trainer.device, trials[0].step
            plan = self.foresight.plan(specs, rows, device, step) if specs[0].plan.record else None
            for trial in trials:
                trial.record["memory"].update(predicted(plan))

    def _close(
        self, specs: list[TrialSpec], records: list[dict[str, Any]], data: list[TrialData], error: BaseException
    ) -> None:
        """Writes ``error`` into every record that is still running. Raises an interruption again."""
        failure = explain(error)
        for index, (spec, stored) in enumerate(zip(specs, records, strict=True)):
            if stored["status"] == "running":
                if isinstance(failure, LoralabError) and index < len(data):
                    stored["memory"]["alone_peak_bytes"] = self.foresight.alone(spec, data[index].encoded)
                close_record(stored, failure)
                record.write(spec.folder, stored)
        if not isinstance(failure, LoralabError):
            raise failure from error
        if failure.exit_code == 1:
            log.debug("trial %s failed", specs[0].id, exc_info=error)


def _name_limits(limited: dict[str, list[int]] | None) -> None:
    for split, (rows, whole) in (limited or {}).items():
        log.warning("a limit of the trainer leaves the first %d of %d %s rows", rows, whole, split)


def check_pack(specs: Sequence[TrialSpec]) -> None:
    """Raises ConfigError for trials that cannot be one pack."""
    if not specs:
        raise ConfigError("there is no trial to run")
    if len(specs) == 1:
        return
    if len({spec.pack_key for spec in specs}) > 1:
        raise ConfigError("the trials of one pack must share model, quantization, optimizer, precision and intervals")
    for spec in specs:
        if why := spec.why_alone:
            raise ConfigError(f"trial {spec.id} cannot share a pass: {why}")
        if not spec.quantization.packable:
            raise ConfigError(f"trial {spec.id} cannot share a pass: quantization={spec.quantization.name}")


def check_batches(base: Base, trials: Sequence[Trial]) -> None:
    """Raises ConfigError where the loss of a row would depend on the rows beside it."""
    for trial in trials:
        rows = (example.input_ids for split in ("train", "validation", "test") for example in trial.data[split])
        check_rows(base.model, trial.task, rows, trial.spec.data.batch_size, len(trials) > 1 or trial.spec.data.packing)


def _resume(trial: Trial) -> None:
    """Continues the trial from the checkpoint of an earlier run, where there is a valid one."""
    spec = trial.spec
    if not spec.memory.continues:
        return
    unkept = [name for name, make in spec.callbacks.items() if not can_go_on(make())]
    if unkept and checkpoint.path(spec.folder).is_file():
        log.info(
            "%s begins anew: callbacks.%s has no state_dict, so that what it holds is in no checkpoint",
            *(spec.id, unkept[0]),
        )
    elif checkpoint.resume(trial):
        trial.record["resumed_from"] = trial.step


def parts_at_one_step(base: Base, trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials in packs whose members stand at the same step (checkpoints may be of several) and have as many virtual
    tokens, since the rows of a pass are of one width. Trials that need padding or dense logits are in packs of their
    own: the other trials would not be bit-identical beside them."""
    parts: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        dense, spec = frozen_head(base.model, [trial.adapter]) is None, trial.spec.adapter
        parts.setdefault((trial.step, spec.tokenwise, dense, spec.before_rows), []).append(trial)
    _name_virtual([key[-1] for key in parts])
    for part in parts.values():
        for index, trial in enumerate(part):
            trial.record["pack"].update(size=len(part), index=index)
    return list(parts.values())


def _name_virtual(found: Sequence[tuple[str, int] | None]) -> None:
    """Says why trials of one pack are fitted one after the other."""
    kinds = dict.fromkeys(f"{one[1]} ({one[0]})" if one else "none" for one in found)
    if len(kinds) > 1:
        log.info(
            "trials with virtual tokens share a pass with those that have as many, by the same method; the others run "
            "before or after them: %s",
            ", ".join(kinds),
        )
