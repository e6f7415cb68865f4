"""Contexts for a trace with fake tensors; nothing outside of them is changed."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import transformers.masking_utils
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from loralab.adapters import dropout, fused
from loralab.optim import packed
from loralab.planning.attention import kernels
from loralab.planning.experts import grouped_products
from loralab.training import passes


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, torch does not log a traceback for each operator without a fake kernel, and adapters do not repeat their
    warnings."""
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
def faked(cuda: bool, padded: bool = False) -> Iterator[None]:
    """Inside, torch and transformers work with fake tensors; random state and kernels are restored at the end.
    ``padded``: whether passes have padding, which no value of theirs says."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(kernels(cuda))
        stack.enter_context(grouped_products())
        if cuda:  # what a pack does there
            stack.enter_context(patch.object(fused, "TOGETHER", {"cpu"}))
            stack.enter_context(patch.object(dropout, "COUNTED", {"cpu"}))
            stack.enter_context(patch.object(packed, "DEVICES", {"cpu"}))
            stack.enter_context(patch.object(passes, "MULTIPLES", {"cpu": passes.MULTIPLES["cuda"]}))
            stack.enter_context(patch.object(passes, "has_padding", lambda _: padded))
        else:
            for name, update in updates_of_a_cpu().items():
                stack.enter_context(patch.object(torch.ops.bitsandbytes, name, update))
        # else transformers keeps every attention mask; so it asks the tracker whether anything is masked
        stack.enter_context(patch.object(transformers.masking_utils, "is_tracing", lambda *_: False))
        # modules convert parameters by swap_tensors, which fails for tensors with weak references
        stack.enter_context(patch.object(torch.utils, "swap_tensors", _swap))
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", _copied))
        yield


def updates_of_a_cpu() -> dict[str, Any]:
    """bitsandbytes' updates on a CPU by the names of their operators: each makes tensors as large as the parameter.
    Empty where bitsandbytes is not imported, and so makes none."""
    ops = sys.modules.get("bitsandbytes.backends.cpu.ops")
    kernels = {f"optimizer_update_{kind}": f"_optimizer_update_{kind}_cpu" for kind in ("32bit", "8bit_blockwise")}
    return {name: getattr(ops, kernel) for name, kernel in kernels.items() if hasattr(ops, kernel)}


def _swap(parameter: Tensor, converted: Tensor) -> None:
    if parameter.dtype != converted.dtype:
        parameter.data = converted.detach()


def _copied(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """Instead of torch's, which copies the FakeTensorMode too; the garbage collector crashes on that copy."""
    copied = tensor.detach().clone()
    memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return memo[id(tensor)]  # type: ignore[no-any-return]


def precision(name: str) -> Precision:
    """Lightning's own plugin; 16-mixed keeps as many bytes as bf16-mixed."""
    if name.endswith("-mixed"):
        return MixedPrecision("bf16-mixed", "cpu")
    return HalfPrecision("bf16-true") if name == "bf16-true" else Precision()
