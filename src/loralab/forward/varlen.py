"""Attention over rows of unequal lengths in one call, without padding between them: torch's varlen_attn, which is flash
attention on CUDA."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from loralab.numerics.stacks import sent

DEVICES = {"cuda"}  # where it runs
DTYPES = {torch.bfloat16, torch.float16}
AMPERE = (8, 0)  # the first compute capability that flash attention is made for
WIDEST, UNIT = 256, 8  # of a head


@cache
def _kernel() -> Callable[..., Any] | None:
    """torch's function; None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def _arguments(kernel: Callable[..., Any]) -> frozenset[str]:
    """The names that it takes: earlier versions of torch say some of it otherwise."""
    return frozenset(inspect.signature(kernel).parameters)


def suits(config: Any, dtype: torch.dtype) -> bool:
    """Whether the attention of a causal base, computed in ``dtype``, can be made of it on this machine's card; where
    there is none, on one from Ampere on."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if _kernel() is None or dtype not in DTYPES or width % UNIT or width > WIDEST:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= AMPERE


def takes(query: Tensor) -> bool:
    """Whether it takes the tensors of a call."""
    return query.device.type in DEVICES and query.dtype in DTYPES


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float | None) -> Tensor:
    """Causal attention within each row: query (1, heads, tokens, width), key and value with as many heads or fewer, the
    rows of ``lengths`` tokens behind each other -> (1, tokens, heads, width)."""
    kernel = _kernel()
    assert kernel is not None
    known = _arguments(kernel)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    more: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "num_splits" in known:  # a row's bits do not depend on the rows beside it
        more["num_splits"] = 1
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in known:
            more["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    ends, longest = _ends(tuple(lengths), q.device), max(lengths)
    out: Tensor = kernel(q, k, v, ends, ends, longest, longest, scale=scaling, **more)
    return out[None]


@lru_cache(maxsize=64)  # all layers of a pass ask for the same ones
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """0 and where each row ends."""
    return sent(torch.tensor((0, *lengths)).cumsum(0).to(torch.int32), device)
