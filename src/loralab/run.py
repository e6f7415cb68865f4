"""Assemble and fit a list of trials on one frozen base; a single run is a list of one."""

import gc
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab import generation, models, optimizers, record
from loralab.adapters.base import AdapterSpec
from loralab.data.base import DataSpec
from loralab.data.encoding import Encoded, encode
from loralab.errors import ConfigError, DataError, DiskError, Interrupted, LoralabError, OutOfMemory
from loralab.interop.peft import save_adapter
from loralab.loggers.wandb import Wandb
from loralab.module import FineTuner
from loralab.planning.foresee import Foresight
from loralab.planning.plan import PlanSpec
from loralab.quantization.base import Quantizer
from loralab.quantization.none import NoQuantization
from loralab.telemetry.environment import environment
from loralab.telemetry.limits import MemorySpec
from loralab.trainers import TrainerSpec, quiet
from loralab.trial import EvaluationPasses, Settings, TrainPasses, Trial

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialSpec:
    """Everything a configuration says about one trial, built and checked, nothing loaded."""

    id: str
    folder: Path
    seed: int
    metric: str
    metric_mode: str
    model: models.Pretrained
    quantization: Quantizer
    adapter: AdapterSpec
    data: DataSpec
    optimizer: optimizers.AdamW
    schedule: optimizers.Schedule
    trainer: TrainerSpec
    logger: Wandb
    memory: MemorySpec = field(default_factory=MemorySpec)
    plan: PlanSpec = field(default_factory=lambda: PlanSpec(record=False))
    callbacks: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    sweep: str | None = None
    source: str | None = None  # digest of the data files, by which a rerun knows that they are the same

    def settings(self) -> Settings:
        """What the trial may differ in from others of its pack."""
        return Settings(
            id=self.id,
            folder=self.folder,
            seed=self.seed,
            optimizer=self.optimizer,
            schedule=self.schedule,
            max_steps=self.trainer.max_steps,
            batch_size=self.data.batch_size,
            gradient_clip_val=self.trainer.gradient_clip_val,
            accumulate_grad_batches=self.trainer.accumulate_grad_batches,
            log_every_n_steps=self.trainer.log_every_n_steps,
        )

    @property
    def shares(self) -> tuple[Any, ...]:
        """What the trials of one pack must agree in."""
        spec = self.trainer
        return (
            *(repr(self.model), repr(self.quantization), self.optimizer.name, type(self.data).__name__),
            *(spec.accumulate_grad_batches, spec.val_check_interval, spec.precision, spec.accelerator),
            self.optimizer.flat,
        )


class Runner:
    """Runs packs one after the other and keeps what the next one can use: the base, its tokenizer, encoded data."""

    def __init__(self, progress: bool = False) -> None:
        self.progress = progress
        self._base: models.Base | None = None
        self._base_key: tuple[Any, ...] = ()
        self._tokenizers: dict[str, Any] = {}
        self._data: dict[str, Encoded] = {}
        self.foresight = Foresight()

    def run(self, specs: list[TrialSpec]) -> list[dict[str, Any]]:
        """Fits ``specs`` together and returns their records, which are also on disk. A trial's failure is in its
        record; only an interruption leaves as an exception, after every record has been written."""
        started = time.monotonic()
        records = [_new_record(spec, index, len(specs)) for index, spec in enumerate(specs)]
        for spec, entry in zip(specs, records, strict=True):
            record.write(spec.folder, entry)
        try:
            self._fit(specs, records, started)
        except (Exception, KeyboardInterrupt, Interrupted) as error:
            failure = explain(error)
            for spec, entry in zip(specs, records, strict=True):
                if entry["status"] == "running":
                    _close_record(entry, failure)
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
        data = [self._encoded(spec, tokenizer) for spec in specs]
        held = self._base.size.bytes if self._base is not None else 0
        plan = self.foresight.check(specs, data, device, held)
        for entry in records:
            entry["memory"]["predicted_peak_bytes"] = plan.predicted_peak_bytes if plan else None
        base = self._load(specs[0], tokenizer, data[0], device)
        _check_labels(base, data)
        if len(specs) > 1 and base_dropout(base.model) > 0:
            raise ConfigError(
                f"the base's own dropout ({base_dropout(base.model):g}) cannot be drawn for each trial of a pack; "
                "model.dropout=0 switches it off"
            )
        trials = [_trial(base, spec, own, entry) for spec, own, entry in zip(specs, data, records, strict=True)]
        try:
            Fit(base, specs, trials, started, self.progress).run()
        finally:
            for trial in trials:
                trial.adapter.detach()
                trial.close(trial.failure.exit_code if trial.failure else 0)

    def _tokenizer(self, spec: models.Pretrained) -> Any:
        spec.check()
        key = f"{spec.tokenizer} {spec.path} {spec.trust_remote_code}"
        if key not in self._tokenizers:
            self._tokenizers[key] = spec.load_tokenizer()
        return self._tokenizers[key]

    def encoded(self, spec: TrialSpec) -> Encoded:
        """The trial's data in token ids, read once for all trials that share it."""
        return self._encoded(spec, self._tokenizer(spec.model))

    def _encoded(self, spec: TrialSpec, tokenizer: Any) -> Encoded:
        key = f"{spec.data} {spec.model.task} {spec.model.max_length} {tokenizer.name_or_path}"
        key += repr(spec.model) if spec.data.from_base else ""
        if key not in self._data:
            encoded = encoded_data(spec.data, spec.model, tokenizer, spec.trainer.device)
            self._data = {key: encoded}  # one at a time: sweeps seldom change the data
        for split in ("train", "validation") if spec.trainer.max_steps else ("validation",):
            if not len(getattr(self._data[key], split)):
                raise DataError(f"data: the {split} split of {self._data[key].splits.name} is empty")
        return self._data[key]

    def _load(self, spec: TrialSpec, tokenizer: Any, data: Encoded, device: str) -> models.Base:
        labels = len(data.splits.labels) or None
        key = (repr(spec.model), repr(spec.quantization), labels, device, spec.trainer.precision)
        if self._base is None or key != self._base_key:
            self.forget()
            self._base = models.load(spec.model, spec.quantization, tokenizer, labels, device)
            self._base_key = key
        return self._base


def encoded_data(data: DataSpec, model: models.Pretrained, tokenizer: Any, device: str) -> Encoded:
    """The rows of ``data`` in token ids; where it draws them from the base, that is loaded, unquantized."""
    if not data.from_base:
        return encode(data.splits(), tokenizer, model.task, model.max_length)
    base = models.load(model, NoQuantization(), tokenizer, device=device).model.to(device)
    sampled: Encoded = data.sample(base, tokenizer, model.task, model.max_length)
    return sampled


class Fit:
    """One fit of a pack: train, validate the final state, score, export, record."""

    def __init__(
        self, base: models.Base, specs: list[TrialSpec], trials: list[Trial], started: float, progress: bool
    ) -> None:
        self.base, self.specs, self.trials, self.started = base, specs, trials, started
        self.progress = progress
        self.callbacks = [build() for build in specs[0].callbacks.values()] + specs[0].memory.callbacks()
        self.module = FineTuner(base.model, trials)
        self.optimizer: dict[str, Any] = {}  # what came of its state

    def run(self) -> None:
        for spec, trial in zip(self.specs, self.trials, strict=True):
            name = " ".join(o for o in spec.overrides if not o.startswith("hydra")) or spec.id
            trial.open(spec.logger.start(spec.folder, name[:120], spec.sweep, spec.config))
        begun = time.monotonic()
        seconds = 0.0
        try:
            if any(trial.alive for trial in self.trials):
                self._train()
            seconds = time.monotonic() - begun
            self._evaluate("val", "validation")
            if self.specs[0].trainer.test and all(len(trial.data.test) for trial in self.trials):
                self._evaluate("test", "test")
        finally:  # what a run that ran out of memory used is the point of its record
            self._note(begun - self.started, seconds or time.monotonic() - begun)
        for spec, trial in zip(self.specs, self.trials, strict=True):
            self._finish(spec, trial)

    def _train(self) -> None:
        """Not called for max_steps=0, which scores the base as it is."""
        spec, config = self.specs[0], self.base.model.config
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        passes = spec.memory.passes(TrainPasses(self.trials), spec.model.max_length, positions)
        trainer = spec.trainer.build(self.callbacks, self.progress)
        self.module.train()  # Lightning keeps the mode it finds, and from_pretrained leaves evaluation mode
        try:
            with spec.memory.capped():
                trainer.fit(self.module, passes, EvaluationPasses(self.trials, "validation"))
        finally:
            if trainer.optimizers:
                self.optimizer = optimizers.describe(trainer.optimizers[0], spec.optimizer.name)

    def _note(self, startup: float, seconds: float) -> None:
        """Memory, time and optimizer state: the pack's, the same in each record. A profiled step is in no time."""
        memory: dict[str, Any] = self.specs[0].memory.record()
        left_out: dict[int, int] = {}
        for callback in self.callbacks:
            if hasattr(callback, "summary"):
                memory.update(callback.summary())
            seconds -= getattr(callback, "excluded_s", 0.0)
            left_out.update(getattr(callback, "excluded_tokens", {}))
        for index, trial in enumerate(self.trials):
            trial.record["optimizer"].update(self.optimizer)
            trial.record["memory"].update(memory)
            timed = trial.tokens - left_out.get(index, 0)
            trial.record["time"].update(
                startup_s=startup,
                train_s=seconds,
                steps=trial.step,
                tokens=trial.tokens,
                tokens_per_s=timed / seconds if seconds > 0 else None,
            )

    def _evaluate(self, prefix: str, split: str) -> None:
        """Scores the final state over a split, unless the last validation of the fit did."""
        self.module.split = prefix
        if prefix != "val" or self.module.validated != [trial.step for trial in self.trials]:
            observers = [callback for callback in self.callbacks if hasattr(callback, "summary")]
            evaluator = self.specs[0].trainer.build(observers, progress=False, evaluating=True)
            evaluator.validate(self.module, EvaluationPasses(self.trials, split), verbose=False)
        for spec, trial in zip(self.specs, self.trials, strict=True):
            self._generate(spec, trial, prefix, split)

    def _generate(self, spec: TrialSpec, trial: Trial, prefix: str, split: str) -> None:
        rows = getattr(trial.data.splits, split)[: spec.data.generate_rows]
        if not rows or trial.failure is not None or spec.model.task == "sequence_classification":
            return
        base = self.base
        value = generation.score(
            base.model, base.tokenizer, trial.adapter, rows, spec.model.task, spec.model.max_length
        )
        trial.metrics[f"{prefix}/rouge_l"] = value
        trial.report({f"{prefix}/rouge_l": value})

    def _finish(self, spec: TrialSpec, trial: Trial) -> None:
        entry = trial.record
        if trial.failure is None:
            folder = spec.folder / "adapter"
            name = self.base.spec.name_or_path or "random"
            entry["adapter"]["bytes"] = save_adapter(trial.adapter, self.base.model, folder, trial.task, name)
            if spec.adapter.changes_base:
                self.base.tokenizer.save_pretrained(folder)
        entry["metrics"] = dict(trial.metrics)
        entry["time"]["wall_s"] = time.monotonic() - self.started
        _close_record(entry, trial.failure)
        for sink in trial.sinks:
            if hasattr(sink, "summarize"):
                sink.summarize({**trial.metrics, "status": entry["status"]})
                if spikes := entry["memory"].get("spikes"):
                    sink.table("memory/spikes", list(spikes[0]), [list(spike.values()) for spike in spikes])
        trial.save()


def explain(error: BaseException) -> LoralabError | Interrupted:
    """Any failure as one of loralab's: out of memory by its name, an unknown one as loralab's own (exit 1)."""
    if isinstance(error, LoralabError | Interrupted):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(2)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return OutOfMemory(
            f"out of memory: {' '.join(str(error).split())[:200]}; a smaller data.batch_size or model.max_length, "
            "model.gradient_checkpointing=true or a 4-bit quantization need less"
        )
    if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
        return DiskError(f"the disk is full: {' '.join(str(error).split())[:200]}; what was finished before is kept")
    wrapped = LoralabError(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    wrapped.__cause__ = error
    return wrapped


def _new_record(spec: TrialSpec, index: int, size: int) -> dict[str, Any]:
    entry = record.blank(spec.id, config=spec.config, overrides=spec.overrides, choices=spec.choices, seed=spec.seed)
    entry["pack"] = {"size": size, "index": index}
    entry["environment"] = environment()
    entry["cwd"] = str(Path.cwd())  # what relative paths among the overrides are relative to
    entry["pid"], entry["host"] = os.getpid(), socket.gethostname()
    return entry


def _close_record(entry: dict[str, Any], failure: LoralabError | Interrupted | None) -> None:
    entry["status"] = "completed" if failure is None else failure.status
    entry["error"] = None if failure is None else str(failure)
    entry["exit_code"] = 0 if failure is None else failure.exit_code


def _trial(base: models.Base, spec: TrialSpec, data: Encoded, entry: dict[str, Any]) -> Trial:
    adapter = spec.adapter.attach(base.model, spec.seed)
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
    entry["data"] = {
        "name": data.splits.name,
        "fingerprint": data.splits.fingerprint,
        "rows": {split: len(getattr(data, split)) for split in ("train", "validation", "test")},
        "truncated": data.truncated,
        "source": spec.source,
    }
    return Trial(spec.settings(), adapter, data, spec.model.task, base.tokenizer.pad_token_id, entry)


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


def _check_labels(base: models.Base, data: list[Encoded]) -> None:
    if base.spec.task != "sequence_classification":
        return
    count = int(base.model.config.num_labels)  # type: ignore[union-attr, arg-type]
    for own in data:
        if len(own.splits.labels) > count:
            raise ConfigError(
                f"model.num_labels={count}, but the data has {len(own.splits.labels)} labels: {own.splits.labels}"
            )


def base_dropout(model: nn.Module) -> float:
    """The largest dropout probability inside the base, attention's included."""
    names = ("p", "dropout", "attention_dropout", "dropout_prob", "dropout_rate")
    found = [getattr(module, name, None) for module in model.modules() for name in names]
    return max((value for value in found if isinstance(value, float)), default=0.0)
