"""Before a run starts: what it will need, what there is, and a refusal where the one exceeds the other."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from loralab.data.encoding import Encoded
from loralab.errors import OutOfMemory
from loralab.planning.plan import GIB, Plan, predict
from loralab.telemetry.ledgers import Host

log = logging.getLogger(__name__)


class Foresight:
    """One trace for each distinct pack; a fault of the planner's own never stops a run."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan | None] = {}

    def plan(self, specs: list[Any], data: Sequence[Encoded], device: str) -> Plan | None:
        """The plan of trials in one pass of rows as long as the longest, with targets as in the mean row; None where it
        could not be made."""
        first = specs[0]
        train = [own.tokens["train"] for own in data]
        length = max(max(own["longest"] for own in train), 2)
        share = sum(own["target_tokens"] for own in train) / max(1, sum(own["rows"] * length for own in train))
        share = 1.0 if first.model.task == "sequence_classification" else share
        fed = [(type(one.adapter), one.adapter, one.data.batch_size) for one in specs]
        key = f"{fed} {first.shares} {length} {share} {device}"
        if key not in self._plans:
            try:
                self._plans[key] = predict(specs, device, length=length, targets=share)
            except Exception as error:
                log.debug("the memory of trial %s could not be foreseen", first.id, exc_info=error)
                self._plans[key] = None
        return self._plans[key]

    def check(self, specs: list[Any], data: Sequence[Encoded], device: str, held: int = 0) -> Plan | None:
        """Raises OutOfMemory (or warns, ``plan.enforce=false``) for what cannot fit; ``held``: bytes of the base that
        are loaded already."""
        settings = specs[0].plan
        found = self.plan(specs, data, device) if settings.record else None
        if found is None:
            return None
        room = settings.budget_gib * GIB if settings.budget_gib else free_bytes(device) + held
        if found.device_bytes <= room:
            return found
        whose = "plan.budget_gib allows" if settings.budget_gib else f"{device} has"
        text = (
            f"predicted to need {found.device_bytes / GIB:.2f} GiB at its peak, and {whose} {room / GIB:.3g} GiB:"
            " a smaller data.batch_size or model.max_length, model.gradient_checkpointing=true or fewer bits need less;"
            " plan.enforce=false starts it all the same"
        )
        if settings.enforce:
            raise OutOfMemory(text)
        log.warning("%s", text)
        return found


def free_bytes(device: str) -> float:
    """What a new run could take; infinite where nobody says."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return float(Host().available() or float("inf"))


def sentence(trials: int, plan: Plan) -> str:
    """What a sweep says of its largest pack before it starts."""
    where = ", ".join(f"{kind} {size / 2**20:,.0f}" for kind, size in plan.by_kind.items() if size > 2**20)
    return f"largest pass ({trials} trials): predicted peak {plan.predicted_peak_bytes / GIB:.2f} GiB ({where} MiB)"
