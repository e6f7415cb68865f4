"""One pass of a stacked batch through the base, by the fastest way that gives the base's own losses.

A way that leaves padding or dense logits out is taken where the base's own graph allows it: its logits are its head's,
its rows do not see each other. It is held against the plain one on the first batch besides. A base that it does not
suit (soft-capped logits, another kind of attention) is computed the plain way, and the log says so.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.perturbed import moderate, perturbed
from loralab.errors import ConfigError, is_out_of_memory
from loralab.forward import varlen
from loralab.forward.dropout import own_dropout
from loralab.forward.graph import evaluated, reached, reads_positions
from loralab.forward.head import bypassed, frozen_head, hands_on, head_nll
from loralab.forward.metrics import nll
from loralab.forward.unpadded import can_unpad, flat, flatten, prepare, undo
from loralab.numerics.stacks import sent

log = logging.getLogger(__name__)

Around = Callable[[Mapping[str, Any]], AbstractContextManager[None]]


def _nothing(_: Mapping[str, Any]) -> AbstractContextManager[None]:
    return nullcontext()


class Unsuited(RuntimeError):  # noqa: N818 - it says what a base is, not what went wrong
    """A way that does not give the base's own losses."""


Scores = tuple[Tensor, Tensor, Tensor]  # summed nll, predictions, targets
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}  # of a row's mean nll; half precision rounds by 2^-8
HALF_TOLERANCE = 0.02
CHECKED = 64  # tokens of a row that a way without dense logits is held against the plain one on


@dataclass(frozen=True)
class ForwardMode:
    """How a pass is computed."""

    unpadded: bool = False
    fused_cross_entropy: bool = False

    def __str__(self) -> str:
        names = {"without padding": self.unpadded, "without dense logits": self.fused_cross_entropy}
        return " and ".join(name for name, chosen in names.items() if chosen) or "the plain way"


class Forward:
    """The base of a pack, called with stacked batches."""

    def __init__(self, model: nn.Module, task: str, unpad: bool = True, packing: bool = False) -> None:
        """``unpad``: padding may be left out; ``packing``: it must be, on any device: rows share sequences."""
        self.model, self.task, self.unpad, self.packing = model, task, unpad, packing
        self.hooks = AdapterHooks.of(model)
        self.mode: ForwardMode | None = None

    def __call__(
        self, inputs: dict[str, Tensor], labels: Tensor, slices: Sequence[BatchSlice], around: Around = _nothing
    ) -> list[Scores]:
        """Scores of each share. ``inputs`` and ``labels``: rows of all shares along dim 0, padded on the right; on the
        host, where what depends on their values is asked, so that no card is waited for. ``around``: what the model is
        called within, given its inputs."""
        if self.mode is None:
            self.mode = self._choose(inputs, labels, slices)
        return self._scores(self.mode, inputs, labels, slices, around)

    def _scores(
        self,
        mode: ForwardMode,
        inputs: dict[str, Tensor],
        labels: Tensor,
        slices: Sequence[BatchSlice],
        around: Around = _nothing,
    ) -> list[Scores]:
        self.hooks.begin_pass(tuple(slices))
        if self.task == "causal_lm":  # a position predicts the next one
            labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], 1)
        if mode.unpadded:
            inputs, labels = self._flattened(inputs, labels)
        if not mode.fused_cross_entropy:
            inputs, labels = self._sent(inputs), sent(labels, self._device)
            with around(inputs):
                logits = self.model(**inputs).logits
            return self._plain(logits, labels)
        head = frozen_head(self.model, [part.owner for part in slices])
        assert head is not None
        has_target = labels != -100
        places = has_target.flatten().nonzero()[:, 0]
        counts = self._counts(has_target, len(places))
        targets, places = sent(labels.flatten()[places], self._device), sent(places, self._device)
        inputs = self._sent(inputs)
        with bypassed(head) as entered, around(inputs):
            hidden = self.model(**inputs).logits
        if isinstance(hidden, FakeTensor) and hidden is not entered[0]:  # _losses_match sees it in the values
            raise Unsuited("the base changes its logits, which have to be made then")
        losses, predictions = head_nll(hidden.flatten(0, 1).index_select(0, places), targets, head)
        parts = zip(*(torch.split(x, counts) for x in (losses, predictions, targets)), strict=True)
        return [(trial_losses.sum(), *rest) for trial_losses, *rest in parts]

    def _counts(self, kept: Tensor, total: int) -> list[int]:
        """Targets of each share."""
        parts = self.hooks.split(kept)
        if len(parts) == 1:
            return [total]
        if isinstance(kept, FakeTensor):
            return [total // len(parts)] * (len(parts) - 1) + [total - total // len(parts) * (len(parts) - 1)]
        counts: list[int] = torch.stack([own.sum() for own in parts]).tolist()
        return counts

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _sent(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = self._device
        return {name: _marked(sent(value, device), value) for name, value in inputs.items()}

    def _plain(self, logits: Tensor, labels: Tensor) -> list[Scores]:
        task = "seq2seq_lm" if self.task == "causal_lm" else self.task  # the labels are shifted already
        return [nll(*own, task) for own in zip(self.hooks.split(logits), self.hooks.split(labels), strict=True)]

    def _flattened(self, inputs: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
        lengths = lengths_of(inputs["attention_mask"])
        counts = iter(lengths)
        slices = [replace(part, tokens=sum(next(counts) for _ in range(part.rows))) for part in self.hooks.slices]
        self.hooks.begin_pass(tuple(slices))
        return flatten(inputs, lengths), flat(labels, lengths)

    def _choose(self, inputs: dict[str, Tensor], labels: Tensor, slices: Sequence[BatchSlice]) -> ForwardMode:
        """The way for this base and these adapters; under fake tensors whatever its shape allows."""
        owners = [part.owner for part in slices]
        fused_cross_entropy = self.task != "sequence_classification" and frozen_head(self.model, owners) is not None
        unpadded = self.task == "causal_lm" and self.unpad and can_unpad(self.model)
        device = self._device.type
        unpadded = unpadded and unpads(self.model.config, device, _computed_in(self.model, device), self.packing)
        changed = prepare(self.model) if unpadded else []
        if isinstance(labels, FakeTensor):
            return ForwardMode(unpadded, fused_cross_entropy)
        two_rows = _two_rows(inputs)
        if fused_cross_entropy and not self._logits_are_the_heads(_two_rows(_short(inputs, labels)[0])):
            fused_cross_entropy = False
            log.info("this base is not computed without dense logits: it changes what its head gives")
        if unpadded and not self._rows_are_independent(two_rows):
            unpadded = False
            log.info("this base is not computed without padding: its rows would not be what they are alone")
        fused = ForwardMode(fused_cross_entropy=fused_cross_entropy)
        modes = [ForwardMode(unpadded, fused_cross_entropy), fused, ForwardMode()]
        methods = {type(getattr(part.owner, "spec", part.owner)): part.owner for part in slices}  # one of each
        for mode in dict.fromkeys(modes):
            if not mode.unpadded:
                undo(changed)
            if mode == ForwardMode() or all(
                self._losses_match(mode, inputs, labels, owner) for owner in methods.values()
            ):
                break
            log.info("this base is not computed %s: its losses would differ", mode)
        if self.packing and not mode.unpadded:
            config: Any = self.model.config
            raise no_packing(config, config._attn_implementation)
        return mode

    def _logits_are_the_heads(self, two_rows: dict[str, Tensor]) -> bool:
        """Whether the base's logits are its head's."""
        head = frozen_head(self.model)
        self.hooks.begin_pass(())
        with evaluated(self.model):
            return head is not None and hands_on(self.model, head, self._sent(two_rows))

    def _rows_are_independent(self, two_rows: dict[str, Tensor]) -> bool:
        """Whether two rows of a flat batch stand at positions of their own and do not see each other."""
        self.hooks.begin_pass(())
        lengths = lengths_of(two_rows["attention_mask"])
        try:
            flat_inputs, second = self._sent(flatten(two_rows, lengths)), slice(lengths[0], sum(lengths))
            dependences = reached(self.model, flat_inputs, second)
            independent = len(dependences) == 1 and not bool((dependences[0][:, : lengths[0]] != 0).any())
            return independent and (lengths[1] < 2 or reads_positions(self.model, flat_inputs, second))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            log.debug("a flat batch", exc_info=error)
            return False

    @torch.no_grad()
    def _losses_match(self, mode: ForwardMode, inputs: dict[str, Tensor], labels: Tensor, owner: nn.Module) -> bool:
        """On one row, and on itself cut short: padded, they are two rows of unequal lengths. The adapter is moved from
        its start, where most compute nothing."""
        training = self.model.training
        self.model.eval()
        if not mode.unpadded:  # where attention has a say whole rows are compared
            inputs, labels = _short(inputs, labels)
        try:
            two_rows = _two_rows(inputs)
            targets = torch.cat([labels[:1], labels[:1]])
            if self.task == "causal_lm":
                targets = targets.masked_fill(two_rows["attention_mask"] == 0, -100)

            def loss(way: ForwardMode) -> float:
                return float(self._scores(way, two_rows, targets, [BatchSlice(owner, 2)])[0][0])

            scale, dense = moderate(owner, loss(ForwardMode()), lambda: loss(ForwardMode()))
            with perturbed(owner, scale):
                by_mode = loss(mode)
            computed_in, device = _computed_in(self.model, self._device.type), self._device.type
            allowed = HALF_TOLERANCE if in_tf32(device) else TOLERANCE.get(computed_in, HALF_TOLERANCE)
            return abs(dense - by_mode) <= allowed * max(1.0, dense)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            if is_out_of_memory(error):  # says nothing of the way, and fewer trials may cure it
                raise
            log.debug("%s", mode, exc_info=error)
            return False
        finally:
            self.model.train(training)


def _marked(moved: Tensor, tensor: Tensor) -> Tensor:
    """``moved`` with what ``tensor``, which it is a copy of, carries beside its values."""
    for name, mark in vars(tensor).items() if moved is not tensor else ():
        setattr(moved, name, sent(mark, moved.device) if isinstance(mark, Tensor) else mark)
    return moved


def unpads(config: Any, device: str, dtype: torch.dtype, packing: bool = False) -> bool:
    """Whether the rows of a causal base are computed without padding: on a CPU; on a card where its attention takes
    rows of unequal lengths in one call; everywhere with ``packing``, since rows share sequences then."""
    return packing or device == "cpu" or (varlen.suits(config, dtype) and not own_dropout(config))


def no_packing(config: Any, attention: str) -> ConfigError:
    """The error where the rows of a sequence are not computed as each is alone. ``attention``: its implementation."""
    return ConfigError(
        "data.packing=true: the rows of a sequence must not see each other, and this base (model_type="
        f"{config.model_type}, model.attn_implementation={attention}), with this adapter, does not compute each as it "
        "is alone; valid: data.packing=false, or a causal base with full attention by sdpa, and position_ids"
    )


def lengths_of(mask: Tensor) -> list[int]:
    """Tokens of each row of a mask (rows, T) that is padded on the right; of one without values, all of them."""
    if isinstance(mask, FakeTensor):
        return [mask.shape[1]] * mask.shape[0]
    return [int(length) for length in mask.sum(1).tolist()]


def _two_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = {name: torch.cat([value[:1], value[:1]]) for name, value in inputs.items()}
    length = int(rows["attention_mask"][0].sum())
    rows["attention_mask"][1, length - length // 3 :] = 0
    return rows


def _short(inputs: dict[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The first row alone, and of it at most CHECKED tokens, the last of which is the last that is a target or stands
    before one: dense logits of whole rows would need memory that no plan holds."""
    places = torch.nonzero(labels[0] != -100)
    aligned = labels.shape == inputs["input_ids"].shape  # of an encoder-decoder they are the decoder's
    end = max(CHECKED, int(places[-1]) + 1) if aligned and len(places) else CHECKED
    cut = {name: value[:1, (end - CHECKED if aligned else 0) : end] for name, value in inputs.items()}
    return cut, labels[:1, (end - CHECKED if aligned else 0) : end]


def in_tf32(device: str) -> bool:
    """Whether float32 products on ``device``, cpu or cuda, may be TF32."""
    return device == "cuda" and torch.get_float32_matmul_precision() != "highest"


def _computed_in(model: nn.Module, device: str) -> torch.dtype:
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return next(model.parameters()).dtype
