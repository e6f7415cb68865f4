"""Imports of torch, transformers and Lightning in about 70% of their time."""

import functools
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any
from unittest.mock import patch

# {a slow module: (who imports it for one function, that function)}
ASIDE = {
    "scipy.signal": ("torchmetrics", "hamming"),  # for an audio metric
    "scipy.optimize": ("transformers.loss.loss_for_object_detection", "linear_sum_assignment"),
}
ALLOCATOR = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)  # of torch's allocator on CUDA: its name, and the older one
SCAN = "create_import_structure_from_path"
_alone = False  # this process runs loralab's command line and nothing else


def own_process() -> None:
    """Says that this process is loralab's alone: what is imported from now on stays to its end, so that the garbage
    collector need not look at it again, which takes a second of the first steps; and torch's allocator on CUDA is the
    one that plans count with, unless the environment says which."""
    global _alone
    _alone = True
    # segments that grow leave far less between blocks of ever new lengths; read by torch when it is imported
    if sys.platform == "linux" and os.environ.keys().isdisjoint(ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


@contextmanager
def quick_imports() -> Iterator[None]:
    """What is imported in the ``with`` block is imported sooner; no module is another for it.

    Python's garbage collector, which would go through all modules again and again, waits. Modules that others import
    for a function that is not called here (``ASIDE``) have stand-ins, which are gone afterwards. transformers reads the
    files of all its models twice (``SCAN``), because its cache of them is too small: here it is not.
    """
    enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    needed = [name for name, (by, _) in ASIDE.items() if sys.modules.keys().isdisjoint((name, by))]
    stand_ins = {name: _StandIn(name) for name in needed}
    sys.modules.update(stand_ins)
    try:
        with patch.object(functools, "lru_cache", _caching):
            yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
        if _alone and len(sys.modules) > known:
            gc.freeze()
        if enabled:
            gc.enable()


def _caching(maxsize: Any = 128, typed: bool = False) -> Any:
    """``functools.lru_cache``, with room for all that ``SCAN`` reads."""
    return lru_cache(None)(maxsize) if getattr(maxsize, "__name__", "") == SCAN else lru_cache(maxsize, typed)


class _StandIn(ModuleType):
    """In place of a module of ``ASIDE``: its function imports the real one when it is called, all else at once."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == ASIDE[self.__name__][1]:
            return lambda *args, **kwargs: getattr(self._real(), name)(*args, **kwargs)
        return getattr(self._real(), name)

    def _real(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)
