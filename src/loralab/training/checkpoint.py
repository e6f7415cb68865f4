"""Where each trial of a pack stands, on disk while it trains: a run that was killed goes on from there."""

import logging
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from loralab.errors import Interrupted
from loralab.optim.optimizers import State, state_of
from loralab.spec import Count, Positive, arguments

if TYPE_CHECKING:
    from loralab.training.trial import Trial

log = logging.getLogger(__name__)

FORMAT = 2
WORTH = 60.0  # seconds of training that are worth a file at its end


class Checkpoint(Callback):
    """Writes ``checkpoints/last.pt`` of every trial, each its own file: adapter, optimizer state, step.

    The order of the data and dropout follow from seed and step, and the base is not kept. Between optimizer steps, when
    ``minutes`` have passed or a trial has made ``every_n_steps`` since the last time, and when the run is interrupted.
    A trial that ends before its pack has its last state written too. A file that cannot be written is a warning. What
    other callbacks and a GradScaler (16-mixed) hold is not in it.
    """

    pack_aware = True

    @arguments("callbacks.checkpoint")
    def __init__(self, minutes: Positive | None = 10.0, every_n_steps: Count | None = None) -> None:
        self.minutes, self.every_n_steps = minutes, every_n_steps
        self.excluded_s = 0.0  # of writing, which is no training
        self._written: dict[str, int] = {}  # {trial: step}
        self._logged: dict[str, int] = {}  # {trial: the last step whose rows are all in metrics.jsonl}
        self._since = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()
        module: Any = pl_module
        self._written = {trial.spec.id: trial.step for trial in module.trials}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        module: Any = pl_module
        self._logged = {trial.spec.id: trial.step for trial in module.trials}
        behind = max(step - self._written[name] for name, step in self._logged.items())
        timely = self.minutes is not None and time.monotonic() - self._since >= 60 * self.minutes
        if behind and (timely or (self.every_n_steps is not None and behind >= self.every_n_steps)):
            self._write(trainer, module.trials)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if self._asked and time.monotonic() - self._since >= WORTH:  # the last validation may take long
            self._write(trainer, module.trials)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        module: Any = pl_module
        if self._asked and isinstance(exception, Interrupted | KeyboardInterrupt) and trainer.optimizers:
            self._write(trainer, module.trials)

    @property
    def _asked(self) -> bool:
        return self.minutes is not None or self.every_n_steps is not None

    def _write(self, trainer: Trainer, trials: list["Trial"]) -> None:
        begun = time.monotonic()
        for index, trial in enumerate(trials):
            name = trial.spec.id
            before = self._written.get(name, trial.step)
            if trial.failure is not None or trial.step == before or trial.step != self._logged.get(name):
                continue
            self._written[name] = trial.step
            try:
                state = state_of(trainer.optimizers[0], index)
                if trial.is_in_step(state):
                    write(trial, state)
            except Exception as error:  # training has not failed, and an interruption shall stay one
                log.warning("%s has no checkpoint at step %d: %s", name, trial.step, " ".join(str(error).split())[:200])
        self._since = time.monotonic()
        self.excluded_s += self._since - begun


def path(folder: Path) -> Path:
    """Of a run folder."""
    return folder / "checkpoints" / "last.pt"


def write(trial: "Trial", optimizer: State) -> None:
    """The trial's state in place of the one before; a reader sees one or the other. Raises OSError, RuntimeError."""
    target = path(trial.spec.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    trial.sync_loggers()
    state = {**trial.state_dict(), "optimizer": optimizer}
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, "made_on": _made_on(trial), **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def resume(trial: "Trial") -> bool:
    """Takes up what ``trial``'s folder holds of the same trial on the same base and rows; whether it does."""
    source = path(trial.spec.folder)
    if not source.is_file():
        return False
    try:
        with zipfile.ZipFile(source) as archive:  # torch writes check sums and reads none
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(source, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT or state["made_on"] != _made_on(trial):
            log.info("%s is of other settings, data or base weights: the trial begins anew", source)
            return False
        if _shapes(state["adapter"]) != _shapes(trial.adapter.state_dict()):
            raise ValueError("its adapter has other parameters")
        trial.load_state_dict(state)
    except Exception as error:  # torch and pickle raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        log.warning("%s cannot be used (%s): the trial begins anew", source, reason)
        return False
    log.info("%s goes on from step %d of %d", trial.spec.id, trial.step, trial.max_steps)
    return True


def forget(folder: Path) -> None:
    """Removes what a finished or a fresh run has no use for."""
    target = path(folder)
    try:
        target.unlink(missing_ok=True)
        _sweep(target)
    except OSError as error:
        log.warning("%s cannot be removed: %s", target, error)
    if target.parent.is_dir() and not any(target.parent.iterdir()):
        target.parent.rmdir()


def _sweep(target: Path) -> None:
    """Removes what a run left that was killed while it wrote."""
    for left in target.parent.glob(f".{target.name}.*"):
        left.unlink(missing_ok=True)


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _made_on(trial: "Trial") -> dict[str, str]:
    """What must be the same for a continuation to be one."""
    base, data = trial.record["base"], trial.record["data"]
    found = {"base": base["fingerprint"], "data": data["fingerprint"], "tokenizer": data["tokenizer"]}
    if code := trial.record["code"]["sources"]:
        found["code"] = sorted(code.items())
    return {"trial": trial.spec.id, **{what: str(fingerprint) for what, fingerprint in found.items()}}
