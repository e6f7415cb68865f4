"""The LightningModule and the LightningDataModule of one trial, for a Trainer of the user's own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule

from loralab.adapters.export import save
from loralab.errors import ConfigError
from loralab.forward import compiled
from loralab.models.loading import Base
from loralab.planning.foresee import check_packing
from loralab.records import record as records
from loralab.running.attach import attach_trial
from loralab.running.inputs import Inputs, check_labels
from loralab.running.runner import check_batches
from loralab.training.arguments import MOST
from loralab.training.compiling import compiling
from loralab.training.cursor import Batch
from loralab.training.first_batch import FirstBatch
from loralab.training.module import FineTuner
from loralab.training.passes import EvaluationPasses
from loralab.training.specs import TrialSpec
from loralab.training.step_results import StepResults
from loralab.training.trial import Trial


class AdapterModule(FineTuner):
    """Trains one adapter on its frozen base with the steps of ``loralab train``: the same optimizer, schedule, dropout
    and loss, which is normalised by the target tokens of the whole optimizer step.

    Steps, gradient accumulation, precision and device are the Trainer's; its ``gradient_clip_val`` counts where it has
    one, else the configuration's. It logs train/loss, train/lr, train/grad_norm, and val/... or test/.... Its state,
    and so a checkpoint, is the adapter's alone. A loss that is not finite raises DivergedError.
    """

    def __init__(self, base: Base, trial: Trial) -> None:
        spec = trial.spec
        prefix_bytes = spec.memory.prefix_bytes if spec.quantization.packable else 0
        super().__init__(base.model, [trial], prefix_bytes, base.prefix_states)
        trial.loggers = [_ToLightning(self)]
        self.trial, self.tokenizer = trial, base.tokenizer

    @property
    def adapter(self) -> torch.nn.Module:
        """What is trained."""
        return self.trial.adapter

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapter into ``folder`` as a run's ``adapter/``: PEFT's files where PEFT has the method."""
        save(self.trial.adapter, Path(folder).expanduser(), self.trial.spec.seed)

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise ConfigError(
                f"Trainer(devices=...): {self.trainer.world_size} processes would each train on all rows;"
                " valid: devices=1"
            )
        if self.trainer.gradient_clip_algorithm not in (None, "norm"):
            raise ConfigError(
                f"Trainer(gradient_clip_algorithm={self.trainer.gradient_clip_algorithm!r}): gradients are clipped by"
                " their norm; valid: norm"
            )

    def configure_callbacks(self) -> list[Callback]:
        """Raises where the first step would train nothing, or changes the base."""
        there = any(isinstance(callback, FirstBatch) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [*([] if there else [FirstBatch()]), *compiling(self.trial.spec.model.compile)]

    def configure_optimizers(self) -> Any:
        """As many steps as the Trainer makes, which the schedule is laid over."""
        trial, trainer = self.trial, self.trainer
        steps, micros = trainer.estimated_stepping_batches, trainer.accumulate_grad_batches
        clip = trainer.gradient_clip_val or trial.spec.trainer.gradient_clip_val
        changes: dict[str, Any] = {
            "max_steps": int(min(steps, MOST)),
            "accumulate_grad_batches": micros,
            "gradient_clip_val": clip,
        }
        trial.spec = replace(trial.spec, trainer=replace(trial.spec.trainer, **changes, log_every_n_steps=1))
        trial.step, trial.optimizer_state = 0, {}  # the schedule's own state holds where it stands
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        self.train()  # Lightning keeps the mode of the module, and from_pretrained leaves it in evaluation mode
        self.results = StepResults(self.trials)  # an earlier fit may have been broken off within a step

    def on_train_start(self) -> None:
        self.trial.step, self.trial.last_logged_step = self.trainer.global_step, -1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trial.failure is not None:
            raise self.trial.failure

    def on_validation_epoch_start(self) -> None:
        self._begin("val")

    def validation_step(self, batches: dict[int, Batch], batch_idx: int) -> None:
        # what a base keeps between passes serves training too, which takes no tensor of inference mode
        with torch.inference_mode(False), torch.no_grad():
            super().validation_step(batches, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._end()

    def on_test_epoch_start(self) -> None:
        self._begin("test")

    def test_step(self, batches: dict[int, Batch], batch_idx: int) -> None:
        self.validation_step(batches, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._end()

    def _begin(self, split: str) -> None:
        self.split = split
        with torch.inference_mode(False):
            super().on_validation_epoch_start()

    def _end(self) -> None:
        (scores,) = self._scores
        self.log_dict(scores.compute(self.split))
        self._scores = []

    def state_dict(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        """The adapter's; the base is not in it."""
        return self.trial.adapter.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Sets the adapter to what ``state_dict`` gave. Raises RuntimeError where a tensor is missing or too many."""
        return self.trial.adapter.load_state_dict(state_dict, strict=strict)


class TrialData(LightningDataModule):
    """The rows of one trial. The order of the training rows follows from seed and step, as in ``loralab train``, and an
    epoch is the steps that take each of them at least once."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial

    def train_dataloader(self) -> "_Epoch":
        assert self.trainer is not None
        return _Epoch(self.trial, self.trainer)

    def val_dataloader(self) -> EvaluationPasses:
        return EvaluationPasses([self.trial], "validation")

    def test_dataloader(self) -> EvaluationPasses:
        """Raises ConfigError where the data has no test split."""
        if not len(self.trial.data.test):
            raise ConfigError(f"data: {self.trial.data.splits.name} has no test split; valid: Trainer.validate")
        return EvaluationPasses([self.trial], "test")


class _Epoch:
    """The passes of one epoch, from the step that the Trainer stands at."""

    def __init__(self, trial: Trial, trainer: Any) -> None:
        self.trial, self.trainer = trial, trainer

    def __len__(self) -> int:
        return self._steps * int(self.trainer.accumulate_grad_batches)

    @property
    def _steps(self) -> int:
        rows, size = self.trial.data_cursor.order.count(), self.trial.spec.data.batch_size
        return -(-rows // (size * int(self.trainer.accumulate_grad_batches)))

    def __iter__(self) -> Iterator[dict[int, Batch]]:
        cursor = self.trial.data_cursor
        cursor.micros = int(self.trainer.accumulate_grad_batches)
        cursor.seek(self.trainer.global_step)
        for _ in range(self._steps):
            yield from ({0: batch} for batch in cursor.step_batches())


class _ToLightning:
    """Hands a trial's rows to ``self.log``, and so to the Trainer's loggers and callbacks."""

    def __init__(self, module: AdapterModule) -> None:
        self._log = module.log_dict

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._log(dict(values))

    def sync(self) -> None:
        """Nothing: the Trainer's loggers do it."""

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Nothing: there is no record."""

    def table(self, name: str, columns: Any, rows: Any) -> None:
        """Nothing: there is no record."""

    def finish(self, exit_code: int) -> None:
        """Nothing: the Trainer closes its loggers."""


def module_and_data(spec: TrialSpec) -> tuple[AdapterModule, TrialData]:
    """The adapter of ``spec`` on its loaded base, and its rows. Raises ConfigError, DataError."""
    spec.check_positions()
    check_packing(spec)
    compiled.check(spec.model.compile, "cpu" if not torch.cuda.is_available() else "cuda")
    inputs = Inputs()
    data = inputs.rows(spec)
    base = inputs.base(spec, len(data.splits.labels) or None)
    check_labels(base, [data])
    with base.hooks.given(decomposed={}):
        trial = attach_trial(base, spec, data, records.blank(spec.id, config=spec.config, seed=spec.seed))
    check_batches(base, [trial])
    return AdapterModule(base, trial), TrialData(trial)
