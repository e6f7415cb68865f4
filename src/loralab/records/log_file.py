"""A log file that stops no run: what cannot be written to it is said once on the terminal."""

import logging
import sys
from contextlib import suppress


class LogFile(logging.FileHandler):
    """logging's own, but for a full disk: one line on stderr in place of a traceback for each line of the log."""

    _said = False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line; logging opens the file with the first one, whose folder may be gone by then."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._said:
            self._said = True
            with suppress(OSError):
                sys.stderr.write(f"{self.baseFilename} cannot be written: {error.strerror or error}; the run goes on\n")

    def close(self) -> None:
        """Closes the file; what is not written by then is lost where it cannot be written."""
        with suppress(OSError):
            super().close()
