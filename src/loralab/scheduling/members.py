"""A trial as the packer needs it: its pack key, the tokens and bytes it adds to a pass, why it runs alone."""

import logging
from typing import Any

from loralab.errors import ConfigError
from loralab.forward.dropout import why_alone
from loralab.planning.foresee import free_bytes
from loralab.planning.plan import CONTEXT, FRAGMENTATION, GIB, device_bytes, estimate
from loralab.scheduling.packs import Member
from loralab.training.observer import is_pack_aware
from loralab.training.specs import TrialSpec

log = logging.getLogger(__name__)

SHARE_OF_FREE = {"cpu": 0.8, "cuda": 0.9}  # what packs may take where no memory_budget is given


class Members:
    """Makes Member objects. The memory of trials that differ only in seed or rate is estimated once."""

    def __init__(self, device: str | None = None) -> None:
        """``device``: cpu or cuda, what trials will run on; None: what each has here."""
        self.device = device
        self._costs: dict[Any, tuple[int, int]] = {}

    def member(self, spec: TrialSpec, data: Any) -> Member:
        """``spec`` as a Member: tokens for rows of the mean length, memory for the longest row of ``data``; with
        data.packing both for full sequences."""
        train = data.tokens["train"]
        full = spec.packing_length and min(spec.packing_length, train["tokens"])
        length = full or train["tokens"] / max(1, train["rows"])
        # ending together: a record is written when its pack ends
        pack_key = (
            *spec.pack_key,
            spec.trainer.max_steps,
            spec.trainer.until,
            spec.trainer.test,
            spec.data.generate_rows > 0,
            repr(spec.data.forgetting),
        )
        # one that needs padding would bring it to the others, whose dropout masks it changes
        pack_key = (*pack_key, spec.adapter.tokenwise)
        base, each = self._cost(spec, max(2, full or train["longest"]))
        return Member(spec.id, pack_key, round(spec.data.batch_size * length), alone(spec), base, each)

    def _cost(self, spec: TrialSpec, length: int) -> tuple[int, int]:
        """(bytes of the base, counted once a pack; bytes that each such trial adds); (0, 0) without an estimate."""
        key = (
            spec.pack_key,
            spec.optimizer.memory_key,
            type(spec.adapter),
            repr(spec.adapter),
            spec.data.batch_size,
            length,
        )
        if key not in self._costs:
            device = self.device or spec.trainer.device
            try:
                single, pair = (estimate([spec] * count, device, length=length) for count in (1, 2))
                self._costs[key] = (2 * single - pair, pair - single)
            except Exception as error:  # the trial itself will report a wrong setting
                log.debug("the memory of trial %s could not be estimated", spec.id, exc_info=error)
                self._costs[key] = (0, 0)
        return self._costs[key]


def room(device: str, memory_budget: float | None) -> float:
    """Bytes that torch may allocate for a pack: within ``memory_budget`` GiB of the device, or most of what is free."""
    budget = memory_budget * GIB if memory_budget else SHARE_OF_FREE[device] * free_bytes(device)
    return (budget - CONTEXT) / FRAGMENTATION if device == "cuda" else budget


def refusal(member: Member, device: str, memory_budget: float) -> ConfigError | None:
    """The error of a trial that exceeds ``memory_budget`` (GiB) even alone; None where it fits."""
    need = member.base + member.own
    if need <= room(device, memory_budget):
        return None
    need = device_bytes(need) if device == "cuda" else need
    return ConfigError(
        f"hydra.launcher.memory_budget={memory_budget:g} GiB is below the {need / GIB:.3g} GiB that this trial is "
        "predicted to need alone; valid: at least that, or a smaller data.batch_size or model.max_length, or fewer bits"
    )


def alone(spec: TrialSpec) -> str:
    """Why a trial cannot share a pass; empty where it can."""
    if spec.why_alone:
        return spec.why_alone
    if not spec.quantization.packable:
        return f"quantization={spec.quantization.name} takes scales or outlier columns over all rows of a pass"
    config = spec.model.prepared_config(spec.model.num_labels)
    if why := why_alone(config, spec.model.attention(config) or "eager"):
        return why
    unaware = [name for name, make in spec.callbacks.items() if not is_pack_aware(make())]
    return f"callbacks.{unaware[0]} is not marked pack_aware" if unaware else ""
