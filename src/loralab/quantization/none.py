"""No quantization: the layers stay as they are loaded."""

from torch import Tensor, nn

from loralab.errors import ConfigError
from loralab.quantization.base import Quantizer
from loralab.quantization.linear import FrozenLinear
from loralab.spec import spec


@spec("quantization")
class NoQuantization(Quantizer):
    """``convert`` freezes the layer and hands it back."""

    packable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute_dtype != "auto":
            raise ConfigError(
                f"quantization.compute_dtype = {self.compute_dtype!r} has no effect where nothing is"
                f" quantized; valid: auto"
                " (model.dtype and trainer.precision set the dtype of dense layers)"
            )

    @property
    def name(self) -> str:
        return "none"

    def storage_bits(self, out_features: int, in_features: int) -> int:
        """Of a float32 weight; the real dtype is the checkpoint's and is measured."""
        return 32 * out_features * in_features

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        raise NotImplementedError("dense layers are not packed")

    def convert(self, linear: nn.Module, name: str = "the layer") -> nn.Module:
        return linear.requires_grad_(False)
