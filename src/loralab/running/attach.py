"""From a trial's spec to a Trial: opens its record and attaches its adapter to the base."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.adapters.attached import attached
from loralab.adapters.base import Adapter
from loralab.data.encoding import Encoded
from loralab.errors import ArtifactError
from loralab.models.loading import Base
from loralab.records import process
from loralab.records import record as records
from loralab.records.environment import environment
from loralab.training.layer_inputs import LayerInputs
from loralab.training.specs import TrialSpec
from loralab.training.together import rank_and_size
from loralab.training.trial import Trial


def open_record(spec: TrialSpec, index: int, size: int) -> dict[str, Any]:
    """Writes and returns the record of a trial that begins, the ``index``-th of a pack of ``size``."""
    record = records.blank(spec.id, config=spec.config, overrides=spec.overrides, choices=spec.choices, seed=spec.seed)
    record["config"] = {**record["config"], **_without_pause(record["config"])}
    if pauses := _earlier_pauses(spec):
        record["pauses"] = pauses
    record["pack"] = {"size": size, "index": index}
    record["environment"] = {**environment(), "processes": rank_and_size()[1]}
    record["code"], record["flags"] = {"sources": spec.sources(), "files": spec.files}, spec.flags
    record["cwd"] = str(Path.cwd())  # what relative paths among the overrides are relative to
    record["pid"], record["host"] = os.getpid(), socket.gethostname()
    record["process"] = process.mark(os.getpid())
    records.write(spec.folder, record)
    return record


def _without_pause(config: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's settings as of a run that is not paused: where it is says nothing of the trial."""
    trainer = config.get("trainer")
    return {"trainer": {**trainer, "until": None}} if isinstance(trainer, Mapping) and "until" in trainer else {}


def _earlier_pauses(spec: TrialSpec) -> list[dict[str, Any]]:
    """Of an earlier run of this trial in its folder; empty where there is none."""
    try:
        earlier = records.read(spec.folder)
    except ArtifactError:
        return []
    return list(earlier.get("pauses") or []) if earlier["trial"] == spec.id else []


def attach_adapter(base: Base, spec: TrialSpec, data: Encoded) -> Adapter:
    """The adapter of ``spec`` at its start, which may be computed from the rows. Raises ConfigError."""
    inputs = LayerInputs(base.model, data.train, spec.model.task, spec.seed) if len(data.train) else None
    with base.hooks.given(layer_inputs=inputs):
        return attached(spec.adapter, base.model, spec.seed)


def attach_trial(base: Base, spec: TrialSpec, data: Encoded, record: dict[str, Any]) -> Trial:
    """A trial at its first step, its adapter attached to ``base`` and described in ``record``. Raises ConfigError."""
    adapter = attach_adapter(base, spec, data)
    base.model.to(spec.trainer.base_device)
    adapter.to(spec.trainer.device)
    record["base"] = {**base.record(), "precision": spec.trainer.precision_on(spec.trainer.device)}
    record["adapter"].update(
        method=spec.adapter.method,
        trainable_parameters=adapter.trainable_parameters(),
        bytes=sum(p.numel() * p.element_size() for p in adapter.parameters()),
        modules=adapter.module_names,
        note=adapter.note or None,
    )
    record["data"].update(
        name=data.splits.name,
        fingerprint=data.splits.fingerprint,
        targets=data.targets,
        rows={split: len(data[split]) for split in ("train", "validation", "test")},
        truncated=data.truncated,
        max_length=spec.model.length,
    )
    if labels := data.splits.labels if spec.model.task == "sequence_classification" else []:
        label2id = {name: index for index, name in enumerate(labels)}
        record["data"].update(id2label=dict(enumerate(labels)), label2id=label2id)
    trial = Trial(spec, adapter, data, pad_token_id(base), record)
    if spec.packing_length is not None:
        record["data"]["packing"] = _packing(trial, spec.packing_length)
    return trial


def _packing(trial: Trial, length: int) -> dict[str, float]:
    """Rows and sequences of the first epoch, and the share of the sequences' ``length`` tokens that rows fill."""
    order = trial.data_cursor.order
    sequences = order.count()
    fill = int(order.lengths.sum()) / (sequences * length) if sequences else 0.0
    return {"rows": len(order.lengths), "sequences": sequences, "fill": round(fill, 4)}


def pad_token_id(base: Base) -> int:
    """The token that rows are padded with. A causal classifier finds the last token of a row by its config's
    pad_token_id, so that is used; where it is not a token of the base, the config is given the tokenizer's."""
    config: Any = base.model.config
    pad: int | None = config.get_text_config().pad_token_id
    if base.spec.task != "sequence_classification":
        return int(base.tokenizer.pad_token_id)
    if pad is None or not 0 <= pad < base.model.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        pad = config.pad_token_id = config.get_text_config().pad_token_id = base.tokenizer.pad_token_id
    return int(pad)
