"""Memory, time and batch of every step by phase: forward, backward, optimizer.

Lightning runs forward, zero_grad, backward and the update in this order inside ``optimizer.step``, so the gradients of
the step before are alive through the forward pass. On CUDA the peaks are the allocator's. On a CPU they are resident
sets; the allocator's true peak there comes from two profiled steps, the second and the one with the most tokens, and a
profiled validation pass, which no timing counts.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from lightning.pytorch import Callback, LightningModule, Trainer

from loralab.memory import ledgers, spikes
from loralab.memory.ledgers import GIB, Reading
from loralab.memory.profiled import ProfiledStep, batch_tensors
from loralab.memory.spikes import MIB, Spike, Spikes
from loralab.spec import Count, NotNegative, Number, Whole, arguments

SPLIT = ("forward", "backward", "optimizer")
HEAVIEST: Literal["heaviest"] = "heaviest"
ProfiledStepNumber = Annotated[
    Literal["heaviest"] | Annotated[Whole, Ge(2)] | None,
    "heaviest, null or a number of at least 2 (step 1 has no optimizer state)",
]


@dataclass
class Step:
    """One optimizer step. Its batch is the largest of its passes, of which one at a time needs memory."""

    number: int
    phases: dict[str, Reading] = field(default_factory=dict)
    marks: list[tuple[str, Any, Any]] = field(default_factory=list)  # (phase, start, end)
    batch: dict[str, int] = field(default_factory=dict)  # rows, padded_tokens, tokens, longest
    own: dict[int, dict[str, int]] = field(default_factory=dict)  # {trial: the same of its own batch}
    spike: Spike | None = None

    def add(self, phase: str, reading: Reading) -> None:
        """Records the reading of a phase; with gradient accumulation the highest of the step's passes stays."""
        before = self.phases.get(phase)
        if before is None or reading.peak >= before.peak:
            self.phases[phase] = reading

    @property
    def highest(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: self.phases[phase].peak)


class PhaseMemory(Callback):
    """Records memory, times and batch sizes of a run. A row of metrics.jsonl has the largest value of every series
    since the row before, so every spike is in one. The driver's count (``device_used``) is read at the steps that have
    a row of their own alone."""

    pack_aware = True

    @arguments("callbacks.memory")
    def __init__(
        self,
        every_n_steps: Annotated[Count, Le(2**31 - 1)] = 10,
        profiled_step: ProfiledStepNumber = HEAVIEST,
        spike_factor: Annotated[Number, Ge(1), "a number of at least 1"] = 1.25,
        spike_floor_mib: Annotated[NotNegative, Le(1e12), "a number of MiB from 0 to 1e12"] = 256.0,
        spike_window: Annotated[Count, Le(2**31 - 1)] = 50,
    ) -> None:
        self.every_n_steps, self.profiled_step = every_n_steps, profiled_step
        self.spikes = Spikes(spike_factor, int(spike_floor_mib * MIB), spike_window)
        self.on_spike: list[Callable[[Spike], None]] = []
        self.ledger: ledgers.Host | None = None
        self.peaks: dict[str, int] = {}  # bytes by phase, by the ledger's instrument
        self.reserved: dict[str, int] = {}  # bytes by phase
        self.seconds: dict[str, float] = {}  # by phase, of the whole run
        self.extremes: dict[str, int] = {}  # bytes by record field, of the whole run
        self.profiled: dict[str, int] = {}  # bytes by phase, of the profiled steps
        self.batch: dict[str, int] = {}  # of the step that measured_peak_bytes belongs to
        self.passes: list[Any] = []  # inputs of the profiled step's passes, as the module describes them
        self.evaluated: Any = None  # the same of the profiled validation pass
        self.excluded_s, self.excluded_tokens = 0.0, dict[int, int]()
        self._rows: dict[str, float] = {}
        self._own_rows: dict[int, dict[str, float]] = {}  # {trial: its batch sizes}
        self._waiting: deque[Step] = deque()
        self._step = Step(0)
        self._profile: ProfiledStep | None = None
        self._mark: Any = None
        self._profile_start, self._managed, self._first, self._rebased = 0.0, 0, 0, False
        self.single = False  # the profiled step is the first and only one
        self._due: int | None = None  # the heaviest step, once it is known
        self._due_evaluation: int | None = None

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return "cpu" if self.ledger is None else self.ledger.device

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.ledger is None:
            self.ledger = ledgers.Cuda() if trainer.strategy.root_device.type == "cuda" else ledgers.Host()
            self._fold("load", self.ledger.read())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[int, Any], batch_idx: int
    ) -> None:
        assert self.ledger is not None
        number = trainer.global_step + 1
        if number != self._step.number:
            self._step = Step(number)
            self._first = self._first or number  # a continued run does not begin at 1
            if self.ledger.device == "cpu" and self._is_due(pl_module, number):
                self.passes = []
                self._start_profile(trainer, pl_module, batch)
        self._note_batch(batch)
        if self._profile is not None and batch:
            self.passes.append(pl_module.fed(batch))  # type: ignore[operator]
        self._begin("forward")

    def _is_due(self, module: Any, number: int) -> bool:
        """Whether the step ``number`` is profiled: the configured one, or the second, the heaviest, and an only one."""
        if self.profiled_step is None:
            return False
        if self.profiled_step != HEAVIEST:
            return number == max(int(self.profiled_step), self._first + 1)
        if number == self._first + 1:
            self._due = module.heaviest()
        last = module.progress()["steps"] == number
        self.single = last and number == 1
        return number in (self._first + 1, self._due) or (last and number == self._first)

    def _start_profile(self, trainer: Trainer, module: LightningModule, batch: dict[int, Any]) -> None:
        self._profile_start = time.perf_counter()
        self._profile = ProfiledStep(module, trainer.optimizers, batch_tensors(batch))
        self._profile.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._close("forward")  # zero_grad has run: old gradients do not count as backward's
        self._begin("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert self.ledger is not None
        if not self._rebased and not ledgers.managed_bytes(trainer.optimizers):  # a resumed state is paged already
            self.ledger.rebase()
        self._rebased = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close("backward")
        self._begin("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < self._step.number:
            return  # the step has more passes
        self._close("optimizer")
        step, self._step = self._step, Step(self._step.number)
        if self._profile is not None:
            self._end_profile(step)
        self._finish(step, trainer)
        if step.number % self.every_n_steps == 0 or step.spike is not None:
            self._report(pl_module, step.spike)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.ledger is not None
        self.ledger.wait()
        self._resolve()
        self._report(pl_module, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.ledger is not None
        self.ledger.read()  # resets the peak, which is training's
        wanted = self.profiled_step is not None and self.ledger.device == "cpu" and "evaluation" not in self.profiled
        self._due_evaluation = pl_module.heaviest_evaluation() if wanted else None  # type: ignore[operator]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[int, Any], batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == self._due_evaluation and batch:
            self.evaluated = pl_module.fed(batch)  # type: ignore[operator]
            self._start_profile(trainer, pl_module, batch)
            assert self._profile is not None
            self._profile.begin("evaluation")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            self.profiled.update(profile.stop())
            self.excluded_s += time.perf_counter() - self._profile_start if trainer.state.fn == "fit" else 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.ledger is not None
        self._fold("evaluation", self.ledger.read())

    def summary(self) -> dict[str, Any]:
        """The ``memory`` part of a record. ``by_phase`` and ``measured_peak_bytes`` are torch's allocator on both
        devices: of the whole run on CUDA; on a CPU of the heaviest step and of a validation's heaviest pass (of the
        second step where the run did not come that far), and null where no training step was profiled."""
        if self.ledger is None:
            return {}
        cuda = self.ledger.device == "cuda"
        peaks = self.peaks if cuda else self.profiled
        record: dict[str, Any] = {
            "device": self.ledger.device,
            "instrument": self.ledger.instrument if cuda else "torch allocator, profiled steps",
            "measured_peak_bytes": max(peaks.values()) if "backward" in peaks else None,
            "measured_batch": dict(self.batch),
            "by_phase": {phase: peaks.get(phase) for phase in ("load", *SPLIT, "evaluation")},
            "seconds_by_phase": dict(self.seconds),
            "spikes": [asdict(spike) for spike in self.spikes.found],
            "spike_count": self.spikes.count,
            **self.extremes,
        }
        record["reserved_by_phase" if cuda else "resident_by_phase"] = dict(self.reserved if cuda else self.peaks)
        others = getattr(self.ledger, "others", None)
        return {**record, "other_processes": others} if cuda else record

    def _begin(self, phase: str) -> None:
        assert self.ledger is not None
        self._mark = self.ledger.mark()
        if self._profile is not None:
            self._profile.begin(phase)

    def _close(self, phase: str) -> None:
        assert self.ledger is not None
        self._step.marks.append((phase, self._mark, self.ledger.mark()))
        self._step.add(phase, self.ledger.read(driver=self._samples))

    @property
    def _samples(self) -> bool:
        """Whether the step under way is the first, or one that ends with a row."""
        return self._step.number % self.every_n_steps in (0, 1)

    def _note_batch(self, batch: dict[int, Any]) -> None:
        """Adds a pass's batch {trial: batch} to the step; a pack's batches are all padded to the longest of them."""
        shapes = [tuple(part["tensors"]["input_ids"].shape) for part in batch.values()]
        rows, longest = sum(shape[0] for shape in shapes), max((shape[1] for shape in shapes), default=0)
        if rows * longest >= self._step.batch.get("padded_tokens", 0):
            tokens = sum(part["tokens"] for part in batch.values())
            self._step.batch = {"rows": rows, "padded_tokens": rows * longest, "tokens": tokens, "longest": longest}
        for index, part in batch.items():
            own, most = _sizes(part), self._step.own.get(index, {})
            if own["padded_tokens"] >= most.get("padded_tokens", 0):
                self._step.own[index] = own
        if self._profile is not None:
            for index, part in batch.items():
                self.excluded_tokens[index] = self.excluded_tokens.get(index, 0) + part["tokens"]

    def _end_profile(self, step: Step) -> None:
        profile, self._profile = self._profile, None  # before stop(), which a signal may interrupt
        assert profile is not None
        self.profiled = {**self.profiled, "load": profile.resident, **profile.stop()}
        self.batch, step.marks = {"step": step.number, **step.batch}, []
        self.excluded_s += time.perf_counter() - self._profile_start

    def _finish(self, step: Step, trainer: Trainer) -> None:
        """Records all numbers of a step but its times, for which the device may have to go on first."""
        assert self.ledger is not None
        if self.ledger.device == "cuda" and step.phases[step.highest].peak >= max(self.peaks.values(), default=0):
            self.batch = step.batch
        for phase, reading in step.phases.items():
            self._fold(phase, reading)
        if self.ledger.device == "cuda" and self._samples:
            self._managed = ledgers.managed_bytes(trainer.optimizers)  # changes at the first step only
        self._extreme("host_rss", self.ledger.resident())
        self._extreme("host_available", self.ledger.available(), least=True)
        if self._managed:
            self._extreme("managed", self._managed)
            self._extreme("managed_resident", self.ledger.managed_resident(self._managed))
        for index, own in step.own.items():
            row = self._own_rows.setdefault(index, {})
            row.update({f"batch/{key}": max(value, row.get(f"batch/{key}", 0)) for key, value in own.items()})
        peak, batch = step.phases[step.highest].peak, step.batch
        step.spike = self.spikes.see(
            step.number, step.highest, peak, batch["rows"], batch["padded_tokens"], self.ledger.retries
        )
        for listener in self.on_spike if step.spike else ():
            listener(step.spike)  # type: ignore[arg-type]
        if step.spike and self._managed:  # else the cached blocks of the long batch keep the state out for good
            self.ledger.give_back()
        self._waiting.append(step)
        self._resolve()

    def _resolve(self) -> None:
        """Records the times of the steps that the device has finished; does not wait for it."""
        assert self.ledger is not None
        while self._waiting and all(self.ledger.passed(end) for _, _, end in self._waiting[0].marks[-1:]):
            step = self._waiting.popleft()
            step_seconds: dict[str, float] = {}
            for phase, start, end in step.marks:
                step_seconds[phase] = step_seconds.get(phase, 0.0) + self.ledger.seconds(start, end)
            for phase, seconds in step_seconds.items():
                self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
                self._rows[f"time/{phase}_s"] = max(seconds, self._rows.get(f"time/{phase}_s", 0.0))
            if "optimizer" in step_seconds:
                self.spikes.time(step.spike, step_seconds["optimizer"])

    def _report(self, pl_module: LightningModule, spike: Spike | None) -> None:
        rows = {**self._rows, **(spikes.row(spike) if spike else {})}
        if rows or self._own_rows:
            pl_module.report(rows, self._own_rows)  # type: ignore[operator]
        self._rows, self._own_rows = {}, {}

    def _fold(self, phase: str, reading: Reading) -> None:
        """Raises the phase's peaks of the run, and of the row under way, to ``reading`` where that is higher."""
        self.peaks[phase] = max(reading.peak, self.peaks.get(phase, 0))
        self._row(f"{phase}_peak", reading.peak)
        if reading.reserved is not None:
            self.reserved[phase] = max(reading.reserved, self.reserved.get(phase, 0))
            self._row(f"{phase}_reserved", reading.reserved)
        self._extreme("device_used", reading.used)

    def _extreme(self, name: str, size: int | None, least: bool = False) -> None:
        if size is not None:
            choose, key = (min, f"{name}_least_bytes") if least else (max, f"{name}_peak_bytes")
            self.extremes[key] = choose(size, self.extremes.get(key, size))
            self._row(name, size, least)

    def _row(self, name: str, size: int, least: bool = False) -> None:
        key = f"memory/{name}_gib"
        self._rows[key] = (min if least else max)(size / GIB, self._rows.get(key, size / GIB))


def _sizes(part: dict[str, Any]) -> dict[str, int]:
    """The sizes of one trial's batch, before it is padded to the longest of its pack."""
    rows, longest = part["tensors"]["input_ids"].shape
    return {"rows": rows, "padded_tokens": rows * longest, "tokens": part["tokens"], "longest": longest}
