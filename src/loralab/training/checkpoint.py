"""The training state of each trial on disk: a run that was killed goes on from there."""

import io
import logging
import os
import pickle
import time
import zipfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_leaves

from loralab import signals
from loralab.errors import ArtifactError, Interrupted
from loralab.optim.optimizers import State, state_of
from loralab.records.record import sync_folder
from loralab.spec import Count, Positive, arguments
from loralab.training import observer

if TYPE_CHECKING:
    from loralab.training.trial import Trial

log = logging.getLogger(__name__)

FORMAT = 2
OVERHEAD = 1024  # bytes of a tensor's own file and entry in a checkpoint
ANEW = "the trial begins anew"
WORTH_SECONDS = 60.0  # of training since the last file, from which its end is written too


class Checkpoint(Callback):
    """Writes ``checkpoints/last.pt`` of every trial, each its own file: adapter, optimizer state, step. The file before
    it stays beside it as ``previous.pt``, for a last one that is damaged.

    The order of the data and dropout follow from seed and step, and the base is not written. Files are written between
    optimizer steps, when ``minutes`` have passed or a trial has made ``every_n_steps`` since the last time, and when
    the run is interrupted: a signal that comes once the update has begun waits for the end of its step. The last state
    of a trial that ends before its pack is written too. A file that cannot be written is a warning. The ``state_dict``
    of Lightning's and of the user's own callbacks is in it, as it is when all of them have seen the end of a step, and
    so is that of a loss scaler (16-mixed).
    """

    pack_aware = True

    @arguments("callbacks.checkpoint")
    def __init__(self, minutes: Positive | None = 10.0, every_n_steps: Count | None = None) -> None:
        self.minutes, self.every_n_steps = minutes, every_n_steps
        self.excluded_s = 0.0  # of writing, which is no training
        self._written: dict[str, int] = {}  # {trial: step}
        self._logged: dict[str, int] = {}  # {trial: the last step whose rows are all in metrics.jsonl}
        self._unkept: set[str] = set()  # callbacks whose state cannot be kept
        self._since = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()
        module: Any = pl_module
        self._written = {trial.spec.id: trial.step for trial in module.trials}
        self._logged = {}

    def on_before_optimizer_step(self, *_: Any) -> None:
        if self._enabled:
            signals.begin_step()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not pl_module.others:
            self._end_step(trainer, pl_module)

    # with other callbacks a step is over when each of them has seen its end, and what they logged is written; the run
    # calls this callback before all others, so that none of them has seen what comes next

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if pl_module.others:
            self._end_step(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.others and trainer.optimizers and not trainer.sanity_checking:
            self._end_step(trainer, pl_module)

    def _end_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._see_step(trainer, pl_module)
        signals.end_step()

    def _see_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if module.others and all(trial.step == self._logged.get(trial.spec.id) for trial in module.trials):
            return  # within a step, or after its validation
        self._logged = {trial.spec.id: trial.step for trial in module.trials}
        self._keep_states(module)
        steps = max(step - self._written[trial] for trial, step in self._logged.items())  # since the last file
        timely = self.minutes is not None and time.monotonic() - self._since >= 60 * self.minutes
        if steps and (timely or (self.every_n_steps is not None and steps >= self.every_n_steps)):
            self._write(trainer, module)

    def _keep_states(self, module: Any) -> None:
        for name, callback in module.others.items():
            try:
                state = deepcopy(callback.state_dict())
                _check_readable(state)
            except Exception as error:
                if name not in self._unkept:
                    log.warning("the state of callbacks.%s is in no checkpoint: %s", name, error)
                self._unkept.add(name)
                continue
            for trial in module.trials:
                trial.callback_states[name] = state

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if module.others:
            self._end_step(trainer, pl_module)
        if self._enabled and time.monotonic() - self._since >= WORTH_SECONDS:  # the last validation may take long
            self._write(trainer, module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._enabled and isinstance(exception, Interrupted | KeyboardInterrupt) and trainer.optimizers:
            self._write(trainer, pl_module)

    @property
    def _enabled(self) -> bool:
        return self.minutes is not None or self.every_n_steps is not None

    def _write(self, trainer: Trainer, module: Any) -> None:
        module.settle()
        begun, trials = time.monotonic(), module.trials
        observers = trainer.callbacks  # type: ignore[attr-defined]
        excluded, untimed = observer.excluded_seconds(observers), observer.excluded_tokens(observers)
        for index, trial in enumerate(trials):
            name = trial.spec.id
            trial.clock.mark(begun, excluded, untimed.get(index, 0))
            trial.scaler_state = dict(trainer.precision_plugin.state_dict())
            before = self._written.get(name, trial.step)
            if trial.failure is not None or trial.step == before or trial.step != self._logged.get(name):
                continue
            try:
                state = state_of(trainer.optimizers[0], index)
                if trial.is_in_step(state):
                    write(trial, state)
            except Exception as error:  # training has not failed, and an interruption shall stay one
                log.warning("%s has no checkpoint at step %d: %s", name, trial.step, " ".join(str(error).split())[:200])
            self._written[name] = trial.step  # not where an interruption tears it, which writes it again
        self._since = time.monotonic()
        self.excluded_s += self._since - begun


def _check_readable(state: Any) -> None:
    """Raises an error where a checkpoint with ``state`` could not be read again: torch loads tensors and plain values
    only."""
    if not state:
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


def path(folder: Path) -> Path:
    """The checkpoint of the run in ``folder``."""
    return folder / "checkpoints" / "last.pt"


def _previous(folder: Path) -> Path:
    """The checkpoint before the last one of the run in ``folder``."""
    return path(folder).with_name("previous.pt")


def write(trial: "Trial", optimizer: State) -> None:
    """Replaces the trial's checkpoint and keeps the one before; at any moment one of them is whole. Raises OSError,
    RuntimeError."""
    target = path(trial.spec.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(target)
    trial.sync_loggers()
    state = {**trial.state_dict(), "optimizer": optimizer}
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, "made_on": _made_on(trial), "precision": _precision(trial), **state}, file)
            file.flush()
            os.fsync(file.fileno())
        _check_size(partial, state)
        if target.is_file():
            target.replace(_previous(trial.spec.folder))
        partial.replace(target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _check_size(file: Path, state: Any) -> None:
    """Warns of a file larger than the tensors of ``state`` explain: of a view torch writes the whole storage."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    held, written = sum(tensor.numel() * tensor.element_size() for tensor in tensors), file.stat().st_size
    if written > 1.1 * held + OVERHEAD * (len(tensors) + 64):
        log.warning(
            "%s has %s bytes, and the tensors in it %s: some are parts of larger ones, which were written whole",
            *(path(file.parent.parent), f"{written:,}", f"{held:,}"),
        )


def resume(trial: "Trial") -> bool:
    """True if ``trial`` was set to a checkpoint in its folder, the last one or, where that is damaged, the one before;
    it must be of the same trial, base and rows.

    Where there is none of it, those that are there are removed: the rows that belong to them are written anew. Raises
    ArtifactError where a newer loralab has written it, or another device in another precision, so that it is not
    replaced.
    """
    folder = trial.spec.folder
    for source in filter(Path.is_file, (path(folder), _previous(folder))):
        taken = _take_up(trial, source)
        if taken is not None:
            if not taken:
                forget(folder)
            return taken
    return False


def _take_up(trial: "Trial", source: Path) -> bool | None:
    """True if ``trial`` was set to the checkpoint ``source``, False if that is another's, None if it is damaged."""
    try:
        with zipfile.ZipFile(source) as archive:  # torch writes checksums and does not check them
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(source, map_location="cpu", weights_only=True)
        if state["format"] > FORMAT:
            raise ArtifactError(
                f"{source} has format {state['format']}, and this loralab reads up to {FORMAT}; valid: a newer loralab,"
                " or --fresh, which begins anew"
            )
        if state["format"] != FORMAT or state["made_on"] != _made_on(trial):
            log.info("%s is of other settings, data or base weights: the trial begins anew", source)
            return False
        if (before := state.get("precision") or _unsaid_precision(trial)) != _precision(trial):
            raise ArtifactError(
                f"{source} was computed in {before}, and trainer.precision={trial.spec.trainer.precision} is "
                f"{_precision(trial)} on this device; valid: a device as before, or --fresh, which begins anew"
            )
        if _shapes(state["adapter"]) != _shapes(trial.adapter.state_dict()):
            raise ValueError("its adapter has other parameters")
        trial.load_state_dict(state)
    except ArtifactError:
        raise
    except pickle.UnpicklingError:  # torch's own text says how to run the code in it
        _mention(trial, source, "holds more than tensors, such as code, which is never run")
        return None
    except Exception as error:  # torch and pickle raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        _mention(trial, source, f"cannot be used ({reason})")
        return None
    log.info("%s goes on from step %d of %d", trial.spec.id, trial.step, trial.max_steps)
    return True


def _mention(trial: "Trial", source: Path, fault: str) -> None:
    other = _previous(trial.spec.folder)
    following = f"the one before it, {other.name}, is tried" if other != source and other.is_file() else ANEW
    log.warning("%s %s: %s", source, fault, following)


def forget(folder: Path) -> None:
    """Removes the checkpoints of a finished run, or before a fresh one. A file that cannot be removed is a warning."""
    target = path(folder)
    try:
        target.unlink(missing_ok=True)
        _previous(folder).unlink(missing_ok=True)
        _remove_partial(target)
    except OSError as error:
        log.warning("%s cannot be removed: %s", target, error)
    if target.parent.is_dir() and not any(target.parent.iterdir()):
        target.parent.rmdir()


def _remove_partial(target: Path) -> None:
    """Removes the unfinished files of a run that was killed while it wrote."""
    for partial in target.parent.glob(f".{target.name}.*"):
        partial.unlink(missing_ok=True)


def _precision(trial: "Trial") -> str:
    """Of the passes on the device that the trial is on."""
    trainer = trial.spec.trainer
    return trainer.precision_on(trainer.device)


def _unsaid_precision(trial: "Trial") -> str:
    """Of a checkpoint that was written before they said so, when auto was always float32."""
    precision = trial.spec.trainer.precision
    return "32-true" if precision == "auto" else precision


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _made_on(trial: "Trial") -> dict[str, str]:
    """Fingerprints that must be equal for the trial to continue from a checkpoint."""
    base, data = trial.record["base"], trial.record["data"]
    fingerprints = {"base": base["fingerprint"], "data": data["fingerprint"], "tokenizer": data["tokenizer"]}
    if code := trial.record["code"]["sources"]:
        fingerprints["code"] = sorted(code.items())
    return {"trial": trial.spec.id, **{part: str(fingerprint) for part, fingerprint in fingerprints.items()}}
