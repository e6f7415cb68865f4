"""A trial's adapter as PEFT reads it: adapter_config.json and adapter_model.safetensors.

Module names are written out (PEFT's own ``all-linear`` means something else on some models), and A and B keep
their shapes (r, in) and (out, r), for Conv1D layers too, where PEFT's ``fan_in_fan_out`` is set.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from loralab.adapters.base import Adapter, BiasDelta
from loralab.adapters.lora import LoRA, LoRADelta
from loralab.errors import DiskError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS"}
PREFIX = "base_model.model."


def save_adapter(adapter: Adapter, model: nn.Module, folder: Path, task: str, base_name: str) -> int:
    """Writes the adapter below ``folder`` and returns its bytes; a fully tuned model is written as a model."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(adapter.spec, LoRA):
            state = {key: value.detach().cpu().contiguous() for key, value in lora_state(adapter, model).items()}
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
            config = lora_config(adapter, adapter.spec, model, task, base_name)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        else:
            model.save_pretrained(folder)  # type: ignore[operator]
    except OSError as error:
        raise DiskError(f"{folder} cannot be written: {error.strerror or error}") from error
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def lora_state(adapter: Adapter, model: nn.Module) -> dict[str, Tensor]:
    """PEFT's names for every tensor the trial trained."""
    state: dict[str, Tensor] = {}
    adapted = {name for name, delta in adapter.adapted() if isinstance(delta, LoRADelta)}
    for name, delta in adapter.adapted():
        if isinstance(delta, LoRADelta):
            state[f"{PREFIX}{name}.lora_A.weight"] = delta.lora_A
            state[f"{PREFIX}{name}.lora_B.weight"] = delta.lora_B
        elif isinstance(delta, BiasDelta):
            bias = model.get_submodule(name).bias + delta.bias_delta  # type: ignore[operator]
            state[f"{PREFIX}{name}.{'base_layer.' if name in adapted else ''}bias"] = bias
    for name, module in adapter.saved_modules():
        state.update({f"{PREFIX}{name}.{key}": value for key, value in module.state_dict().items()})
    return state


def lora_config(adapter: Adapter, spec: LoRA, model: nn.Module, task: str, base_name: str) -> dict[str, Any]:
    """PEFT's LoraConfig as a plain dictionary."""
    names = [name for name, delta in adapter.adapted() if isinstance(delta, LoRADelta)]
    kinds = {type(model.get_submodule(name)).__name__ for name in names}
    transposed = kinds == {"Conv1D"} or all(getattr(model.get_submodule(name), "transposed", False) for name in names)
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[task],
        "base_model_name_or_path": base_name,
        "r": spec.r,
        "lora_alpha": spec.lora_alpha,
        "lora_dropout": spec.lora_dropout,
        "target_modules": names,
        "fan_in_fan_out": transposed,
        "use_rslora": spec.use_rslora,
        "init_lora_weights": "gaussian" if spec.init_lora_weights == "gaussian" else True,
        "bias": "none" if spec.bias == "none" else "all",
        "modules_to_save": [name for name, _ in adapter.saved_modules()] or None,
        "rank_pattern": {name: spec.rank(name) for name in names if spec.rank(name) != spec.r},
        "alpha_pattern": {name: _alpha(spec, name) for name in names if _alpha(spec, name) != spec.lora_alpha},
        "inference_mode": True,
    }


def _alpha(spec: LoRA, name: str) -> float:
    r = spec.rank(name)
    return spec.scaling(name) * (r**0.5 if spec.use_rslora else r)
