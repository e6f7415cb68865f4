"""One case through the entry point of the command, in this process, and what must hold of its end."""

import signal
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO

from loralab.cli import main
from loralab.running.runner import Runner

CODES = (0, 2, 3, 4, 5, 6, 7)
STEPS, SECONDS = 2, 30


class Hang(BaseException):
    """A case that takes longer than SECONDS; no ``except Exception`` hides it."""


@contextmanager
def deadline():
    def ring(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def shortened(monkeypatch):
    """A valid case trains for two steps, whatever it asks for; what is checked before is as asked."""
    real = Runner.run

    def run(self, specs):
        return real(self, [replace(spec, trainer=short(spec.trainer)) for spec in specs])

    def short(trainer):
        micros = min(2, trainer.accumulate_grad_batches)
        return replace(trainer, max_steps=min(STEPS, trainer.max_steps), accumulate_grad_batches=micros)

    monkeypatch.setattr(Runner, "run", run)


def fault(words):
    """What is wrong with how the command ends; empty where nothing is."""
    said = StringIO()
    try:
        with deadline(), redirect_stderr(said), redirect_stdout(StringIO()):
            code = main.run(words)
    except Hang:
        return f"no end within {SECONDS} s"
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        return f"it raised {type(error).__name__}: {error}"
    text = said.getvalue()
    if code not in CODES:
        return f"exit code {code}: {text[-600:]}"
    if "Traceback" in text:
        return f"a traceback: {text[-600:]}"
    lines = text.strip("\n").split("\n")
    while len(lines) > 1 and lines[-1].startswith("  "):  # the list of rows that are bad
        lines.pop()
    last = lines[-1]
    if code and not last.startswith("loralab: "):
        return f"exit code {code}, and the last line is no message of loralab's: {text[-600:]!r}"
    if code and len(last) > 2500:
        return f"a message of {len(last)} characters: {last[:300]}"
    return ""
