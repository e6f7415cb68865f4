"""A callback, for a folder on PYTHONPATH, that ends its process by kill -9 at an exact place and keeps what resuming is
judged by. It is only looking on (``pack_aware``), so that the trial keeps its id.

KILL_AT names one place of this process, or none:
  batch:N.M         before the pass M of step N (steps from 1, passes from 0)
  update:N          when the gradients of step N are there, before the optimizer uses them
  after:N           behind step N, before the checkpoint that is due is written
  written:N         behind step N and the checkpoint that was due
  validation:N      within the validation behind step N
  final             within the validation of the final state
  torn:K            in the middle of writing the K-th checkpoint file of this process
  between:K         before the K-th of them takes the place of the one before
  record            before the record of the finished trial is written
"""

import os
import signal
from pathlib import Path

import torch
from left_files import STATE, STEPS
from lightning.pytorch import Callback

from loralab.optim.optimizers import state_of
from loralab.running import finish
from loralab.training import checkpoint

PLACE = os.environ.get("KILL_AT", "")


def reach(place):
    if place == PLACE:
        os.kill(os.getpid(), signal.SIGKILL)


class Killer(Callback):
    pack_aware = True
    seen = {}  # noqa: RUF012 - set anew by each fit: the steps that are in the log
    ended = {}  # noqa: RUF012 - those whose end was seen

    def summary(self):
        """Makes it an observer of the final validation too."""
        return {}

    def on_train_start(self, trainer, module):
        Killer.seen = {trial.spec.id: trial.step for trial in module.trials}
        self.ended = dict(Killer.seen)

    def on_train_batch_start(self, trainer, module, batch, index):
        micro = next(iter(batch.values()))["micro"]
        reach(f"batch:{max(trial.step for trial in module.trials) + 1}.{micro}")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        reach(f"update:{max(trial.step for trial in module.trials) + 1}")

    def on_train_batch_end(self, trainer, module, *_):
        note(module.trials)
        moved = [pair for pair in enumerate(module.trials) if pair[1].step > self.ended.get(pair[1].spec.id, 0)]
        for index, trial in moved:
            self.ended[trial.spec.id] = trial.step
            if trial.step == trial.max_steps:
                torch.save(state_of(trainer.optimizers[0], index), trial.spec.folder / STATE)
        if moved:
            reach(f"written:{moved[0][1].step}")

    def on_validation_batch_start(self, trainer, module, *_):
        training = bool(trainer.optimizers)
        reach(f"validation:{max(trial.step for trial in module.trials)}" if training else "final")


def note(trials):
    """Logs the steps that are over, each once; also before a checkpoint holds them."""
    for trial in trials:
        if trial.step > Killer.seen.get(trial.spec.id, 0):
            with (trial.spec.folder / STEPS).open("a") as file:
                file.write(f"{os.getpid()} {trial.step}\n")
            Killer.seen[trial.spec.id] = trial.step  # last: an interruption may come in between


class Torn:
    """Counts the checkpoint files of this process."""

    count = 0

    @classmethod
    def save(cls, content, file, real=torch.save):
        if Path(str(getattr(file, "name", ""))).name.startswith(".last.pt."):
            cls.count += 1
            if f"torn:{cls.count}" == PLACE:
                file.write(b"half of it")
                file.flush()
                reach(PLACE)
        real(content, file)

    @classmethod
    def replace(cls, path, target, real=Path.replace):
        if path.name.startswith(".last.pt."):
            reach(f"between:{cls.count}")
        return real(path, target)


def finished(folder, record, real=finish.records.write):
    if record["status"] == "completed":
        reach("record")
    return real(folder, record)


def before_writing(self, trainer, trials, real=checkpoint.Checkpoint._write):
    note(trials)
    reach(f"after:{max(trial.step for trial in trials)}")
    real(self, trainer, trials)


torch.save, Path.replace = Torn.save, lambda path, target: Torn.replace(path, target)
finish.records.write = finished
checkpoint.Checkpoint._write = before_writing
