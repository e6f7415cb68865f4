"""What runs will need and did need: before a run starts a refusal where there is less, and two figures for its record.

``predicted_peak_bytes`` is of a pack and the step that was measured, so that the two can be held against each other;
``alone_peak_bytes`` of a trial by itself and the largest batch that its rows can make: the same however it was run.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from loralab.data.encoding import Encoded
from loralab.data.passes import Feed, Pass, Rows, Weighing, fullest, heaviest, heaviest_evaluation
from loralab.errors import OutOfMemory
from loralab.forward.unpadded import can_unpad
from loralab.memory.ledgers import Host
from loralab.planning import alone
from loralab.planning.plan import GIB, Plan, predict_step
from loralab.planning.sizes import skeleton
from loralab.planning.trace import Geometry

log = logging.getLogger(__name__)


class Foresight:
    """One trace for each distinct step; a fault of the planner's own never stops a run."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan | None] = {}

    def plan(self, specs: list[Any], data: Sequence[Encoded], device: str, start: int = 0) -> Plan | None:
        """The plan of trials that have made ``start`` steps, for the heaviest pass that is still to come; None where
        there is none, or it could not be made. Of trials that will not share a pass, the largest of their plans."""
        parts = _sharing(specs)
        if len(parts) > 1:
            own = [self.plan([specs[i] for i in part], [data[i] for i in part], device, start) for part in parts]
            return max((one for one in own if one is not None), key=lambda one: one.device_bytes, default=None)
        by = _weighing(specs, device)
        feeds = [Feed.of(one, own.train, start) for one, own in zip(specs, data, strict=True)]
        found = heaviest(feeds, by)
        if not found:
            return None
        splits = [(own.validation, one.data.batch_size) for one, own in zip(specs, data, strict=True)]
        scored = heaviest_evaluation(splits, by)
        return self.of(specs, Geometry(found, device == "cuda", scored[1] if scored else None))

    def of(self, specs: list[Any], geometry: Geometry) -> Plan | None:
        """The plan of trials that are fed this; None where it could not be made."""
        fed = [(type(one.adapter), one.adapter, one.memory.spiky_every) for one in specs]
        key = f"{fed} {specs[0].pack_key} {_unnumbered(geometry)}"
        return self._kept(key, specs, lambda: predict_step(specs, geometry))

    def _kept(self, key: str, specs: list[Any], make: Callable[[], Plan]) -> Plan | None:
        if key not in self._plans:
            try:
                self._plans[key] = make()
            except Exception as error:
                log.debug("the memory of trial %s could not be foreseen", specs[0].id, exc_info=error)
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

    def alone(self, spec: Any, data: Encoded) -> int | None:
        """The predicted peak of a trial by itself on the largest batch that its rows can make, whatever their order;
        None where it trains nothing or nobody can say. Kept in a folder for the next run."""
        device = spec.trainer.device
        if not (spec.plan.record and spec.trainer.max_steps and len(data.train)):
            return None
        try:
            return alone.peak(spec, _largest(spec, data, device))
        except Exception as error:
            log.debug("the memory of trial %s alone could not be foreseen", spec.id, exc_info=error)
            return None


def _largest(spec: Any, data: Encoded, device: str) -> Geometry:
    """The step of the largest batch that the rows can make, and a validation's heaviest pass where that is larger: a
    smaller one holds less than the step, which has its gradients, states and graph besides."""
    step = Pass(0, (fullest(Rows.of(data.train), spec.data.batch_size),))
    found = heaviest_evaluation([(data.validation, spec.data.batch_size)], _weighing([spec], device))
    larger = found is not None and any(a > b for a, b in zip(_sizes(found[1]), _sizes(step), strict=True))
    micros = min(2, spec.trainer.accumulate_grad_batches)
    evaluation = found[1] if found is not None and larger else None
    return Geometry((step,) * micros, device == "cuda", evaluation, scored=larger)


def _sizes(one: Pass) -> tuple[int, ...]:
    """Tokens, then tokens with their padding, of the inputs and of the labels."""
    columns = [[n for fed in one.taking for n in getattr(fed, kind)] for kind in ("inputs", "labels")]
    return (*map(sum, columns), *(len(column) * max(column) for column in columns))


def _sharing(specs: Sequence[Any]) -> list[list[int]]:
    """Places of those that stand behind the same kind of virtual tokens."""
    parts: dict[Any, list[int]] = {}
    for place, one in enumerate(specs):
        parts.setdefault(one.adapter.before_rows, []).append(place)
    return list(parts.values())


def _weighing(specs: Sequence[Any], device: str) -> Weighing:
    """As the base's configuration has it: the first batch may show that it does not suit."""
    first, memory = specs[0], specs[0].memory
    spiky = None
    if memory.spiky_every is not None:
        spiky = memory.spiky_every, memory.spike(first.model.length, first.room)
    flat = first.model.task == "causal_lm" and device == "cpu" and spiky is None
    flat = flat and all(one.adapter.tokenwise for one in specs) and first.model.attn_implementation != "eager"
    return Weighing(flat and can_unpad(skeleton(first.model)), first.model.task == "seq2seq_lm", spiky)


def _unnumbered(geometry: Geometry) -> str:
    """Without the number of the step, which costs nothing."""
    passes = [(one.fed, one.length) for one in (*geometry.passes, geometry.evaluation) if one is not None]
    return f"{passes} {len(geometry.passes)} {geometry.cuda} {geometry.ragged} {geometry.mode} {geometry.first}"


def free_bytes(device: str) -> float:
    """What a new run could take; infinite where nobody says."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return float(Host().available() or float("inf"))


def sentence(trials: int, plan: Plan) -> str:
    """What a sweep says of its largest pack before it starts."""
    size, unit = (GIB, "GiB") if plan.predicted_peak_bytes >= GIB else (2**20, "MiB")
    digits = 2 if unit == "GiB" else 0
    where = ", ".join(f"{kind} {n / size:,.{digits}f}" for kind, n in plan.by_kind.items() if round(n / size, digits))
    peak = f"{plan.predicted_peak_bytes / size:,.{digits}f} {unit}"
    return f"largest pass ({trials} trial{'s' * (trials != 1)}): predicted peak {peak} ({where})"
