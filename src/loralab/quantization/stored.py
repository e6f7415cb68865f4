"""Frozen layers from the files of a checkpoint that bitsandbytes quantized, with the same bytes, and the way back.

4 bits: ``weight`` (n / 2, 1) uint8, ``weight.absmax``, with double quantization ``weight.nested_absmax``, and
``weight.quant_state.bitsandbytes__nf4``, JSON in bytes. LLM.int8(): ``weight`` (out, in) int8 and ``SCB`` (out,).
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.errors import ConfigError
from loralab.numerics import blockwise, codebooks
from loralab.quantization.base import Quantizer, linear_shape
from loralab.quantization.four_bit import FourBit, FourBitLinear
from loralab.quantization.linear import FrozenLinear
from loralab.quantization.llm_int8 import LLMInt8, LLMInt8Linear

STATE = "weight.quant_state.bitsandbytes__"
CPU_ROWS = 32  # output features that bitsandbytes' 4-bit product on CPUs with bfloat16 instructions takes at once


def scheme(stored: Mapping[str, Any]) -> str | None:
    """The name in conf/quantization of a config.json's ``quantization_config``; None for one that is not read."""
    four, eight = (stored.get(f"load_in_{bits}bit") or stored.get(f"_load_in_{bits}bit") for bits in (4, 8))
    if stored.get("quant_method") not in (None, "bitsandbytes") or bool(four) == bool(eight):
        return None
    if eight:
        return "llm_int8"
    if stored.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        return None
    return str(stored.get("bnb_4bit_quant_type", "fp4")) + "_double" * bool(stored.get("bnb_4bit_use_double_quant"))


def fits(spec: Quantizer, name: str | None) -> bool:
    """Whether the run's ``spec`` is the scheme ``name`` of the checkpoint."""
    if isinstance(spec, FourBit):
        return spec.name == name and spec.quant_type in ("nf4", "fp4") and spec.quant_storage == "uint8"
    return isinstance(spec, LLMInt8) and spec.name == name


def restore(spec: Quantizer, layer: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> FrozenLinear:
    """The frozen layer for ``layer``, whose weight is not used. ``tensors``: those stored for the layer, by what
    follows its name. Raises ConfigError where they do not match ``spec`` or the layer's shape."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    shape = linear_shape(layer)
    if isinstance(layer, Conv1D):
        raise _refusal(name, "is a Conv1D layer, whose quantized weights are not read")
    dense = torch.empty(shape, dtype=weight.dtype, device="meta")
    frozen: FrozenLinear
    if isinstance(spec, FourBit):
        frozen = FourBitLinear(dense, bias, spec, _four_bit(spec, name, shape, tensors))
    else:
        assert isinstance(spec, LLMInt8)
        frozen = LLMInt8Linear(dense, bias, spec, _int8(name, shape, tensors))
    if not all(bool(t.isfinite().all()) for t in frozen.packed() if t.is_floating_point()):
        raise _refusal(name, "holds statistics that are nan or infinite")
    return frozen.train(layer.training)


def _four_bit(spec: FourBit, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    key, n = STATE + spec.quant_type, shape[0] * shape[1]
    if key not in tensors or "weight.absmax" not in tensors:
        raise _refusal(name, f"is not stored as {spec.quant_type}")
    state = json.loads(bytes(tensors[key].tolist()))
    if tuple(state["shape"]) != shape or tensors["weight"].numel() != -(-n // 2):
        raise _refusal(name, f"is {tuple(state['shape'])} in the checkpoint and {shape} by its config.json")
    if state["blocksize"] != spec.block_size:
        raise ConfigError(
            f"quantization.block_size={spec.block_size}: {name} is stored in blocks of {state['blocksize']}; valid: "
            f"quantization.block_size={state['blocksize']}"
        )
    _check_table(name, tensors["weight.quant_map"], spec.quant_type)
    codes, absmax = tensors["weight"].view(-1, 1), tensors["weight.absmax"]
    if not spec.double_quant:
        return {"codes": codes, "absmax": absmax.float()}
    if "weight.nested_absmax" not in tensors or state["nested_blocksize"] != blockwise.STATISTICS_BLOCK:
        raise _refusal(name, f"has no double quantization in blocks of {blockwise.STATISTICS_BLOCK}")
    _check_table(name, tensors["weight.nested_quant_map"], "dynamic")
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
    return {
        "codes": codes,
        "absmax": absmax,
        "second_absmax": tensors["weight.nested_absmax"].float(),
        "offset": offset,
    }


def _int8(name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "SCB" not in tensors or tensors["weight"].dtype != torch.int8:
        raise _refusal(name, "is not stored as LLM.int8()")
    if int(tensors.get("weight_format", torch.zeros(()))) != 0:
        raise _refusal(name, "is stored in the memory layout of a GPU; valid: weight_format 0, by rows")
    if tuple(tensors["weight"].shape) != shape:
        raise _refusal(name, f"is {tuple(tensors['weight'].shape)} in the checkpoint and {shape} by its config.json")
    return {"codes": tensors["weight"], "absmax": tensors["SCB"].float()}


def tensors(layer: FrozenLinear) -> dict[str, Tensor]:
    """What ``restore`` reads: the tensors of a layer by what follows its name, without its bias."""
    if isinstance(layer, LLMInt8Linear):
        form = torch.zeros((), dtype=torch.uint8)  # by rows
        return {"weight": layer.codes, "SCB": layer.absmax, "weight_format": form}
    assert isinstance(layer, FourBitLinear)
    state: dict[str, Any] = {
        "quant_type": layer.quant_type,
        "blocksize": layer.block_size,
        "dtype": str(layer.dense_dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    found = {"weight": layer.codes, "weight.absmax": layer.absmax}
    found["weight.quant_map"] = codebooks.table(layer.quant_type, layer.codes.device).clone()
    if layer.double_quant:
        found["weight.nested_absmax"] = layer.second_absmax
        found["weight.nested_quant_map"] = codebooks.table("dynamic", layer.codes.device).clone()
        offset = float(layer.offset)
        state.update(nested_blocksize=blockwise.STATISTICS_BLOCK, nested_dtype="float32", nested_offset=offset)
    packed = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return {**found, STATE + layer.quant_type: packed}


def unfit_for_cpus(layer: FrozenLinear) -> bool:
    """Whether bitsandbytes' own layer cannot compute with these codes on some CPUs, as it can on a GPU."""
    return isinstance(layer, FourBitLinear) and layer.out_features % CPU_ROWS > 0


def written_config(spec: Quantizer, dense: list[str], dtype: torch.dtype) -> dict[str, Any] | None:
    """config.json's ``quantization_config`` of a checkpoint whose layers are quantized by ``spec`` but for ``dense``,
    by transformers' names; None for a scheme that bitsandbytes does not read. ``dtype``: of its products."""
    if not fits(spec, spec.name):
        return None
    common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": dense}
    if isinstance(spec, LLMInt8):
        return {**common, "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": spec.threshold}
    assert isinstance(spec, FourBit)
    if spec.granularity != "block":
        return None
    return {
        **common,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": spec.quant_type,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def _check_table(name: str, stored: Tensor, wanted: str) -> None:
    if not torch.equal(stored.float().cpu(), codebooks.table(wanted, torch.device("cpu"))):
        raise _refusal(name, f"is stored by another code book than {wanted}")


def _refusal(name: str, what: str) -> ConfigError:
    return ConfigError(f"model: {name} {what}; valid: a checkpoint that bitsandbytes quantized, or the dense one")
