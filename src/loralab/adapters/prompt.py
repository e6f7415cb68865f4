"""Prompt tuning: trained embeddings before those of a row's tokens (Lester et al. 2021, arXiv:2104.08691)."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loralab.adapters import peft
from loralab.adapters.base import Adapter, AdapterSpec, Saved, freeze, generator_for, save_modules
from loralab.adapters.hooks import AdapterHooks
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
from loralab.quantization.sequences import KEY, Sequences
from loralab.spec import Count, Text, spec


@spec("adapter")
class Prompt(AdapterSpec):
    """``num_virtual_tokens`` embeddings before a row's; of an encoder-decoder before what the encoder reads.

    They stand at the row's first positions, so that an encoder's classifier, which looks at the first, looks at one of
    them (as in PEFT); a decoder's looks at the row's last token. ``prompt_tuning_init``: drawn (random), or the
    embeddings of ``prompt_tuning_init_text``, repeated or cut to their number.
    """

    packable: ClassVar[bool] = True
    size_field: ClassVar[str] = "num_virtual_tokens"
    unmergeable: ClassVar[str] = (
        "its embeddings stand before those of a row's tokens, as inputs that no weight of the base makes"
    )
    start_differs: ClassVar[str] = "every token attends to the prompt from the first step on"

    num_virtual_tokens: Count = 20
    prompt_tuning_init: Literal["random", "text"] = "random"
    prompt_tuning_init_text: Text | None = None
    modules_to_save: Saved = None

    def __post_init__(self) -> None:
        if (self.prompt_tuning_init == "text") != bool(self.prompt_tuning_init_text):
            raise ConfigError(
                f"adapter.prompt_tuning_init={self.prompt_tuning_init} and adapter.prompt_tuning_init_text="
                f"{self.prompt_tuning_init_text!r} do not go together; valid: text with a text, random with null"
            )

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def attach(self, model: nn.Module, seed: int = 0) -> Adapter:
        freeze(model)
        coded = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
        stack: nn.Module = model.get_encoder() if coded else stack_of(self, model)  # type: ignore[operator]
        self._check(model, stack)
        adapter = self.makes(model, self)
        prompt = PromptEmbeddings(self.num_virtual_tokens, model, _looks_back(model))
        self._draw(prompt, model, seed)
        adapter.add(name_of(model, stack), prompt)
        if coded:
            adapter.add(name_of(model, stack_of(self, model)), Crossed(self.num_virtual_tokens, model))
        save_modules(adapter, model, self.modules_to_save, seed)
        name_unlike_peft(self, model)
        return adapter

    def _check(self, model: nn.Module, stack: nn.Module) -> None:
        """Raises ConfigError for a base that has no place for a prompt."""
        config: Any = model.config
        if not takes(stack, "inputs_embeds"):
            raise refuse(self, model, "takes no inputs_embeds, so that there is no place for a prompt")
        classifies = peft.task_type(model) == "SEQ_CLS"
        if any(takes(stack, own) for own in ("cache_params", "state")) or (takes(stack, "langs") and not classifies):
            raise refuse(self, model, "generates in steps of its own kind, which would each begin with the prompt")
        if "hash_moe" in (getattr(config, "mlp_layer_types", None) or ()):
            raise refuse(self, model, "chooses experts by token ids, which a prompt has none of")
        pooled = getattr(config, "classifier_pooling", None) in ("mean", "late")
        if classifies and (pooled or hasattr(config, "attention_window")):
            raise refuse(self, model, "holds its mask against the states of all positions, a prompt's too")

    def _draw(self, prompt: "PromptEmbeddings", model: Any, seed: int) -> None:
        if prompt.embedding.is_meta:
            return
        with torch.no_grad():
            if self.prompt_tuning_init_text is None:
                drawn = torch.randn(prompt.embedding.shape, generator=generator_for(seed, "prompt"))  # PEFT's draw
            else:
                ids = self._text_ids(AdapterHooks.of(model).tokenizer)
                drawn = model.get_input_embeddings()(ids.to(prompt.embedding.device))
            prompt.embedding.copy_(drawn)

    def _text_ids(self, tokenizer: Any) -> Tensor:
        """As many token ids of the text as there are virtual tokens; without those that frame a text."""
        if tokenizer is None:
            raise ConfigError(
                "adapter.prompt_tuning_init=text: the base was loaded without a tokenizer; valid: random, or a base "
                "with one"
            )
        ids = tokenizer(self.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(
                f"adapter.prompt_tuning_init_text={self.prompt_tuning_init_text!r} has no token; valid: some words"
            )
        return torch.tensor((ids * self.num_virtual_tokens)[: self.num_virtual_tokens])


def _looks_back(model: nn.Module) -> bool:
    """Whether what stands above the stack finds its tokens by the positions of ``input_ids``: a language model's head
    all of them, a decoder's classifier the last one (its source then names the padding)."""
    if peft.task_type(model) != "SEQ_CLS":
        return True
    return "pad_token_id" in inspect.getsource(type(model).forward)


class PromptEmbeddings(Virtual):
    """The prompt of one trial: n embeddings."""

    def __init__(self, size: int, model: Any, cut: bool) -> None:
        """``cut``: the states of the prompt are left out of what the stack gives."""
        super().__init__()
        weight = model.get_input_embeddings().weight
        self.embedding = nn.Parameter(torch.empty(size, weight.shape[1], device=weight.device))
        self.size, self.cut = size, cut and not model.config.is_encoder_decoder
        self.sequences: Sequences | None = model.__dict__.get(KEY)

    def forward(self) -> Tensor:  # (n, width)
        return self.embedding

    @staticmethod
    def forward_grouped(shares: Sequence[Share], dtype: torch.dtype) -> Tensor:
        """The prompts of all rows of several trials, (rows, n, width)."""
        parts = [share.tokens().to(dtype)[None].expand(share.rows, -1, -1) for share in shares]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def enter(stack: nn.Module, named: dict[str, Any], shares: Sequence[Share]) -> dict[str, Any]:
        """Embeddings in place of ids, the prompts in front; later steps of a generation find them in the cache."""
        first = cast(PromptEmbeddings, shares[0].tokens)
        size, past = first.size, named.get("past_key_values")
        given = {**named, "attention_mask": widened(named.get("attention_mask"), size)}
        if past is not None and past.get_seq_length():
            return _moved(given, size)
        embedded = _embedded(stack, named)
        prompts = PromptEmbeddings.forward_grouped(shares, embedded.dtype)
        given.update(input_ids=None, inputs_embeds=torch.cat([prompts, embedded], 1))
        if named.get("token_type_ids") is not None:
            given["token_type_ids"] = pad(named["token_type_ids"], (size, 0))
        if first.sequences is not None:
            given = _apart(given, first.sequences)
            first.sequences.encode(stack, (), given)
        return _moved(given, size, front=True)

    def leave(self, stack: nn.Module, named: Mapping[str, Any], out: Any) -> Any:
        if not self.cut or named.get("input_ids") is not None:
            return out
        if isinstance(out, tuple):
            return (out[0][:, self.size :], *out[1:])
        out.last_hidden_state = out.last_hidden_state[:, self.size :]
        return out


class Crossed(Virtual):
    """What the decoder behind an encoder with a prompt is told: its mask covers the prompt's states too."""

    def __init__(self, size: int, model: Any) -> None:
        super().__init__()
        self.size = size
        self.sequences: Sequences | None = model.__dict__.get(KEY)

    @staticmethod
    def enter(stack: nn.Module, named: dict[str, Any], shares: Sequence[Share]) -> dict[str, Any]:
        first, states = cast(Crossed, shares[0].tokens), named.get("encoder_hidden_states")
        mask = widened(named.get("encoder_attention_mask"), first.size)
        if mask is None or states is None:
            return named
        mask = pad(mask, (0, states.shape[1] - mask.shape[1]))
        if first.sequences is not None:
            first.sequences.encode(stack, (), {"inputs_embeds": states, "attention_mask": mask})
        return {**named, "encoder_attention_mask": mask}


def _embedded(stack: Any, named: Mapping[str, Any]) -> Tensor:
    given = named.get("inputs_embeds")
    found: Tensor = stack.get_input_embeddings()(named["input_ids"]) if given is None else given
    return found


def _moved(given: dict[str, Any], size: int, front: bool = False) -> dict[str, Any]:
    """With the positions of the tokens behind those of the prompt; ``front``: which are in this call."""
    positions = given.get("position_ids")
    if positions is None:
        return given
    own = torch.arange(size, device=positions.device).expand(len(positions), -1)
    return {**given, "position_ids": torch.cat([own, positions + size], 1) if front else positions + size}


def _apart(given: dict[str, Any], sequences: Sequences) -> dict[str, Any]:
    """With one more column of padding, where encoder and decoder would be of one width."""
    states, mask = given["inputs_embeds"], given["attention_mask"]
    if mask is None or not sequences.knows(tuple(states.shape[:2])):
        return given
    return {**given, "inputs_embeds": pad(states, (0, 0, 0, 1)), "attention_mask": pad(mask, (0, 1))}


class PromptAdapter(VirtualAdapter):
    """PEFT's files."""

    def export(self, folder: Path) -> None:
        super().export(folder)

    def restore(self, folder: Path) -> None:
        super().restore(folder)

    def take(self, embeddings: Tensor) -> None:
        cast(PromptEmbeddings, self.virtual[1]).embedding.copy_(embeddings)

    def peft_fields(self) -> dict[str, Any]:
        config: Any = self._model[0].config.get_text_config()  # type: ignore[union-attr, operator]
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.spec.virtual_tokens,
            "token_dim": self.embeddings().shape[1],
            "num_attention_heads": getattr(config, "num_attention_heads", None) or 1,
            "num_layers": getattr(config, "num_hidden_layers", None) or 1,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",  # the file holds the values; a text would be tokenized again
        }


Prompt.makes = PromptAdapter
