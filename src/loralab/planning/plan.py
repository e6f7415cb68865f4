"""Peak memory of a run before it runs, and the largest batch, length or rank that fits.

``predict`` traces the step (planning/trace.py); ``estimate`` is arithmetic, for a first look at many trials.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loralab.data.passes import BatchShape, Pass
from loralab.errors import ConfigError, nearest
from loralab.forward.stacked import ForwardMode
from loralab.planning.geometry import Geometry
from loralab.planning.resident import AUTOCAST, computed_in, dense_bytes
from loralab.planning.sizes import homogeneous_layers, sizes
from loralab.planning.trace import trace
from loralab.planning.tracker import Segment
from loralab.planning.workspace import held_workspaces
from loralab.records.record import PHASES
from loralab.records.shown import html_table
from loralab.training.specs import TrialSpec

GIB = 2**30
CARDS = (24, 48, 80)  # GiB
CONTEXT = GIB // 2  # CUDA's context and modules: 0.4 to 0.6 GiB by driver and card (reported by nvidia-smi)
FRAGMENTATION = 1.05  # reserved over allocated; 1.03 to 1.15 is usual, less with expandable_segments. Not calibrated
SHORT, LONG = 3, 5  # numbers of layers that a uniform stack is traced with, to extrapolate
WHATS = ("batch_size", "max_length", "r")
CEILING = {"batch_size": 2**16, "max_length": 2**20, "r": 2**14}


@dataclass(frozen=True)
class Plan:
    """The predicted memory of a run. All numbers but ``rows`` and ``length`` are bytes."""

    device: str
    predicted_peak_bytes: int  # of torch's allocator
    device_bytes: int  # with CUDA's context and fragmentation; on a CPU the same as above
    by_phase: dict[str, int]  # the peak of each
    by_kind: dict[str, int]  # at the highest peak
    fits: dict[str, bool]
    paged_bytes: int = 0  # optimizer state that can leave the device; not included above
    rows: int = 0
    length: int = 0
    mode: ForwardMode | None = None  # how the passes are computed
    resident_bytes: int = 0  # dense weights that are kept beside the codes, part of the base above

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Plan":
        """From ``as_dict``."""
        return cls(**{**stored, "mode": stored["mode"] and ForwardMode(**stored["mode"])})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        """A table for a notebook."""
        totals = {f"predicted peak, {self.device}": self.predicted_peak_bytes, "with context": self.device_bytes}
        kinds = {f"at the peak: {name}": size for name, size in self.by_kind.items()}
        sizes = {**totals, **{f"peak of {name}": size for name, size in self.by_phase.items()}, **kinds}
        fits = [f"{card}: {'yes' if fits else 'no'}" for card, fits in self.fits.items()]
        rows: list[list[Any]] = [[name, round(size / GIB, 3)] for name, size in sizes.items()]
        return html_table(["memory", "GiB"], [*rows, ["fits in", ", ".join(fits)]])


def predict(
    spec: TrialSpec | Sequence[TrialSpec],
    device: str = "cuda",
    rows: int | None = None,
    length: int | None = None,
    ragged: bool | None = None,
    targets: float = 1.0,
) -> Plan:
    """The plan of one trial, or of a pack (a sequence of trials on one base).

    ``rows`` of each trial (null: its batch_size) padded to ``length`` tokens (null: model.max_length). ``ragged``:
    some rows are padded, which costs attention masks; null: where there is more than one, and that needs more than
    rows of one length. ``targets``: share of the positions that enter the loss; prompts and padding do not.
    """
    pack = list(spec) if isinstance(spec, Sequence) else [spec]
    return predict_step(pack, _geometry(pack, device, rows, length, ragged, targets))


def _geometry(
    pack: Sequence[TrialSpec],
    device: str,
    rows: int | None = None,
    length: int | None = None,
    ragged: bool | None = None,
    targets: float = 1.0,
) -> Geometry:
    counts = [rows or trial.data.batch_size for trial in pack]
    batches = tuple(_full(n, length or trial.model.length, targets) for n, trial in zip(counts, pack, strict=True))
    micros = min(2, pack[0].trainer.accumulate_grad_batches)  # further ones need no more memory
    ragged = sum(counts) > 1 and not _masks_save(pack[0], device) if ragged is None else ragged
    return Geometry((Pass(0, batches),) * micros, device != "cpu", ragged=ragged)


def _masks_save(spec: TrialSpec, device: str) -> bool:
    """Whether rows of one length need more than padded ones: CUDA has no fused kernel in float32 for fewer key heads
    than query heads, which transformers repeats only beside a mask (planning/attention.py)."""
    config = spec.model.architecture().get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    grouped = (getattr(config, "num_key_value_heads", None) or heads) < heads
    return grouped and device != "cpu" and computed_in(spec, device) == torch.float32


def _full(rows: int, length: int, targets: float) -> BatchShape:
    return BatchShape((length,) * rows, (length,) * rows, max(1, round(targets * rows * length)))


def predict_step(pack: Sequence[TrialSpec], geometry: Geometry) -> Plan:
    """The plan of trials on one base whose step is fed ``geometry``."""
    layers = homogeneous_layers(pack)
    if layers is not None and layers > LONG:
        short, long = trace(pack, geometry, SHORT), trace(pack, geometry, LONG)
        segments = _extrapolated(_named(short.segments, SHORT), _named(long.segments, LONG), layers)
        plan = _plan(segments, _extrapolate(short.paged, long.paged, layers), geometry, long.mode)
    else:
        traced = trace(pack, geometry)
        plan = _plan(traced.segments, traced.paged, geometry, traced.mode)
    resident = pack[0].quantization.dequantize == "resident"
    return dataclasses.replace(plan, resident_bytes=dense_bytes(pack[0], geometry.device)) if resident else plan


def _plan(segments: Sequence[Segment], paged: int, geometry: Geometry, mode: ForwardMode | None) -> Plan:
    highest = max(segments, key=lambda segment: segment.peak)
    by_phase = {phase: max((s.peak for s in segments if s.phase == phase), default=0) for phase in PHASES}
    needed = device_bytes(highest.peak) if geometry.cuda else highest.peak
    lengths = [batch.inputs for batch in geometry.passes[0].present]
    return Plan(
        device=geometry.device,
        predicted_peak_bytes=highest.peak,
        device_bytes=needed,
        by_phase=by_phase,
        by_kind=highest.kinds,
        fits={f"{card} GiB": needed <= card * GIB for card in CARDS},
        paged_bytes=paged,
        rows=sum(map(len, lengths)),
        length=max(map(max, lengths)),
        mode=mode,
    )


def device_bytes(allocated: int) -> int:
    """What a CUDA device must have free for torch to allocate this much."""
    return int(allocated * FRAGMENTATION) + CONTEXT


def _named(segments: Sequence[Segment], layers: int) -> dict[tuple[str, int, str], Segment]:
    """{(phase, how often it has come, place): segment}. The first two layers are 0 and 1, the last two -2 and -1, in a
    stack of any height. Between them memory grows or shrinks linearly, so no peak is missed."""
    named: dict[tuple[str, int, str], Segment] = {}
    times: dict[str, int] = {}
    for segment in segments:
        if not segment.place.isdigit():
            times[segment.phase] = times.get(segment.phase, 0) + (segment.place in ("", "before"))
            names = [segment.place]
        else:
            number = int(segment.place)
            names = [str(n) for n in (number, number - layers) if -2 <= n < 2]
        named.update({(segment.phase, times[segment.phase], name): segment for name in names})
    return named


def _extrapolated(
    short: dict[tuple[str, int, str], Segment], long: dict[tuple[str, int, str], Segment], layers: int
) -> list[Segment]:
    segments = []
    for key in short.keys() & long.keys():
        a, b = short[key], long[key]
        kinds = {kind: max(0, _extrapolate(a.kinds[kind], b.kinds[kind], layers)) for kind in b.kinds}
        segments.append(Segment(key[0], key[2], _extrapolate(a.peak, b.peak, layers), kinds))
    return segments


def _extrapolate(short: int, long: int, layers: int) -> int:
    return long + round((long - short) * (layers - LONG) / (LONG - SHORT))


def estimate(
    spec: TrialSpec | Sequence[TrialSpec], device: str = "cuda", rows: int | None = None, length: int | None = None
) -> int:
    """Peak bytes of the allocator by arithmetic: within 5% for weights and states, rough for the activations.

    Activations: 40.5 bytes a token and unit of width in bf16, measured on Llama shapes with LoRA on every layer.
    """
    pack = list(spec) if isinstance(spec, Sequence) else [spec]
    model, config = pack[0].model, pack[0].model.architecture().get_text_config()
    trials = [sizes(trial) for trial in pack]
    mixed = pack[0].trainer.precision_on(device) in AUTOCAST
    width = 2 if mixed else trials[0].dtype_bytes
    tokens = sum(rows or trial.data.batch_size for trial in pack) * (length or model.length)
    layers = int(config.num_hidden_layers) * (2 if config.is_encoder_decoder else 1)
    one_layer = tokens * 20.25 * config.hidden_size * width
    if width < 4 and not mixed:  # the adapters are float32, and keep their inputs so
        one_layer += 4 * tokens * trials[0].adapted_width / layers
    activations = layers * one_layer
    if model.gradient_checkpointing:
        activations = layers * tokens * config.hidden_size * width + one_layer
    logits = 0 if model.task == "sequence_classification" else tokens * config.vocab_size * (width + 8)
    states = sum(trial.optimizer - (trial.paged if device != "cpu" else 0) for trial in trials)
    trained = sum(trial.adapter + trial.gradients for trial in trials)
    constant = held_workspaces() if device != "cpu" else 0
    resident = pack[0].quantization.dequantize == "resident"
    dense = (trials[0].quantized if resident else trials[0].largest_layer) * width  # quantized layers unpacked
    return int(trials[0].base + trained + states + activations + logits + dense) + constant


def largest(spec: TrialSpec, budget: float, what: str, device: str = "cuda", present: int | None = None) -> int:
    """The largest batch_size, max_length or r whose ``device_bytes`` stay within ``budget`` bytes; 0: none does.

    ``present``: ``device_bytes`` of ``spec`` as it is; None: not known yet. Memory is nearly linear in each of the
    three, so a few predictions are enough.
    """
    if what not in WHATS:
        raise ConfigError(f"plan: {what!r} is not something that can be fitted; {nearest(what, WHATS)}")
    lowest = 1 if what != "max_length" else 2
    begun = _present(spec, what)
    bracket = _Bracket(budget, lowest - 1, _ceiling(spec, what) + 1, slope=_estimated_slope(spec, what, begun, device))
    if present is not None and lowest <= begun < bracket.high:
        bracket.narrow(begun, present)
    probe = bracket.probe() if bracket.narrowed else begun
    while bracket.high - bracket.low > 1:
        probe = min(max(probe, bracket.low + 1), bracket.high - 1)
        bracket.narrow(probe, _need(spec, what, probe, device))
        probe = bracket.probe()
    return bracket.low if bracket.low >= lowest else 0


@dataclass
class _Bracket:
    """``low`` fits in ``budget`` bytes, unless nothing does, and ``high`` does not."""

    budget: float
    low: int
    high: int
    low_need: int | None = None  # bytes; None: not known
    high_need: int | None = None
    slope: float = 0.0  # bytes a unit: estimated, then between the last two values that fit; 0: not known
    stalled: int = 0  # predictions since the bracket was halved

    @property
    def narrowed(self) -> bool:
        return self.low_need is not None or self.high_need is not None

    def narrow(self, value: int, need: int) -> None:
        """Takes what ``value`` needs."""
        width = self.high - self.low
        if need <= self.budget:
            if self.low_need is not None:
                self.slope = (need - self.low_need) / (value - self.low)
            self.low, self.low_need = value, need
        else:
            self.high, self.high_need = value, need
        self.stalled = 0 if 2 * (self.high - self.low) <= width else self.stalled + 1

    def probe(self) -> int:
        """The value to ask about next: where a straight line meets the budget, the middle where that has not helped."""
        if self.low_need is None:
            return self.low + 1
        room = self.budget - self.low_need
        if self.high_need is None:
            return self.low + round(room / self.slope) if self.slope > 0 else 4 * self.low
        if self.stalled > 2 or self.high_need <= self.low_need:
            return (self.low + self.high) // 2
        return self.low + int(room * (self.high - self.low) / (self.high_need - self.low_need))


def _ceiling(spec: TrialSpec, what: str) -> int:
    return spec.room if what == "max_length" and spec.room else CEILING[what]


def _present(spec: TrialSpec, what: str) -> int:
    if what == "batch_size":
        return spec.data.batch_size
    return spec.model.length if what == "max_length" else int(getattr(spec.adapter, "r", 1))


def _need(spec: TrialSpec, what: str, value: int, device: str) -> int:
    changed, fed = _with(spec, what, value)
    # a validation of the same rows holds no graph, so that its peak is never the highest
    geometry = dataclasses.replace(_geometry([changed], device, **fed), scored=False)
    return predict_step([changed], geometry).device_bytes


def _estimated_slope(spec: TrialSpec, what: str, value: int, device: str) -> float:
    """Bytes a unit from ``value`` to twice as many, by arithmetic: where to look first."""
    (changed, fed), (doubled, fed_double) = _with(spec, what, value), _with(spec, what, 2 * value)
    return (estimate(doubled, device, **fed_double) - estimate(changed, device, **fed)) / value


def _with(spec: Any, what: str, value: int) -> tuple[TrialSpec, dict[str, Any]]:
    """The spec with that value, and what ``predict`` and ``estimate`` are told beside it."""
    if what != "r":
        return spec, {"rows" if what == "batch_size" else "length": value}
    if not hasattr(spec.adapter, "r"):
        raise ConfigError(f"plan: adapter={spec.adapter.method} has no r")
    return dataclasses.replace(spec, adapter=dataclasses.replace(spec.adapter, r=value)), {}
