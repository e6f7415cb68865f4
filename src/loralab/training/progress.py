"""Progress where no terminal draws a bar: a plain line every few seconds, so that logs stay readable."""

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from loralab.spec import NotNegative, arguments

log = logging.getLogger(__name__)


class ProgressLines(Callback):
    """One line ``step 120/400  loss 2.13  lr 1.0e-3  9,400 tokens/s  3m left`` every ``seconds``."""

    pack_aware = True

    @arguments("callbacks.progress")
    def __init__(self, seconds: NotNegative = 10.0) -> None:
        self.seconds = seconds
        self._last = self._start = 0.0
        self._steps, self._tokens = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = self._start = time.monotonic()
        before: dict[str, float] = pl_module.progress()  # type: ignore[operator]
        self._steps, self._tokens = int(before["step"]), before["tokens"]  # of a continued run

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self._last < self.seconds or trainer.progress_bar_callback is not None:
            return
        self._last = now
        state: dict[str, float] = pl_module.progress()  # type: ignore[operator]
        done, total = int(state["step"]), int(state["steps"])
        left = (now - self._start) / max(1, done - self._steps) * (total - done)
        log.info(
            "step %d/%d  loss %.4f  lr %.1e  %s tokens/s  %s left",
            *(done, total, state["loss"], state["lr"]),
            *(f"{(state['tokens'] - self._tokens) / (now - self._start):,.0f}", clock(left)),
        )


def clock(seconds: float) -> str:
    """95 -> 1m35s."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
