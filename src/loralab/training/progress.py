"""The progress of a run: a live line on a terminal, elsewhere a plain line every few seconds."""

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from loralab.spec import NotNegative, arguments

log = logging.getLogger(__name__)

LIVE_SECONDS = 0.1  # between two looks of the live line
PACK_SECONDS = 30.0  # between plain lines of a pack, of which a sweep has many


class ProgressLines(Callback):
    """``step 120/400  loss 2.13  lr 1.0e-3  9,400 tokens/s  3m left`` every ``seconds``; of a pack the lowest and the
    highest loss, at most every 30 seconds, and a line for each trial in its train.log."""

    pack_aware = True

    @arguments("callbacks.progress")
    def __init__(self, seconds: NotNegative = 10.0) -> None:
        self.seconds = seconds
        self._last = self._start = self._shown = 0.0
        self._steps, self._tokens = 0, 0.0
        self._live: _LiveLine | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = self._start = time.monotonic()
        state: dict[str, Any] = pl_module.progress()  # type: ignore[operator]
        self._steps, self._tokens = state["step"], state["tokens"]  # of a continued run
        if trainer.progress_bar_callback is None and sys.stderr.isatty():
            self._live = _LiveLine(state["steps"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.progress_bar_callback is not None:
            return
        now, module = time.monotonic(), pl_module
        several = len(module.trials) > 1  # type: ignore[arg-type]
        seconds = max(self.seconds, PACK_SECONDS) if several and self.seconds else self.seconds
        shown = self._live is not None and now - self._shown >= LIVE_SECONDS
        if not shown and now - self._last < seconds:  # a card need not be waited for
            return
        state: dict[str, Any] = module.progress()  # type: ignore[operator]
        if self._live is not None:
            self._live.show(state["step"], _losses(state["losses"]))
            self._shown = now
        if now - self._last < seconds:
            return
        self._last = now
        left = (now - self._start) / max(1, state["step"] - self._steps) * (state["steps"] - state["step"])
        where = f"step {state['step']}/{state['steps']}"
        rate = f"{(state['tokens'] - self._tokens) / (now - self._start):,.0f} tokens/s"
        hidden = {"terminal": self._live is None}
        if several:
            log.info(
                "%d trials  %s  loss %s  %s  %s left",
                *(len(state["trials"]), where, _losses(state["losses"]), rate, clock(left)),
                extra=hidden,
            )
        for trial, loss in zip(state["trials"], state["losses"], strict=True):
            log.info(
                "%s  loss %.4f  lr %.1e  %s  %s left",
                *(where, loss, state["lr"], rate, clock(left)),
                extra={"trial": trial, "terminal": not several and self._live is None},
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None


class _LiveLine:
    """A bar, the step, the losses and the time left, on a terminal; lines that are logged meanwhile stand above it."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.file_proxy import FileProxy
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=steps)
        handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
        self._streams = [(h, h.stream) for h in handlers if h.stream in (sys.stderr, sys.__stderr__)]
        for handler, stream in self._streams:
            handler.setStream(FileProxy(console, stream))
        self._bar.start()

    def show(self, step: int, losses: str) -> None:
        self._bar.update(self._task, completed=step, description=losses)

    def close(self) -> None:
        self._bar.stop()
        for handler, stream in self._streams:
            handler.setStream(stream)


def _losses(losses: Sequence[float]) -> str:
    """The loss, or the lowest and the highest of several."""
    low, high = min(losses), max(losses)
    return f"{low:.4f}" if low == high else f"{low:.4f} to {high:.4f}"


def clock(seconds: float) -> str:
    """95 -> 1m35s."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
