"""What a model does, asked of its graph and never of how near one loss is to another: who sees whom, and by which way.

A gradient that is not there is exactly zero, whatever the weights and the rounding.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.errors import ConfigError, is_out_of_memory
from loralab.unpadded import LENGTHS

log = logging.getLogger(__name__)

LOOKED_AT = 8  # tokens
CLOSE = 0.1  # of the deviation of a row's logits; those of bases that read padding differ by 0.3 and more
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


def reached(model: nn.Module, inputs: Mapping[str, Any], scored: slice, first: int = 0) -> Tensor | None:
    """(rows, T): how strongly the output at the positions ``scored`` of the rows from ``first`` on depends on each input
    token; exactly 0 where it does not. None where nobody can say: the model does not look its tokens up in its input
    embeddings once."""
    embedded: list[Tensor] = []

    def watch(_: nn.Module, __: Any, looked_up: Tensor) -> Tensor:
        embedded.append(looked_up.detach().requires_grad_())
        return embedded[-1].clone()  # some models change it in place

    handle = model.get_input_embeddings().register_forward_hook(watch)  # type: ignore[operator]
    try:
        with evaluated(model), torch.inference_mode(False), torch.enable_grad():
            given = {name: value if hasattr(value, LENGTHS) else value.clone() for name, value in inputs.items()}
            out = model(**given).logits[first:, scored]
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
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
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


def check_padding(model: nn.Module, task: str, batch_size: int) -> None:
    """Raises ConfigError for a base that reads the padding behind a row, or the rows beside it: what it computes would
    say more of the batch than of the row."""
    long, short = (_row(model, task, tokens) for tokens in (2 * LOOKED_AT, LOOKED_AT - 1))
    pad = int(model.config.pad_token_id or 0)  # type: ignore[union-attr,arg-type]
    padded = {name: F.pad(short[name], (0, LOOKED_AT + 1), value=fill) for name, fill in _fills(pad).items()}
    together = {name: torch.cat([long[name], padded.get(name, short[name])]) for name in long}
    try:
        with evaluated(model), torch.inference_mode(False), torch.no_grad():
            beside, alone = (model(**given).logits.float() for given in (together, short))
        own, spread = beside[1, : alone.shape[1]] if alone.dim() == 3 else beside[1], alone.std()
        reads = not bool(((own - alone[0]).abs() <= CLOSE * spread).all())
        if not reads:
            found = reached(model, together, slice(None), 1)
            reads = found is not None and bool(found[0].any() or found[1, LOOKED_AT - 1 :].any())
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        log.debug("whether padding is read", exc_info=error)
        return
    if reads:
        raise ConfigError(
            f"data.batch_size={batch_size}: {type(model).__name__} (model_type={model.config.model_type}) reads the "  # type: ignore[union-attr]
            "padding behind a row or the rows beside it, whatever its mask says, so that a row's loss would depend on "
            "its batch; valid: data.batch_size=1, rows of one length, or another base"
        )


def _fills(pad: int) -> dict[str, int]:
    return {"input_ids": pad, "attention_mask": 0}


def _row(model: nn.Module, task: str, tokens: int) -> dict[str, Tensor]:
    """A row of its own making: an ending where the base knows one (some classifiers look for it)."""
    config: Any = model.config
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.arange(3, 3 + tokens, device=next(model.parameters()).device)[None] % vocabulary
    if isinstance(config.eos_token_id, int):
        ids[ids == config.eos_token_id] = 2 + (config.eos_token_id == 2)
        ids[0, -1] = config.eos_token_id
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**row, "decoder_input_ids": ids[:, :4].clone()} if task == "seq2seq_lm" else row


@torch.no_grad()
def reads_positions(model: nn.Module, inputs: Mapping[str, Any], scored: slice) -> bool:
    """Whether other ``position_ids`` change what comes out at ``scored``."""
    others = inputs["position_ids"].clone()
    others[:, scored] = others[:, scored].flip(1)
    with evaluated(model):
        outs = [model(**{**inputs, "position_ids": ids}).logits[:, scored] for ids in (inputs["position_ids"], others)]
    return not torch.equal(*outs)
