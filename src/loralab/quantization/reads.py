"""Layers whose weight the model multiplies itself without calling the layer, such as Mamba's ``dt_proj``.

They cannot be packed, because a packed layer has no dense weight, and an adapter on their output has no effect.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from loralab.errors import ConfigError

log = logging.getLogger(__name__)

KEY = "loralab_reads"
OWNER = "loralab_owner"  # attribute of a packed layer's ``weight``, a new tensor at each access: the layer
VALUES = frozenset({"T", "mT", "H", "mH", "data", "real"})  # attributes that are a weight's values; others describe it
DESCRIBING = frozenset(
    {
        *(
            "size",
            "dim",
            "numel",
            "nelement",
            "stride",
            "element_size",
            "is_floating_point",
            "is_complex",
            "get_device",
        ),
        *("is_contiguous", "type_as", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new"),
        *("empty_like", "zeros_like", "ones_like", "full_like", "__len__", "__hash__", "is_conj", "is_neg"),
    }
)


def read_weights(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """Names of those of ``layers`` whose weight a pass of two tokens uses outside of the layer; works on meta too.
    Where the pass fails, those found by then."""
    if KEY not in model.__dict__:
        model.__dict__[KEY] = _names_read(model, layers)
    return [name for name in layers if name in model.__dict__[KEY]]


def refuse_read(model: nn.Module, packed: dict[str, nn.Module]) -> None:
    """Raises ConfigError where a pass of the loaded model uses the weight of one of its ``packed`` layers."""
    names = sorted(_names_read(model, packed)) if packed else []
    if names:
        more = f" and {len(names) - 1} other layers" if len(names) > 1 else ""
        last = ",".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ConfigError(
            f"quantization: {type(model).__name__} reads the weight of {names[0]}{more} itself and does not call the "
            f"layer, so that it cannot be packed; valid: quantization.skip_modules=[{last}], or quantization=none"
        )


def _names_read(model: nn.Module, layers: dict[str, nn.Module]) -> frozenset[str]:
    """Names of those of ``layers`` whose weight a pass of two tokens reads from outside; none that a failed pass had
    not come to."""
    watch = _Watch(layers)
    training = model.training
    try:
        with torch.no_grad(), watch.calls(), watch:
            model.eval()(**_two_tokens(model))
    except Exception as error:
        log.debug("the pass that looks for weights read outside of their layer failed", exc_info=error)
    finally:
        model.train(training)
    return frozenset(watch.read)


def _two_tokens(model: nn.Module) -> dict[str, Any]:
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    config: Any = model.config
    more = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, **more}


class _Watch(TorchFunctionMode):
    """Collects in ``read`` the names of the layers whose weight a function takes outside of the layer's call."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers, self.read = layers, set[str]()
        self.names = {id(layer): name for name, layer in layers.items()}
        self.names |= {
            id(weight): name for name, layer in layers.items() if isinstance(weight := layer.weight, nn.Parameter)
        }
        self.within: list[str] = []  # layers that are being called

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Within, ``within`` has the names of the layers that are being called."""
        handles = []
        for name, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(lambda *_, n=name: self.within.append(n)))
            handles.append(layer.register_forward_hook(lambda *_: self.within.pop() and None, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _describes(func):
            for value in tree_leaves((args, kwargs or {})):
                owner = getattr(value, OWNER, value) if isinstance(value, Tensor) else None
                name = self.names.get(id(owner))
                if name is not None and name not in self.within:
                    self.read.add(name)
        return func(*args, **(kwargs or {}))


def _describes(func: Any) -> bool:
    """Whether a function only describes a tensor, such as its shape, and reads none of its values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in VALUES
    return name in DESCRIBING or name == "__set__"
