"""Lightning's loggers beside metrics.jsonl: an instance for each trial, which no error and no delay of it holds up."""

import inspect
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.records.metric_logger import Labels, LoggerSpec, MetricLogger, prepare

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0  # a killed run loses no more
PATIENCE_SECONDS = 30.0  # that the end of a trial waits for a slow logger
PLACE = ("save_dir", "name", "version")  # arguments of Lightning's file loggers that say where they write
NAMES = {"TensorBoardLogger": "tensorboard", "CSVLogger": "csv"}  # their folders in a run folder


@dataclass(frozen=True)
class LightningLogger:
    """Any Lightning logger with its own arguments. Where they do not say it, it writes below the run folder, into a
    folder of its own."""

    cls: type[Any]
    arguments: Mapping[str, Any]
    key: str = "logger"  # for messages

    def start(self, folder: Path, labels: Labels, resumed: bool = False, left_out: Collection[str] = ()) -> "Aside":
        place = {name: value for name, value in self._place(folder).items() if self.arguments.get(name) is None}
        values = {**self.arguments, **place}
        own = len(place) == len(PLACE)

        def begin() -> Any:
            if own:
                _remove_earlier(folder / place["name"])
            logger = self.cls(**values)
            with suppress(Exception):  # of a logger that takes none, or not these
                logger.log_hyperparams(dict(labels.config))
            return logger

        return Aside(begin, self.key, replays=own)

    def _place(self, folder: Path) -> dict[str, Any]:
        """The arguments that say where it writes: for TensorBoard and CSV a folder of that name in the run folder."""
        named = inspect.signature(self.cls).parameters
        place = {"save_dir": str(folder)} if "save_dir" in named else {}
        title = next((NAMES[kind.__name__] for kind in self.cls.__mro__ if kind.__name__ in NAMES), None)
        return {**place, "name": title, "version": ""} if title else place


def _remove_earlier(folder: Path) -> None:
    """Removes what an earlier process of the same run wrote: all its rows that count are written again."""
    for path in [*folder.glob("events.out.tfevents.*"), *folder.glob("metrics.csv")]:
        path.unlink()


class Aside:
    """A Lightning logger that works in a thread of its own. Its first error is logged, and ends it."""

    def __init__(self, begin: Callable[[], Any], key: str, replays: bool = False) -> None:
        """``begin`` makes the logger; ``replays``: it is given the rows of an earlier process again."""
        self.replays, self._key = replays, key
        self._waiting: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(begin,), name=key, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        row = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._waiting.put(lambda logger: logger.log_metrics(row, step=step))

    def sync(self) -> None:
        """It writes by itself, every second."""

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Nothing: the last rows hold the scores."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Nothing: the record holds it."""

    def finish(self, exit_code: int = 0) -> None:
        """Waits until all rows are written, for half a minute at most."""
        self._waiting.put(lambda logger: logger.finalize("failed" if exit_code else "success"))
        self._waiting.put(None)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            log.warning(
                "%s is slow: it has not written all rows %.0f seconds after the end; metrics.jsonl holds them",
                *(self._key, PATIENCE_SECONDS),
            )

    def _work(self, begin: Callable[[], Any]) -> None:
        try:
            logger = begin()
            saved = time.monotonic()
            while (action := self._waiting.get()) is not None:
                action(logger)
                if time.monotonic() - saved >= FLUSH_SECONDS:
                    logger.save()
                    saved = time.monotonic()
        except Exception as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            log.warning("%s stopped: %s; metrics.jsonl goes on", self._key, reason)


@dataclass(frozen=True)
class Loggers:
    """Several loggers at once; none of them: metrics.jsonl alone."""

    specs: tuple[LoggerSpec, ...]

    def prepare(self) -> None:
        for spec in self.specs:
            prepare(spec)

    def start(self, folder: Path, labels: Labels, resumed: bool = False, left_out: Collection[str] = ()) -> "Each":
        return Each([spec.start(folder, labels, resumed, left_out) for spec in self.specs])


class Each:
    """Gives everything to each of its loggers."""

    def __init__(self, loggers: Sequence[MetricLogger]) -> None:
        self.loggers = loggers

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for logger in self.loggers:
            logger.log(step, values)

    def sync(self) -> None:
        for logger in self.loggers:
            logger.sync()

    def summarize(self, values: Mapping[str, Any]) -> None:
        for logger in self.loggers:
            logger.summarize(values)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        for logger in self.loggers:
            logger.table(name, columns, rows)

    def finish(self, exit_code: int = 0) -> None:
        for logger in self.loggers:
            logger.finish(exit_code)
