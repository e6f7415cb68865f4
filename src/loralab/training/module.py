"""The LightningModule: loss, metrics and the optimizer of a list of trials on one frozen base."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from loralab.adapters.hooks import BatchSlice
from loralab.data.base import FORGETTING
from loralab.data.passes import BatchShape, Feed, Pass, Weighing, heaviest, heaviest_evaluation
from loralab.errors import ConfigError
from loralab.forward.metrics import SplitMetrics
from loralab.forward.prefix import Prefix, States
from loralab.forward.stacked import Forward
from loralab.models.architecture import positions
from loralab.optim import packed
from loralab.optim.groups import rate, trial_of
from loralab.optim.optimizers import gather, restore
from loralab.quantization.sequences import decoder_input_ids
from loralab.training import together
from loralab.training.cursor import Batch
from loralab.training.passes import stack_batches
from loralab.training.step_results import StepResults
from loralab.training.trainer import TrainerSpec
from loralab.training.trial import Trial

PAUSE = "pause"  # prefix of the scores of a paused trial, which are no validation of its training
# by the prefix of their metrics
SPLITS = {"val": "validation", "test": "test", PAUSE: "validation", FORGETTING: FORGETTING}


class FineTuner(LightningModule):
    """Trains the adapters of ``trials`` on ``model``; their batches are stacked along dim 0."""

    def __init__(
        self,
        model: nn.Module,
        trials: list[Trial],
        prefix_bytes: int = 0,
        prefix_states: States | None = None,
        unpad: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.trials = trials
        self.adapters = nn.ModuleList([trial.adapter for trial in trials])
        self.prefix = Prefix(model, [t.adapter for t in trials], [t.data for t in trials], prefix_bytes, prefix_states)
        self.task = trials[0].task
        found = positions(model.config)
        self.room = None if found is None else found - max(t.adapter.spec.virtual_tokens for t in trials)
        self.compiles = trials[0].spec.model.compile != "none"
        unpad = unpad and not self.compiles and all(t.adapter.spec.tokenwise for t in trials)
        self.forward_pass = Forward(model, self.task, unpad, packing=any(t.spec.data.packing for t in trials))
        self.others: dict[str, Any] = {}  # callbacks that are no Observer, by name
        self.split = "val"
        self._scores: list[SplitMetrics] = []
        self.results = StepResults(trials)
        self._micro = 0  # number of the pass within the step under way

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What the trials train, as Lightning's ModelCheckpoint writes it: ``adapters.0.NAME`` of the first trial, and
        so on; never the base."""
        return {
            f"adapters.{index}.{name}": value
            for index, trial in enumerate(self.trials)
            for name, value in trial.adapter.state_dict().items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Sets the adapters to what ``state_dict`` returned. Raises RuntimeError where a name or a shape differs."""
        for index, trial in enumerate(self.trials):
            prefix = f"adapters.{index}."
            own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
            trial.adapter.load_state_dict(own, strict=strict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def losses(self, batches: Mapping[int, Batch], training: bool) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """{trial: (summed nll, predictions, targets)} of one pass through the base."""
        batches = dict(sorted(batches.items(), key=lambda pair: self._size(pair[0])))
        pad = self.trials[0].pad_token_id
        inputs, labels = stack_batches(batches, pad, self.device, self.room, self.compiles)
        slices = [_slice(self.trials[index], batch, training) for index, batch in batches.items()]
        if training:
            # for what the base draws without the hooks (functional dropout, skipped layers); such a trial runs alone
            _seed((slices[0].key or 0) + together.rank_and_size()[0])  # the rows of another process are others
        if self.compiles:  # nothing is drawn (training/compiling.py), and a key is new at each step
            slices = [replace(part, key=None) for part in slices]
        if self.task == "seq2seq_lm":
            inputs["decoder_input_ids"] = decoder_input_ids(self.model, labels)
        scores = self.forward_pass(inputs, labels, slices, lambda part: self.prefix.shared(part, batches))
        return dict(zip(batches, scores, strict=True))

    def _size(self, index: int) -> int:
        """What the parameters of a trial grow with, such as r. Trials alike in it follow each other in a pass, so that
        their products are made together."""
        spec = self.trials[index].adapter.spec
        return int(getattr(spec, spec.size_field, 0)) if spec.size_field else 0

    def training_step(self, batches: dict[int, Batch], batch_idx: int) -> Tensor | None:
        """Sum over trials of nll / target tokens of the whole optimizer step."""
        if not batches:
            return None
        total: list[Tensor] = []
        losses = self.losses(batches, training=True)
        self.settle()  # while the device is busy with this pass
        for index, (loss_sum, _, _) in losses.items():
            trial, batch = self.trials[index], batches[index]
            total.append(loss_sum / max(1, batch["step_targets"]))
            self.results.add(index, together.total(total[-1].detach()))
            self._micro = batch["micro"]
            if trial.failure is None:  # else the step before, which is known by now, was its last
                trial.tokens += batch["tokens"]
        # undoes Lightning's division by the number of accumulated passes: the loss is normalised already
        return torch.stack(total).sum() * self.trainer.accumulate_grad_batches

    def on_after_backward(self) -> None:
        """Adds up the gradients of several processes once a step: before they are unscaled, checked and clipped."""
        if self._micro < self.trainer.accumulate_grad_batches - 1:
            return
        if together.several():
            for trial in self.trials:
                together.add_gradients(trial.adapter.parameters())
        if self._scaler is not None:
            gather(self.trainer.optimizers[0])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each trial by its own norm. A trial whose loss or gradient is not finite fails and drops its gradient;
        under a loss scaler, which skips that update and goes on with half its scale, only once there is no scale to
        halve.

        What the host must know of the step, losses and norms, it waits for once, and not for each trial: here, or where
        results are read late in ``settle``."""
        graded = [[p for p in trial.adapter.parameters() if p.grad is not None] for trial in self.trials]
        self.results.take(*self._clipped(optimizer, graded), self._skips_update)
        for trial, parameters in zip(self.trials, graded, strict=True):
            if trial.failure is not None:
                for parameter in parameters:
                    parameter.grad = None
            trial.updating = True  # Lightning clips last of all before the update

    def _skips_update(self) -> bool:
        """Whether a gradient that is not finite may be the doing of a loss scaler (16-mixed)."""
        return self._scaler is not None and float(self._scaler.get_scale()) > 1.0

    @property
    def _scaler(self) -> Any:
        """The loss scaler of 16-mixed; None in every other precision, and outside of a Trainer."""
        return getattr(getattr(self._trainer, "precision_plugin", None), "scaler", None)

    def _clipped(self, optimizer: Optimizer, graded: list[list[nn.Parameter]]) -> tuple[list[int], Tensor]:
        """(trials with a gradient, the norm of each before it was clipped)."""
        settings = [trial.spec.trainer for trial in self.trials]
        if all(one.decisive.get("gradient_clip_algorithm", "norm") == "norm" for one in settings):
            bounds = {index: one.gradient_clip_val or float("inf") for index, one in enumerate(settings)}
            if (found := packed.clip(optimizer, bounds)) is not None:
                return found
        clipped = [index for index, trial in enumerate(self.trials) if trial.failure is None and graded[index]]
        norms = [_clip(graded[index], settings[index]) for index in clipped]
        return clipped, torch.stack(norms) if norms else torch.empty(0, device=self.device)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """One step of every trial that took part in this step's passes."""
        rates = [rate(optimizer, index) for index in range(len(self.trials))]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.results.made(rates)
        for trial in self.trials:
            trial.updating = False
        interval = self.trials[0].spec.trainer.val_check_interval
        ahead = self.results.ahead
        if any(not trial.alive or (interval and trial.step % interval == 0) for trial in ahead):
            self.results.settle()
        if not self.results.late:  # Lightning's own callbacks alone look at it, and it goes to the device first
            losses = self.results.losses
            self.log("loss", sum(losses.values()) / max(1, len(losses)), prog_bar=True, logger=False)
        self._stop_at_the_end()

    def settle(self) -> None:
        """Reads the losses of the last step where they have not been read: a trial of which one is not finite has not
        made that step, and fails. For whoever writes or shows what a step has come to."""
        if self.results.settle():
            self._stop_at_the_end()

    def _stop_at_the_end(self) -> None:
        if not any(trial.alive for trial in self.trials):
            self.trainer.should_stop = True

    def on_validation_start(self) -> None:
        for trial in self.trials:
            trial.write_held()  # a run that goes on from this step makes the rows of its validation again

    def on_validation_epoch_start(self) -> None:
        # as many as the logits: a head may have more classes than the data
        labels = max(2, int(getattr(self.model.config, "num_labels", 2)))
        sizes = [trial.data.document_bytes(SPLITS[self.split]) for trial in self.trials]
        self._scores = [
            SplitMetrics(self.task, labels, self.device, size, trial.spec.own_metrics(texts=False))
            for trial, size in zip(self.trials, sizes, strict=True)
        ]

    def validation_step(self, batches: dict[int, Batch], batch_idx: int) -> None:
        if not batches and not together.several():
            return
        with torch.random.fork_rng(devices=[]):
            scores = self.losses(batches, training=False) if batches else {}
            if together.several():
                own = None if not batches or batches[0].get("spare") else scores[0]
                whole = together.joined(own, self.device)
                scores = {} if whole is None else {0: whole}
            for index, scored in scores.items():
                self._scores[index].update(*scored)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        for trial, scores in zip(self.trials, self._scores, strict=True):
            scored = self.split == "val" and trial.last_validated_step == trial.step  # a trial that has ended
            if trial.failure is None and not scored and len(trial.data[SPLITS[self.split]]):
                values = scores.compute(self.split)
                (trial.validated if self.split == "val" else trial.score)(values)
                if len(self.trials) == 1:  # for Lightning's own callbacks, which know no packs
                    self.log_dict(values, logger=False)
        if not any(trial.alive for trial in self.trials):
            self.trainer.should_stop = True
        self._scores = []

    def configure_optimizers(self) -> Any:
        """One optimizer with parameter groups and a schedule for each trial, which continue from the trial's step."""
        specs = [trial.spec.optimizer for trial in self.trials]
        names = {spec.name for spec in specs}
        if len(names) > 1:
            raise ConfigError(f"trials of one pack share their optimizer class, got {sorted(names)}")
        named = [trial.adapter.named_parameters() for trial in self.trials]
        groups = [group for index, spec in enumerate(specs) for group in spec.groups(named[index], index)]
        optimizer = specs[0].build(groups, self._scaler is not None)
        restore(optimizer, [trial.optimizer_state for trial in self.trials])
        for trial in self.trials:
            trial.optimizer_state = {}
        of_group = zip(groups, trial_of(groups), strict=True)
        factors = [self.trials[index].schedule_factor(group["lr"]) for group, index in of_group]
        schedule = LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # stacked first, moved once, by the pass

    def report(self, values: Mapping[str, Any], own: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        """Logs a row for every trial of the pack, at the step under way or else the last one. For callbacks.

        ``own``: {index of a trial: values of its own beside those of the pack}. A trial that has ended before this step
        is given nothing: what goes on is not of it.
        """
        self.settle()
        under_way, latest = self._under_way, max(trial.step for trial in self.trials)
        for index, trial in enumerate(self.trials):
            row = {**values, **(own or {}).get(index, {})}
            takes_part = trial.alive or (not under_way and trial.step == latest)
            if trial.failure is None and takes_part and row:
                trial.log(row, under_way)

    @property
    def _under_way(self) -> bool:
        """True if a step has begun that is not finished."""
        begun: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return self.results.under_way or (self.trainer.training and begun.ready > begun.processed)

    def heaviest(self) -> int | None:
        """The step with the heaviest pass, of those that early stopping cannot prevent; None where no step is left."""
        interval, micros = self.trainer.val_check_interval, self.trainer.accumulate_grad_batches
        steps = interval // micros if isinstance(interval, int) else 0
        alive = [trial for trial in self.trials if trial.alive]
        feeds = [Feed.of(trial.spec, trial.data.train, trial.step, trial.certain_steps(steps)) for trial in alive]
        passes = heaviest(feeds, self.weighing)
        return passes[0].step if passes else None

    def heaviest_evaluation(self) -> int | None:
        """The number of the heaviest pass over the split that is scored next; None where there is no pass."""
        split = SPLITS[self.split]
        parts = [trial.evaluated(split) for trial in self.trials if trial.failure is None]
        numbered = heaviest_evaluation(parts, self.weighing)
        return None if numbered is None else numbered[0]

    @property
    def weighing(self) -> Weighing:
        """What the memory of a pass depends on, as far as it is known."""
        passes: Any = self.trainer.train_dataloader
        spiky = (passes.every, passes.length) if hasattr(passes, "every") else None
        mode = self.forward_pass.mode
        return Weighing(mode is not None and mode.unpadded, self.task == "seq2seq_lm", spiky)

    def fed(self, batches: Mapping[int, Batch]) -> Pass:
        """The shapes of ``batches``, a pass of the step under way."""
        parts = [BatchShape.of(batches[i], self.task) if i in batches else None for i in range(len(self.trials))]
        width = max(batch["tensors"]["input_ids"].shape[1] for batch in batches.values())
        longest = max(length for part in parts if part for length in part.inputs)
        step = max(self.trials[i].step for i in batches) + 1
        return Pass(step, tuple(parts), width if width > longest else None)

    def progress(self) -> dict[str, Any]:
        """Step, losses, rate and tokens of the pack, for progress lines; a loss is nan before the first step."""
        self.settle()
        return {
            "step": max(trial.step for trial in self.trials),
            "steps": max(trial.max_steps for trial in self.trials),
            "trials": [trial.spec.id for trial in self.trials],
            "losses": [self.results.losses.get(index, float("nan")) for index in range(len(self.trials))],
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "tokens": sum(trial.tokens for trial in self.trials),
        }


def _clip(parameters: list[nn.Parameter], settings: TrainerSpec) -> Tensor:
    """The norm of all gradients before they are clipped, by it or (``gradient_clip_algorithm=value``) each value."""
    bound = settings.gradient_clip_val or float("inf")
    if settings.decisive.get("gradient_clip_algorithm", "norm") == "norm":
        return torch.nn.utils.clip_grad_norm_(parameters, bound)
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
    torch.nn.utils.clip_grad_value_(parameters, bound)
    return norm


def _slice(trial: Trial, batch: Batch, training: bool) -> BatchSlice:
    key = trial.dropout_key(batch["micro"]) if training else None
    return BatchSlice(trial.adapter, batch["rows"], key, share=batch.get("share"))


def _seed(key: int) -> None:
    """As torch.manual_seed, without the stack trace that it formats on machines without CUDA (2 ms)."""
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(key)
