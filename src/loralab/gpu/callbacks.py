"""A run that is killed in its middle, so that another can take it up."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback, Trainer

KILL_AFTER = "LORALAB_KILL_AFTER"  # environment: steps; the configuration of a killed run and its heir must be the same


class Kill(Callback):
    """Ends the process by SIGKILL after as many steps as the environment says; does nothing where it says none."""

    pack_aware = True

    def __init__(self) -> None:
        self.steps = int(os.environ.get(KILL_AFTER) or 0)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.steps and trainer.global_step >= self.steps:
            os.kill(os.getpid(), signal.SIGKILL)
