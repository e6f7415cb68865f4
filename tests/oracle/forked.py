"""A process of its own without the seconds in which a new interpreter imports everything."""

import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path


class Forked:
    """A copy of this process that calls ``function`` and ends with the exit code it returns; used like a Popen.

    ``env``: variables that are set there; ``cwd``: its folder; ``stderr``: the file of its messages; None: nowhere.
    """

    returncode = None

    def __init__(self, function, env=None, cwd=".", stderr=None):
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.environ.update(env or {})
                os.chdir(cwd)
                _redirect(Path(os.devnull), Path(stderr or os.devnull))
                logging.getLogger().handlers.clear()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                code = function()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds=60.0):
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} still runs after {seconds} s")
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _redirect(out, err):
    """What is written to either stream, by Python or below it, goes to these files."""
    for number, name, path in ((1, "stdout", out), (2, "stderr", err)):
        file = path.open("w", buffering=1)
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
