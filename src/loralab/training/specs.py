"""The checked settings of one trial, and which of them the trials of one pack must share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from loralab.adapters.base import AdapterSpec
from loralab.data.base import DataSpec
from loralab.errors import ConfigError
from loralab.forward.texts import takes_texts
from loralab.memory.budget import PlanSpec
from loralab.memory.limits import MemorySpec
from loralab.models import architecture, pretrained
from loralab.optim import foreign, optimizers, schedulers
from loralab.quantization.base import Quantizer
from loralab.records import sources
from loralab.records.metric_logger import LoggerSpec
from loralab.training.early_stopping import EarlyStopping
from loralab.training.trainer import TrainerSpec


@dataclass(frozen=True)
class TrialSpec:
    """The settings of one trial, built and checked; nothing is loaded."""

    id: str
    folder: Path
    seed: int
    metric: str
    metric_mode: str
    model: pretrained.Pretrained
    quantization: Quantizer
    adapter: AdapterSpec
    data: DataSpec
    optimizer: optimizers.AdamW | foreign.AnyOptimizer
    schedule: optimizers.Schedule | schedulers.AnySchedule
    trainer: TrainerSpec
    logger: LoggerSpec
    memory: MemorySpec = field(default_factory=MemorySpec)
    plan: PlanSpec = field(default_factory=lambda: PlanSpec(record=False))
    callbacks: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    stops: tuple[EarlyStopping, ...] = ()  # rules beside trainer.patience, of Lightning's EarlyStopping callbacks
    metrics: Mapping[str, Callable[[], Any]] = field(default_factory=dict)  # torchmetrics' own, by name
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    sweep: str | None = None
    flags: list[str] = field(default_factory=list)  # see records/schema.py
    files: list[str] = field(default_factory=list)  # yaml files of the user's own

    def sources(self) -> dict[str, str]:
        """{module: fingerprint} of the spec classes that decide the result and are not loralab's."""
        parts = (self.model, self.quantization, self.adapter, self.data, self.optimizer, self.schedule, self.trainer)
        made = [*self.metrics.values(), *self.callbacks.values()]
        others = [cast(type, make.func) for make in made if isinstance(make, partial)]
        deciding = [cls for cls in others if not getattr(cls, "pack_aware", False)]  # the others only look on
        return sources.of((getattr(part, "cls", type(part)) for part in parts), deciding)

    def own_metrics(self, texts: bool) -> dict[str, Any]:
        """The user's metrics newly made, by name: those of generated ``texts``, or of predictions and targets."""
        made = {name: make() for name, make in self.metrics.items()}
        return {name: metric for name, metric in made.items() if takes_texts(type(metric)) == texts}

    @property
    def room(self) -> int | None:
        """Tokens of the longest row that the base has positions for, beside the adapter's own; None: no bound."""
        found = architecture.positions(self.model.architecture())
        return None if found is None else found - self.adapter.virtual_tokens

    @property
    def packing_length(self) -> int | None:
        """Tokens that a packed training sequence holds at most; None where a sequence is one row."""
        return self.model.length if self.data.packing else None

    def check_positions(self) -> None:
        """Raises ConfigError where the longest row would not fit behind the adapter's virtual tokens."""
        taken = self.adapter.virtual_tokens
        room = self.room if taken else None
        if room is not None and self.model.length > room:
            null = "" if self.model.max_length else ", which null stands for,"
            raise ConfigError(
                f"model.max_length={self.model.length}{null} and adapter.num_virtual_tokens={taken} exceed the "
                f"{room + taken} positions of the base model; valid: model.max_length of at most {room}"
            )

    @property
    def why_alone(self) -> str:
        """Why the trial cannot share a pass, by its own settings; empty where it can."""
        if self.trainer.strategy:
            return f"trainer.strategy={self.trainer.strategy} is one trial over several processes"
        if self.trainer.decisive.get("max_time"):
            return "trainer.max_time would end all trials of a pass, by the time that they take together"
        if self.trainer.precision == "16-mixed":
            return "trainer.precision=16-mixed has one loss scaler, which would skip the update of all trials of a pass"
        return self.memory.alone or self.adapter.why_alone or self.optimizer.why_alone

    @property
    def own_share(self) -> "TrialSpec":
        """The trial as one of its processes computes it: with its share of the rows of a batch. The prediction of
        memory knows of no base that is spread over devices: of such a one none is made."""
        size = self.trainer.processes
        if size == 1:
            return self
        plan = replace(self.plan, record=False) if self.trainer.strategy == "fsdp" else self.plan
        return replace(self, data=replace(self.data, batch_size=self.data.batch_size // size), plan=plan)

    @property
    def pack_key(self) -> tuple[Any, ...]:
        """Equal for trials that may share a pack."""
        trainer = self.trainer
        parts = (self.model, self.quantization, self.optimizer, self.data, trainer)
        return (
            *map(type, parts),  # two classes may have the same name
            *(repr(self.model), repr(self.quantization), self.optimizer.pack_key),
            *(
                self.data.packing,
                trainer.accumulate_grad_batches,
                trainer.val_check_interval,
                trainer.precision,
                trainer.accelerator,
            ),
            *trainer.shared,
            *(f"{name}: {_described(make)}" for name, make in sorted(self.callbacks.items())),
        )


def _described(make: Any) -> str:
    """What a callback is made by: equal where it is the same class with the same options."""
    made = getattr(make, "func", make)
    return f"{made.__module__}.{made.__qualname__} {getattr(make, 'keywords', {})}"
