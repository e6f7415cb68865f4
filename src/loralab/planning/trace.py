"""Traces the real training step with fake tensors: no weights, no GPU, every allocation is counted.

The step runs in Lightning's order: forward, zero_grad, backward, clipping, optimizer, so the gradients of the step
before are alive in the forward pass. The second step counts, because the first has no optimizer state.
"""

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from loralab.adapters.attached import check_parameters
from loralab.adapters.blocks import stack
from loralab.adapters.hooks import AdapterHooks
from loralab.data.passes import BatchShape, Pass
from loralab.errors import ConfigError
from loralab.forward import stacked
from loralab.forward.compiled import width
from loralab.forward.dropout import own_dropout
from loralab.forward.stacked import ForwardMode, unpads
from loralab.forward.unpadded import prepare
from loralab.models import loading, pretrained
from loralab.models.architecture import auto_class
from loralab.optim.managed import PAGED_FROM
from loralab.optim.optimizers import TORCH, UNPAGED
from loralab.planning.faking import faked, precision, quiet
from loralab.planning.geometry import Geometry
from loralab.planning.resident import computed_in
from loralab.planning.tracker import Segment, Tracker
from loralab.planning.workspace import held_workspaces
from loralab.quantization.base import quantizable
from loralab.quantization.kernels import bitsandbytes_ops
from loralab.quantization.linear import frozen_layers
from loralab.quantization.loading import replace
from loralab.training.module import FineTuner
from loralab.training.passes import padded_alike
from loralab.training.specs import TrialSpec
from loralab.training.trial import Trial

log = logging.getLogger(__name__)

PACKED_ROWS = 8  # of a batch that are traced: attention's operations are traced row by row
CUDA_BLOCK = 512  # bytes every block of CUDA's caching allocator is a multiple of (c10/cuda/CUDACachingAllocator)


@dataclass(frozen=True)
class Traced:
    """Peaks of loading, of one training step and of a validation pass; ``paged``: bytes that can go to the host."""

    segments: list[Segment]
    paged: int
    levels: NDArray[np.int64]  # bytes alive in each moment of these
    mode: ForwardMode | None  # that the passes were computed in


def trace(specs: Sequence[TrialSpec], geometry: Geometry, layers: int | None = None) -> Traced:
    """Traces one pack on one base. ``layers``: as if the stack had that many; None: all.

    The gradients and optimizer states that the first step leaves are made without tracing that step. It is traced too
    if it leaves more (weights kept dense) or less (parameters that no batch reaches).
    """
    specs[0].optimizer.check_traceable()
    two_steps = specs[0].quantization.dequantize == "resident" or specs[0].adapter.changes_base
    two_steps = two_steps and not geometry.first
    if specs[0].quantization.name != "none" or specs[0].optimizer.name != TORCH:
        with suppress(ConfigError):  # imported now: under fake tensors its tables would be fake for good
            bitsandbytes_ops()
    config = specs[0].model._adjust(specs[0].model.architecture(), None)
    if specs[0].data.packing and not geometry.cuda and not own_dropout(config):  # a fused kernel, linear in a row
        geometry = dataclasses.replace(geometry, passes=tuple(p.in_fewer_rows(PACKED_ROWS) for p in geometry.passes))
    with quiet():
        try:
            traced = _trace(specs, geometry, layers, two_steps) or _trace(specs, geometry, layers, True)
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
            if geometry.mode == ForwardMode():
                raise
            # the same fallback as on a run's first batch
            mode = ForwardMode(fused_cross_entropy=True) if geometry.mode is None else ForwardMode()
            log.debug("traced %s", mode, exc_info=error)
            return trace(specs, dataclasses.replace(geometry, mode=mode), layers)
    assert traced is not None
    return traced


def _trace(specs: Sequence[TrialSpec], geometry: Geometry, layers: int | None, two_steps: bool) -> Traced | None:
    spec = specs[0].model
    new: frozenset[str] = frozenset()
    vocabulary = 0
    if spec.task == "sequence_classification":
        new = AdapterHooks.of(loading.skeleton(spec)).new_parameters
    else:
        vocabulary = int(spec.architecture().get_text_config().vocab_size)
    tracker = Tracker(CUDA_BLOCK if geometry.cuda else 1, not geometry.masked, vocabulary)
    with faked(geometry.cuda, geometry.masked), FakeTensorMode(allow_non_fake_inputs=True):
        model = build(spec, layers)
        AdapterHooks.of(model).new_parameters = new
        # asked now, because it makes a pass: the tracker would count the dense weights that this uses as moved already
        names = [] if specs[0].quantization.name == "none" else quantizable(model, specs[0].quantization)
        with tracker:
            return _Step(tracker, model, specs, geometry, names).run(two_steps)


def build(spec: pretrained.Pretrained, layers: int | None) -> nn.Module:
    """The dense model; called under fake tensors, so that it takes no memory."""
    config = spec._adjust(spec.architecture(), None)
    dtype = getattr(torch, spec.dtype) if spec.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    attention = spec.attention(config)
    model = auto_class(spec.task).from_config(config, dtype=dtype, attn_implementation=attention)
    if spec.config.get("tie_word_embeddings") is False:
        loading.untie(model)
    loading.prepare(spec, model)
    return model  # type: ignore[no-any-return]


class _Step:
    """A pack on its base, and the training step."""

    def __init__(
        self, tracker: Tracker, model: nn.Module, specs: Sequence[TrialSpec], geometry: Geometry, names: list[str]
    ) -> None:
        self.tracker, self.model, self.geometry = tracker, model, geometry
        self.spec, self.phase = specs[0], ""
        self.plugin = precision(self.spec.trainer.precision_on(geometry.device))
        tracker.mark("load")
        self._convert(names)
        # a mark for each part: each peak is linear in the layers, the higher of two is not
        tracker.mark("load", "adapters")
        trials = [self._trial(spec) for spec in specs]
        # lengthened rows are computed with their padding
        device, packing = geometry.device, self.spec.data.packing
        unpad = unpads(model.config, device, computed_in(self.spec, device), packing)
        unpad = unpad and (packing or not any(p.length for p in geometry.passes))
        self.module = FineTuner(model, trials, unpad=unpad)
        self.module.forward_pass.mode = geometry.mode
        if geometry.mode is not None and geometry.mode.unpadded:
            prepare(model)
        self.plugin.convert_module(self.module)
        tracker.tag((tensor for _, tensor in loading.tensors(model)), "base")
        tracker.mark("load", "optimizer")
        self.optimizer = self._optimizer()
        adapters = self.module.adapters  # whose parameters may be views of a new buffer by now
        tracker.tag([*adapters.parameters(), *adapters.buffers()], "adapter")
        self.micros = len(geometry.passes)
        self.trainer = SimpleNamespace(accumulate_grad_batches=self.micros, should_stop=False)
        self.module.trainer = self.trainer  # type: ignore[assignment]
        self.shapes = [*geometry.passes, geometry.evaluation or geometry.passes[0]]
        self.passes = [self._pass(shape) for shape in self.shapes[:-1]]

    def run(self, two_steps: bool) -> Traced | None:
        """None: some parameter got no gradient, so the first step must be traced too (``two_steps``)."""
        self.module.train()
        if self.geometry.cuda:  # products come after the load
            self._enter("", False)
            self.workspaces = torch.empty(held_workspaces(), dtype=torch.uint8)
            self.tracker.tag([self.workspaces], "constants")
        if two_steps:
            self._train(reported=False)
        elif not self.geometry.first:
            self._make_leftovers()
        paged = self._page()
        self._watch()
        self._train(reported=True)
        if not (two_steps or self.geometry.first) and any(p.grad is None for p in self.module.adapters.parameters()):
            return None
        if self.geometry.scored:
            self._evaluate()
        kept = (layer.resident for layer in frozen_layers(self.model) if layer.resident is not None)
        self.tracker.tag(kept, "base")
        segments = [segment for segment in self.tracker.segments() if segment.phase]
        levels = self.tracker.levels()
        self.tracker.forget()
        return Traced(segments, paged, levels, self.module.forward_pass.mode)

    def _convert(self, names: list[str]) -> None:
        """Quantizes the layers ``names`` one by one, as loading does; the other weights are there already."""
        quantizer = self.spec.quantization
        waiting = {id(self.model.get_submodule(name).weight) for name in names}
        self.tracker.tag((t for _, t in loading.tensors(self.model) if id(t) not in waiting), "base")
        for name in names:
            layer = self.model.get_submodule(name)
            if self.geometry.cuda:  # moved there dense, packed there
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
            replace(self.model, {id(layer): quantizer.convert(layer, name)})

    def _trial(self, spec: TrialSpec) -> Trial:
        adapter = spec.adapter.attach(self.model, spec.seed)
        check_parameters(adapter, self.model)
        data: Any = SimpleNamespace(train=[0])
        return Trial(dataclasses.replace(spec, optimizer=spec.optimizer.unpaged()), adapter, data, 0, {})

    def _optimizer(self) -> Any:
        optimizer = self.module.configure_optimizers()["optimizer"]
        if hasattr(optimizer, "name2qmap"):  # bitsandbytes computes its maps from values, which fake tensors lack
            optimizer.name2qmap = {name: torch.empty(256) for name in ("dynamic", "udynamic")}
            self.tracker.tag(optimizer.name2qmap.values(), "constants")
        unfused = self.geometry.cuda and self.spec.trainer.precision == "16-mixed"  # for its loss scaler
        for group in optimizer.param_groups if unfused else ():
            if "foreach" in group:
                group["foreach"], group["fused"] = True, False  # torch's choice on CUDA
        return optimizer

    def _pass(self, shape: Pass) -> dict[int, dict[str, Any]]:
        length = shape.length
        if self.spec.model.compile != "none":  # traced as without it, but for its padding
            length = width(length or max(n for batch in shape.present for n in batch.inputs), self.spec.room)
        made = {i: self._batch(batch, length) for i, batch in enumerate(shape.batches) if batch is not None}
        return padded_alike(made, 0, torch.device("cpu"), self.module.room) if self.geometry.cuda else made

    def _batch(self, batch: BatchShape, length: int | None) -> dict[str, Any]:
        rows, width = len(batch.inputs), length or max(batch.inputs)
        ids = torch.ones(rows, width, dtype=torch.int64)
        task = self.spec.model.task
        shape = {"sequence_classification": (rows,), "seq2seq_lm": (rows, max(batch.labels))}.get(task, (rows, width))
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.ones(shape).long()}
        self.tracker.tag(tensors.values(), "activations")
        tokens = sum(batch.inputs)
        return {"tensors": tensors, "rows": rows, "step_targets": batch.targets, "tokens": tokens, "micro": 0}

    def _losses(self, number: int, training: bool) -> Any:
        """The losses of one pass; its lengths and targets are set, since fake tensors have no values."""
        shape, batches = self.shapes[number], self.passes[number]
        self.tracker.targets = _targets(shape, self.spec.model.task, batches)
        lengths = [n for batch in shape.present for n in batch.inputs]
        with patch.object(stacked, "lengths_of", lambda _: lengths):
            return self.module.training_step(batches, number) if training else self.module.losses(batches, False)

    def _enter(self, phase: str, reported: bool) -> None:
        self.phase = phase if reported else ""
        self.tracker.mark(self.phase, "before")

    def _train(self, reported: bool) -> None:
        @torch.enable_grad()  # as Lightning's: an optimizer may call it without
        def closure() -> None:
            for micro in range(self.micros):
                self._enter("forward", reported)
                with self.plugin.train_step_context():
                    loss = self._losses(micro, training=True)
                if not micro:
                    self.optimizer.zero_grad()
                self._enter("backward", reported)
                assert loss is not None
                loss.backward()  # type: ignore[no-untyped-call]
            self._enter("optimizer", reported)
            self.module.configure_gradient_clipping(self.optimizer)
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self.tracker.tag(gradients, "gradients")

        self.optimizer.step(closure)
        self.tracker.tag(self._state(), "optimizer")

    def _make_leftovers(self) -> None:
        """Makes the gradients and optimizer states that a first step leaves."""
        self._enter("optimizer", False)
        for parameter in self.module.adapters.parameters():
            parameter.grad = torch.empty_like(parameter)
        self.tracker.tag((p.grad for p in self.module.adapters.parameters() if p.grad is not None), "gradients")
        self.optimizer.step()
        self.tracker.tag(self._state(), "optimizer")
        if self.spec.optimizer.flat:  # it moves the gradients into its own buffer
            self.optimizer.zero_grad()

    def _state(self) -> list[Tensor]:
        maps = {id(table) for table in getattr(self.optimizer, "name2qmap", {}).values()}
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, Tensor) and id(value) not in maps]

    def _page(self) -> int:
        """Leaves out the states that bitsandbytes keeps in managed memory, outside of torch's allocator. Bytes."""
        if not self.geometry.cuda or self.spec.optimizer.name not in UNPAGED:
            return 0
        states = [state[key] for state in self.optimizer.state.values() for key in ("state1", "state2")]
        return self.tracker.leave_out(state for state in states if state.numel() >= PAGED_FROM)

    def _evaluate(self) -> None:
        self._enter("", False)
        if self.spec.trainer.val_check_interval is None:  # then it comes after the fit
            self.optimizer.state.clear()
        self.passes.append(self._pass(self.shapes[-1]))
        self._enter("evaluation", True)
        self.module.eval()
        with torch.no_grad(), self.plugin.val_step_context():
            self._losses(-1, training=False)

    def _watch(self) -> None:
        """Marks where each layer of the stack begins, forward and backward."""
        layers = stack(self.model)
        for number, layer in enumerate(layers or ()):
            layer.register_forward_pre_hook(lambda *_, place=str(number): self.tracker.mark(self.phase, place))
            layer.register_forward_hook(lambda _, __, out, n=number: self._after(out, n, len(layers or ())))

    def _after(self, out: Any, number: int, count: int) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.tracker.mark(self.phase, str(number)))
        if number == count - 1:
            self.tracker.mark(self.phase, "after")


def _targets(shape: Pass, task: str, batches: dict[int, dict[str, Any]]) -> dict[int, int]:
    """{number of positions: how many of them are targets}: of the whole pass, flat or padded, and of each trial."""
    present = shape.present
    if task == "sequence_classification":
        return {}
    rows = [len(batch.inputs) for batch in present]
    width = max(batch["tensors"]["labels"].shape[1] for batch in batches.values())
    targets = {count * width: batch.targets for count, batch in zip(rows, present, strict=True)}
    targets |= {sum(batch.inputs): batch.targets for batch in present}
    total = sum(batch.targets for batch in present)
    return targets | {sum(rows) * width: total, sum(sum(batch.inputs) for batch in present): total}
