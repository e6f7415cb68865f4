"""Imports of torch, transformers and Lightning in about 70% of their time."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

SIGNAL = "scipy.signal"
_alone = False  # this process runs loralab's command line and nothing else


def own_process() -> None:
    """Says that this process is loralab's alone: what is imported from now on stays to its end, so that the garbage
    collector need not look at it again, which takes a second of the first steps."""
    global _alone
    _alone = True


@contextmanager
def quick_imports() -> Iterator[None]:
    """What is imported in the ``with`` block is imported sooner; no module is another for it.

    Python's garbage collector, which would go through all modules again and again, waits. torchmetrics imports
    scipy.signal for the sake of one audio metric: it is given a stand-in, which is gone afterwards.
    """
    enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    stand_in = _Signal(SIGNAL) if sys.modules.keys().isdisjoint((SIGNAL, "torchmetrics")) else None
    if stand_in is not None:
        sys.modules[SIGNAL] = stand_in
    try:
        yield
    finally:
        if stand_in is not None and sys.modules.get(SIGNAL) is stand_in:
            del sys.modules[SIGNAL]
        if _alone and len(sys.modules) > known:
            gc.freeze()
        if enabled:
            gc.enable()


class _Signal(ModuleType):
    """In place of scipy.signal: what torchmetrics looks for is there, all else imports the real one."""

    hamming = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(SIGNAL) is self:
            del sys.modules[SIGNAL]
        return getattr(importlib.import_module(SIGNAL), name)
