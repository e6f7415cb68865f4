"""One fit of a pack: train, score, export, record. The trials of a pack change only between fits."""

import logging
import time
from copy import deepcopy
from typing import Any

from loralab import signals
from loralab.adapters.hooks import NotPackable
from loralab.data.base import FORGETTING
from loralab.errors import LoralabError, OutOfMemory, explain
from loralab.forward.compiled import explained
from loralab.forward.stacked import ForwardMode
from loralab.models.loading import Base
from loralab.optim import managed, optimizers
from loralab.planning import resident, spikes
from loralab.planning.foresee import Foresight, predicted
from loralab.planning.geometry import Geometry
from loralab.quantization.linear import keep_dense
from loralab.records import wandb_run
from loralab.records.metric_logger import LoggerSpec
from loralab.records.wandb import Wandb
from loralab.running.attach import attach_adapter
from loralab.running.finish import choose, finish, generate, pause
from loralab.running.forgetting import compare
from loralab.training import observer, step_results, together
from loralab.training.checkpoint import Checkpoint
from loralab.training.compiling import compiling
from loralab.training.first_batch import FirstBatch
from loralab.training.lightning_rows import LightningRows
from loralab.training.module import PAUSE, FineTuner
from loralab.training.passes import EvaluationPasses, TrainPasses
from loralab.training.specs import TrialSpec
from loralab.training.trial import Trial

log = logging.getLogger(__name__)


class Fit:
    """Fits ``trials``, which all stand at the same step, and closes their records."""

    def __init__(self, base: Base, trials: list[Trial], started: float, progress: bool, foresight: Foresight) -> None:
        """``started``: when the run began, in seconds of time.monotonic."""
        self.base, self.trials, self.started, self.progress = base, trials, started, progress
        self.foresight = foresight
        self.spec = trials[0].spec  # for all that the trials of a pack share
        named = made(self.spec)
        self.callbacks = [*named.values(), *self.spec.memory.callbacks()]
        # quantized layers that are not packable take scales over whole sequences, which a cached prefix would split
        keeps = self.spec.quantization.packable and not self.spec.trainer.spreads
        prefix_bytes = self.spec.memory.prefix_bytes if keeps else 0
        unpad = self.spec.memory.spiky_every is None  # spikes are made of padding, which must be computed
        self.module = FineTuner(base.model, trials, prefix_bytes, base.prefix_states, unpad)
        if self.spec.trainer.spreads:  # the checks of other ways would have to come out alike in all processes
            self.module.forward_pass.mode = ForwardMode()
        self.module.others = {name: callback for name, callback in named.items() if not observer.is_own(callback)}
        self.logs = not all(map(observer.is_loralabs, named.values()))  # callbacks that may log by Lightning's ways
        self.optimizer_records: list[dict[str, Any]] = [{} for _ in trials]
        self.states: list[optimizers.State | None] = [trial.optimizer_state for trial in trials]

    def run(self) -> list[list[Trial]]:
        """The packs in which the trials must go on; empty when every record is closed."""
        for trial in self.trials:
            trial.clock.started = self.started
            if not trial.loggers:
                spec = trial.spec
                logger: LoggerSpec = Wandb(mode="disabled") if spec.trainer.given("fast_dev_run") else spec.logger
                labels = wandb_run.labels(spec.folder, trial.record)
                left_out = wandb_run.not_measured(spec.trainer.device)
                trial.open_loggers(logger.start(spec.folder, labels, trial.step > 0, left_out))
            trial.merges_rows = self.logs
        # a smaller card would be smaller for the validations too, whose peaks are part of what is measured
        with self.spec.trainer.settings_restored(), self.spec.memory.capped():
            failure = self._train_and_score()
        if isinstance(failure, OutOfMemory) and self._keeps_by_itself:
            return self._without_dense_weights(failure)
        if failure is not None and len(self.trials) > 1:
            return self._divide(failure)
        if failure is not None:
            self.trials[0].fail(failure)
        self._predict_memory()
        for trial, state in zip(self.trials, self.states, strict=True):
            if trial.paused:
                pause(trial, state or {})
            else:
                finish(trial, self.base)
        return []

    def _train_and_score(self) -> LoralabError | None:
        """None, or an error that a smaller pack may avoid, without the frames of its traceback, which hold memory."""
        begun = time.monotonic()
        seconds = 0.0
        for trial in self.trials:
            trial.clock.begin(begun)
        try:
            if any(trial.alive for trial in self.trials):
                self._train()
            elif any(trial.optimizer_state for trial in self.trials):  # continued from its last step
                self._describe(self.module.configure_optimizers()["optimizer"])
            seconds = time.monotonic() - begun
            if any(trial.paused for trial in self.trials):
                self.evaluate(PAUSE, "validation")
                return None
            self.evaluate("val", "validation")
            for trial in self.trials:
                trial.take_best()
            if self.spec.trainer.test and any(len(trial.data.test) for trial in self.trials):
                self.evaluate("test", "test")
            self.measure_forgetting()
        except Exception as error:
            failure = explain(error)
            if isinstance(failure, OutOfMemory | NotPackable):
                return failure.with_traceback(None)
            raise
        finally:  # also after an error: what a run used that ran out of memory
            self._record_costs(seconds or time.monotonic() - begun)
        return None

    def _train(self) -> None:
        """Not called for max_steps=0, where the base is scored as it is."""
        spec = self.spec
        passes = spec.memory.passes(TrainPasses(self.trials), spec.model.length, spec.room)
        step, interval = min(trial.step for trial in self.trials if trial.alive), spec.trainer.val_check_interval
        if interval and step and step % interval == 0:  # an earlier fit ended by an error in this validation
            self._score("val", "validation")
            if not any(trial.alive for trial in self.trials):
                return
        # the checkpoint first, so that no other callback has seen more of the run than it keeps
        ordered = sorted(self.callbacks, key=lambda callback: not isinstance(callback, Checkpoint))
        logger = LightningRows(self.module, str(spec.folder)) if self.logs else False
        # callbacks see the validation of the final state too, as they would in any run of Lightning's
        validating = bool(self.module.others) and len(self.trials) == 1
        observers = [*ordered, FirstBatch(self.base.unmixed), *compiling(spec.model.compile)]
        trainer = spec.trainer.build(observers, self.progress, logger=logger, validating=validating, folder=spec.folder)
        count_from(trainer, step)
        if scaler_state := self.trials[0].scaler_state:
            trainer.precision_plugin.load_state_dict(scaler_state)
        for name, callback in self.module.others.items():
            if state := self.trials[0].callback_states.get(name):
                callback.load_state_dict(deepcopy(state))
        for trial in self.trials:
            together.agree(trial.step, trial.adapter)
        self.module.train()  # Lightning keeps the mode of the module, and from_pretrained leaves it in evaluation mode
        methods = ", ".join(sorted({trial.spec.adapter.method for trial in self.trials}))
        try:
            with explained(spec.model.compile, methods, spec.quantization.name), signals.whole_steps():
                self._fit(trainer, passes)
        except Exception:
            if trainer.optimizers:  # else the error came before it had states
                self.states = [None for _ in self.trials]
                self.states[:] = optimizers.states(trainer.optimizers[0])
            raise
        else:
            if any(trial.paused for trial in self.trials):
                self.states[:] = optimizers.states(trainer.optimizers[0])
        finally:
            for trial in self.trials:  # which may go on in other packs
                trial.scaler_state = dict(trainer.precision_plugin.state_dict())
            if trainer.optimizers:
                self._describe(trainer.optimizers[0])
                managed.release(trainer.optimizers[0])

    def _fit(self, trainer: Any, passes: Any) -> None:
        self.module.results.late = self._reads_late(trainer)
        try:
            trainer.fit(self.module, passes, EvaluationPasses(self.trials, "validation"))
        finally:
            self.module.results.close()

    def _reads_late(self, trainer: Any) -> bool:
        """Whether the losses of a step may be read in the next: nobody looks at them in between."""
        alone = not self.module.others and not self.logs and self.spec.trainer.processes == 1
        # autograd raises at what is not finite, of a trial that should have left by then
        watched = trainer.progress_bar_callback is not None or self.spec.trainer.given("detect_anomaly")
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # waits for the gradients of each step itself
        return self.spec.trainer.device in step_results.LATE and alone and not watched and scaler is None

    def evaluate(self, prefix: str, split: str) -> None:
        """Scores the final state over ``split``, by its loss, by choice and by generation."""
        self._score(prefix, split)
        for trial in self.trials:
            choose(trial, self.base, prefix, trial.data.splits[split], trial.spec.data.batch_size)
            generate(trial, self.base, prefix, split)

    def measure_forgetting(self) -> None:
        """Scores the final state over data.forgetting, where trials have it, and holds it against the bare base."""
        measured = [trial for trial in self.trials if trial.data.forgetting is not None]
        if measured:
            self._score(FORGETTING, FORGETTING, observed=False)
        for trial in measured:
            compare(trial, self.base)

    def _score(self, prefix: str, split: str, observed: bool = True) -> None:
        """Scores the present state over ``split``, unless the last validation or an earlier fit has. ``observed``: its
        memory is part of what the record has."""
        self.module.split = prefix
        if not all(_is_scored(trial, prefix) for trial in self.trials):
            observers = observer.evaluation_observers(self.callbacks) if observed else []
            evaluator = self.spec.trainer.build(observers, progress=False, evaluating=True)
            evaluator.validate(self.module, EvaluationPasses(self.trials, split), verbose=False)

    def _describe(self, optimizer: Any) -> None:
        spec = self.spec.optimizer
        records = [optimizers.describe(optimizer, spec.name, i) for i in range(len(self.trials))]
        self.optimizer_records = [{**one, "note": one["note"] or spec.why_alone or None} for one in records]

    def _record_costs(self, seconds: float) -> None:
        """Memory and time are the pack's, the same in each record; the optimizer state is each trial's own.

        ``seconds``: of the fit. Profiled steps are left out of the times.
        """
        memory: dict[str, Any] = {**self.spec.memory.record(), **observer.memory_fields(self.callbacks)}
        seconds -= observer.excluded_seconds(self.callbacks)
        untimed = observer.excluded_tokens(self.callbacks)
        for index, trial in enumerate(self.trials):
            trial.record["optimizer"].update(self.optimizer_records[index])
            trial.record["memory"].update(memory)
            trial.clock.end(seconds, untimed.get(index, 0))
            spent = trial.clock.total(time.monotonic())
            trial.record["time"].update(
                startup_s=spent["startup_s"],
                train_s=spent["train_s"],
                steps=trial.step,
                tokens=trial.tokens,
                tokens_per_s=trial.clock.rate(trial.tokens),
            )

    def _predict_memory(self) -> None:
        """Records the predicted peak of the step that was measured, and of each trial alone, once training is over."""
        if not self.spec.plan.record:
            return
        profiler: Any = next((callback for callback in self.callbacks if getattr(callback, "passes", None)), None)
        specs = resident.settled([trial.spec.own_share for trial in self.trials], self.base.dequantize)
        plan = (
            None if profiler is None or not specs[0].plan.record else self.foresight.of(specs, self._geometry(profiler))
        )
        for trial in self.trials:
            memory = trial.record["memory"]
            memory["alone_peak_bytes"] = self.foresight.alone(trial.spec, trial.data)
            if trial.spec.memory.spiky_every is not None:
                memory["predicted_on_card"] = spikes.by_step(trial.spec, trial.data, self.foresight)
            if plan is not None:
                memory.update(predicted(plan))

    def _geometry(self, profiler: Any) -> Geometry:
        """The passes of the measured step, and the forward mode they were computed in."""
        passes, mode = profiler.passes, self.module.forward_pass.mode
        heaviest = max(range(len(passes)), key=lambda index: passes[index].tokens)
        first = max(0, min(heaviest - 1, len(passes) - 2))
        pair = tuple(passes[first : first + 2])
        return Geometry(pair, profiler.device == "cuda", profiler.evaluated, mode=mode, first=profiler.single)

    @property
    def _keeps_by_itself(self) -> bool:
        """Whether dense weights are kept that nobody asked for."""
        auto = self.spec.quantization.dequantize == "auto" and self.spec.trainer.processes == 1
        return auto and self.base.dequantize == "resident"

    def _without_dense_weights(self, why: OutOfMemory) -> list[list[Trial]]:
        """The same trials again, from their last finished step, with the weights dequantized at each use."""
        keep_dense(self.base.model, "per_use")
        self.foresight.keep_no_more(self.spec)
        for trial in self.trials:
            trial.record["base"]["dequantize"] = self.base.dequantize
        log.warning("%s: quantization.dequantize=auto keeps no dense weights any more", why)
        return [part for part in self._go_on() if part]

    def _divide(self, why: LoralabError) -> list[list[Trial]]:
        """Two halves, or single trials where the base mixes rows. Each trial goes on from its last finished step; one
        whose update was cut short begins anew."""
        step = max(trial.step for trial in self.trials)
        rewound, restarted = self._go_on()
        half = len(self.trials) // 2
        if isinstance(why, NotPackable):
            parts = [[trial] for trial in self.trials]
        else:
            parts = [rewound, restarted] if rewound and restarted else [self.trials[:half], self.trials[half:]]
        log.warning(
            "%d trials do not run together: %s; from step %d they go on in %s (%s)%s",
            *(len(self.trials), why, step, " + ".join(str(len(part)) for part in parts)),
            ", ".join(trial.spec.id for trial in self.trials),
            f", {len(restarted)} of them anew: their update was cut short" if restarted else "",
        )
        for part in parts:
            for index, trial in enumerate(part):
                _record_division(trial.record["pack"], len(part), index, why)
        return parts

    def _go_on(self) -> tuple[list[Trial], list[Trial]]:
        """(the trials set back to their last finished step, those whose update was cut short, which begin anew)."""
        rewound: list[Trial] = []
        restarted: list[Trial] = []
        for trial, state in zip(self.trials, self.states, strict=True):
            (rewound if trial.rewind(state) else restarted).append(trial)
        with self.base.hooks.given(decomposed={}):
            for trial in restarted:
                trial.adapter.detach()
                trial.restart(attach_adapter(self.base, trial.spec, trial.data))
        return rewound, restarted


def made(spec: TrialSpec) -> dict[str, Any]:
    """The callbacks of a fit by their names, newly made; Lightning's own files lie in the run folder's checkpoints/."""
    from lightning.pytorch.callbacks import ModelCheckpoint, Timer

    callbacks = {name: make() for name, make in spec.callbacks.items()}
    for callback in callbacks.values():
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(spec.folder / "checkpoints")
    if limit := spec.trainer.decisive.get("max_time"):
        callbacks["max_time"] = Timer(duration=limit)
    return callbacks


def _is_scored(trial: Trial, prefix: str) -> bool:
    """Whether the trial's present state needs no scoring over the split of ``prefix``."""
    scored = trial.last_validated_step == trial.step if prefix == "val" else f"{prefix}/loss" in trial.metrics
    return scored or trial.failure is not None


def _record_division(pack: dict[str, Any], size: int, index: int, why: LoralabError) -> None:
    """Sets in ``pack``: ``why`` a trial runs alone, or ``halved``, the sizes that were too large for the memory."""
    if isinstance(why, NotPackable):
        pack["why"] = str(why)
    else:
        pack["halved"] = [*pack.get("halved", []), pack["size"]]
    pack.update(size=size, index=index)


def count_from(trainer: Any, step: int) -> None:
    """Makes Lightning count optimizer steps from ``step`` on, so that validations come at the same steps."""
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.total.ready = step * trainer.accumulate_grad_batches
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    loop._batches_that_stepped = step
