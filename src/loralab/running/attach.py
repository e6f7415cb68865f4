"""A trial from its spec: its record opened, its adapter attached to the base."""

import os
import socket
from pathlib import Path
from typing import Any

from loralab.adapters.attached import attached
from loralab.data.encoding import Encoded
from loralab.models.loading import Base
from loralab.records import record
from loralab.records.environment import environment
from loralab.training.specs import TrialSpec
from loralab.training.trial import Trial


def open_record(spec: TrialSpec, index: int, size: int) -> dict[str, Any]:
    """Writes and returns the record of a trial that begins, the ``index``-th of a pack of ``size``."""
    entry = record.blank(spec.id, config=spec.config, overrides=spec.overrides, choices=spec.choices, seed=spec.seed)
    entry["pack"] = {"size": size, "index": index}
    entry["environment"], entry["code"]["sources"] = environment(), spec.sources()
    entry["cwd"] = str(Path.cwd())  # what relative paths among the overrides are relative to
    entry["pid"], entry["host"] = os.getpid(), socket.gethostname()
    record.write(spec.folder, entry)
    return entry


def attach_trial(base: Base, spec: TrialSpec, data: Encoded, entry: dict[str, Any]) -> Trial:
    """A trial at its first step, its adapter attached to ``base`` and described in ``entry``. Raises ConfigError."""
    adapter = attached(spec.adapter, base.model, spec.seed)
    base.model.to(spec.trainer.device)
    adapter.to(spec.trainer.device)
    entry["base"] = base.record()
    entry["adapter"].update(
        method=spec.adapter.method,
        trainable_parameters=adapter.trainable_parameters(),
        bytes=sum(p.numel() * p.element_size() for p in adapter.parameters()),
        modules=adapter.module_names,
    )
    entry["data"].update(
        name=data.splits.name,
        fingerprint=data.splits.fingerprint,
        targets=data.targets,
        rows={split: len(data[split]) for split in ("train", "validation", "test")},
        truncated=data.truncated,
        max_length=spec.model.length,
    )
    if labels := data.splits.labels if spec.model.task == "sequence_classification" else []:
        classes = {"id2label": dict(enumerate(labels)), "label2id": {name: at for at, name in enumerate(labels)}}
        entry["data"].update(classes)
    return Trial(spec, adapter, data, _pad_token_id(base), entry)


def _pad_token_id(base: Base) -> int:
    """The token that rows are padded with. A causal classifier finds a row's last token by its config's own
    pad_token_id, whatever the tokenizer pads with; where that is no token, the config is given the tokenizer's."""
    config: Any = base.model.config
    pad: int | None = config.get_text_config().pad_token_id
    if base.spec.task != "sequence_classification":
        return int(base.tokenizer.pad_token_id)
    if pad is None or not 0 <= pad < base.model.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        pad = config.pad_token_id = config.get_text_config().pad_token_id = base.tokenizer.pad_token_id
    return int(pad)
