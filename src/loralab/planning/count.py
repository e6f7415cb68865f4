"""Exact parameter counts from shapes alone: the model is built on the meta device, no weight is read."""

from typing import Any

from loralab import models
from loralab.adapters.base import AdapterSpec
from loralab.quantization.base import Quantizer, linear_shape, quantizable

PEFT_SAVES = ("classifier", "score")  # what PEFT trains whole without being told (peft.tuners.lora, SEQ_CLS)


def count(
    model: models.Pretrained, quantization: Quantizer, adapter: AdapterSpec, num_labels: int | None = None
) -> dict[str, Any]:
    """{trainable_parameters, adapter_parameters, total_parameters, quantized_parameters, saved_modules}.

    ``adapter_parameters``: those trained, without modules that are trained whole, which ``saved_modules`` names with
    theirs. ``total_parameters``: of the base and what the adapter adds to it, shared tensors once, as PEFT counts.
    """
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
    saved = {name: sum(p.numel() for p in module.parameters()) for name, module in attached.saved_modules()}
    return {
        "trainable_parameters": trainable,
        "adapter_parameters": trainable - sum(saved.values()),
        "total_parameters": total if adapter.changes_base else total + attached.added_parameters(),
        "quantized_parameters": quantized,
        "saved_modules": saved,
    }


def render(counts: dict[str, Any], adapter: AdapterSpec) -> str:
    """The counts for a terminal, and where PEFT's of the same settings would be others."""
    numbers = {name: value for name, value in counts.items() if name != "saved_modules"}
    width = max(len(f"{value:,}") for value in numbers.values())
    lines = [f"{name:22} {value:>{width},}" for name, value in numbers.items()]
    for name, size in counts["saved_modules"].items():
        if getattr(adapter, "modules_to_save", None) is None and name not in PEFT_SAVES:
            lines.append(
                f"{name} ({size:,}) is new with this task and trained whole; PEFT leaves it as it is drawn unless its "
                "modules_to_save names it"
            )
    return "\n".join(lines)
