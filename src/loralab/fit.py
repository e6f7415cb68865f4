"""One fit of a pack: train, validate the final state, score, export, record."""

import logging
import time
from typing import Any

import torch

from loralab import generation, models, optimizers
from loralab.errors import DiskError, Interrupted, LoralabError, OutOfMemory
from loralab.interop.peft import save_adapter
from loralab.module import FineTuner
from loralab.specs import TrialSpec
from loralab.trial import EvaluationPasses, TrainPasses, Trial

log = logging.getLogger(__name__)


class Fit:
    """One fit of a pack: train, validate the final state, score, export, record."""

    def __init__(
        self, base: models.Base, specs: list[TrialSpec], trials: list[Trial], started: float, progress: bool
    ) -> None:
        self.base, self.specs, self.trials, self.started = base, specs, trials, started
        self.progress = progress
        self.callbacks = [build() for build in specs[0].callbacks.values()] + specs[0].memory.callbacks()
        # outliers are found over a whole batch: there a row's states are not its own
        prefix_bytes = specs[0].memory.prefix_bytes if specs[0].quantization.packable else 0
        self.module = FineTuner(base.model, trials, prefix_bytes)
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
        close_record(entry, trial.failure)
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


def close_record(entry: dict[str, Any], failure: LoralabError | Interrupted | None) -> None:
    entry["status"] = "completed" if failure is None else failure.status
    entry["error"] = None if failure is None else str(failure)
    entry["exit_code"] = 0 if failure is None else failure.exit_code
