"""A merged base as a folder that plain transformers opens."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from loralab.artifacts.reopen import OpenRun
from loralab.artifacts.swap import Merged, dense_values
from loralab.artifacts.ties import untie_config
from loralab.errors import unwritable
from loralab.models import loading
from loralab.models.feeding import name_classes
from loralab.models.weights import quiet_loading
from loralab.quantization import stored
from loralab.quantization.linear import FrozenLinear

FIGURES, GENERATION = "merge.json", "generation_config.json"


def save(run: OpenRun, merged: Merged, folder: Path, packed: dict[str, Any] | None) -> None:
    """Writes the model of ``run``, with ``merged`` on, and its tokenizer into ``folder``.

    ``packed``: config.json's ``quantization_config``, whose codes are written as they are; None: quantized layers are
    written dense. The model keeps its own config.
    """
    model: Any = run.model
    config: Any = model.config
    generation: Any = getattr(model, "generation_config", None)
    model.config = _config(run, merged, packed)
    try:
        if generation is not None:
            model.generation_config = GenerationConfig()  # transformers does not write one that its rules refuse
        with quiet_loading():
            model.save_pretrained(folder, state_dict=state_of(merged, packed is not None))
        if (folder / GENERATION).exists():
            generation.to_json_file(folder / GENERATION)
        run.base.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        model.config = config
        if generation is not None:
            model.generation_config = generation


def _config(run: OpenRun, merged: Merged, packed: dict[str, Any] | None) -> Any:
    """The base's config as it was before training: with its cache and dropout, and the names of the run's classes."""
    model: Any = run.model
    config = deepcopy(model.config)
    plain = run.spec.model.architecture()
    own = [key for key in vars(plain) if key == "use_cache" or "dropout" in key or key.endswith("_pdrop")]
    for key in own:
        setattr(config, key, getattr(plain, key))
    before, model.config = model.config, config
    try:
        if run.spec.model.task == "sequence_classification":
            names = run.record["data"].get("id2label") or {}
            name_classes(model, [str(names[key]) for key in sorted(names, key=int)])
    finally:
        model.config = before
    if merged.untied:
        untie_config(model, config)
    if packed is not None:
        config.quantization_config = packed
    return config


def state_of(merged: Merged, packed: bool) -> dict[str, Tensor]:
    """The state of the model that ``merged`` is on, with, of quantized layers, their codes (``packed``) or the values
    that these stand for. Where it is untied every tensor has memory of its own, so that none is left out as shared."""
    state = merged.model.state_dict()
    for name, layer in merged.model.named_modules(remove_duplicate=False):
        if not isinstance(layer, FrozenLinear):
            continue
        if packed:
            state.update({f"{name}.{rest}": value for rest, value in stored.tensors(layer).items()})
        else:
            weight = dense_values(layer).to(merged.dtype)
            state[f"{name}.weight"] = (weight.t() if layer.transposed else weight).contiguous()
    return {name: value.clone() for name, value in state.items()} if merged.untied else state


def packed_config(run: OpenRun, names: list[str], dtype: torch.dtype) -> tuple[dict[str, Any] | None, str]:
    """(``quantization_config`` of a checkpoint that transformers opens by bitsandbytes with the codes of the quantized
    layers ``names``, ""), or (None, why there is none)."""
    quantizer = run.base.quantizer
    plain = loading.skeleton(run.spec.model, run.labels)
    linears = [name for name, module in plain.named_modules() if type(module) is nn.Linear]
    dense = [name for name in linears if name not in names]
    found = stored.written_config(quantizer, dense, dtype)
    if found is None:
        return None, f"bitsandbytes has no {quantizer.name} as this run quantizes"
    lost = [name for name in names if name not in linears or not should_convert_module(name, dense)]
    if lost:
        return None, f"transformers does not read {lost[0]} as a layer that bitsandbytes quantized"
    return found, ""
