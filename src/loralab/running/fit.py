"""One fit of a pack: train, score, export, record; who is in a pack changes between fits only."""

import logging
import time
from typing import Any

from loralab.adapters.attached import attached
from loralab.adapters.hooks import NotPackable
from loralab.errors import LoralabError, OutOfMemory, explain
from loralab.models.loading import Base
from loralab.optim import optimizers
from loralab.planning.foresee import Foresight
from loralab.planning.trace import Geometry
from loralab.running.finish import finish, generate
from loralab.training import observer
from loralab.training.first_batch import FirstBatch
from loralab.training.module import FineTuner
from loralab.training.passes import EvaluationPasses, TrainPasses
from loralab.training.trial import Trial

log = logging.getLogger(__name__)


class Fit:
    """Fits ``trials`` from the step where they all stand, and closes their records."""

    def __init__(self, base: Base, trials: list[Trial], started: float, progress: bool, foresight: Foresight) -> None:
        """``started``: when the run began, in seconds of time.monotonic."""
        self.base, self.trials, self.started, self.progress = base, trials, started, progress
        self.foresight = foresight
        self.spec = trials[0].spec  # what the trials of a pack share is read off the first
        self.callbacks = [make() for make in self.spec.callbacks.values()] + self.spec.memory.callbacks()
        # such layers look at whole sequences, which a prefix would show them in parts
        prefix_bytes = self.spec.memory.prefix_bytes if self.spec.quantization.packable else 0
        lengthened = self.spec.memory.spiky_every is not None  # by padding, which shall cost what it costs
        self.module = FineTuner(base.model, trials, prefix_bytes, base.prefix_states, unpad=not lengthened)
        self.optimizer_records: list[dict[str, Any]] = [{} for _ in trials]
        self.states: list[optimizers.State | None] = [trial.optimizer_state for trial in trials]

    def run(self) -> list[list[Trial]]:
        """The packs in which the trials go on from where they stand; none where their records are closed."""
        for trial in self.trials:
            if not trial.loggers:
                spec = trial.spec
                name = " ".join(word for word in spec.overrides if not word.startswith("hydra")) or spec.id
                trial.open_loggers(spec.logger.start(spec.folder, name[:120], spec.sweep, spec.config))
        failure = self._train_and_score()
        if failure is not None and len(self.trials) > 1:
            return self._divide(failure)
        if failure is not None:
            self.trials[0].fail(failure)
        self._predict_memory()
        for trial in self.trials:
            finish(trial, self.base, self.started)
        return []

    def _train_and_score(self) -> LoralabError | None:
        """What fewer trials could cure is returned, without the frames that hold memory."""
        begun = time.monotonic()
        seconds = 0.0
        try:
            if any(trial.alive for trial in self.trials):
                self._train()
            elif any(trial.optimizer_state for trial in self.trials):  # continued from its last step
                self._describe(self.module.configure_optimizers()["optimizer"])
            seconds = time.monotonic() - begun
            self._evaluate("val", "validation")
            if self.spec.trainer.test and any(len(trial.data.test) for trial in self.trials):
                self._evaluate("test", "test")
        except Exception as error:
            failure = explain(error)
            if isinstance(failure, OutOfMemory | NotPackable):
                return failure.with_traceback(None)
            raise
        finally:  # what a run that ran out of memory used is the point of its record
            self._record_costs(begun - self.started, seconds or time.monotonic() - begun)
        return None

    def _train(self) -> None:
        """Not called for max_steps=0, which scores the base as it is."""
        spec = self.spec
        passes = spec.memory.passes(TrainPasses(self.trials), spec.model.length, spec.room)
        step, interval = min(trial.step for trial in self.trials if trial.alive), spec.trainer.val_check_interval
        if interval and step and step % interval == 0:  # an earlier fit broke off in this validation
            self._score("val", "validation")
            if not any(trial.alive for trial in self.trials):
                return
        trainer = spec.trainer.build([*self.callbacks, FirstBatch()], self.progress)
        count_from(trainer, step)
        self.module.train()  # Lightning keeps the mode it finds, and from_pretrained leaves evaluation mode
        try:
            with spec.memory.capped():
                trainer.fit(self.module, passes, EvaluationPasses(self.trials, "validation"))
        except Exception:
            if trainer.optimizers:  # else it broke off before they were taken over
                self.states = [None for _ in self.trials]
                self.states[:] = optimizers.states(trainer.optimizers[0])
            raise
        finally:
            if trainer.optimizers:
                self._describe(trainer.optimizers[0])

    def _evaluate(self, prefix: str, split: str) -> None:
        """Scores the final state over a split and by generation."""
        self._score(prefix, split)
        for trial in self.trials:
            generate(trial, self.base, prefix, split)

    def _score(self, prefix: str, split: str) -> None:
        """The state as it is, unless the last validation or an earlier fit did."""
        self.module.split = prefix
        if not all(_is_scored(trial, prefix) for trial in self.trials):
            observers = observer.evaluation_observers(self.callbacks)
            evaluator = self.spec.trainer.build(observers, progress=False, evaluating=True)
            evaluator.validate(self.module, EvaluationPasses(self.trials, split), verbose=False)

    def _describe(self, optimizer: Any) -> None:
        name = self.spec.optimizer.name
        self.optimizer_records = [optimizers.describe(optimizer, name, i) for i in range(len(self.trials))]

    def _record_costs(self, startup: float, seconds: float) -> None:
        """Memory and time: the pack's, the same in each record; optimizer state: each trial's own.

        A profiled step is in no time.
        """
        memory: dict[str, Any] = {**self.spec.memory.record(), **observer.memory_fields(self.callbacks)}
        seconds -= observer.excluded_seconds(self.callbacks)
        untimed = observer.excluded_tokens(self.callbacks)
        for index, trial in enumerate(self.trials):
            trial.record["optimizer"].update(self.optimizer_records[index])
            trial.record["memory"].update(memory)
            trial.train_seconds += seconds
            trial.untimed_tokens += untimed.get(index, 0)
            costs, timed = trial.record["time"], trial.tokens - trial.untimed_tokens
            costs.update(
                startup_s=startup if costs["startup_s"] is None else costs["startup_s"],
                train_s=trial.train_seconds,
                steps=trial.step,
                tokens=trial.tokens,
                tokens_per_s=timed / trial.train_seconds if trial.train_seconds > 0 and timed > 0 else None,
            )

    def _predict_memory(self) -> None:
        """The predicted peak of the very step that was measured, and of each trial alone; nothing waits for it now."""
        if not self.spec.plan.record:
            return
        profiler: Any = next((one for one in self.callbacks if getattr(one, "passes", None)), None)
        specs = [trial.spec for trial in self.trials]
        plan = None if profiler is None else self.foresight.of(specs, self._geometry(profiler))
        for trial in self.trials:
            memory = trial.record["memory"]
            memory["alone_peak_bytes"] = self.foresight.alone(trial.spec, trial.data)
            if plan is not None:
                memory["predicted_peak_bytes"] = plan.predicted_peak_bytes

    def _geometry(self, profiler: Any) -> Geometry:
        """What was fed while allocations were added up, by the way that the base was computed."""
        passes, mode = profiler.passes, self.module.forward_pass.mode
        heavy = max(range(len(passes)), key=lambda at: passes[at].tokens)
        first = max(0, min(heavy - 1, len(passes) - 2))
        taken = tuple(passes[first : first + 2])
        return Geometry(taken, profiler.device == "cuda", profiler.evaluated, mode=mode, first=profiler.single)

    def _divide(self, why: LoralabError) -> list[list[Trial]]:
        """Halves, or single trials where the base mixes rows, each from its trials' last finished steps."""
        step = max(trial.step for trial in self.trials)
        whole = [trial.rewind(state) for trial, state in zip(self.trials, self.states, strict=True)]
        kept = [trial for trial, sound in zip(self.trials, whole, strict=True) if sound]
        again = [trial for trial, sound in zip(self.trials, whole, strict=True) if not sound]
        for trial in again:
            trial.adapter.detach()
            trial.restart(attached(trial.spec.adapter, self.base.model, trial.spec.seed))
        half = len(self.trials) // 2
        if isinstance(why, NotPackable):
            parts = [[trial] for trial in self.trials]
        else:
            parts = [kept, again] if kept and again else [self.trials[:half], self.trials[half:]]
        log.warning(
            "%d trials do not run together: %s; from step %d they go on in %s (%s)%s",
            *(len(self.trials), why, step, " + ".join(str(len(part)) for part in parts)),
            ", ".join(trial.spec.id for trial in self.trials),
            f", {len(again)} of them anew: their update was cut short" if again else "",
        )
        for part in parts:
            for index, trial in enumerate(part):
                _record_division(trial.record["pack"], len(part), index, why)
        return parts


def _is_scored(trial: Trial, prefix: str) -> bool:
    done = trial.last_validated_step == trial.step if prefix == "val" else f"{prefix}/loss" in trial.metrics
    return done or trial.failure is not None


def _record_division(pack: dict[str, Any], size: int, index: int, why: LoralabError) -> None:
    """``halved``: the sizes that were too much for the memory; ``why``: what keeps a trial alone."""
    if isinstance(why, NotPackable):
        pack["why"] = str(why)
    else:
        pack["halved"] = [*pack.get("halved", []), pack["size"]]
    pack.update(size=size, index=index)


def count_from(trainer: Any, step: int) -> None:
    """Lightning counts on from ``step``, so that validations keep their places."""
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.total.ready = step * trainer.accumulate_grad_batches
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
