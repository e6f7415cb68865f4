"""Which positions of a batch are tokens, and of which sequence: what activation scales and outlier columns are over.

LLM.int8() (arXiv 2208.07339, sections 2.1 and 3.2) defines both for the hidden states X (s, h) of one sequence. Taken
like that, padding sets no scale, and a row's result does not depend on the rows that share its batch.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from loralab.errors import ConfigError
from loralab.quantization.linear import FrozenLinear

Place = slice | Tensor  # where the tokens of one sequence are among the positions, flattened
KEY = "loralab_sequences"
TARGET_MASK = "loralab_real"  # attribute of decoder_input_ids: True where there is a target


class Sequences:
    """The sequences of the current pass, which hooks on the model set from its masks, for the layers to look up."""

    def __init__(self) -> None:
        self._places_by_shape: dict[
            tuple[int, ...], list[Place]
        ] = {}  # leading shape of a layer's input -> its sequences
        self._rows, self._padded = 0, False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sequences":
        return self  # a copied layer looks up the same model's passes

    def of(self, x: Tensor) -> list[Place]:
        """x (..., in) -> the places of each sequence's tokens in x.reshape(-1, in), without padding.

        A layer called by itself takes each matrix (s, in) for a sequence. Raises ConfigError where the model has
        folded its batch so that sequences cannot be told apart."""
        shape = tuple(x.shape[:-1])
        if isinstance(x, FakeTensor) or not self._places_by_shape:
            return _matrices(x)
        if shape in self._places_by_shape:
            return self._places_by_shape[shape]
        if not self._are_whole_sequences(shape):
            raise ConfigError(
                f"quantization: a layer with {x.shape[-1]} inputs sees states of shape {tuple(x.shape)}, in a batch of"
                f" shapes {[known for known in self._places_by_shape if len(known) == 2]}, so that the sequences, over"
                " which scales of activations and outlier columns are taken, cannot be told apart; valid:"
                " quantization.threshold=0 with scales per token (granularity vector or row), another scheme, or the"
                " layer in quantization.skip_modules"
            )
        return _matrices(x)

    def _are_whole_sequences(self, shape: tuple[int, ...]) -> bool:
        """Whether states of an unknown shape are whole sequences: of a batch without padding, or of no batch at all
        (1, n), such as a table of relative positions."""
        if len(shape) == 1 or self._rows == 1:
            return self._rows == 1 and not self._padded
        return shape[0] == 1 or (shape[0] == self._rows and not self._padded)

    def each(self, x: Tensor, out_features: int, product: Callable[[Tensor], Tensor]) -> Tensor:
        """x (..., in) -> (n, out) float32: ``product`` (s, in) -> (s, out) of every sequence; 0 at padding."""
        rows, places = x.reshape(-1, x.shape[-1]), self.of(x)
        if places == [slice(0, len(rows))]:
            return product(rows)
        y = torch.zeros(len(rows), out_features, device=x.device)
        for place in places:
            y[place] = product(rows[place])
        return y

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of a whole model: looks at what it is called with.

        An encoder and a decoder of one width get one more column of padding before the encoder, so that a layer's
        input says by its shape whose positions it holds."""
        arguments = _arguments(model, args, kwargs)
        self._places_by_shape, self._padded = {}, False
        decoder = _first(arguments, "decoder_input_ids", "decoder_inputs_embeds")
        if decoder is None or isinstance(decoder, FakeTensor):
            self._record_input(arguments)
            return None
        changed = None
        ids = arguments.get("input_ids")
        if ids is not None and not args and ids.shape == decoder.shape[:2] and _has_free_position(model, ids):
            mask = arguments.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            padded = {"input_ids": pad(ids, (0, 1)), "attention_mask": pad(mask, (0, 1))}
            arguments, changed = {**arguments, **padded}, (args, {**kwargs, **padded})
        self._record_input(arguments)
        states = arguments.get("encoder_outputs")
        if ids is None and states is not None:  # what cross attention reads
            self._record_shape(states[0].shape[:2], arguments.get("attention_mask"))
        shape = tuple(decoder.shape[:2])
        before = self._places_by_shape.get(shape)
        self._record_shape(shape, _decoder_mask(arguments, model))
        if before is not None and str(before) != str(self._places_by_shape[shape]):
            raise ConfigError(
                f"quantization: encoder and decoder both have {shape[0]} rows of {shape[1]} positions, padded otherwise"
                ", so that a layer cannot tell which of them it sees, and scales of activations are taken without"
                " padding; valid: one position less in one of them, or a scheme that quantizes weights only"
            )
        return changed

    def knows(self, shape: tuple[int, ...]) -> bool:
        """Whether states of this leading shape are taken for those of a stack already."""
        return shape in self._places_by_shape

    def encode(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an encoder, which generation calls by itself."""
        self._record_input(_arguments(encoder, args, kwargs))

    def _record_input(self, arguments: Mapping[str, Any]) -> None:
        ids = _first(arguments, "input_ids", "inputs_embeds")
        if ids is not None and not isinstance(ids, FakeTensor):
            self._record_shape(ids.shape[:2], arguments.get("attention_mask"))

    def _record_shape(self, shape: Sequence[int], mask: Any) -> None:
        """Sequences of (rows, T) positions; a mask may reach further back than these (a cache)."""
        rows, width = shape
        lengths = getattr(mask, "loralab_lengths", None)
        if lengths is not None:
            ends = list(accumulate(lengths))
            places: list[Place] = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        elif isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == rows and mask.shape[1] >= width:
            places = _places(mask[:, mask.shape[1] - width :])
            self._padded |= not bool(mask.all())
        else:
            places = [slice(row * width, (row + 1) * width) for row in range(rows)]
        self._rows = len(places)
        one_each: list[Place] = [slice(row, row + 1) for row in range(rows)]
        self._places_by_shape.update({(rows,): one_each, (rows * width,): places, (1, rows * width): places})
        self._places_by_shape[rows, width] = places


def watch(model: nn.Module) -> Sequences:
    """The ``Sequences`` of ``model``, its hooks set at first use; layers that ask for it have it from now on."""
    if KEY not in model.__dict__:
        sequences = model.__dict__[KEY] = Sequences()
        model.register_forward_pre_hook(sequences.begin, with_kwargs=True)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
            model.get_encoder().register_forward_pre_hook(sequences.encode, with_kwargs=True)  # type: ignore[operator]
    sequences = cast(Sequences, model.__dict__[KEY])
    for layer in model.modules():
        if isinstance(layer, SequenceLinear):
            layer.sequences = sequences
    return sequences


def watch_if_needed(model: nn.Module) -> None:
    """``watch`` where a layer of ``model`` computes per sequence."""
    if any(isinstance(layer, SequenceLinear) and layer.per_sequence for layer in model.modules()):
        watch(model)


def watched(model: nn.Module) -> bool:
    """Whether a layer of ``model`` looks at whole sequences, so that it must not be shown parts of the batch."""
    return KEY in model.__dict__


def decoder_input_ids(model: nn.Module, labels: Tensor) -> Tensor:
    """labels (rows, T), -100 at padding -> what the decoder reads to predict them, (rows, T).

    With a mark of the positions that have a target: in a row that is shorter than the batch the token behind its last
    target is read too, which in the longest row is not, so that the ids alone do not say what belongs to a row."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        ids: Tensor = model.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
    elif hasattr(
        module := sys.modules[type(model).__module__], "shift_tokens_right"
    ):  # M2M100, PLBart: as their forward
        shift, config = module.shift_tokens_right, model.config
        start = ("pad_token_id", "decoder_start_token_id")[: len(inspect.signature(shift).parameters) - 1]
        ids = shift(labels, *(getattr(config, key) for key in start))
    else:
        own: Any = model.config
        first = torch.full_like(labels[:, :1], own.decoder_start_token_id)
        ids = torch.cat([first, labels[:, :-1]], 1)
        ids = ids.masked_fill(ids == -100, 0 if own.pad_token_id is None else own.pad_token_id)
    setattr(ids, TARGET_MASK, labels != -100)
    return ids


class SequenceLinear(FrozenLinear):
    """A frozen layer whose product may look at all tokens of a sequence."""

    per_sequence = False  # whether its product does

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sequences = Sequences()


def _first(given: Mapping[str, Any], *names: str) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    named: dict[str, Any] = inspect.signature(module.forward).bind_partial(*args).arguments
    return {**named, **kwargs}


def _has_free_position(model: nn.Module, ids: Tensor) -> bool:
    """Whether the encoder has a position beyond those of ``ids`` (rows, T)."""
    return ids.shape[1] < (getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + 1)  # type: ignore[union-attr,arg-type]


def _matrices(x: Tensor) -> list[Place]:
    """x (..., s, in) -> the places of each matrix (s, in), taken for a sequence."""
    count, width = x.numel() // x.shape[-1], x.shape[-2] if x.dim() > 1 else 1
    if isinstance(x, FakeTensor):
        return [slice(0, count)]
    return [slice(start, start + width) for start in range(0, count, max(1, width))]


def _places(mask: Tensor) -> list[Place]:
    """mask (rows, T), 0 at padding -> the places of each row's tokens."""
    places: list[Place] = []
    for row, own in enumerate(mask.bool().cpu()):
        tokens = own.nonzero().flatten() + row * mask.shape[1]
        first, last = (int(tokens[0]), int(tokens[-1])) if len(tokens) else (0, -1)
        contiguous = last - first + 1 == len(tokens)
        places.append(slice(first, last + 1) if contiguous else tokens.to(mask.device))
    return places


def _decoder_mask(given: Mapping[str, Any], model: nn.Module) -> Any:
    """The mask (rows, T) of decoder positions: the call's own, or TARGET_MASK, or, in generation, all but the padding
    at the end of a row; its first position always counts. None without decoder_input_ids or a pad token."""
    ids = given.get("decoder_input_ids")
    mask = _first(given, "decoder_attention_mask")
    mask = getattr(ids, TARGET_MASK, None) if mask is None else mask
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if mask is not None or ids is None or padding is None:
        return mask
    real = (ids != padding).int()
    real[:, 0] = 1
    return real.flip(1).cummax(1).values.flip(1)
