"""No quantization: the layers stay as they are loaded."""

from torch import Tensor, nn

from loralab.errors import ConfigError
from loralab.quantization.base import Quantizer
from loralab.quantization.linear import FrozenLinear
from loralab.spec import spec


@spec("quantization")
class NoQuantization(Quantizer):
    """``convert`` freezes the layer itself and returns it."""

    packable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute_dtype != "auto":
            raise ConfigError(
                f"quantization.compute_dtype={self.compute_dtype} has no effect where nothing is quantized; valid: auto"
                " (model.dtype and trainer.precision set the dtype of dense layers)"
            )

    @property
    def name(self) -> str:
        return "none"

    def storage_bits(self, out_features: int, in_features: int) -> int:
        """Bits of a float32 weight; the real dtype is the checkpoint's, which ``measure`` counts."""
        return 32 * out_features * in_features

    def pack(self, weight: Tensor, bias: nn.Parameter | None) -> FrozenLinear:
        raise NotImplementedError("dense layers are not packed")

    def convert(self, linear: nn.Module, name: str = "the layer") -> nn.Module:
        return linear.requires_grad_(False)
