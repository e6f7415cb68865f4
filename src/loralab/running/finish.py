"""The end of a trial: its generated text is scored, its adapter exported, its record closed."""

import json
import math
import time
from collections.abc import Iterable
from typing import Any

from loralab.adapters.export import save
from loralab.data.base import Row
from loralab.data.encoding import Encoder
from loralab.errors import DataError, DiskError, Interrupted, LoralabError, explain
from loralab.forward import texts
from loralab.models.feeding import name_classes
from loralab.models.loading import Base
from loralab.optim.optimizers import State
from loralab.records import card, wandb_run
from loralab.records import record as records
from loralab.training import checkpoint, generation
from loralab.training.choices import choice_accuracy
from loralab.training.module import PAUSE
from loralab.training.trial import Trial

PREDICTIONS = "predictions.jsonl"
LAST = "adapter_last"  # folder of the last state, where adapter/ holds the best one


def generate(trial: Trial, base: Base, prefix: str, split: str) -> None:
    """Generates the first ``data.generate_rows`` rows of ``split`` and adds their scores to the trial's metrics."""
    spec, score = trial.spec, f"{prefix}/rouge_l"
    rows = getattr(trial.data.splits, split)[: spec.data.generate_rows]
    if not rows or trial.failure is not None or trial.task == "sequence_classification":
        return
    if score in trial.metrics:  # of an earlier fit
        return
    writer = generation.Writer(
        base.model, base.tokenizer, trial.adapter, trial.task, spec.model.length, spec.data.generation
    )
    trial.record["data"].update(generation=writer.settings(), rouge=spec.data.rouge, bleu=spec.data.bleu)
    with spec.trainer.autocast():
        made, targets = generation.answers(writer, rows)
    trial.predictions[split] = generation.predictions(rows, made, targets, split)
    values = texts.scores(made, targets, spec.data.rouge, spec.data.bleu)
    values |= texts.own_scores(spec.own_metrics(texts=True), made, targets)
    if spec.metric == f"{prefix}/number_match" and math.isnan(values["number_match"]):
        trial.fail(
            DataError(f"metric={spec.metric}: none of the {len(rows)} rows of {split} has a number in its target")
        )
        return
    trial.score({f"{prefix}/{name}": value for name, value in values.items()})


def choose(trial: Trial, base: Base, prefix: str, rows: Iterable[Row], size: int) -> None:
    """Adds to the trial's metrics how often the likeliest of a row's choices is its target; ``size``: answers in a
    pass."""
    rows = [row for row in rows if row.choices]
    name = f"{prefix}/choice_accuracy"
    if not rows or trial.failure is not None or name in trial.metrics:
        return
    spec = trial.spec
    encoder = Encoder(base.tokenizer, trial.task, spec.model.length)
    with spec.trainer.autocast():
        share = choice_accuracy(base.model, trial.adapter, encoder, rows, size)
    trial.score({name: share})


def keep_predictions(trial: Trial) -> None:
    """Writes what the trial generated as its predictions.jsonl, in place of an earlier run's."""
    path = trial.spec.folder / PREDICTIONS
    lines = [json.dumps(one) + "\n" for split in trial.predictions.values() for one in split]
    if lines:
        records.replace_text(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)


def add_predictions(trial: Trial) -> None:
    """Writes what the trial generated behind what its predictions.jsonl has of other splits."""
    path = trial.spec.folder / PREDICTIONS
    if not trial.predictions:
        return
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in before if json.loads(line).get("split") not in trial.predictions]
    made = [json.dumps(one) for split in trial.predictions.values() for one in split]
    records.replace_text(path, "".join(f"{line}\n" for line in [*kept, *made]))


def finish(trial: Trial, base: Base) -> None:
    """Exports the adapter and closes the record."""
    record = trial.record
    trial.write_held()  # a kill behind the record would lose it, and no later run writes it again
    keep_predictions(trial)
    if trial.failure is None:
        _export(trial, base)
    if trial.failure is None or trial.last_validated_step == trial.step:  # else the scores are of an earlier state
        record["metrics"] = dict(trial.metrics)
    if trial.step < trial.max_steps and trial.failure is None:
        record["stopped_early"] = _stopped_early(trial)
    if trial.best is not None:
        record["best"] = _best(trial)
    record["time"]["wall_s"] = trial.clock.total(time.monotonic())["wall_s"]
    if trial.failure is None:
        _write_card(trial)
    close_record(record, trial.failure)
    for logger in trial.loggers:
        logger.summarize(wandb_run.summary(record))
        if spikes := record["memory"].get("spikes"):
            logger.table("memory/spikes", list(spikes[0]), [list(spike.values()) for spike in spikes])
    try:
        records.write(trial.spec.folder, record)
    except DiskError as error:  # completed is only what is on the disk
        close_record(record, error)
        raise
    if trial.failure is None:
        checkpoint.forget(trial.spec.folder)


def pause(trial: Trial, optimizer: State) -> None:
    """Writes the state of a trial that a later run goes on from, then its record, whose ``pauses`` have the scores at
    this step. ``optimizer``: its state on the host."""
    record = trial.record
    scores = {f"val/{name.partition('/')[2]}": value for name, value in trial.metrics.items() if name.startswith(PAUSE)}
    now = time.monotonic()
    trial.clock.mark(now)
    checkpoint.write(trial, optimizer)
    until, known = trial.spec.trainer.until, scores if trial.step == trial.end else {}
    own = {"until": until, "step": trial.step, "of": trial.max_steps, "metrics": known}
    others = [one for one in record.get("pauses") or [] if one["until"] != until]  # of few steps, some at this one
    record["pauses"] = sorted([*others, own], key=lambda one: (one["step"], one["until"]))
    record["time"]["wall_s"] = trial.clock.total(now)["wall_s"]
    record.update(status="interrupted", error=None, exit_code=0)
    records.write(trial.spec.folder, record)


def _stopped_early(trial: Trial) -> dict[str, Any]:
    """Why a trial ended before its last step."""
    rule = trial.stopped_by
    if rule is None:
        why = "trainer.max_time or a callback ended the training"
        return {"step": trial.step, "metric": None, "best": None, "why": why}
    return {"step": trial.step, "metric": rule.metric, "best": rule.best, "min_delta": rule.min_delta}


def _best(trial: Trial) -> dict[str, Any]:
    """Which state adapter/ holds where the best one is kept. ``metrics`` holds the last validation, and the test of
    the state in adapter/."""
    best, last, metric = trial.best, trial.last, trial.spec.metric
    assert best is not None
    return {
        **{"metric": metric, "step": best.step, "value": best.value},
        **{"last_step": trial.step, "last_value": trial.metrics.get(metric), "adapter": "adapter"},
        "last": LAST if last is not None else "adapter",
    }


def _export(trial: Trial, base: Base) -> None:
    """Writes the adapter. An error is the failure of this trial alone; the others are written all the same."""
    folder = trial.spec.folder / "adapter"
    trial.record["adapter"]["never_called"] = trial.adapter.never_called()
    name_classes(base.model, trial.data.splits.labels if trial.task == "sequence_classification" else [])
    try:
        trial.record["adapter"]["bytes"] = save(trial.adapter, folder, trial.spec.seed)
        if trial.spec.adapter.changes_base:
            base.tokenizer.save_pretrained(folder)
        if trial.last is not None:
            trial.adapter.load_state_dict(trial.last.state, strict=True)
            save(trial.adapter, folder.with_name(LAST), trial.spec.seed)
    except Exception as error:
        failure = explain(error)
        if not isinstance(failure, LoralabError):
            raise
        trial.fail(failure)


def _write_card(trial: Trial) -> None:
    """A card that cannot be written fails the trial, as its adapter would."""
    try:
        card.write(trial.spec.folder / "adapter", trial.record)
    except Exception as error:
        failure = explain(error)
        if not isinstance(failure, LoralabError):
            raise
        trial.fail(failure)


def close_record(record: dict[str, Any], failure: LoralabError | Interrupted | None) -> None:
    """Sets status, error and exit code in ``record``; ``failure`` None: the trial is completed."""
    if failure is None:
        record.update(status="completed", error=None, exit_code=0)
    else:
        record.update(status=failure.status, error=str(failure), exit_code=failure.exit_code)
