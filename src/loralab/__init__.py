"""LoRA and QLoRA experiments: many trials, one frozen base, records that can be rerun.

From Python: ``train``, ``sweep``, ``plan``, ``results``, ``summary``, ``curves``, ``charts``, ``load``,
``lightning`` (see ``loralab.api``).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralab.api import charts, curves, lightning, load, plan, results, summary, sweep, train

__version__ = "0.1.0"
__all__ = ["charts", "curves", "lightning", "load", "plan", "results", "summary", "sweep", "train"]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that ``import loralab`` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'loralab' has no attribute {name!r}")
    from loralab import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
