"""The blocks of a base compiled by torch.compile, each as one graph, for as long as trials train on it.

A block is compiled in place (its ``_compiled_call_impl``), so that no module and no name in a state dict changes. Each
has a code object of its own, and with it its own compiled forms: in one cache for all of them a look-up would try every
block's conditions, and torch gives up after a few forms of one function. Rows are padded to multiples of ``MULTIPLE``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from loralab.adapters.blocks import stacks
from loralab.errors import ConfigError

BACKEND = "inductor"
MULTIPLE = 64  # tokens
MODES = {"blocks": None, "graphs": "reduce-overhead"}  # of torch.compile
NONE = "valid: model.compile=none"
LONGEST_REASON = 300  # characters of torch's own words


def check(how: str, device: str) -> None:
    """Raises ConfigError for CUDA graphs without a CUDA device."""
    if how == "graphs" and device == "cpu":
        raise ConfigError(
            "model.compile=graphs records CUDA graphs, and this run is on the CPU; valid: model.compile=blocks, or none"
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is compiled. Raises ConfigError for a base that is no stack of blocks."""
    found = [block for layers in stacks(model) for block in layers]
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"model.compile: {type(model).__name__} is no stack of blocks, each a module; {NONE}")
    return found


def switch_on(model: nn.Module, how: str) -> None:
    """From now on the blocks of ``model`` are called as torch.compile makes them: by the second pass and later ones."""
    for block in blocks(model):
        block._compiled_call_impl = torch.compile(_call_of(block), fullgraph=True, backend=BACKEND, mode=MODES[how])


def switch_off(model: nn.Module) -> None:
    """The blocks are their own again, and what was compiled for them is freed."""
    for module in model.modules():
        module._compiled_call_impl = None


@contextmanager
def eager(some: Sequence[nn.Module]) -> Iterator[None]:
    """Within, these blocks are their own: for passes that are looked into, cut short, or computed in another way."""
    before = [block._compiled_call_impl for block in some]
    for block in some:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, compiled in zip(some, before, strict=True):
            block._compiled_call_impl = compiled


def _call_of(block: nn.Module) -> Callable[..., Any]:
    """A function with a code object of its own that calls ``block``."""

    def call(*args: Any, **named: Any) -> Any:
        return block._call_impl(*args, **named)  # type: ignore[no-untyped-call]

    own = call.__code__.replace(co_name=f"block_{id(block)}")
    return FunctionType(own, globals(), own.co_name, None, call.__closure__)


def width(length: int, room: int | None) -> int:
    """Tokens that a row of ``length`` is padded to: a multiple of MULTIPLE, at most ``room``; None: no bound."""
    whole = -(-length // MULTIPLE) * MULTIPLE
    return max(length, min(whole, room or whole))


@contextmanager
def explained(how: str, adapters: str, quantizer: str) -> Iterator[None]:
    """Raises ConfigError in place of what torch.compile says of a graph that it cannot make whole or build.

    ``adapters``, ``quantizer``: names of what acts in a block.
    """
    if how == "none":
        yield
        return
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # a second, where nothing is compiled

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        raise ConfigError(_paragraph(error, how, adapters, quantizer)) from error


def _paragraph(error: Exception, how: str, adapters: str, quantizer: str) -> str:
    text = " ".join(str(error).split())
    if "CxxCompiler" in text or "C compiler" in text:
        return f"model.compile={how} needs a C++ compiler, and torch finds none that works (g++, or CXX); {NONE}"
    what = f"model.compile={how}: a block with adapter={adapters} over quantization={quantizer}"
    if "recompile_limit" in text or "recompile limit" in text:
        return f"{what} would have to be compiled again and again, for ever new passes: {_short(text)}; {NONE}"
    return f"{what} cannot be compiled as one graph: {_short(text)}; {NONE}"


def _short(text: str) -> str:
    """The first sentences of torch's reason."""
    reason = text.split("Developer debug context")[0].split(" Hint:")[0].strip()
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
