"""What the predicted memory of a run is held against."""

import math
from dataclasses import dataclass

from loralab.errors import ConfigError, nearest

DEVICES = ("auto", "cuda", "cpu")


@dataclass(frozen=True)
class PlanSpec:
    """Whether a prediction stops a run, and for which device it is made."""

    record: bool = True  # trace the step of every distinct pack, for its record
    enforce: bool = True  # false: warn
    device: str = "auto"
    budget_gib: float | None = None  # null: what the device has

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"plan.device={self.device!r} is unknown; {nearest(self.device, DEVICES)}")
        if self.budget_gib is not None and not (math.isfinite(self.budget_gib) and self.budget_gib > 0):
            raise ConfigError(f"plan.budget_gib must be a positive number of GiB or null, got {self.budget_gib}")
