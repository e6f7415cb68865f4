"""Prefix tuning: every layer's attention sees trained keys and values before those of the tokens (Li and Liang 2021,
arXiv:2101.00190, section 4)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache

from loralab.adapters import peft
from loralab.adapters.base import Adapter, AdapterSpec, Saved, freeze, generator_for, save_modules
from loralab.adapters.files import read_state, write_state
from loralab.adapters.virtual import (
    Share,
    Virtual,
    VirtualAdapter,
    name_of,
    name_unlike_peft,
    refuse,
    stack_of,
    takes,
    widened,
)
from loralab.errors import ConfigError
from loralab.spec import Count, spec

PROJECTION = "prefix_projection.safetensors"  # what PEFT's file does not hold


@spec("adapter")
class Prefix(AdapterSpec):
    """``num_virtual_tokens`` keys and values a layer; of an encoder-decoder in the decoder's self-attention, as PEFT.

    ``prefix_projection``: they are made by a perceptron of ``encoder_hidden_size`` (null: their width) from one
    embedding a virtual token, which the paper found to train more steadily (section 4.3).
    """

    packable: ClassVar[bool] = True
    size_field: ClassVar[str] = "num_virtual_tokens"
    unmergeable: ClassVar[str] = (
        "its keys and values are those of tokens that no row has, and depend on no weight of the base"
    )
    start_differs: ClassVar[str] = "every token attends to the prefix from the first step on"

    num_virtual_tokens: Count = 20
    prefix_projection: bool = False
    encoder_hidden_size: Count | None = None
    modules_to_save: Saved = None

    def __post_init__(self) -> None:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ConfigError(
                f"adapter.encoder_hidden_size={self.encoder_hidden_size} has no effect without a perceptron; valid: "
                "null, or adapter.prefix_projection=true"
            )

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        stack = stack_of(self, model)
        shape = _shape(self, model, stack)
        adapter = self.makes(model, self)
        hidden = (self.encoder_hidden_size or shape.width) if self.prefix_projection else None
        states = PrefixStates(self.num_virtual_tokens, shape, hidden, next(model.parameters()).device)
        states.draw(generator_for(seed, "prefix"))
        adapter.add(name_of(model, stack), states)
        save_modules(adapter, model, self.modules_to_save, seed)
        name_unlike_peft(self, model)
        return adapter


@dataclass(frozen=True)
class Shape:
    """Of the keys (and the values) of a token in all layers."""

    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def _shape(spec: AdapterSpec, model: nn.Module, stack: nn.Module) -> Shape:
    """Raises ConfigError for a base that has no cache to put keys and values into, or one of another kind."""
    if not takes(stack, "past_key_values"):
        raise refuse(spec, model, "takes no past_key_values, so that there is no place for a prefix")
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise refuse(spec, model, "has layers that do not attend to all tokens before, which would lose a prefix")
    if getattr(config, "kv_lora_rank", None) or not hasattr(config, "num_attention_heads"):
        raise refuse(spec, model, "keeps no keys and values of one width for each head")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ConfigError(
            f"adapter={spec.method} does not go with model.gradient_checkpointing=true, under which transformers drops "
            "the past_key_values that hold a prefix; valid: model.gradient_checkpointing=false"
        )
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    own = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return Shape(layers, heads, own or config.hidden_size // config.num_attention_heads)


class PrefixStates(Virtual):
    """The prefix of one trial: n keys and n values for each layer, as one table or made from n embeddings."""

    def __init__(self, size: int, shape: Shape, hidden: int | None, device: torch.device) -> None:
        """``hidden``: width of the perceptron that makes them; None: there is none."""
        super().__init__()
        self.size, self.shape = size, shape
        total = 2 * shape.layers * shape.width
        self.embedding = nn.Parameter(torch.empty(size, shape.width if hidden else total, device=device))
        self.transform = nn.Sequential()
        if hidden:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                first, last = nn.Linear(shape.width, hidden), nn.Linear(hidden, total)
            self.transform = nn.Sequential(first, nn.Tanh(), last)

    def draw(self, generator: torch.Generator) -> None:
        """Normal with deviation 1 (the embeddings), uniform in +-1/sqrt(in) (the perceptron): PEFT's draw."""
        if self.embedding.is_meta:
            return
        with torch.no_grad():
            self.embedding.copy_(torch.randn(self.embedding.shape, generator=generator))
            for layer in self.transform.children():
                width = getattr(layer, "in_features", 1)
                for parameter in layer.parameters():
                    drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
                    parameter.copy_(drawn / math.sqrt(width))

    def forward(self) -> Tensor:  # (n, 2 * layers * width): of each layer the keys, then the values
        made: Tensor = self.transform(self.embedding)
        return made

    @staticmethod
    def forward_grouped(shares: Sequence[Share], dtype: torch.dtype) -> Tensor:
        """Keys and values of all rows of several trials, (2 * layers, rows, heads, n, width of a head)."""
        parts = []
        for share in shares:
            shape = cast(PrefixStates, share.tokens).shape
            states = share.tokens().to(dtype).view(share.tokens.size, 2 * shape.layers, shape.heads, shape.head_dim)
            parts.append(states.permute(1, 2, 0, 3)[:, None].expand(-1, share.rows, -1, -1, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @staticmethod
    def enter(stack: nn.Module, named: dict[str, Any], shares: Sequence[Share]) -> dict[str, Any]:
        """The prefix lies in the cache from the first step on; the tokens' positions follow on it."""
        size, past, positions = shares[0].tokens.size, named.get("past_key_values"), named.get("position_ids")
        if past is None or not past.get_seq_length():
            past = _filled(past, PrefixStates.forward_grouped(shares, _dtype(stack)), encoded=_crosses(stack, named))
        given = {**named, "past_key_values": past, "attention_mask": widened(named.get("attention_mask"), size)}
        return given if positions is None else {**given, "position_ids": positions + size}


def _crosses(stack: nn.Module, named: Mapping[str, Any]) -> bool:
    return named.get("encoder_hidden_states") is not None


def _filled(past: Cache | None, states: Tensor, encoded: bool) -> Cache:
    """``past`` (null: a new cache) with the keys and values of every layer; ``encoded``: it has an encoder's too."""
    if past is None:
        past = EncoderDecoderCache(DynamicCache(), DynamicCache()) if encoded else DynamicCache()
    own = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
    for layer in range(len(states) // 2):
        own.update(states[2 * layer], states[2 * layer + 1], layer)
    return past


def _dtype(stack: Any) -> torch.dtype:
    """Of the base's own keys."""
    weight: Tensor = stack.get_input_embeddings().weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class PrefixAdapter(VirtualAdapter):
    """PEFT's file holds the keys and values; a perceptron that makes them lies beside it, so that training can go on.

    PEFT gives layer i of a decoder behind an encoder the states it keeps for layer 2i, counted round: of an even
    number of layers it never reads half. Ours are written at those places, among twice as many layers.
    """

    def export(self, folder: Path) -> None:
        super().export(folder)
        if self._states.transform:
            write_state(self._states.state_dict(), folder / PROJECTION)

    def restore(self, folder: Path) -> None:
        super().restore(folder)
        if self._states.transform:
            self._states.load_state_dict(read_state(folder / PROJECTION))

    @property
    def _states(self) -> PrefixStates:
        return cast(PrefixStates, self.virtual[1])

    @property
    def _spread(self) -> bool:
        return peft.task_type(self._model[0]) == "SEQ_2_SEQ_LM"

    def embeddings(self) -> Tensor:
        own: Tensor = self._states()
        if not self._spread:
            return own
        pairs = own.view(len(own), self._states.shape.layers, 1, -1)
        return torch.cat([pairs, torch.zeros_like(pairs)], 2).flatten(1)

    def take(self, embeddings: Tensor) -> None:
        if not self._states.transform:
            layers = self._states.shape.layers
            own = embeddings.view(len(embeddings), layers, 2, -1)[:, :, 0].flatten(1) if self._spread else embeddings
            self._states.embedding.copy_(own)

    def peft_fields(self) -> dict[str, Any]:
        shape, spec = self._states.shape, cast(Prefix, self.spec)
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": spec.num_virtual_tokens,
            "token_dim": shape.width,
            "num_attention_heads": shape.heads,
            "num_layers": shape.layers * (2 if self._spread else 1),
            "num_transformer_submodules": 2 if self._spread else 1,
            "prefix_projection": spec.prefix_projection,
            "encoder_hidden_size": spec.encoder_hidden_size or shape.width,
        }


Prefix.makes = PrefixAdapter
