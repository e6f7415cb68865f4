"""Exact parameter counts from shapes alone: the model is built on the meta device, no weight is read."""

from loralab import models
from loralab.adapters.base import AdapterSpec
from loralab.quantization.base import Quantizer, linear_shape, quantizable


def count(
    model: models.Pretrained, quantization: Quantizer, adapter: AdapterSpec, num_labels: int | None = None
) -> dict[str, int]:
    """{trainable_parameters, total_parameters, quantized_parameters}; total counts the adapter, shared tensors once."""
    base = models.skeleton(model, num_labels)
    names = [] if quantization.name == "none" else quantizable(base, quantization)
    quantized = 0
    for name in names:
        out_features, in_features = linear_shape(base.get_submodule(name))
        quantization.check(name, out_features, in_features)
        quantized += out_features * in_features
    total = sum(parameter.numel() for parameter in base.parameters())
    attached = adapter.attach(base)
    trainable = attached.trainable_parameters()
    return {
        "trainable_parameters": trainable,
        "total_parameters": total if adapter.changes_base else total + trainable,
        "quantized_parameters": quantized,
    }
