"""A base model from its spec: loaded or drawn, quantized, frozen; or its shapes alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loralab.adapters.hooks import AdapterHooks
from loralab.errors import ConfigError
from loralab.forward.dropout import key_dropout
from loralab.forward.prefix import States
from loralab.forward.unpadded import NAME as ROWS
from loralab.models import architecture, weights
from loralab.models.architecture import auto_class
from loralab.models.pretrained import Pretrained, Random
from loralab.models.tokenizer import check_vocabulary
from loralab.models.weights import explained
from loralab.quantization import gemm
from loralab.quantization.base import BaseSize, Quantizer, measure, warn_out_of_reach
from loralab.quantization.linear import dequantized
from loralab.records import fingerprints


@dataclass
class Base:
    """A frozen base model, ready for adapters; trials that agree on it share it."""

    spec: Pretrained
    quantizer: Quantizer
    model: nn.Module
    tokenizer: Any
    size: BaseSize
    fingerprint: str | None  # of the spec; None where it could not be taken
    prefix_states: States = field(default_factory=States)  # what one pack leaves for the next
    unmixed: set[str] = field(default_factory=set)  # trials whose losses were seen not to depend on rows beside theirs

    @property
    def hooks(self) -> AdapterHooks:
        """The hooks of the adapters attached to the model."""
        return AdapterHooks.of(self.model)

    @property
    def dequantize(self) -> str:
        """How its quantized layers dequantize: resident or per_use."""
        return dequantized(self.model) or "per_use"

    def record(self) -> dict[str, Any]:
        """The ``base`` part of a run record."""
        attention = getattr(self.model.config, "_attn_implementation", None)
        return {
            "name": self.spec.name_or_path or "random",
            "fingerprint": self.fingerprint,
            "parameters": self.size.parameters,
            "quantized_parameters": self.size.quantized_parameters,
            "bytes": self.size.bytes,
            "bits_per_parameter": self.size.bits_per_parameter,
            "attn_implementation": "sdpa" if attention == ROWS else attention,
            "dequantize": dequantized(self.model),
            "bits_per_parameter_overall": self.size.bits_per_parameter_overall,
            "out_of_reach": {
                "parameters": sum(self.size.out_of_reach.values()),
                "share": self.size.share_out_of_reach,
                "names": list(self.size.out_of_reach),
            },
        }


def load(
    spec: Pretrained, quantizer: Quantizer, tokenizer: Any, num_labels: int | None = None, device: str = "cpu"
) -> Base:
    """Loads (or draws) the base of ``spec``, quantized by ``quantizer``. Raises ConfigError where it cannot.

    ``tokenizer`` None: for a look at the weights alone.
    """
    spec.check()
    config = spec.prepared_config(num_labels)
    architecture.length(spec.max_length, spec.LONGEST, config)
    dtype: torch.dtype | str = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    before = spec.fingerprint()
    model = spec.weights(config, quantizer, dtype, device)
    weights.refuse_non_finite(spec._named, model)
    if device == "cpu" and quantizer.name != "none":
        gemm.product_library()  # its probe must not run within a measured step
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    if tokenizer is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    model.config.name_or_path = spec.name_or_path or "random"  # type: ignore[union-attr]
    AdapterHooks.of(model).tokenizer = tokenizer
    prepare(spec, model)
    size = measure(model)
    overall = f"; over all parameters the base has {size.bits_per_parameter_overall:.2f} bits each"
    bits = f"{overall}, {size.bits_per_parameter:.2f} where it could be quantized"
    warn_out_of_reach(size.out_of_reach, size.parameters, bits)
    return Base(spec, quantizer, model, tokenizer, size, _unchanged(spec, before))


def _unchanged(spec: Pretrained, before: str | None) -> str | None:
    """The fingerprint after loading, which may have downloaded another commit. Raises ConfigError where the files of a
    folder were written meanwhile."""
    after = spec.fingerprint()
    if after != before and fingerprints.local_folder(spec.name_or_path) is not None:
        raise ConfigError(
            f"{spec._named}: its files changed while they were read; valid: weights that stay what they are"
        )
    return after


def prepare(spec: Pretrained, model: nn.Module) -> None:
    """Dropout that follows the trials' keys, and gradient checkpointing that draws it again."""
    key_dropout(model)
    if spec.gradient_checkpointing:
        with explained("model.gradient_checkpointing=true is refused"):
            # a compiled block draws no masks, and torch.compile traces no context of ours
            context = {"context_fn": AdapterHooks.of(model).replayed} if spec.compile == "none" else {}
            model.gradient_checkpointing_enable({"use_reentrant": False, **context})  # type: ignore[operator]


def skeleton(spec: Pretrained, num_labels: int | None = None) -> nn.Module:
    """The architecture of ``spec`` on the meta device: shapes and names, no weights."""
    config = spec._adjust(spec.architecture(), num_labels)
    with torch.device("meta"), spec._building():
        model = auto_class(spec.task).from_config(config)
    if spec.config.get("tie_word_embeddings") is False:
        untie(model)
    lacking = set() if isinstance(spec, Random) else weights.lacks_pooler(model, spec.path)
    AdapterHooks.of(model).new_parameters = weights.beside_base(model) | lacking
    return model  # type: ignore[no-any-return]


def untie(model: nn.Module) -> None:
    """transformers builds every T5 tied and unties where the checkpoint holds an output matrix of its own."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    if output is not None and output.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        output.weight = nn.Parameter(torch.empty_like(output.weight))


def tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Every parameter and buffer of ``model`` by name, shared ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
