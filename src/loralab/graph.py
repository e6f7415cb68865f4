"""What a model does, asked of its graph and never of how near one loss is to another: who sees whom, and by which way.

A gradient that is not there is exactly zero, whatever the weights and the rounding.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loralab.errors import ConfigError

log = logging.getLogger(__name__)

LOOKED_AT = 8  # tokens
# what decides it, as configs call it
CAUSAL_KEYS = {"is_decoder": True, "causal": True, "is_causal": True, "use_bidirectional_attention": False}


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The base in evaluation mode, put back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def reached(model: nn.Module, inputs: Mapping[str, Any], scored: slice) -> Tensor | None:
    """(rows, T): how strongly the output at the positions ``scored`` depends on each input token; exactly 0 where it
    does not. None where nobody can say: the model does not look its tokens up in its input embeddings."""
    embedded: list[Tensor] = []

    def watch(_: nn.Module, __: Any, looked_up: Tensor) -> Tensor:
        embedded.append(looked_up.detach().requires_grad_())
        return embedded[-1].clone()  # some models change it in place

    handle = model.get_input_embeddings().register_forward_hook(watch)  # type: ignore[operator]
    try:
        with evaluated(model), torch.enable_grad():
            out = model(**inputs).logits[:, scored]
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
            found = torch.autograd.grad((out * weights).sum(), embedded, allow_unused=True) if embedded else []
    finally:
        handle.remove()
    if len(found) != 1 or embedded[0].dim() != 3:
        return None
    return torch.zeros_like(embedded[0][..., 0]) if found[0] is None else found[0].abs().amax(-1)


def check_causal(model: nn.Module) -> None:
    """Raises ConfigError for a base whose logits at a token depend on later ones: trained as a causal language model it
    would be told what it has to predict."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    device = next(model.parameters()).device
    ids = torch.arange(2, 2 + LOOKED_AT, device=device)[None] % vocabulary
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = reached(model, given, slice(0, LOOKED_AT // 2))
    if found is None or not bool((found[:, LOOKED_AT // 2 :] != 0).any()):
        return
    config: Any = model.config
    keys = [f"{key}={getattr(config, key)}" for key in CAUSAL_KEYS if hasattr(config, key)]
    wanted = [f"{key}: {str(CAUSAL_KEYS[key]).lower()}" for key in CAUSAL_KEYS if hasattr(config, key)][:1]
    raise ConfigError(
        f"model.task=causal_lm: {type(model).__name__} ({', '.join([f'model_type={config.model_type}', *keys])}) sees "
        "the tokens that come later, so that it would be told what it has to predict; valid: a decoder"
        f"{''.join(f', {one} in its config' for one in wanted)}, or model.task=sequence_classification"
    )


@torch.no_grad()
def reads_positions(model: nn.Module, inputs: Mapping[str, Any], scored: slice) -> bool:
    """Whether other ``position_ids`` change what comes out at ``scored``."""
    others = inputs["position_ids"].clone()
    others[:, scored] = others[:, scored].flip(1)
    with evaluated(model):
        outs = [model(**{**inputs, "position_ids": ids}).logits[:, scored] for ids in (inputs["position_ids"], others)]
    return not torch.equal(*outs)


@torch.no_grad()
def check_padding(model: nn.Module, task: str, exact: bool) -> None:
    """Raises ConfigError for a base that gives a row other logits where it is padded on the right, as rows of unequal
    lengths are: its losses would depend on the batch size. ``exact``: nothing is quantized or of half precision."""
    config: Any = model.config
    padding = 0 if config.pad_token_id is None or config.pad_token_id < 0 else int(config.pad_token_id)
    ids = torch.arange(padding + 1, padding + 1 + LOOKED_AT, device=next(model.parameters()).device)[None]
    ids = ids % model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {"input_ids": pad(ids, (0, 4), value=padding), "attention_mask": pad(torch.ones_like(ids), (0, 4))}
    if task == "seq2seq_lm":
        alone["decoder_input_ids"] = ids[:, :-2]
        padded["decoder_input_ids"] = pad(ids[:, :-2], (0, 4), value=padding)
    try:
        with evaluated(model):
            right, found = model(**alone).logits.float(), model(**padded).logits.float()
    except (RuntimeError, ValueError, IndexError, ConfigError) as error:
        log.debug("no padded pass", exc_info=error)
        return
    off = float((found[:, : right.shape[1]] - right).abs().max() / right.std())
    if off > (0.02 if exact else 0.5):
        raise ConfigError(
            f"model.task={task}: {type(model).__name__} (model_type={config.model_type}) gives a row other logits "
            f"where it is padded (by {off:.2g} of their deviation), so that its losses would depend on the rows beside "
            "it; valid: a model that leaves padding on the right out"
        )
