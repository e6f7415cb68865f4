"""Exact parameter counts from shapes alone: the model is built on the meta device, no weight is read."""

import logging

from torch import nn

from loralab.adapters.attached import check_parameters
from loralab.adapters.base import Adapter, AdapterSpec
from loralab.adapters.biases import BiasDelta
from loralab.models import loading, pretrained
from loralab.quantization.base import Quantizer, linear_shape, out_of_reach_weights, quantizable, warn_out_of_reach

log = logging.getLogger(__name__)

PEFT_HEADS = ("classifier", "score")  # endings of the modules that PEFT trains whole with task_type SEQ_CLS


def count(
    model: pretrained.Pretrained, quantization: Quantizer, adapter: AdapterSpec, num_labels: int | None = None
) -> dict[str, int]:
    """{trainable_parameters, adapter_parameters, total_parameters, quantized_parameters}. Raises ConfigError.

    ``adapter_parameters`` leaves out new and saved modules. The total includes the adapter; it counts shared tensors
    once, and a trained bias and the base's bias that it replaces once.
    """
    base = loading.skeleton(model, num_labels)
    names = [] if quantization.name == "none" else quantizable(base, quantization)
    quantized = 0
    for name in names:
        out_features, in_features = linear_shape(base.get_submodule(name))
        quantization.check(name, out_features, in_features)
        quantized += out_features * in_features
    total = sum(parameter.numel() for parameter in base.parameters())
    attached = adapter.attach(base)
    check_parameters(attached, base)
    trainable = attached.trainable_parameters()
    added = trainable - sum(_size(delta) for _, delta in attached.adapted() if isinstance(delta, BiasDelta))
    warn_out_of_reach(out_of_reach_weights(base), total)
    _name_unlike_peft(attached)
    return {
        "trainable_parameters": trainable,
        "adapter_parameters": adapter_parameters(attached),
        "total_parameters": total if adapter.changes_base else total + added,
        "quantized_parameters": quantized,
    }


def adapter_parameters(adapter: Adapter) -> int:
    """Numbers that ``adapter`` trains, new and saved modules left out."""
    return adapter.trainable_parameters() - sum(_size(module) for _, module in adapter.saved_modules())


def _name_unlike_peft(adapter: Adapter) -> None:
    """Warns of new modules that PEFT would leave untrained: it recognises heads by two names."""
    if getattr(adapter.spec, "modules_to_save", None) is not None:
        return
    saved = dict(adapter.saved_modules())
    frozen = [name for name in saved if not name.endswith(PEFT_HEADS)]
    if frozen:
        log.warning(
            "%s: no checkpoint of the base holds it, so it is drawn and trained whole; PEFT by default leaves it as it "
            "was drawn and trains %s parameters fewer, as adapter.modules_to_save=[%s] does",
            *(", ".join(frozen), f"{sum(_size(saved[name]) for name in frozen):,}"),
            ",".join(name for name in saved if name not in frozen),
        )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
