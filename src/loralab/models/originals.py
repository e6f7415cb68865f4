"""The weights of quantized layers as they were before, read again from the checkpoint's files, one at a time."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from loralab.errors import ConfigError
from loralab.models import weights
from loralab.quantization.linear import FrozenLinear


class TensorFiles:
    """The tensors of a checkpoint's *.safetensors by name. Nothing is read before one is asked for."""

    def __init__(self, what: str, path: str) -> None:
        """``what``: the base in errors; ``path``: its folder or hub id."""
        self.what, self.path = what, path

    @cached_property
    def places(self) -> dict[str, Any]:
        """{name of a tensor: the open file that holds it}. Raises ConfigError for files of another format."""
        from safetensors import safe_open

        files = weights.weight_files(self.path)
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise ConfigError(f"{self.what}: its weights are read one by one from *.safetensors alone")
        opened: list[Any] = [safe_open(file, "pt") for file in files]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - it is no mapping

    def read(self, name: str) -> Tensor:
        """One tensor, on the host."""
        tensor: Tensor = self.places[name].get_tensor(name)
        return tensor


def stored_weights(what: str, path: str, model: nn.Module, names: list[str]) -> Iterator[Tensor]:
    """The weights (out, in) of the quantized layers ``names`` of ``model``, each read when it is asked for, in the
    dtype that was quantized. Raises ConfigError for a layer whose weight is no tensor of the checkpoint ``path``."""
    files = TensorFiles(what, path)
    for name in names:
        layer: Any = model.get_submodule(name)
        assert isinstance(layer, FrozenLinear)
        if layer.stored_key is None:
            raise ConfigError(
                f"{what}: the weight of {name} before quantization is no tensor of the checkpoint, which holds it "
                "quantized, or fused with others; valid: adapter.target_modules without it, or a dense checkpoint"
            )
        weight = files.read(layer.stored_key).to(layer.dense_dtype)
        yield weight.t() if layer.transposed else weight
