"""Assemble and fit a list of trials on one frozen base; a single run is a list of one."""

import gc
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters.attached import attached
from loralab.data.base import DataSpec
from loralab.data.encoding import Encoded
from loralab.errors import ConfigError, DataError, Interrupted, LoralabError, explain
from loralab.forward.graph import check_causal
from loralab.forward.head import frozen_head
from loralab.models import pretrained
from loralab.models.batching import check_rows
from loralab.models.feeding import encoded_rows
from loralab.planning.foresee import Foresight
from loralab.quantization.base import is_frozen
from loralab.quantization.linear import resident_bytes
from loralab.quantization.none import NoQuantization
from loralab.quantization.reads import refuse_read
from loralab.records import record
from loralab.records.environment import environment
from loralab.running.fit import Fit, Part, close_record
from loralab.training import checkpoint
from loralab.training.specs import TrialSpec
from loralab.training.trainer import quiet
from loralab.training.trial import Trial

log = logging.getLogger(__name__)


class Runner:
    """Runs packs one after the other and keeps what the next one can use: the base, its tokenizer, encoded data."""

    def __init__(self, progress: bool = False) -> None:
        self.progress = progress
        self._base: pretrained.Base | None = None
        self._base_key: tuple[Any, ...] = ()
        self._tokenizers: dict[str, Any] = {}
        self._prints: dict[int, str | None] = {}  # {tokenizer: fingerprint of its files when they were read}
        self._data: dict[str, tuple[Encoded, str | None]] = {}  # with the fingerprint of what they were read from
        self._known: dict[str, Encoded] = {}  # of the trials under way
        self.foresight = Foresight()

    def run(self, specs: list[TrialSpec]) -> list[dict[str, Any]]:
        """Fits ``specs`` together and returns their records, which are also on disk. A trial's failure is in its
        record; only an interruption leaves as an exception, after every record has been written."""
        started, self._known = time.monotonic(), {}
        records = [_new_record(spec, index, len(specs)) for index, spec in enumerate(specs)]
        for spec, entry in zip(specs, records, strict=True):
            record.write(spec.folder, entry)
        try:
            self._fit(specs, records, started)
        except (Exception, KeyboardInterrupt, Interrupted) as error:
            failure = explain(error)
            for spec, entry in zip(specs, records, strict=True):
                if entry["status"] == "running":
                    if isinstance(failure, LoralabError) and spec.id in self._known:
                        entry["memory"]["alone_peak_bytes"] = self.foresight.alone(spec, self._known[spec.id])
                    close_record(entry, failure)
                    record.write(spec.folder, entry)
            if not isinstance(failure, LoralabError):
                raise failure from error
            if failure.exit_code == 1:
                log.debug("trial %s failed", specs[0].id, exc_info=error)
        finally:
            if any(spec.adapter.changes_base for spec in specs):
                self.forget()
        return records

    def forget(self) -> None:
        """Drops the base."""
        self._base, self._base_key = None, ()
        gc.collect()

    def _fit(self, specs: list[TrialSpec], records: list[dict[str, Any]], started: float) -> None:
        quiet()
        _check_pack(specs)
        device = specs[0].trainer.device
        specs[0].trainer.check_precision()
        specs[0].memory.check(device)
        tokenizer = self._tokenizer(specs[0].model)
        read = [self._read(spec, tokenizer) for spec in specs]
        data = [encoded for encoded, _ in read]
        for entry, (_, source) in zip(records, read, strict=True):
            entry["data"].update(source=source, tokenizer=self._prints[id(tokenizer)])
        self._known = {spec.id: own for spec, own in zip(specs, data, strict=True)}
        held = self._base.size.bytes + resident_bytes(self._base.model) if self._base is not None else 0
        plan = self.foresight.check(specs, data, device, held)
        for entry in records:
            entry["memory"]["predicted_peak_bytes"] = plan.predicted_peak_bytes if plan else None
        base = self._load(specs[0], tokenizer, data[0], device)
        _check_labels(base, data)
        trials = [_trial(base, spec, own, entry) for spec, own, entry in zip(specs, data, records, strict=True)]
        for spec, own in zip(specs, data, strict=True):
            rows = (one.input_ids for split in (own.train, own.validation, own.test) for one in split)
            check_rows(base.model, spec.model.task, rows, spec.data.batch_size, len(specs) > 1)
        for spec, trial in zip(specs, trials, strict=True):
            if spec.memory.continues and _own_callbacks(spec):
                log.info("%s begins anew: what its own callbacks hold is in no checkpoint", spec.id)
            elif spec.memory.continues and checkpoint.resume(trial):
                trial.record["resumed_from"] = trial.step
        waiting = _alike(base.model, specs, trials)
        if len(waiting) > 1:
            self._divided(waiting)
        try:
            while waiting:
                parts = Fit(base, waiting.pop(0), started, self.progress, self.foresight).run()
                if parts:
                    self._divided(parts)
                waiting[:0] = parts
        finally:
            for trial in trials:
                trial.adapter.detach()
                trial.close(trial.failure.exit_code if trial.failure else 0)

    def _divided(self, parts: list[Part]) -> None:
        """What the pack held is given back, and its parts are foreseen anew."""
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        for part in parts:
            specs, data = [spec for spec, _ in part], [trial.data for _, trial in part]
            start, device = part[0][1].step, specs[0].trainer.device
            plan = self.foresight.plan(specs, data, device, start) if specs[0].plan.record else None
            for _, trial in part:
                trial.record["memory"]["predicted_peak_bytes"] = plan.predicted_peak_bytes if plan else None

    def _tokenizer(self, spec: pretrained.Pretrained) -> Any:
        spec.check()
        key = f"{type(spec)} {spec.tokenizer} {spec.path} {spec.trust_remote_code}"
        if key not in self._tokenizers:
            self._tokenizers[key] = spec.load_tokenizer()
            self._prints[id(self._tokenizers[key])] = spec.tokenizer_fingerprint()
        return self._tokenizers[key]

    def encoded(self, spec: TrialSpec) -> Encoded:
        """The trial's data in token ids, read once for all trials that share it."""
        return self._read(spec, self._tokenizer(spec.model))[0]

    def _read(self, spec: TrialSpec, tokenizer: Any) -> tuple[Encoded, str | None]:
        key = f"{type(spec.data)} {spec.data} {spec.model.task} {spec.model.length} {tokenizer.name_or_path}"
        own = spec.data.from_base or spec.model.task == "sequence_classification"  # whose head may name the classes
        key += repr(spec.model) if own else ""
        if key not in self._data:
            source = spec.data.source()  # before the rows are read: what changes meanwhile is then seen to have changed
            encoded = encoded_data(spec.data, spec.model, tokenizer, spec.trainer.device)
            self._data = {key: (encoded, source)}  # one at a time: sweeps seldom change the data
        _check_splits(spec, self._data[key][0])
        return self._data[key]

    def _load(self, spec: TrialSpec, tokenizer: Any, data: Encoded, device: str) -> pretrained.Base:
        labels = len(data.splits.labels) or None
        kinds = (type(spec.model), type(spec.quantization))  # of which two may have one name
        key = (*kinds, repr(spec.model), repr(spec.quantization), labels, device, spec.trainer.precision)
        if self._base is None or key != self._base_key:
            self.forget()
            self._base = pretrained.load(spec.model, spec.quantization, tokenizer, labels, device)
            model: Any = self._base.model.to(device)
            if getattr(model.config, "output_router_logits", False):
                model.config.output_router_logits = False
                log.info("the router loss of %s is not part of train/loss", type(model).__name__)
            if getattr(model.config, "problem_type", None) == "multi_label_classification":
                log.warning("the base's config says problem_type=multi_label_classification; a row has one class here")
            refuse_read(model, {name: layer for name, layer in model.named_modules() if is_frozen(layer)})
            if spec.model.task == "causal_lm":
                check_causal(model)
            self._base_key = key
        return self._base


def _check_splits(spec: TrialSpec, data: Encoded) -> None:
    """Raises DataError for a split that this trial needs and that has no row, or nothing to predict in any."""
    needed = ["train", "validation"] if spec.trainer.max_steps else ["validation"]
    needed += ["test"] if spec.trainer.test and (len(data.test) or spec.metric.startswith("test/")) else []
    for split in needed:
        if not len(data[split]):
            raise DataError(f"data: the {split} split of {data.splits.name} is empty")
        if not data.tokens[split]["target_tokens"]:
            raise DataError(
                f"data: the {split} split of {data.splits.name} has not one token to predict;"
                f" model.max_length={spec.model.length} may leave none of its targets"
            )


def _own_callbacks(spec: TrialSpec) -> bool:
    """Whether callbacks that do not know packs, which may decide when to stop, have seen the steps before."""
    begun = checkpoint.path(spec.folder).is_file()
    return begun and any(not getattr(made(), "pack_aware", False) for made in spec.callbacks.values())


def _alike(model: nn.Module, specs: list[TrialSpec], trials: list[Trial]) -> list[Part]:
    """Trials that stand at one step train together; checkpoints may be of several. Those that need padding or dense
    logits would bring them to the others, whose bits they change."""
    found: dict[tuple[int, bool, bool], list[tuple[TrialSpec, Trial]]] = {}
    for spec, trial in zip(specs, trials, strict=True):
        kind = (trial.step, spec.adapter.tokenwise, frozen_head(model, [trial.adapter]) is None)
        found.setdefault(kind, []).append((spec, trial))
    for part in found.values():
        for index, (_, trial) in enumerate(part):
            trial.record["pack"].update(size=len(part), index=index)
    return list(found.values())


def encoded_data(data: DataSpec, model: pretrained.Pretrained, tokenizer: Any, device: str) -> Encoded:
    """The rows of ``data`` in token ids; where it draws them from the base, that is loaded, unquantized."""
    if not data.from_base:
        return encoded_rows(data, model, tokenizer)
    base = pretrained.load(model, NoQuantization(), tokenizer, device=device).model.to(device)
    sampled: Encoded = data.sample(base, tokenizer, model.task, model.length)
    return sampled


def _new_record(spec: TrialSpec, index: int, size: int) -> dict[str, Any]:
    entry = record.blank(spec.id, config=spec.config, overrides=spec.overrides, choices=spec.choices, seed=spec.seed)
    entry["pack"] = {"size": size, "index": index}
    entry["environment"], entry["code"]["sources"] = environment(), spec.sources()
    entry["cwd"] = str(Path.cwd())  # what relative paths among the overrides are relative to
    entry["pid"], entry["host"] = os.getpid(), socket.gethostname()
    return entry


def _trial(base: pretrained.Base, spec: TrialSpec, data: Encoded, entry: dict[str, Any]) -> Trial:
    adapter = attached(spec.adapter, base.model, spec.seed)
    device = spec.trainer.device
    base.model.to(device)
    adapter.to(device)
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
        rows={split: len(getattr(data, split)) for split in ("train", "validation", "test")},
        truncated=data.truncated,
        max_length=spec.model.length,
    )
    if labels := data.splits.labels if spec.model.task == "sequence_classification" else []:
        classes = {"id2label": dict(enumerate(labels)), "label2id": {name: at for at, name in enumerate(labels)}}
        entry["data"].update(classes)
    return Trial(spec.settings(), adapter, data, spec.model.task, _padding(base), entry)


def _padding(base: pretrained.Base) -> int:
    """The token that rows are padded with. A causal classifier finds a row's last token by its config's own
    pad_token_id, whatever the tokenizer pads with."""
    config: Any = base.model.config
    own = config.get_text_config().pad_token_id
    if base.spec.task != "sequence_classification":
        return int(base.tokenizer.pad_token_id)
    if own is None or not 0 <= own < base.model.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        own = config.pad_token_id = config.get_text_config().pad_token_id = base.tokenizer.pad_token_id
    return int(own)


def _check_pack(specs: list[TrialSpec]) -> None:
    if not specs:
        raise ConfigError("there is no trial to run")
    flat = next((spec for spec in specs if spec.optimizer.flat and spec.trainer.precision == "16-mixed"), None)
    if flat is not None:
        raise ConfigError(
            "optimizer.flat=true does not go with trainer.precision=16-mixed, whose loss scaler looks for gradients in "
            "the optimizer's own buffers; valid: bf16-mixed or 32-true, or optimizer.flat=false"
        )
    if len(specs) == 1:
        return
    if len({spec.shares for spec in specs}) > 1:
        raise ConfigError("the trials of one pack must share model, quantization, optimizer, precision and intervals")
    measured = [spec for spec in specs if spec.memory.alone]
    if measured:
        raise ConfigError(f"trial {measured[0].id} cannot share a pass: {measured[0].memory.alone}")
    alone = [spec for spec in specs if not (spec.adapter.packable and spec.quantization.packable)]
    if alone:
        raise ConfigError(
            f"trial {alone[0].id} cannot share a pass: adapter={alone[0].adapter.method}, "
            f"quantization={alone[0].quantization.name}"
        )


def _check_labels(base: pretrained.Base, data: list[Encoded]) -> None:
    if base.spec.task != "sequence_classification":
        return
    count = int(base.model.config.num_labels)  # type: ignore[union-attr, arg-type]
    for own in data:
        if len(own.splits.labels) > count:
            raise ConfigError(
                f"model.num_labels={count}, but the data has {len(own.splits.labels)} labels: {own.splits.labels}"
            )
