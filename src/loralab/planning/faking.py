"""Fake tensors among real code: nothing outside a trace may notice that one was made."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import transformers.masking_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from loralab.planning.attention import kernels
from loralab.planning.experts import grouped_products


@contextmanager
def quiet() -> Iterator[None]:
    """torch logs a traceback for every operator that fake tensors cannot have; adapters say at a real start what they
    would say here."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "loralab.adapters")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def faked(cuda: bool) -> Iterator[None]:
    """Nothing outside may notice: not the random state, not the kernels, not what transformers does while tracing."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(kernels(cuda))
        stack.enter_context(grouped_products())
        # transformers keeps the attention mask of a fake batch whatever is in it; let it ask the tracker
        stack.enter_context(patch.object(transformers.masking_utils, "is_tracing", lambda *_: False))
        # modules convert fake parameters by swapping them, which a weak reference forbids
        stack.enter_context(patch.object(torch.utils, "swap_tensors", _swap))
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", _copied))
        yield


def _swap(parameter: Tensor, converted: Tensor) -> None:
    if parameter.dtype != converted.dtype:
        parameter.data = converted.detach()


def _copied(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """torch's own copies the tensor's FakeTensorMode too, and the garbage collector crashes on what that leaves."""
    copied = tensor.detach().clone()
    memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return memo[id(tensor)]  # type: ignore[no-any-return]
