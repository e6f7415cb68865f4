"""train.log: each trial's own story, of those that train together too."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def train_logs(folders: Mapping[str, Path]) -> Iterator[None]:
    """While it lasts, what is logged goes to train.log of every run folder of ``folders`` ({trial: folder}); a line
    that is of one trial (``extra={"trial": id}``) to that one only."""
    root = logging.getLogger()
    handlers = [_handler(trial, folder) for trial, folder in folders.items()]
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _handler(trial: str, folder: Path) -> logging.Handler:
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "train.log", delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(lambda line: getattr(line, "trial", trial) == trial)
    return handler


class TerminalFilter(logging.Filter):
    """Keeps lines off the terminal that are for train.log only (``extra={"terminal": False}``)."""

    def filter(self, record: logging.LogRecord) -> bool:
        return bool(getattr(record, "terminal", True))
