"""train.log of each trial, also of those that train together."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loralab.records.log_file import LogFile
from loralab.records.secrets import MaskedFormatter

NAME = "train.log"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def train_logs(folders: Mapping[str, Path]) -> Iterator[None]:
    """Inside, every log line goes to train.log in each of ``folders`` ({trial: run folder}); a line with
    ``extra={"trial": id}`` goes to that trial's only. Where Hydra writes that file already, it goes on doing so."""
    root = logging.getLogger()
    there = [handler.baseFilename for handler in root.handlers if isinstance(handler, logging.FileHandler)]
    new = {trial: folder for trial, folder in folders.items() if str((folder / NAME).absolute()) not in there}
    handlers = [_handler(trial, folder) for trial, folder in new.items()]
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
    handler = LogFile(folder / NAME, delay=True, encoding="utf-8")
    handler.setFormatter(MaskedFormatter(FORMAT))
    handler.addFilter(lambda line: getattr(line, "trial", trial) == trial)
    return handler


class TerminalFilter(logging.Filter):
    """Keeps lines off the terminal that are for train.log only (``extra={"terminal": False}``)."""

    def filter(self, record: logging.LogRecord) -> bool:
        return bool(getattr(record, "terminal", True))
