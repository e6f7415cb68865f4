"""One fit of a pack: train, validate the final state, score, export, record; or divide, and others go on."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from loralab.adapters.attached import attached
from loralab.adapters.export import save
from loralab.adapters.sites import NotPackable
from loralab.errors import Interrupted, LoralabError, OutOfMemory, explain
from loralab.models import architecture, pretrained
from loralab.models.feeding import name_classes
from loralab.optim import optimizers
from loralab.planning.foresee import Foresight
from loralab.planning.trace import Geometry
from loralab.training import checkpoint, generation
from loralab.training.first_batch import FirstBatch
from loralab.training.module import FineTuner
from loralab.training.specs import TrialSpec
from loralab.training.trial import EvaluationPasses, TrainPasses, Trial

log = logging.getLogger(__name__)

Part = Sequence[tuple[TrialSpec, Trial]]  # trials that are fitted together


class Fit:
    """One fit of a pack, from the step where its trials stand. Who is in a pack changes between fits only."""

    def __init__(self, base: pretrained.Base, pack: Part, started: float, progress: bool, foresight: Foresight) -> None:
        self.base, self.pack, self.started, self.progress = base, pack, started, progress
        self.foresight = foresight
        self.specs, self.trials = [spec for spec, _ in pack], [trial for _, trial in pack]
        self.callbacks = [build() for build in self.specs[0].callbacks.values()] + self.specs[0].memory.callbacks()
        # such layers look at whole sequences, which a prefix would show them in parts
        prefix_bytes = self.specs[0].memory.prefix_bytes if self.specs[0].quantization.packable else 0
        lengthened = self.specs[0].memory.spiky_every is not None  # by padding, which shall cost what it costs
        self.module = FineTuner(base.model, self.trials, prefix_bytes, unpad=not lengthened)
        self.optimizers: list[dict[str, Any]] = [{} for _ in pack]  # what came of each trial's state
        self.states: list[optimizers.State | None] = [trial.optimizer_state for trial in self.trials]

    def run(self) -> list[Part]:
        """The packs in which the trials go on from where they stand; none where their records are written."""
        for spec, trial in self.pack:
            if not trial.sinks:
                name = " ".join(o for o in spec.overrides if not o.startswith("hydra")) or spec.id
                trial.open(spec.logger.start(spec.folder, name[:120], spec.sweep, spec.config))
        broken = self._attempt()
        if broken is not None and len(self.pack) > 1:
            return self._divide(broken)
        if broken is not None:
            self.trials[0].fail(broken)
        self._foresee()
        for spec, trial in self.pack:
            self._finish(spec, trial)
        return []

    def _attempt(self) -> LoralabError | None:
        """Trains and scores; what fewer trials could cure comes back, without the frames that hold memory."""
        begun = time.monotonic()
        seconds = 0.0
        try:
            if any(trial.alive for trial in self.trials):
                self._train()
            elif any(trial.optimizer_state for trial in self.trials):  # continued from its last step
                self._describe(self.module.configure_optimizers()["optimizer"])
            seconds = time.monotonic() - begun
            self._evaluate("val", "validation")
            if self.specs[0].trainer.test and any(len(trial.data.test) for trial in self.trials):
                self._evaluate("test", "test")
        except Exception as error:
            failure = explain(error)
            if isinstance(failure, OutOfMemory | NotPackable):
                return failure.with_traceback(None)
            raise
        finally:  # what a run that ran out of memory used is the point of its record
            self._note(begun - self.started, seconds or time.monotonic() - begun)
        return None

    def _divide(self, why: LoralabError) -> list[Part]:
        """Halves, or single trials where the base mixes rows, each from its trials' last finished steps."""
        step = max(trial.step for trial in self.trials)
        whole = [trial.rewind(state) for trial, state in zip(self.trials, self.states, strict=True)]
        kept = [member for member, sound in zip(self.pack, whole, strict=True) if sound]
        again = [member for member, sound in zip(self.pack, whole, strict=True) if not sound]
        for spec, trial in again:
            trial.adapter.detach()
            trial.restart(attached(spec.adapter, self.base.model, spec.seed))
        if isinstance(why, NotPackable):
            parts: list[Part] = [[member] for member in self.pack]
        elif kept and again:
            parts = [kept, again]
        else:
            parts = [self.pack[: len(self.pack) // 2], self.pack[len(self.pack) // 2 :]]
        log.warning(
            "%d trials do not run together: %s; from step %d they go on in %s (%s)%s",
            *(len(self.pack), why, step, " + ".join(str(len(part)) for part in parts)),
            ", ".join(spec.id for spec in self.specs),
            f", {len(again)} of them anew: their update was cut short" if again else "",
        )
        for part in parts:
            for index, (_, trial) in enumerate(part):
                _note_division(trial.record["pack"], len(part), index, why)
        return parts

    def _train(self) -> None:
        """Not called for max_steps=0, which scores the base as it is."""
        spec, config = self.specs[0], self.base.model.config
        passes = spec.memory.passes(TrainPasses(self.trials), spec.model.length, architecture.positions(config))
        step, interval = min(trial.step for trial in self.trials if trial.alive), spec.trainer.val_check_interval
        if interval and step and step % interval == 0:  # an earlier fit broke off in this validation
            self._score("val", "validation")
            if not any(trial.alive for trial in self.trials):
                return
        trainer = spec.trainer.build([*self.callbacks, FirstBatch()], self.progress)
        resume(trainer, step)
        self.module.train()  # Lightning keeps the mode it finds, and from_pretrained leaves evaluation mode
        try:
            with spec.memory.capped():
                trainer.fit(self.module, passes, EvaluationPasses(self.trials, "validation"))
        except Exception:
            if trainer.optimizers:  # else it broke off before they were taken over
                self.states = [None for _ in self.pack]
                self.states[:] = optimizers.states(trainer.optimizers[0])
            raise
        finally:
            if trainer.optimizers:
                self._describe(trainer.optimizers[0])

    def _describe(self, made: Any) -> None:
        name = self.specs[0].optimizer.name
        self.optimizers = [optimizers.describe(made, name, index) for index in range(len(self.pack))]

    def _note(self, startup: float, seconds: float) -> None:
        """Memory and time: the pack's, the same in each record; optimizer state: each trial's own.

        A profiled step is in no time.
        """
        memory: dict[str, Any] = self.specs[0].memory.record()
        left_out: dict[int, int] = {}
        for callback in self.callbacks:
            if hasattr(callback, "summary"):
                memory.update(callback.summary())
            seconds -= getattr(callback, "excluded_s", 0.0)
            left_out.update(getattr(callback, "excluded_tokens", {}))
        for index, trial in enumerate(self.trials):
            trial.record["optimizer"].update(self.optimizers[index])
            trial.record["memory"].update(memory)
            trial.seconds += seconds
            trial.untimed += left_out.get(index, 0)
            noted, timed = trial.record["time"], trial.tokens - trial.untimed
            noted.update(
                startup_s=startup if noted["startup_s"] is None else noted["startup_s"],
                train_s=trial.seconds,
                steps=trial.step,
                tokens=trial.tokens,
                tokens_per_s=timed / trial.seconds if trial.seconds > 0 and timed > 0 else None,
            )

    def _foresee(self) -> None:
        """The predicted peak of the very step that was measured, and of each trial alone; nothing waits for it now."""
        if not self.specs[0].plan.record:
            return
        observer: Any = next((one for one in self.callbacks if getattr(one, "passes", None)), None)
        plan = None if observer is None else self.foresight.of(self.specs, self._geometry(observer))
        for spec, trial in self.pack:
            memory = trial.record["memory"]
            memory["alone_peak_bytes"] = self.foresight.alone(spec, trial.data)
            if plan is not None:
                memory["predicted_peak_bytes"] = plan.predicted_peak_bytes

    def _geometry(self, observer: Any) -> Geometry:
        """What was fed while allocations were added up, by the way that the base was computed."""
        passes, way = observer.passes, self.module.forward_pass.way
        heavy = max(range(len(passes)), key=lambda at: passes[at].tokens)
        first = max(0, min(heavy - 1, len(passes) - 2))
        taken = tuple(passes[first : first + 2])
        return Geometry(taken, observer.device == "cuda", observer.evaluated, way=way, first=observer.single)

    def _evaluate(self, prefix: str, split: str) -> None:
        """Scores the final state over a split and by generation."""
        self._score(prefix, split)
        for spec, trial in zip(self.specs, self.trials, strict=True):
            self._generate(spec, trial, prefix, split)

    def _score(self, prefix: str, split: str) -> None:
        """The state as it is, unless the last validation or an earlier fit did."""
        self.module.split = prefix
        if not all(_scored(trial, prefix) for trial in self.trials):
            observers = [callback for callback in self.callbacks if hasattr(callback, "summary")]
            evaluator = self.specs[0].trainer.build(observers, progress=False, evaluating=True)
            evaluator.validate(self.module, EvaluationPasses(self.trials, split), verbose=False)

    def _generate(self, spec: TrialSpec, trial: Trial, prefix: str, split: str) -> None:
        rows = getattr(trial.data.splits, split)[: spec.data.generate_rows]
        if not rows or trial.failure is not None or spec.model.task == "sequence_classification":
            return
        if f"{prefix}/rouge_l" in trial.metrics:  # by an earlier fit
            return
        base = self.base
        own = (base.model, base.tokenizer, trial.adapter, spec.model.task, spec.model.length, spec.data.generation)
        writer = generation.Writer(*own)
        trial.record["data"].update(generation=writer.settings(), rouge=spec.data.rouge)
        trial.scored({f"{prefix}/rouge_l": generation.score(writer, rows, spec.data.rouge)})

    def _finish(self, spec: TrialSpec, trial: Trial) -> None:
        entry = trial.record
        if trial.failure is None:
            self._export(spec, trial)
        if trial.failure is None or trial.validated == trial.step:  # else of an earlier state
            entry["metrics"] = dict(trial.metrics)
        if trial.stopped and trial.step < trial.settings.max_steps:
            entry["stopped_early"] = {"step": trial.step, "metric": trial.settings.metric, "best": trial.best}
        entry["time"]["wall_s"] = time.monotonic() - self.started
        close_record(entry, trial.failure)
        for sink in trial.sinks:
            if hasattr(sink, "summarize"):
                sink.summarize({**trial.metrics, "status": entry["status"]})
                if spikes := entry["memory"].get("spikes"):
                    sink.table("memory/spikes", list(spikes[0]), [list(spike.values()) for spike in spikes])
        trial.save()
        if trial.failure is None:
            checkpoint.forget(spec.folder)

    def _export(self, spec: TrialSpec, trial: Trial) -> None:
        """The adapter on disk. What goes wrong is this trial's failure, and the others are written all the same."""
        folder = spec.folder / "adapter"
        trial.record["adapter"]["never_called"] = trial.adapter.never_called()
        name_classes(self.base.model, trial.data.splits.labels if trial.task == "sequence_classification" else [])
        try:
            trial.record["adapter"]["bytes"] = save(trial.adapter, folder, spec.seed)
            if spec.adapter.changes_base:
                self.base.tokenizer.save_pretrained(folder)
        except Exception as error:
            failure = explain(error)
            if not isinstance(failure, LoralabError):
                raise
            trial.fail(failure)


def _scored(trial: Trial, prefix: str) -> bool:
    done = trial.validated == trial.step if prefix == "val" else f"{prefix}/loss" in trial.metrics
    return done or trial.failure is not None


def _note_division(pack: dict[str, Any], size: int, index: int, why: LoralabError) -> None:
    """``halved``: the sizes that were too much for the memory; ``why``: what keeps a trial alone."""
    if isinstance(why, NotPackable):
        pack["why"] = str(why)
    else:
        pack["halved"] = [*pack.get("halved", []), pack["size"]]
    pack.update(size=size, index=index)


def resume(trainer: Any, step: int) -> None:
    """Lightning counts on from ``step``, so that validations keep their places."""
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.total.ready = step * trainer.accumulate_grad_batches
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


def close_record(entry: dict[str, Any], failure: LoralabError | Interrupted | None) -> None:
    entry["status"] = "completed" if failure is None else failure.status
    entry["error"] = None if failure is None else str(failure)
    entry["exit_code"] = 0 if failure is None else failure.exit_code
