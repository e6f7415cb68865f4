"""The spec of the check of a run's predicted memory against a budget."""

from typing import Literal

from loralab.spec import Gib, spec


@spec("plan")
class PlanSpec:
    """Whether a prediction stops a run, and for which device it is made."""

    record: bool = True  # trace the step of every distinct pack, for its record
    enforce: bool = True  # false: warn
    device: Literal["auto", "cuda", "cpu"] = "auto"
    budget_gib: Gib | None = None  # null: what the device has
