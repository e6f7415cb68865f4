"""Predicted memory of runs: an error before one starts that cannot fit, and two numbers for its record.

``predicted_peak_bytes``: of a pack, for the step that was measured, to be compared with the measurement.
``alone_peak_bytes``: of a trial alone, for the largest batch that its rows can make: independent of how it was run.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from loralab.data.base import FORGETTING
from loralab.data.encoding import Encoded
from loralab.data.passes import Feed, Pass, Rows, Weighing, fullest, heaviest, heaviest_evaluation, weight
from loralab.errors import ConfigError, OutOfMemory
from loralab.forward.stacked import no_packing, unpads
from loralab.forward.unpadded import can_unpad
from loralab.memory.cards import free_of_each
from loralab.memory.ledgers import Host
from loralab.planning import alone, resident
from loralab.planning.geometry import Geometry
from loralab.planning.kept import kept
from loralab.planning.plan import CONTEXT, GIB, Plan, predict, predict_step
from loralab.planning.sizes import skeleton

log = logging.getLogger(__name__)


def check_packing(spec: Any) -> None:
    """Raises ConfigError where data.packing is set and the base's attention cannot keep a sequence's rows apart.

    Reads no weight; that the base does keep them apart is checked on the first batch.
    """
    if not spec.data.packing:
        return
    model = skeleton(spec.model)
    config: Any = model.config
    attention = spec.model.attention(config) or config._attn_implementation
    if attention != "sdpa" or not can_unpad(model):
        raise no_packing(config, attention)


class Foresight:
    """Predicts the memory of packs, with one trace for each distinct step. An error of the planner stops no run."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan | None] = {}
        self._said: set[str] = set()
        self._keeps: dict[tuple[Any, ...], bool] = {}  # whether a base's dense weights are kept

    def plan(self, specs: list[Any], data: Sequence[Encoded], device: str, start: int = 0) -> Plan | None:
        """The plan of trials that have made ``start`` steps, for the heaviest pass that is still to come; None where
        there is none, or it could not be traced. Of trials that will not share a pass, the largest of their plans."""
        parts = _sharing(specs)
        if len(parts) > 1:
            plans = [self.plan([specs[i] for i in part], [data[i] for i in part], device, start) for part in parts]
            return max((plan for plan in plans if plan is not None), key=lambda plan: plan.device_bytes, default=None)
        weighing = _weighing(specs, device)
        feeds = [Feed.of(spec, encoded.train, start) for spec, encoded in zip(specs, data, strict=True)]
        passes = heaviest(feeds, weighing)
        if not passes:
            return None
        return self.of(specs, Geometry(passes, device == "cuda", _heaviest_scored(specs, data, weighing)))

    def of(self, specs: list[Any], geometry: Geometry) -> Plan | None:
        """The plan of trials that are fed ``geometry``; None where it could not be traced."""
        trials = [
            (type(spec.adapter), spec.adapter, spec.optimizer.memory_key, spec.memory.spiky_every) for spec in specs
        ]
        key = f"{trials} {specs[0].pack_key}"
        step = key + _without_step(geometry)
        if step not in self._plans:
            try:
                plan = self._plans[step] = _kept_plan(specs, geometry)
                # the run may say later that it computes in the mode that was traced
                self._plans.setdefault(key + _without_step(replace(geometry, mode=plan.mode)), plan)
            except ConfigError as error:
                self._say_once(str(error))
                self._plans[step] = None
            except Exception as error:
                log.debug("the memory of trial %s could not be foreseen", specs[0].id, exc_info=error)
                self._plans[step] = None
        return self._plans[step]

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            log.warning("%s", text)
        self._said.add(text)

    def check(self, specs: list[Any], data: Sequence[Encoded], device: str, held: int = 0) -> Plan | None:
        """The plan of a pack, None where there is none. Raises OutOfMemory (``plan.enforce=false``: warns) if it cannot
        fit. ``held``: bytes of the base that are loaded already."""
        settings = specs[0].plan
        plan = self.plan(specs, data, device) if settings.record else None
        if plan is None:
            return None
        room = _room(specs[0], device, held)
        if plan.device_bytes <= room:
            return plan
        whose = "plan.budget_gib allows" if settings.budget_gib else f"{device} has"
        text = (
            f"predicted to need {plan.device_bytes / GIB:.4g} GiB at its peak, and {whose} {room / GIB:.4g} GiB:"
            " a smaller data.batch_size or model.max_length, model.gradient_checkpointing=true or fewer bits need less;"
            " plan.enforce=false starts it all the same"
        )
        if settings.enforce:
            raise OutOfMemory(text)
        log.warning("%s", text)
        return plan

    def dequantize(self, specs: list[Any], data: Sequence[Encoded], device: str, held: int = 0) -> str:
        """How the base of a pack is to dequantize, per_use or resident.

        auto is resident where the dense weights easily fit, which is decided once for each base in a process, before it
        is first loaded, and where the pack is predicted to fit with them too. ``held``: as in ``check``.
        """
        asked = str(specs[0].quantization.dequantize)
        if asked != "auto" or specs[0].quantization.name == "none":
            return "per_use" if asked == "auto" else asked
        key = _base_key(specs[0])
        if key not in self._keeps:
            self._keeps[key] = resident.easily_fits(specs[0], device, free_bytes(device) + held)
        if not self._keeps[key]:
            return "per_use"
        kept = resident.settled(specs, "resident")
        plan = self.plan(kept, data, device) if specs[0].plan.record else None
        return "per_use" if plan and plan.device_bytes > _room(specs[0], device, held) else "resident"

    def keep_no_more(self, spec: Any) -> None:
        """auto is per_use from now on for the base of ``spec``, with which a pack ran out of memory."""
        self._keeps[_base_key(spec)] = False

    def alone(self, spec: Any, data: Encoded) -> int | None:
        """The predicted peak bytes of a trial alone on the largest batch that its rows can make, in any order; None
        where it trains nothing or cannot be traced. Cached on disk for the next run."""
        device = spec.trainer.device
        if not (spec.plan.record and spec.trainer.max_steps and len(data.train)):
            return None
        try:
            return alone.peak(spec, _largest(spec, data, device))
        except Exception as error:
            log.debug("the memory of trial %s alone could not be foreseen", spec.id, exc_info=error)
            return None


def _room(spec: Any, device: str, held: int) -> float:
    """Bytes that a pack may take: ``plan.budget_gib``, or what is free beside the base with its ``held`` bytes."""
    return spec.plan.budget_gib * GIB if spec.plan.budget_gib else free_bytes(device) + held


def _base_key(spec: Any) -> tuple[Any, ...]:
    """Equal where base and bounds of its memory are the same."""
    trainer, limits = spec.trainer, (spec.plan.budget_gib, spec.memory.cap)
    return (*map(alone.with_class, (spec.model, spec.quantization)), trainer.precision, trainer.strategy, *limits)


def _heaviest_scored(specs: Sequence[Any], data: Sequence[Encoded], weighing: Weighing) -> Pass | None:
    """The heaviest pass of a validation, or of data.forgetting; None where no row is scored."""
    pairs = list(zip(specs, data, strict=True))
    validation = [(encoded.validation, spec.data.batch_size) for spec, encoded in pairs]
    others = [
        (encoded[FORGETTING], spec.data.forgetting.batch_size if encoded.forgetting else 1) for spec, encoded in pairs
    ]
    found = [one for splits in (validation, others) if (one := heaviest_evaluation(splits, weighing))]
    return max((one[1] for one in found), key=lambda shape: weight(shape, weighing), default=None)


def _kept_plan(specs: Sequence[Any], geometry: Geometry) -> Plan:
    """The plan of ``geometry``; from the disk where an earlier run traced the same step of loralab's own classes."""
    on_disk = all(map(alone.is_loralabs, specs))
    own = [(alone.with_class(spec.adapter), spec.memory.spiky_every) for spec in specs]
    trials = [(alone.identity(spec, geometry.device), *parts) for spec, parts in zip(specs, own, strict=True)]
    key = ("plan", trials, _without_step(geometry), geometry.scored)
    return Plan.of(kept(key, lambda: predict_step(specs, geometry).as_dict(), on_disk))


def _largest(spec: Any, data: Encoded, device: str) -> Geometry:
    """A step on the largest batch that the rows can make, and the heaviest validation pass where that is larger: a
    smaller one needs less than the step, which also has gradients, states and graph."""
    rows = Rows.of(data.train)
    step = Pass(0, (fullest(rows, spec.data.batch_size, spec.packing_length),))
    _, evaluation = heaviest_evaluation([(data.validation, spec.data.batch_size)], _weighing([spec], device)) or (
        0,
        None,
    )
    if evaluation and not any(a > b for a, b in zip(_sizes(evaluation), _sizes(step), strict=True)):
        evaluation = None
    micros = min(2, spec.trainer.accumulate_grad_batches)
    # a batch of the longest rows but for one is as wide, and needs masks of its padding as well
    ragged = spec.data.batch_size > 1 and any(len(set(lengths.tolist())) > 1 for lengths in (rows.inputs, rows.labels))
    return Geometry((step,) * micros, device == "cuda", evaluation, ragged or None, scored=evaluation is not None)


def _sizes(shape: Pass) -> tuple[int, ...]:
    """Tokens of the inputs and of the labels, then the same with padding."""
    columns = [[n for batch in shape.present for n in getattr(batch, kind)] for kind in ("inputs", "labels")]
    return (*map(sum, columns), *(len(column) * max(column) for column in columns))


def _sharing(specs: Sequence[Any]) -> list[list[int]]:
    """Places of those that stand behind the same kind of virtual tokens."""
    parts: dict[Any, list[int]] = {}
    for place, one in enumerate(specs):
        parts.setdefault(one.adapter.before_rows, []).append(place)
    return list(parts.values())


def _weighing(specs: Sequence[Any], device: str) -> Weighing:
    """As the base's configuration has it; the first batch may show that its rows cannot be unpadded."""
    first, memory = specs[0], specs[0].memory
    spiky = None
    if memory.spiky_every is not None:
        spiky = memory.spiky_every, memory.spike(first.model.length, first.room)
    unpadded = first.model.task == "causal_lm" and spiky is None and first.model.compile == "none"
    unpadded = unpadded and all(s.adapter.tokenwise for s in specs) and first.model.attn_implementation != "eager"
    if unpadded:
        model = skeleton(first.model)
        takes = unpads(model.config, device, resident.computed_in(first, device), first.data.packing)
        unpadded = takes and can_unpad(model)
    return Weighing(unpadded, first.model.task == "seq2seq_lm", spiky)


def _without_step(geometry: Geometry) -> str:
    """A key of ``geometry`` without the number of the step."""
    passes = [(shape.batches, shape.length) for shape in (*geometry.passes, geometry.evaluation) if shape is not None]
    return f"{passes} {len(geometry.passes)} {geometry.cuda} {geometry.ragged} {geometry.mode} {geometry.first}"


def predicted(plan: Plan | None) -> dict[str, Any]:
    """The fields of a record's ``memory`` that are known before a step."""
    if plan is None:
        return {"predicted_peak_bytes": None, "predicted_by_kind": None}
    return {"predicted_peak_bytes": plan.predicted_peak_bytes, "predicted_by_kind": plan.by_kind}


def free_bytes(device: str) -> float:
    """Bytes that a new run could take, on CUDA with its context; infinite where that is unknown. Of several devices,
    each of which will have a process of its own, the least."""
    if device == "cuda" and torch.cuda.device_count() > 1:
        return float(min(free_of_each(), default=float("inf"))) + CONTEXT
    if device == "cuda":  # asking makes the context, so that what is free is without it
        return float(torch.cuda.mem_get_info()[0]) + CONTEXT
    return float(Host().available() or float("inf"))


def plan_here(spec: Any, device: str) -> Plan:
    """The plan of a trial of full rows, with quantization.dequantize=auto as a run would have it.

    That is by plan.budget_gib and memory.cap, and by what this machine has free where it has such a device. ``fits`` is
    without weights that auto keeps, since it keeps them only where they fit.
    """
    lean = predict(resident.settled([spec], "per_use"), device)
    here = device == "cpu" or torch.cuda.is_available()
    free = free_bytes(device) if here else float("inf")
    if spec.quantization.dequantize != "auto" or not resident.easily_fits(spec, device, free):
        return lean
    kept = predict(resident.settled([spec], "resident"), device)
    room = spec.plan.budget_gib * GIB if spec.plan.budget_gib else free
    return replace(kept, fits=lean.fits) if kept.device_bytes <= room else lean


def sentence(trials: int, plan: Plan) -> str:
    """The log line of a sweep about its largest pack."""
    size, unit = (GIB, "GiB") if plan.predicted_peak_bytes >= GIB else (2**20, "MiB")
    digits = 2 if unit == "GiB" else 0
    where = ", ".join(f"{kind} {n / size:,.{digits}f}" for kind, n in plan.by_kind.items() if round(n / size, digits))
    peak = f"{plan.predicted_peak_bytes / size:,.{digits}f} {unit}"
    return f"largest pass ({trials} trial{'s' * (trials != 1)}): predicted peak {peak} ({where})"
