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
from loralab.forward.unpadded import LENGTHS

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


def reached(model: nn.Module, inputs: Mapping[str, Any], scored: slice, first: int = 0) -> list[Tensor]:
    """(rows, T) of each call of the input embeddings, one but for an encoder with a decoder: how strongly the output at
    the positions ``scored`` of the rows from ``first`` on depends on each token; exactly 0 where it does not.

    Empty where nobody can say: the model looks its tokens up in another way, or has no gradient."""
    embedded: list[Tensor] = []

    def watch(_: nn.Module, __: Any, looked_up: Any) -> Any:
        if not isinstance(looked_up, Tensor):  # I-BERT's come with their scale
            return looked_up
        embedded.append(looked_up.detach().requires_grad_())
        return embedded[-1].clone()  # some models change it in place

    try:
        handle = model.get_input_embeddings().register_forward_hook(watch)  # type: ignore[operator]
    except NotImplementedError:  # CANINE hashes characters
        return []
    try:
        with evaluated(model), torch.inference_mode(False), torch.enable_grad():
            own_inputs = {name: value if hasattr(value, LENGTHS) else value.clone() for name, value in inputs.items()}
            out = model(**own_inputs).logits[first:, scored]
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
            gradients = torch.autograd.grad((out * weights).sum(), embedded, allow_unused=True) if embedded else []
    except (AssertionError, NotImplementedError):  # Reformer has no gradient in evaluation mode
        return []
    finally:
        handle.remove()
    if any(embeddings.dim() != 3 for embeddings in embedded):
        return []
    pairs = zip(embedded, gradients, strict=True)
    return [torch.zeros_like(x[..., 0]) if grad is None else grad.abs().amax(-1) for x, grad in pairs]


def check_causal(model: nn.Module) -> None:
    """Raises ConfigError for a base whose logits at a token depend on later ones: trained as a causal language model it
    would be told what it has to predict."""
    ids = _tokens(model, LOOKED_AT)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dependences = reached(model, inputs, slice(0, LOOKED_AT // 2))
    if len(dependences) != 1:
        later = _logits_differ(
            *(_first_half(model, {**inputs, "input_ids": tokens}) for tokens in (ids, _changed(ids)))
        )
    else:
        later = bool((dependences[0][:, LOOKED_AT // 2 :] != 0).any())
    if not later:
        return
    config: Any = model.config
    keys = [f"{key}={getattr(config, key)}" for key in CAUSAL_KEYS if hasattr(config, key)]
    wanted = [f"{key}: {str(CAUSAL_KEYS[key]).lower()}" for key in CAUSAL_KEYS if hasattr(config, key)][:1]
    raise ConfigError(
        f"model.task=causal_lm: {type(model).__name__} ({', '.join([f'model_type={config.model_type}', *keys])}) sees "
        "the tokens that come later, so that it would be told what it has to predict; valid: a decoder"
        f"{''.join(f', {key} in its config' for key in wanted)}, or model.task=sequence_classification"
    )


@torch.no_grad()
def _first_half(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    with evaluated(model), torch.inference_mode(False):
        logits: Tensor = model(**given).logits
        return logits[0, : LOOKED_AT // 2]


def _changed(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, : LOOKED_AT // 2], ids[:, : LOOKED_AT // 2]], 1)


def check_padding(model: nn.Module, task: str, batch_size: int) -> None:
    """Raises ConfigError for a base that reads the padding behind a row, or the rows beside it: what it computes would
    say more of the batch than of the row."""
    long, short = _row(model, task, 2 * LOOKED_AT, 6), _row(model, task, LOOKED_AT - 1, 4)
    if _reads_padding(model, long, short):
        config: Any = model.config
        raise ConfigError(
            f"data.batch_size={batch_size}: {type(model).__name__} (model_type={config.model_type}) computes a row "
            "otherwise where it is padded or beside other rows, whatever the mask says, so that its loss would depend "
            "on its batch; valid: data.batch_size=1, rows of one length, or another base"
        )


def _reads_padding(model: nn.Module, long: Mapping[str, Tensor], short: Mapping[str, Tensor]) -> bool:
    """Whether ``short``, padded beside ``long``, depends on anything but itself, or where the graph says nothing of it,
    comes out otherwise than alone."""
    pad = max(0, int(model.config.pad_token_id or 0))  # type: ignore[union-attr,arg-type]
    together = {}
    for name, tensor in short.items():
        behind = (0, long[name].shape[1] - tensor.shape[1])
        together[name] = torch.cat([long[name], F.pad(tensor, behind, value=0 if name == "attention_mask" else pad)])
    try:
        with evaluated(model), torch.inference_mode(False), torch.no_grad():
            beside, alone = (model(**given).logits for given in (together, short))
        dependences = reached(model, together, slice(alone.shape[1] if alone.dim() == 3 else None), 1)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        log.debug("whether padding is read", exc_info=error)
        return False
    real = {long[name].shape[1]: tensor.shape[1] for name, tensor in short.items()}
    depends = any(
        bool(one[0].any()) or bool(one[1, real.get(one.shape[1], one.shape[1]) :].any()) for one in dependences
    )
    return depends or _logits_differ(beside[1, : alone.shape[1]] if alone.dim() == 3 else beside[1], alone[0])


def _logits_differ(logits: Tensor, other: Tensor) -> bool:
    """Whether logits differ by more than rounding; bases that read padding differ by 0.3 of their size."""
    allowed = 1e-3 if logits.element_size() >= 4 else 0.1
    largest = (logits.float() - other.float()).abs().max()
    return not bool(largest <= allowed * other.float().square().mean().sqrt())  # a single logit has no deviation


def _tokens(model: nn.Module, count: int) -> Tensor:
    """(1, count) some ids."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", None) or 64)  # type: ignore[union-attr, operator]
    return torch.arange(2, 2 + count, device=next(model.parameters()).device)[None] % vocabulary


def _row(model: nn.Module, task: str, count: int, decoded: int) -> dict[str, Tensor]:
    """One row, its end marked where the base knows an end: some classifiers look for it."""
    ids, end = _tokens(model, count), getattr(model.config, "eos_token_id", None)
    if isinstance(end, int):
        ids[ids == end] = 0 if end else 1
        ids[0, -1] = end
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**row, "decoder_input_ids": ids[:, :decoded].clone()} if task == "seq2seq_lm" else row


@torch.no_grad()
def reads_positions(model: nn.Module, inputs: Mapping[str, Any], scored: slice) -> bool:
    """Whether other ``position_ids`` change what comes out at ``scored``."""
    others = inputs["position_ids"].clone()
    others[:, scored] = others[:, scored].flip(1)
    with evaluated(model):
        outs = [model(**{**inputs, "position_ids": ids}).logits[:, scored] for ids in (inputs["position_ids"], others)]
    return not torch.equal(*outs)
