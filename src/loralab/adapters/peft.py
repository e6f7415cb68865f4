"""PEFT's files for LoRA: adapter_config.json and adapter_model.safetensors.

Module names are written out (PEFT's own ``all-linear`` means something else on some models), and A and B keep
their shapes (r, in) and (out, r), for Conv1D layers too, where PEFT's ``fan_in_fan_out`` is set.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loralab.adapters.biases import BiasDelta
from loralab.adapters.files import WEIGHTS, write_state

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
EXPERTS = {  # PEFT's words for what transformers has fused since its version 5, by the pattern of an architecture
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
HEADS = ("classifier", "score")  # modules that PEFT trains whole wherever the task is classification


def write(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Both files, below ``folder``."""
    write_state(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def lora_keys(name: str) -> tuple[str, str]:
    """PEFT's names of A and B of layer ``name``."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def magnitude_key(name: str) -> str:
    """PEFT's name of DoRA's lengths of layer ``name``."""
    return f"{PREFIX}{name}.lora_magnitude_vector"


def bias_key(name: str, adapted: bool) -> str:
    """PEFT's name of a trained bias; ``adapted``: whether the layer has A and B as well."""
    return f"{PREFIX}{name}.{'base_layer.' if adapted else ''}bias"


def saved_keys(name: str, module: nn.Module) -> dict[str, str]:
    """{PEFT's name: own name} of the tensors of a module that is trained whole."""
    return {f"{PREFIX}{name}.{key}": key for key in module.state_dict()}


def lora_config(
    spec: Any, names: list[str], model: nn.Module, saved: list[str], parameters: list[str]
) -> dict[str, Any]:
    """PEFT's LoraConfig as a plain dictionary. ``names``: the layers with A and B; ``saved``: those trained whole;
    ``parameters``: those that have A and B themselves."""
    times = spec.plain_rank
    ranks = {name: times * spec.rank(name) for name in [*names, *parameters]}
    factor = times**0.5 if spec.use_rslora else times  # of alpha, so that its quotient is the scaling of the trial
    alphas = {name: factor * spec.alpha(name) for name in ranks}
    return {
        "peft_type": "LORA",
        "r": times * spec.r,
        "lora_alpha": factor * spec.lora_alpha,
        "lora_dropout": spec.lora_dropout,
        "target_modules": names,
        **({"target_parameters": parameters} if parameters else {}),
        "fan_in_fan_out": transposed(model, names),
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "init_lora_weights": "gaussian" if spec.init_lora_weights == "gaussian" else True,
        "bias": "none" if spec.bias == "none" else "all",
        "modules_to_save": saved or None,
        "rank_pattern": {name: r for name, r in ranks.items() if r != times * spec.r},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != factor * spec.lora_alpha},
        **base_fields(model),
    }


def base_fields(model: nn.Module) -> dict[str, Any]:
    """What every adapter_config.json holds of the base."""
    return {
        "task_type": task_type(model),
        "base_model_name_or_path": getattr(model.config, "name_or_path", "") or "random",
        "inference_mode": True,
        **_classes(model),
    }


def transposed(model: nn.Module, names: list[str]) -> bool:
    """Whether the linear layers among ``names`` keep their weight as (in, out), packed or not."""
    layers = [layer for layer in map(model.get_submodule, names) if not isinstance(layer, nn.Embedding)]
    kinds = {type(layer).__name__ for layer in layers}
    return kinds == {"Conv1D"} or (bool(layers) and all(getattr(layer, "transposed", False) for layer in layers))


def frozen_heads(adapter: Any) -> dict[str, Tensor]:
    """The base's own classification head: PEFT looks for one in every classifier's adapter. A bias that is trained in
    it is written over the base's."""
    model = adapter._model[0]
    if task_type(model) != "SEQ_CLS":
        return {}
    trained = {name for name, delta in adapter.adapted() if not isinstance(delta, BiasDelta)}
    trained |= dict(adapter.saved_modules()).keys()
    heads = [(name, head) for name, head in model.named_modules() if name.endswith(HEADS)]
    return {
        key: head.get_parameter(inside).detach()
        for name, head in heads
        if not any(one == name or one.startswith(f"{name}.") for one in trained)
        for key, inside in saved_keys(name, head).items()
    }


def misread(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the layers ``names`` that PEFT, under transformers 5, takes for a mixture's experts by their last word:
    it leaves them unadapted, whatever the rest of their name says."""
    from transformers import conversion_mapping

    patterns: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    moved = EXPERTS.get(patterns.get(model.config.model_type, ""), ())  # type: ignore[union-attr, arg-type]
    return [name for name in names if name.rpartition(".")[2] in moved]


def _classes(model: nn.Module) -> dict[str, Any]:
    """The names of a classifier's classes, which PEFT itself does not keep."""
    if task_type(model) != "SEQ_CLS":
        return {}
    config: Any = model.config
    return {"id2label": dict(config.id2label), "label2id": dict(config.label2id)}


def task_type(model: nn.Module) -> str:
    """PEFT's word for what ``model`` does."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
