"""What a run reads from its callbacks. An ordinary Lightning callback has none of it, and its trial runs alone."""

from collections.abc import Iterable
from typing import Any, Protocol

# Lightning's own that look at the pass or the clock, and at no single trial: once a pack
ONCE_A_PACK = {
    *("LearningRateMonitor", "DeviceStatsMonitor", "Timer", "ModelSummary", "RichModelSummary"),
    *("TQDMProgressBar", "RichProgressBar"),
}
LIGHTNING = ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")


class Observer(Protocol):
    """A Lightning callback that knows packs: ``pl_module.trials`` are those that train together, and
    ``pl_module.report(values)`` writes a row for each. All members are optional."""

    pack_aware: bool  # true: it may see several trials at once
    excluded_s: float  # seconds of the fit that no timing counts
    excluded_tokens: dict[int, int]  # {index of a trial: its tokens in those seconds}

    def summary(self) -> dict[str, Any]:
        """Fields of the record's ``memory``. A callback that has it observes evaluations too."""


def is_pack_aware(callback: Any) -> bool:
    kind = type(callback)
    return bool(getattr(callback, "pack_aware", is_lightnings(callback) and kind.__name__ in ONCE_A_PACK))


def is_lightnings(callback: Any) -> bool:
    """Whether the callback's very class is Lightning's own."""
    return type(callback).__module__.startswith(LIGHTNING)


def is_own(callback: Any) -> bool:
    """Whether it is an Observer: what it logs and holds needs no help of Lightning's."""
    return hasattr(callback, "pack_aware")


def is_loralabs(callback: Any) -> bool:
    return type(callback).__module__.partition(".")[0] == "loralab"


def can_go_on(callback: Any) -> bool:
    """Whether a run may go on from a checkpoint that holds no more of the callback than its ``state_dict``: loralab's
    observers, Lightning's own classes, and those that have a ``state_dict``."""
    from lightning.pytorch import Callback

    return is_own(callback) or is_lightnings(callback) or type(callback).state_dict is not Callback.state_dict


def evaluation_observers(callbacks: Iterable[Any]) -> list[Any]:
    """The callbacks that observe evaluations after the fit too."""
    return [callback for callback in callbacks if hasattr(callback, "summary")]


def memory_fields(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The fields that the callbacks add to the record's ``memory``."""
    fields: dict[str, Any] = {}
    for callback in evaluation_observers(callbacks):
        fields.update(callback.summary())
    return fields


def excluded_seconds(callbacks: Iterable[Any]) -> float:
    return sum(float(getattr(callback, "excluded_s", 0.0)) for callback in callbacks)


def excluded_tokens(callbacks: Iterable[Any]) -> dict[int, int]:
    """{index of a trial: tokens that no timing counts}."""
    tokens: dict[int, int] = {}
    for callback in callbacks:
        tokens.update(getattr(callback, "excluded_tokens", {}))
    return tokens
